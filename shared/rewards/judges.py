"""A model behind an OpenAI-compatible endpoint as a judge: it is shown prompt and answer, and asked for a number.

Requests go out by the standard library, several at once, and are sent again where a server is busy or fails.
Deliberately not here: judges that compare two answers (pairwise.py), and servers that generate
(shared.runtime.servers).
"""

from __future__ import annotations

import base64
import difflib
import inspect
import io
import json
import math
import os
import re
import string
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from shared.errors import UserError
from shared.http import JsonClient, ServerError
from shared.rewards import background
from shared.rewards.base import RowErrors, text_of
from shared.secrets import is_secret

PROMPT = """Rate how good the answer to the request is: correct, helpful, and in the form that was asked for.

Request:
{prompt}

Answer:
{completion}

Give a number from {low} (worst) to {high} (best). End with a line that holds nothing but that number."""
PROMPT_OF_IMAGES = """Rate how well the image fits its description: everything in it is there, as it is said to be.

Description:
{prompt}

Give a number from {low} (worst) to {high} (best). End with a line that holds nothing but that number."""
PATH = "/v1/chat/completions"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NUMBER = r"(?<![\w.,–—-])(-?(?:\d+(?:\.\d+)?|\.\d+))(?![.,]?\d|\s*%|\s*[-–—]\s*\d)"
OTHER_SCALE = r"(?!\s*(?:/|out\s+of)\s*\d)"


class JudgeError(UserError):
    """The judge gave no score for an answer."""


class ChatEndpoint:
    """A model behind `/v1/chat/completions` that is asked for its judgement.

    Args:
        base_url, model, timeout, retries, backoff, max_concurrency, api_key_env: as of EndpointJudge.
        options: more for the request.
        low, high: numbers of the judge, which are checked with the others.

    Raises:
        UserError: an argument that cannot work, or the variable is not set.
    """

    remote = True  # so that a RewardSet runs it beside other rewards

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        timeout: float,
        retries: int,
        backoff: float,
        max_concurrency: int,
        api_key_env: str | None,
        options: dict[str, Any],
        low: float = 0,
        high: float = 1,
    ):
        _check_options(options, type(self))
        _check_numbers(low, high, timeout, retries, backoff, max_concurrency)
        if not model:
            raise UserError("The judge has no model: give its name at the server.")
        if api_key_env is not None and not VARIABLE.fullmatch(api_key_env):
            raise UserError("The judge's api_key_env is no name: give that of the environment variable with the key.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise UserError(
                f"The judge's key is to come from the environment variable {api_key_env}, which is not set."
            )
        self._client = JsonClient(
            base_url,
            api_key=os.environ[api_key_env] if api_key_env else None,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            repeat_slow=True,
        )
        self.__name__ = f"judge_{model.rsplit('/', 1)[-1]}"
        self.model, self.options = model, options
        self.url = self._client.url + PATH
        self.max_concurrency, self.api_key_env = max_concurrency, api_key_env

    def reply(self, messages: list[dict[str, Any]], stop: threading.Event) -> tuple[str, bool]:
        """What the model replies, and whether that was cut off.

        Raises:
            JudgeError: the server cannot be asked, or sends something else.
        """
        body = {"model": self.model, "messages": messages, **{"temperature": 0, **self.options}}
        try:
            reply = self._client.post(PATH, body, stop=stop)
        except ServerError as error:
            raise JudgeError(str(error)) from error
        try:
            choice = reply["choices"][0]
            return choice["message"]["content"] or "", choice.get("finish_reason") == "length"
        except (LookupError, TypeError, AttributeError) as error:
            said = json.dumps(reply)[:200]
            raise JudgeError(f"{self.url} sent {said}, which is no chat completion") from error


class EndpointJudge(ChatEndpoint):
    """Scores answers by a language or vision-language model behind `/v1/chat/completions`.

    Its score is brought to 0 … 1. It is the number in the last line of the reply, if nothing else stands there; or
    what `Score: 7`, `7/10` or another line of its own says; or the only number. A reply with several numbers that says
    no more of them has no score. Images of a prompt, and an answer that is an image, are sent along.

    Args:
        base_url: of the server, with or without `/v1`.
        model: the model's name at the server.
        prompt: what is asked. `{prompt}`, `{completion}`, `{low}`, `{high}` and the data's columns by name are filled
            in; a brace that is meant is doubled. None: how good an answer is or, of an image, how well it fits.
        low, high: the worst and the best score.
        timeout: seconds that a server may be silent.
        retries: how often a request is sent again, where the server cannot be reached, is silent, or answers 429 or
            5xx.
        backoff: seconds before the first of these; doubled each time. A server's own Retry-After counts if longer.
        max_concurrency: requests at once.
        api_key_env: the environment variable that holds the key; None: no key is sent.
        options: more for the request, such as `temperature` (0 where it is not given) or `max_tokens`.

    Raises:
        UserError: an argument that cannot work, or the variable is not set.

    Example:
        >>> judge = EndpointJudge("http://localhost:8000/v1", "Qwen/Qwen3-8B")  # doctest: +SKIP
        >>> judge(["What is 2 + 2?"], ["4"])  # doctest: +SKIP
        [1.0]
    """

    takes = "pil"

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        prompt: str | None = None,
        low: float = 0,
        high: float = 10,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_concurrency: int = 8,
        api_key_env: str | None = None,
        **options: Any,
    ):
        super().__init__(
            base_url,
            model,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_concurrency=max_concurrency,
            api_key_env=api_key_env,
            options=options,
            low=low,
            high=high,
        )
        self.prompt, self.low, self.high = prompt, low, high
        self.fields = template_fields(prompt or PROMPT)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Scores of answers, between 0 and 1.

        Args:
            prompts: strings or lists of messages, whose images are sent along.
            completions: strings, lists of messages, or images.
            columns: the rows' other columns; those that the prompt names are filled in, and `image` and `images` are
                sent, but for images that are the completions.

        Raises:
            UserError: the prompt names a column that is not there.
            RowErrors: no score for some rows; the others' come along.
        """
        missing = self.fields - {"prompt", "completion", "low", "high", *columns}
        if missing:
            raise UserError(
                f"The judge's prompt names {{{min(missing)}}}, and the rows have no such column; there are: "
                f"{', '.join(columns) or 'none'}."
            )
        if columns.get("images") is completions:
            columns = {name: values for name, values in columns.items() if name != "images"}
        values: list[float | None] = [None] * len(completions)
        errors: dict[int, Exception] = {}
        stop = background.stop_of_call()

        def judge(at: int) -> None:
            row = {name: values[at] for name, values in columns.items() if isinstance(values, (list, tuple))}
            try:
                values[at] = self._score(*self._ask(prompts[at], completions[at], row, stop))
            except UserError as error:
                errors[at] = error

        background.for_each(judge, len(values), self.max_concurrency)
        if errors:
            raise RowErrors(values, errors)
        return values

    def _ask(self, prompt: Any, completion: Any, row: Mapping[str, Any], stop: threading.Event) -> tuple[str, bool]:
        """What the judge replies, and whether that was cut off."""
        images = [*_images(prompt, row), *([completion] if _is_image(completion) else [])]
        said = "(the image)" if _is_image(completion) else text_of(completion)
        filled = {**row, "prompt": request_text(prompt), "completion": said, "low": self.low, "high": self.high}
        asked = self.prompt or (PROMPT_OF_IMAGES if _is_image(completion) else PROMPT)
        content: Any = asked.format_map(filled)
        if images:
            shown = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
            content = [*shown, {"type": "text", "text": content}]
        return self.reply([{"role": "user", "content": content}], stop)

    def _score(self, reply: str, cut: bool = False) -> float:
        score = score_in(reply, self.low, self.high, cut=cut)
        if not self.low <= score <= self.high:
            raise JudgeError(
                f"the judge gave {score:g}, which is not within {self.low:g} and {self.high:g}: {reply[-200:]!r}"
            )
        return (score - self.low) / (self.high - self.low)


def score_in(reply: str, low: float, high: float, *, cut: bool = False) -> float:
    """The score that a judge's reply says.

    Args:
        reply: what it wrote.
        low, high: the worst and the best score, as it was told them.
        cut: the reply was cut off at its greatest length: only a line with nothing but a number counts.

    Raises:
        JudgeError: it says none, or several.
    """
    worst, best = (re.escape(f"{value:g}") + r"(?:\.0+)?(?![.,]?\d)" for value in (low, high))
    text = re.sub(r"[*_`$#]|\\boxed|[{}]", "", reply)
    text = re.sub(rf"(?<![\w.,]){worst}(?:\s*\([^)]*\))?\s*(?:to|and|through|[-–—])\s*{best}", "", text)  # the scale
    of_best = rf"\W*(?:/|\bout\s+of\b|\bof\b)\W*{best}"
    whole = re.sub(of_best, "", text)
    lines = [re.fullmatch(rf"\W*?{NUMBER}\W*", line) for line in whole.splitlines() if line.strip()]
    if lines and lines[-1] and not cut:
        return float(lines[-1][1])
    said = [
        re.findall(rf"(?:score|rating)(?:\s+(?:is|of))?[^\w-]*?{NUMBER}{OTHER_SCALE}", whole, re.IGNORECASE),
        re.findall(rf"{NUMBER}{of_best}", text),
    ]
    alone = [line[1] for line in lines if line]
    for found in [alone] if cut else [*said, alone, re.findall(NUMBER, whole)]:
        if values := {float(number) for number in found}:
            if len(values) > 1:
                raise JudgeError(f"the judge gave several numbers: {reply[-200:]!r}")
            return values.pop()
    if cut:
        raise JudgeError(f"the judge was cut off before its score (raise max_tokens): {reply[-200:]!r}")
    raise JudgeError(f"the judge gave no number, but {reply[-200:]!r}")


def _check_options(options: Mapping[str, Any], judge: type) -> None:
    own = [name for name in inspect.signature(judge).parameters if name != "options"]
    for name in options:
        if is_secret(name):
            raise UserError(
                f"The judge was given {name}, which would be written down: put the key into an environment variable, "
                "and give its name as api_key_env."
            )
        if close := difflib.get_close_matches(name, own, n=1, cutoff=0.7):
            raise UserError(f"The judge takes no {name}. Did you mean {close[0]}?")


def _check_numbers(
    low: float, high: float, timeout: float, retries: int, backoff: float, max_concurrency: int
) -> None:
    numbers = {"low": low, "high": high, "timeout": timeout, "backoff": backoff}
    for name, value in {**numbers, "retries": retries, "max_concurrency": max_concurrency}.items():
        kinds = (int, float) if name in numbers else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise UserError(f"The judge's {name} is {value!r}: give a {'' if name in numbers else 'whole '}number.")
    if not low < high:
        raise UserError(f"The judge's worst score is {low} and its best {high}: low must be less than high.")
    for name, value, least in (
        ("retries", retries, 0),
        ("backoff", backoff, 0),
        ("max_concurrency", max_concurrency, 1),
    ):
        if value < least:
            raise UserError(f"The judge's {name} is {value}: it must be at least {least}.")
    if not timeout > 0:
        raise UserError(f"The judge's timeout is {timeout} seconds: it must be more than 0.")


def template_fields(template: str) -> set[str]:
    """The names that a judge's prompt has in braces.

    Raises:
        UserError: what is in braces is no name.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"The judge's prompt cannot be filled in ({error}): double a brace that is meant.") from error
    for name, form, conversion in parts:
        if form or conversion or not name.isidentifier():
            field = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise UserError(
                f"The judge's prompt has {{{field}}}, which is no column's name: double a brace that is meant."
            )
    return {name for name, _, _ in parts}


def request_text(prompt: Any) -> str:
    """A prompt in words: itself, what its one message says, or all messages with their roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    return "\n".join(f"{message['role']}: {text_of([message])}" for message in prompt)


def _images(prompt: Any, row: Mapping[str, Any]) -> list[Any]:
    """The images of a prompt, in its messages or else in the row's columns, decoded."""
    from shared.data.conversation import media
    from shared.data.images import decode_image

    contents = [] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    shown = [part["image"] for part in parts if part.get("type") == "image" and part.get("image") is not None]
    return [decode_image(raw, row=0) for raw in shown or media(row, "image")]


def _is_image(output: Any) -> bool:
    return hasattr(output, "convert") and hasattr(output, "save")


def _data_url(image: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
