"""What a best-of-n sampler is given, read: queries, settings of `generate`, and functions that score texts.

Nothing here runs a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shared.data.encoding import Tokeniser
from shared.data.rows import ROW
from shared.data.schema import Kind
from shared.errors import UserError
from shared.rewards.base import OF_IMAGES, Sample, as_values, name_of
from shared.rewards.combine import RewardSet
from shared.trainers.token_rollouts import FIELDS

TEXT = "__text__"  # the column with what a function of texts is given
DEFAULT_LENGTH = 256  # tokens of an answer where nothing says how long it may be
_REWARD_TAKES = {"prompts", "completions", "completion_ids", "samples", *OF_IMAGES}
# setting of `generate` -> its name in Sampling
_FIELDS = {"max_new_tokens" if name == "max_new_tokens" else option: name for option, name in FIELDS.items()}
_OTHERS = ("do_sample", "eos_token_id")
# settings that say what is done here anyway, or say nothing of the tokens
_WITHOUT_EFFECT = ("bos_token_id", "pad_token_id", "tokenizer", "transformers_version", "use_cache")
# settings that are taken where they are off
_OFF = {"min_length": 0, "min_new_tokens": 0, "num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0}


@dataclass(frozen=True)
class Query:
    """A prompt to be answered.

    Attributes:
        ids: its tokens, `(L,)`.
        prompt: as rewards see it: a text, or a list of messages.
    """

    ids: list[int]
    prompt: Any

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)


class QueryReader:
    """Reads queries in the forms that `BestOfNSampler.generate` takes.

    Args:
        tokenizer: writes and reads text.
        template_kwargs: more variables for the chat template.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any] | None = None):
        self._tokenizer, self._template_kwargs = tokenizer, template_kwargs

    def read(self, given: Any) -> list[Query]:
        """Raises UserError, or DataError for a chat that cannot be written, where there is nothing to go on from."""
        queries = [self._query(each, at) for at, each in enumerate(_several(given))]
        if not queries:
            raise UserError("There are no queries: give at least one, as tokens, a text or a chat.")
        for at, query in enumerate(queries):
            if not query.ids:
                raise UserError(f"Query {at} is empty, so there is nothing to go on from.")
        return queries

    def _query(self, given: Any, at: int) -> Query:
        if isinstance(given, str) or _is_chat(given):
            if not given:
                return Query([], "")
            return Query(self._tokeniser.ask({"prompt": given, ROW: at}).prompt_ids, given)
        ids = given.flatten().tolist() if hasattr(given, "tolist") else given
        if not isinstance(ids, (list, tuple)) or not all(isinstance(token, int) for token in ids):
            raise UserError(
                f"Query {at} is {str(given)[:60]!r}: give tokens (a tensor or a list of whole numbers), a text, or a "
                "chat (a list of messages)."
            )
        return Query(list(ids), self._tokenizer.decode(ids, skip_special_tokens=True))

    @cached_property
    def _tokeniser(self) -> Tokeniser:
        return Tokeniser(self._tokenizer, Kind.PROMPT_ONLY, template_kwargs=self._template_kwargs)


def _several(given: Any) -> Sequence[Any]:
    """The queries, also where one alone is given; padding is left out where a mask tells it."""
    if isinstance(given, Mapping) and "input_ids" in given:
        rows, masks = _several(given["input_ids"]), given.get("attention_mask")
        if masks is None:
            return rows
        pairs = zip(rows, _several(masks), strict=True)
        return [torch.as_tensor(row)[torch.as_tensor(mask).bool()] for row, mask in pairs]
    if isinstance(given, Tensor):
        return list(torch.atleast_2d(given))
    if isinstance(given, str) or _is_chat(given):
        return [given]
    if not hasattr(given, "__iter__") or isinstance(given, Mapping):
        raise UserError(f"The queries are {type(given).__name__}: give a tensor, or a list of tokens, texts or chats.")
    several = list(given)
    return [several] if several and isinstance(several[0], int) else several


def _is_chat(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(turn, Mapping) for turn in given)


def settings_of(model: nn.Module, config: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[int] | None]:
    """The arguments of Sampling that are said, and the tokens that end an answer (None: those of the model).

    What is given goes before the configuration, and that before the model's own, of which settings that are not known
    here are left aside.

    Args:
        model: a transformers model.
        config: a transformers.GenerationConfig, or None.
        given: keyword arguments as of `generate`.

    Raises:
        UserError: settings that cannot be followed.
    """
    own = model.generation_config.to_dict() if getattr(model, "generation_config", None) is not None else {}
    said = {name: value for name, value in own.items() if name in _FIELDS}
    asked = {**({} if config is None else config.to_diff_dict()), **given}
    if "stop" in asked:
        asked["stop_strings"] = asked.pop("stop")
    for name, value in asked.items():
        if name in _OFF and value is not None and value > _OFF[name]:
            raise UserError(f"{name} is {value}, which best of n does not follow; allowed: {_OFF[name]} or nothing.")
    known = (*_FIELDS, *_OTHERS)
    if unknown := sorted(asked.keys() - {*known, *_WITHOUT_EFFECT, *_OFF}):
        raise UserError(f"{', '.join(unknown)}: no setting of best of n; allowed: {', '.join(known)}.")
    said |= {name: value for name, value in asked.items() if name in _FIELDS and value is not None}
    values = {_FIELDS[name]: value for name, value in said.items() if value is not None}
    if asked.get("do_sample") is False:
        values["temperature"] = 0.0
    if "top_k" in values:
        values["top_k"] = int(values["top_k"])
    if "stop" in values:
        values["stop"] = (values["stop"],) if isinstance(values["stop"], str) else tuple(values["stop"])
    ends = asked.get("eos_token_id")
    if ends is None:
        return values, None
    ends = torch.as_tensor(ends).flatten().tolist()
    return values, [token for token in ends if token >= 0]  # -1 is the field's word for none


class OfTexts:
    """A function `f(texts) -> scores`, of texts with their queries, as a reward; see shared.rewards.base.Reward."""

    def __init__(self, function: Callable[[list[str]], Any]):
        self.function, self.__name__ = function, name_of(function)

    def __call__(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> Tensor:
        return as_values(self.function([sample.columns[TEXT] for sample in samples]), len(samples))


def rewards_of(given: Any, device: Any = None) -> RewardSet:
    """What scores, as one set of rewards.

    Args:
        given: as BestOfNSampler takes it.
        device: where models that are given by name are put.

    Raises:
        UserError: a reward is not known or cannot be loaded.
    """
    if isinstance(given, RewardSet):
        return given
    several = given if isinstance(given, (list, tuple)) else [given]
    return RewardSet([OfTexts(each) if _scores_texts(each) else each for each in several], device=device)


def _scores_texts(function: Any) -> bool:
    """Whether a function takes one list, of texts, and not the keywords of a reward."""
    if not callable(function) or isinstance(function, nn.Module) or hasattr(function, "task"):
        return False  # a pipeline has a task, and is known as a reward
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some that are written in C do not tell
        return True
    if any(each.name in _REWARD_TAKES or each.kind is each.VAR_KEYWORD for each in parameters):
        return False
    return len([each for each in parameters if each.default is each.empty]) == 1
