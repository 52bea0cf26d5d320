"""Judges of pairs that are a model behind an OpenAI-compatible endpoint: it is asked which of two answers is better.

How it is asked, several at once and again where a server fails, is `shared.rewards.judges`.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Sequence
from typing import Any

from shared.errors import UserError
from shared.rewards import background
from shared.rewards.base import text_of
from shared.rewards.judges import ChatEndpoint, JudgeError, request_text, template_fields
from shared.rewards.pairwise import BasePairwiseJudge, PairErrors, rank_of

PROMPT = """Which of two answers to a request is better: more correct, more helpful, closer to what was asked for?

Request:
{prompt}

Answer 0:
{response0}

Answer 1:
{response1}

End with a line that holds nothing but 0 or 1, the number of the better answer."""
# no part of another number or word: -1, 0.5, 1/10, 1st
VERDICT = re.compile(r"(?<![^\W_])(?<![.,/])(?<!(?<![^\W_])[–—−-])[01](?![^\W_])(?![.,/]\d)")


class EndpointPairwiseJudge(ChatEndpoint, BasePairwiseJudge):
    """A model behind an OpenAI-compatible endpoint that is shown two answers and asked for the number of the better.

    What counts is the last line of its reply that holds nothing but 0 or 1, or else the only one of the two that
    comes in it.

    Args:
        base_url: of the server, with or without `/v1`.
        model: the model's name at the server.
        prompt: what is asked; `{prompt}`, `{response0}` and `{response1}` are filled in, a brace that is meant is
            doubled. None: which answer is better.
        system_prompt: what the request begins with. One that has `{response0}` in it is taken for the prompt.
        both_orders: ask twice, the answers in either order: a judge that says the same place twice does not know.
        timeout, retries, backoff, max_concurrency, api_key_env, options: as of shared.rewards.judges.EndpointJudge.

    Raises:
        UserError: an argument that cannot work, or the key's variable is not set.

    Example:
        >>> judge = EndpointPairwiseJudge("http://localhost:8000/v1", "Qwen/Qwen3-8B")  # doctest: +SKIP
        >>> judge.judge(["What is 2 + 2?"], [["5", "4"]])  # doctest: +SKIP
        [1]
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        prompt: str | None = None,
        system_prompt: str | None = None,
        both_orders: bool = False,
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
        )
        if system_prompt is not None and "{response0}" in system_prompt and prompt is None:
            prompt, system_prompt = system_prompt, None
        self.prompt, self.system_prompt, self.both_orders = prompt or PROMPT, system_prompt, both_orders
        fields, known = template_fields(self.prompt), {"prompt", "response0", "response1"}
        if fields - known or not {"response0", "response1"} <= fields:
            raise UserError(
                "The judge's prompt must have {response0} and {response1}, and may have {prompt}, but no other name "
                f"in braces; it has {', '.join(sorted(fields)) or 'none'}."
            )

    def judge(
        self,
        prompts: list[Any],
        completions: list[list[Any]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[Any]:
        """See BasePairwiseJudge.judge. The order that a pair is shown in follows from its texts.

        Raises:
            PairErrors: no verdict on some pairs; the others' come along.
        """
        found: list[float | None] = [None] * len(prompts)
        errors: dict[int, Exception] = {}
        stop = background.stop_of_call()

        def ask(at: int) -> None:
            prompt, pair = request_text(prompts[at]), [text_of(each) for each in completions[at]]
            swapped = shuffle_order and random.Random("\0".join((prompt, *pair))).random() < 0.5
            orders = [False, True] if self.both_orders else [swapped]
            try:
                said = [self._better(prompt, pair[::-1] if turned else pair, stop) for turned in orders]
                found[at] = sum(better == int(turned) for better, turned in zip(said, orders, strict=True)) / len(said)
            except UserError as error:
                errors[at] = error

        background.for_each(ask, len(prompts), self.max_concurrency)
        verdicts = found if return_scores else [rank_of(chance) for chance in found]
        if errors:
            raise PairErrors(verdicts, errors)
        return verdicts

    def _better(self, prompt: str, pair: Sequence[str], stop: threading.Event) -> int:
        text = self.prompt.format(prompt=prompt, response0=pair[0], response1=pair[1])
        told = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        reply, cut = self.reply([*told, {"role": "user", "content": text}], stop)
        return verdict_in(reply, cut=cut)


class OpenAIPairwiseJudge(EndpointPairwiseJudge):
    """A model of OpenAI's as a judge; the key comes from the environment variable OPENAI_API_KEY.

    Args:
        model: its name.
        system_prompt, options: as of EndpointPairwiseJudge.
    """

    def __init__(self, model: str = "gpt-4.1-mini", system_prompt: str | None = None, **options: Any):
        place = {"base_url": "https://api.openai.com", "api_key_env": "OPENAI_API_KEY", **options}
        super().__init__(model=model, system_prompt=system_prompt, **place)


class HfPairwiseJudge(EndpointPairwiseJudge):
    """A model of Hugging Face's inference providers as a judge; the key comes from the environment variable HF_TOKEN.

    Args:
        model: its hub id.
        system_prompt, options: as of EndpointPairwiseJudge.
    """

    def __init__(
        self, model: str = "meta-llama/Llama-3.3-70B-Instruct", system_prompt: str | None = None, **options: Any
    ):
        place = {"base_url": "https://router.huggingface.co", "api_key_env": "HF_TOKEN", **options}
        super().__init__(model=model, system_prompt=system_prompt, **place)


def verdict_in(reply: str, *, cut: bool = False) -> int:
    """The number of the better answer, 0 or 1, that a judge's reply says.

    Args:
        reply: what it wrote.
        cut: the reply was cut off at its greatest length: only a line with nothing but the number counts.

    Raises:
        JudgeError: it says none, or both.
    """
    lines = [line.strip(" \t*_`$#\"'.:()[]{}") for line in reply.splitlines()]
    alone = [line for line in lines if line]
    if alone and alone[-1] in ("0", "1") and not cut:
        return int(alone[-1])
    numbers = {line for line in alone if line in ("0", "1")}
    if not numbers and not cut:
        numbers = set(VERDICT.findall(reply))
    if len(numbers) == 1:
        return int(numbers.pop())
    if cut:
        raise JudgeError(f"the judge was cut off before its verdict (raise max_tokens): {reply[-200:]!r}")
    said = "both numbers" if numbers else "neither 0 nor 1"
    raise JudgeError(f"the judge said {said}: {reply[-200:]!r}")
