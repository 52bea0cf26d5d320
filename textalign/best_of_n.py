"""Best of n: several answers to a prompt are sampled, scored, and the best are kept. No weight is trained.

The prompts are run once, together, and all their answers are scored in one call. Deliberately not here: how tokens are
drawn (shared.runtime.generation), and what scores (shared.rewards).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from shared.data.collators import left_padded
from shared.data.rows import ROW
from shared.errors import UserError
from shared.objectives.advantages import weighted_rewards
from shared.policies.prefix import evaluating
from shared.rewards.base import Sample
from shared.rewards.models import current_device
from shared.runtime.adapters import attach_adapter
from shared.runtime.generation import Completions, InProcessGenerator, Sampling
from shared.runtime.models import load_model, load_processor
from shared.trainers.keeping import preserved_randomness
from textalign.best_of_n_settings import DEFAULT_LENGTH, TEXT, Query, QueryReader, rewards_of, settings_of
from textalign.options import TokenizerOptions
from textalign.preparing import fit_to_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Candidate:
    """One answer to a query.

    Attributes:
        text: query and answer as one text; of a chat the answer alone.
        response: the answer alone, without special tokens.
        ids: its tokens, the ending one included.
        score: what it is ranked by.
        rewards: the values that the score is made of, by name; NaN where a reward does not apply.
        finished: whether it ended by itself; False: it was cut at the longest length.
    """

    text: str
    response: str
    ids: list[int]
    score: float
    rewards: dict[str, float]
    finished: bool


class LengthSampler:
    """Draws whole numbers from `min_value` up to, not including, `max_value`, by Python's own random numbers.

    Raises:
        UserError: there is none to draw.
    """

    def __init__(self, min_value: int, max_value: int):
        if not 1 <= min_value < max_value:
            raise UserError(f"LengthSampler({min_value}, {max_value}): give 1 or more, and then a larger number.")
        self.values = range(min_value, max_value)

    def __call__(self) -> int:
        return random.choice(self.values)


class BestOfNSampler:
    """Samples n answers to each query, and gives the best by a reward (Stiennon et al. 2020, arXiv:2009.01325).

    Args:
        model: hub id, folder (of an adapter too) or built-in name; or a loaded model, a PEFT model or one inside a
            value-head wrapper (`pretrained_model`) too. It is in evaluation mode meanwhile, and not changed.
        tokenizer: the model's tokenizer or its name; None: the one beside the model.
        queries_to_scores: a function `f(texts) -> scores` of queries with their answers, decoded, as one text each
            (of chats the answers alone); or any reward that trainers take, see shared.rewards.loading: a function
            `f(prompts, completions, **columns)`, a name, a reward model. Several in a list are added up, with weights
            in a RewardSet.
        length_sampler: called for each query, gives the longest answer in tokens, such as LengthSampler; a whole
            number: that for each. None: `max_new_tokens`, or 256.
        sample_size: n.
        seed: of all draws: the same calls in the same order give the same. None: torch's own random numbers.
        n_candidates: how many of the n `generate` gives.
        generation_config: a transformers.GenerationConfig, before the model's own. `temperature`, `top_k`, `top_p`,
            `min_p`, `repetition_penalty`, `max_new_tokens`, `stop_strings` and `eos_token_id` are followed. What
            nobody says is the model's plain distribution: temperature 1, no filter.
        max_rows: answers that are written at a time, in whole groups; None: all. The result does not depend on it.
        template_kwargs: more variables for the chat template.
        model_init_kwargs: more for `from_pretrained`, of a model that is given by name.

    Raises:
        UserError: numbers out of range; a model, tokenizer or reward that is not known or cannot be loaded.

    Example:
        >>> sampler = BestOfNSampler("Qwen/Qwen3-0.6B", None, "my/reward-model", sample_size=8)  # doctest: +SKIP
        >>> sampler.generate(["Once upon a time"], max_new_tokens=64)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | None,
        queries_to_scores: Any,
        length_sampler: Callable[[], int] | int | None = None,
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: Any = None,
        *,
        max_rows: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        check_sizes(sample_size, n_candidates)
        self.sample_size, self.n_candidates = sample_size, n_candidates
        self.length_sampler, self.generation_config = length_sampler, generation_config
        self.model, self.tokenizer = _loaded(model, tokenizer, model_init_kwargs)
        self.rewards = rewards_of(queries_to_scores)
        self._reader = QueryReader(self.tokenizer, template_kwargs)
        self._random = None if seed is None else torch.Generator().manual_seed(seed)
        self._max_rows = max_rows
        self._engines: dict[tuple[int, ...] | None, InProcessGenerator] = {}

    @property
    def kl(self) -> float:
        """How far the best of n is from the model, at most; see `best_of_n_kl`."""
        return best_of_n_kl(self.sample_size)

    def generate(
        self,
        tokenized_query: Any,
        skip_special_tokens: bool = True,
        device: torch.device | str | int | None = None,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The `n_candidates` best texts for each query, best first; see Candidate.text.

        Args:
            tokenized_query: one query or several: a tensor `(L,)` or `(P, L)`, a list of tensors or of lists of
                tokens, texts, chats (which the chat template writes), or what a tokenizer returns.
            skip_special_tokens: leave special tokens out of the texts.
            device: where the model is put; None: where it is.
            columns: name -> a value for each query, for rewards that take more than prompts and completions.
            generation_kwargs: settings of `generate`, before those of the configuration and the length sampler.

        Raises:
            UserError: no queries, settings that cannot be followed, or a reward that fails or gives no score.
        """
        found = self.candidates(tokenized_query, skip_special_tokens, device, columns=columns, **generation_kwargs)
        return [[candidate.text for candidate in each[: self.n_candidates]] for each in found]

    def candidates(
        self,
        tokenized_query: Any,
        skip_special_tokens: bool = True,
        device: torch.device | str | int | None = None,
        *,
        columns: Mapping[str, Sequence[Any]] | None = None,
        **generation_kwargs: Any,
    ) -> list[list[Candidate]]:
        """All n answers to each query with their scores, best first; of equal ones that first which was drawn first.

        Arguments and errors as of `generate`.
        """
        queries = self._reader.read(tokenized_query)
        rows = _rows_of(columns or {}, len(queries))
        if device is not None and not _is_on(self.model, torch.device(device)):
            self.model.to(device)
        done = self._written(queries, generation_kwargs)
        texts, responses = self._texts(queries, done.ids, skip_special_tokens)
        samples = []
        for at, (text, response, ids) in enumerate(zip(texts, responses, done.ids, strict=True)):
            query, place = queries[at // self.sample_size], at // self.sample_size
            output = [{"role": "assistant", "content": response}] if query.is_chat else response
            own = {**rows[place], "completion_ids": ids.tolist(), TEXT: text, ROW: place}
            samples.append(Sample(query.prompt, output, own))
        table = self.rewards(samples, group_size=self.sample_size, mode="eval")
        scores = weighted_rewards(table.values, self.rewards.weights)
        _check_scores(scores, responses, self.sample_size)
        found = [
            Candidate(text, response, ids.tolist(), score, dict(zip(table.names, values, strict=True)), finished)
            for text, response, ids, score, values, finished in zip(
                texts, responses, done.ids, scores.tolist(), table.values.tolist(), done.finished, strict=True
            )
        ]
        n = self.sample_size
        groups = [found[at : at + n] for at in range(0, len(found), n)]
        return [sorted(group, key=lambda candidate: -candidate.score) for group in groups]

    def _written(self, queries: Sequence[Query], given: Mapping[str, Any]) -> Completions:
        """n completions of each query, cut to its length."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        values, ends = settings_of(inner, self.generation_config, given)
        longest = values.pop("max_new_tokens", None)
        room = _room(inner, queries)
        if given.get("max_new_tokens") is None and self.length_sampler is not None:
            lengths = self._lengths(len(queries))
        else:
            lengths = [min(DEFAULT_LENGTH, room) if longest is None else longest] * len(queries)
        if max(lengths) > room:
            raise UserError(
                f"Answers of {max(lengths)} tokens: behind the longest query the model has {room} positions left. "
                "Give a smaller max_new_tokens, or leave such queries out."
            )
        sampling = Sampling(max_new_tokens=max(lengths), **values)
        if sampling.greedy and self.sample_size > 1:
            raise UserError(
                f"do_sample False or temperature 0: all {self.sample_size} answers to a query would be the same. "
                "Leave it out, or give sample_size 1."
            )
        key = None if ends is None else tuple(ends)
        if key not in self._engines:
            self._engines[key] = InProcessGenerator(self.tokenizer, max_rows=self._max_rows, end_ids=ends)
        inputs = left_padded([query.ids for query in queries], self.tokenizer.pad_token_id)
        with evaluating(self.model):
            done = self._engines[key].generate(self.model, inputs, self.sample_size, sampling, random=self._random)
        limits = [length for length in lengths for _ in range(self.sample_size)]
        finished = [
            whole and len(ids) <= limit for ids, limit, whole in zip(done.ids, limits, done.finished, strict=True)
        ]
        # what a shorter length would have given is the start of the longer one
        return Completions([ids[:limit] for ids, limit in zip(done.ids, limits, strict=True)], None, finished)

    def _lengths(self, count: int) -> list[int]:
        draw = self.length_sampler if callable(self.length_sampler) else lambda: self.length_sampler
        if self._random is None:
            lengths = [int(draw()) for _ in range(count)]
        else:
            with preserved_randomness():  # whichever random numbers it draws, they follow the seed
                set_seed(int(torch.randint(2**31, (), generator=self._random)))
                lengths = [int(draw()) for _ in range(count)]
        if min(lengths) < 1:
            raise UserError(f"length_sampler gave {min(lengths)}: an answer has at least 1 token.")
        return lengths

    def _texts(
        self, queries: Sequence[Query], ids: Sequence[torch.Tensor], skip_special_tokens: bool
    ) -> tuple[list[str], list[str]]:
        """Of each answer what is given back and what functions of texts score, and the answer alone."""
        decode = self.tokenizer.batch_decode
        responses = decode(ids, skip_special_tokens=True)
        whole = []
        for at, tokens in enumerate(ids):
            query = queries[at // self.sample_size]
            whole.append([*([] if query.is_chat else query.ids), *tokens.tolist()])
        return decode(whole, skip_special_tokens=skip_special_tokens), responses


def best_of_n_kl(n: int) -> float:
    """`log n - (n - 1) / n`: how far the best of n samples is from one sample, as a KL divergence in nats.

    It is reached where no two samples have the same score, and an upper bound otherwise (Beirami et al. 2024,
    arXiv:2401.01879). The formula is that of Stiennon et al. 2020, arXiv:2009.01325, and Gao et al. 2022,
    arXiv:2210.10760.

    Raises:
        UserError: n is less than 1.
    """
    if n < 1:
        raise UserError(f"n is {n}; it has to be 1 or more.")
    return math.log(n) - (n - 1) / n


def chances_of_best(samples: int, n: int) -> list[float]:
    """How likely the first, second, ... best of some samples is the best of n of them, drawn without replacement.

    With these weights N samples of a prompt give the mean of anything under best of n for each n up to N, and use all
    of them (Nakano et al. 2021, arXiv:2112.09332, appendix).

    Args:
        samples: N.
        n: from 1 to N.

    Returns:
        N numbers that add up to 1.

    Raises:
        UserError: n is out of range.
    """
    if not 1 <= n <= samples:
        raise UserError(f"n is {n}; of {samples} samples it has to be from 1 to {samples}.")
    return [math.comb(samples - place, n - 1) / math.comb(samples, n) for place in range(1, samples + 1)]


def check_sizes(sample_size: int, n_candidates: int) -> None:
    """Raise UserError where n_candidates of sample_size answers cannot be given."""
    if sample_size < 1 or n_candidates < 1:
        raise UserError(f"sample_size {sample_size} and n_candidates {n_candidates} have to be 1 or more.")
    if sample_size < n_candidates:
        raise UserError(
            f"n_candidates {n_candidates} is more than sample_size {sample_size}: sample at least as many."
        )


def _loaded(
    model: Any, tokenizer: Any, model_init_kwargs: dict[str, Any] | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_processor(str(tokenizer))
    if isinstance(model, nn.Module):
        if model_init_kwargs:
            raise UserError("model_init_kwargs cannot be followed: the model is loaded.")
        model = getattr(model, "pretrained_model", model)
        return model, load_tokenizer(model, TokenizerOptions(), tokenizer)
    if not isinstance(model, (str, Path)):
        raise UserError(f"model is a {type(model).__name__}: give its name or folder as a string, or a loaded model.")
    name, adapter = str(model), None
    if (Path(name) / "adapter_config.json").is_file():
        from peft import PeftConfig
        from transformers import AutoTokenizer

        if tokenizer is None and (Path(name) / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(name)
        name, adapter = PeftConfig.from_pretrained(name).base_model_name_or_path, name
    options = TokenizerOptions(model_init_kwargs=model_init_kwargs)
    tokenizer = load_tokenizer(name, options, tokenizer)
    found = load_model(name, head="causal-lm", frozen=True, **(model_init_kwargs or {}))
    fit_to_tokenizer(found, tokenizer)
    found = attach_adapter(found, path=adapter)
    return (found if hasattr(found, "hf_device_map") else found.to(current_device())), tokenizer


def _is_on(model: nn.Module, device: torch.device) -> bool:
    here = next(model.parameters()).device
    return here.type == device.type and device.index in (None, here.index)


def _room(model: nn.Module, queries: Sequence[Query]) -> float:
    """How many tokens fit behind the longest query; raises UserError where none does."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = max(len(query.ids) for query in queries)
    if longest >= limit:
        raise UserError(f"A query of {longest} tokens fills the {limit} positions of the model: leave it out.")
    return limit - longest


def _rows_of(columns: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    for name, values in columns.items():
        if len(values) != count:
            raise UserError(f"The column {name} has {len(values)} values for {count} queries: give one for each.")
    return [{name: values[at] for name, values in columns.items()} for at in range(count)]


def _check_scores(scores: torch.Tensor, responses: Sequence[str], group: int) -> None:
    bad = scores.isnan().nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} of {len(scores)} answers have no score (NaN or None), the first {responses[bad[0]][:60]!r} "
            f"to query {bad[0] // group}: the best cannot be told. Let the reward give each a number."
        )
