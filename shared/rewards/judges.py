"""A model behind an OpenAI-compatible endpoint as a judge: it is shown prompt and answer, and asked for a number.

Requests go out by the standard library, several at once, and are sent again where a server is busy or fails.
Deliberately not here: judges that compare two answers, and servers that generate (shared.runtime.servers).
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shared.errors import UserError
from shared.rewards.base import RowErrors, text_of

PROMPT = """Rate how good the answer to the request is: correct, helpful, and in the form that was asked for.

Request:
{prompt}

Answer:
{completion}

Give a number from {low} (worst) to {high} (best). End with a line that holds nothing but that number."""
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)")
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever a server asks for


class JudgeError(UserError):
    """The judge gave no score for an answer."""


class EndpointJudge:
    """Scores answers by a language or vision-language model behind `/v1/chat/completions`.

    The last number of its reply is the score, brought to 0 … 1. Of `7/10` or `7 out of 10` it is the 7, where 10 is
    the best score. Images of a prompt, and an answer that is an image, are sent along.

    Args:
        base_url: of the server, with or without `/v1`.
        model: the model's name at the server.
        prompt: what is asked. `{prompt}`, `{completion}`, `{low}`, `{high}` and the data's columns by name are filled
            in; a brace that is meant is doubled.
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

    remote = True  # so that a RewardSet runs it beside other rewards

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        prompt: str = PROMPT,
        low: float = 0,
        high: float = 10,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        max_concurrency: int = 8,
        api_key_env: str | None = None,
        **options: Any,
    ):
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise UserError(f"The judge's address is {base_url!r}: give a URL that begins with http:// or https://.")
        if not model:
            raise UserError("The judge has no model: give its name at the server.")
        if not low < high:
            raise UserError(f"The judge's worst score is {low} and its best {high}: low must be less than high.")
        limits = {"retries": (retries, 0), "backoff": (backoff, 0), "max_concurrency": (max_concurrency, 1)}
        for name, (value, least) in limits.items():
            if value < least:
                raise UserError(f"The judge's {name} is {value}: it must be at least {least}.")
        if not timeout > 0:
            raise UserError(f"The judge's timeout is {timeout} seconds: it must be more than 0.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise UserError(
                f"The judge's key is to come from the environment variable {api_key_env}, which is not set."
            )
        root = base_url.rstrip("/")
        self.url = f"{root if root.endswith('/v1') else f'{root}/v1'}/chat/completions"
        self.__name__ = f"judge_{model.rsplit('/', 1)[-1]}"
        self.model, self.prompt, self.low, self.high, self.options = model, prompt, low, high, options
        self.fields = _fields(prompt)
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.max_concurrency, self.api_key_env = max_concurrency, api_key_env

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Scores of answers, between 0 and 1.

        Args:
            prompts: strings or lists of messages, whose images are sent along.
            completions: strings, lists of messages, or images.
            columns: the rows' other columns; those that the prompt names are filled in, `image` and `images` are sent.

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
        values: list[float | None] = [None] * len(completions)
        errors: dict[int, Exception] = {}

        def judge(at: int) -> None:
            row = {name: values[at] for name, values in columns.items() if isinstance(values, (list, tuple))}
            try:
                values[at] = self._score(self._ask(prompts[at], completions[at], row))
            except UserError as error:
                errors[at] = error

        with ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="judge") as pool:
            list(pool.map(judge, range(len(values))))
        if errors:
            raise RowErrors(values, errors)
        return values

    def _ask(self, prompt: Any, completion: Any, row: Mapping[str, Any]) -> str:
        """What the judge replies."""
        images = [*_images(prompt, row), *([completion] if _is_image(completion) else [])]
        said = "(the image)" if _is_image(completion) else text_of(completion)
        filled = {**row, "prompt": _request(prompt), "completion": said, "low": self.low, "high": self.high}
        content: Any = self.prompt.format_map(filled)
        if images:
            shown = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
            content = [*shown, {"type": "text", "text": content}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            **{"temperature": 0, **self.options},
        }
        reply = self._send(json.dumps(body).encode())
        try:
            return json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"{self.url} sent {reply[:200]!r}, which is no chat completion") from error

    def _send(self, body: bytes) -> bytes:
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            if self.api_key_env is not None:  # not to be sent on where the server redirects to
                request.add_unredirected_header("Authorization", f"Bearer {os.environ[self.api_key_env]}")
            wait = self.backoff * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"answered {error.code}: {error.read()[:200].decode(errors='replace').strip()!r}"
                if error.code != 429 and error.code < 500:
                    raise JudgeError(f"{self.url} {problem}") from error
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except TimeoutError:
                problem = f"was silent for {self.timeout:g} s"
            except urllib.error.URLError as error:
                silent = isinstance(error.reason, TimeoutError)
                problem = f"was silent for {self.timeout:g} s" if silent else f"cannot be reached ({error.reason})"
            except (OSError, http.client.HTTPException) as error:
                problem = f"broke off ({type(error).__name__}: {error})"
            if attempt < self.retries:
                time.sleep(min(wait, LONGEST_WAIT))
        tries = "once" if self.retries == 0 else f"{self.retries + 1} times"
        raise JudgeError(f"{self.url} {problem}; it was asked {tries}")

    def _score(self, reply: str) -> float:
        best = rf"\s*(?:/|out of|of)\s*{self.high:g}(?![\d.]*\d)"
        numbers = NUMBER.findall(re.sub(rf"(?<=\d){best}", "", reply))
        if not numbers:
            raise JudgeError(f"the judge gave no number, but {reply[:200]!r}")
        score = float(numbers[-1])
        if not self.low <= score <= self.high:
            raise JudgeError(
                f"the judge gave {score:g}, which is not within {self.low:g} and {self.high:g}: {reply[:200]!r}"
            )
        return (score - self.low) / (self.high - self.low)


def _fields(template: str) -> set[str]:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(f"The judge's prompt cannot be filled in ({error}): double a brace that is meant.") from error
    odd = [name for name in names if not name.isidentifier()]
    if odd:
        raise UserError(
            f"The judge's prompt has {{{odd[0]}}}, which is no column's name: double a brace that is meant."
        )
    return names


def _request(prompt: Any) -> str:
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


def _seconds(retry_after: str | None) -> float:
    try:
        seconds = float(retry_after or 0)
    except ValueError:  # a date: the own wait does
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0
