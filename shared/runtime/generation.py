"""Completions of prompts from a model in this process, for training on them and for evaluation.

An engine is a `Generator`. The one here runs each prompt (with its images) once, copies its key/value cache to the
group and decodes all rows together, without those that have finished; what it gives as log-probabilities is in the
numerics of the model that it is given. It does not switch the model to evaluation mode: its caller does.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.runtime.fsdp import reshard
from shared.runtime.generation_cache import UnknownCache
from shared.runtime.generation_check import disagreement
from shared.runtime.generation_loop import Decoder, Passes, rows_of, split_extras, trimmed
from shared.runtime.generation_mixture import Mixture, Part, parts_of, passes_of, unknown_tokens
from shared.runtime.generation_sampling import Drawer, Sampling, StopStrings
from shared.runtime.generation_sharded import largest, several_processes, sharded, whole_weights
from shared.runtime.generation_whole import generate_rows

__all__ = ["Completions", "Generator", "InProcessGenerator", "Mixture", "Part", "Sampling", "greedy_answers"]

logger = logging.getLogger(__name__)

Random = torch.Generator | Sequence[torch.Generator] | None

_MODEL_CANNOT = (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, IndexError)


@dataclass
class Completions:
    """What an engine made: B = P*G rows, prompt by prompt.

    Args:
        ids: `(n_i,)` int64 on the CPU, the ending token included.
        logp: `(n_i,)` float32, under softmax(logits / temperature) of the whole vocabulary, before penalty and
            filters; at temperature 0 of the logits as they are. None where the engine cannot tell.
        finished: whether a row ended by an end token or a stop string; False: it was cut at max_new_tokens.
    """

    ids: list[Tensor]
    logp: list[Tensor] | None
    finished: list[bool]


class Generator(Protocol):
    """An engine that completes prompts. `exact`: its log-probabilities are in the trainer's numerics."""

    exact: bool

    def generate(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        group_size: int,
        sampling: Sampling,
        *,
        random: Random = None,
    ) -> Completions: ...

    def update_weights(self, model: nn.Module) -> None: ...


class InProcessGenerator:
    """Generates with the model that is trained, as it is at the moment.

    The first use of a model compares a few tokens with `model.generate`; a model that disagrees, takes no cache or
    keeps one of an unknown kind is run by `generate` from then on, with one warning and without log-probabilities. Of
    several processes, which have to come here alike, all do so where one has to. The comparison is left out where each
    pass gathers sharded weights, since it would have to go alike on every process.

    Args:
        tokenizer: decodes for stop strings; its end-of-sequence token ends a completion, besides those of the model.
        suppressed: tokens that are never drawn (image placeholders); they count in the log-probabilities.
        max_rows: decode at most so many rows at a time, in whole groups; None: all.
        end_ids: the tokens that end a completion, in place of those of tokenizer and model.
        gather_weights: put sharded weights together on every process while generating: much faster, if they fit.
    """

    exact = True

    def __init__(
        self,
        tokenizer: Any,
        *,
        suppressed: Collection[int] = (),
        max_rows: int | None = None,
        end_ids: Collection[int] | None = None,
        gather_weights: bool = True,
    ):
        if max_rows is not None and max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; it has to be None (all rows at a time) or 1 or more.")
        self._tokenizer, self._suppressed, self._max_rows = tokenizer, frozenset(suppressed), max_rows
        self._end_ids, self._gather_weights = end_ids, gather_weights
        self._able: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def update_weights(self, model: nn.Module) -> None:
        """Nothing: each call runs the model that it is given."""

    def generate(
        self,
        model: nn.Module | Mixture,
        inputs: dict[str, Any],
        group_size: int,
        sampling: Sampling,
        *,
        random: Random = None,
    ) -> Completions:
        """Complete each prompt `group_size` times.

        The draws are taken from `random` before anything runs, one for each row and possible token: what a row becomes
        does not depend on when others finish or on `max_rows`, but for rounding.

        Args:
            model: as the trainer calls it, inside DDP's wrapper: a transformers model or a PEFT model around one, in
                evaluation mode; or a mixture of such. Under autocast, call this inside the autocast context, or
                weights are cast anew for each token. If weights are sharded, every process has to call this, with at
                least one prompt.
            inputs: left-padded `input_ids` `(P, L)`, `attention_mask`, and extras as `model.generate` takes them.
            group_size: G completions of each prompt.
            sampling: the settings.
            random: of the draws; several: one for each row, on the CPU, so that a row does not depend on the others
                of its call either; None: torch's own for the CPU.

        Raises:
            UserError: prompt and completion together are longer than the model's positions, or its logits are not
                numbers; a mixture of models one of which cannot be run so.
            ValueError: the model is in training mode.
        """
        parts, suppressed = parts_of(model), self._suppressed.union(unknown_tokens(model))
        if any(part.model.training for part in parts):
            raise ValueError("A model in training mode would drop out units as it generates: call model.eval() first.")
        inner = parts[0].inner
        device = inner.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        inputs = _cast(inner, trimmed(inputs))
        for part in parts:
            _check_length(part.inner, inputs, sampling)
        rows = len(inputs["input_ids"]) * group_size
        with torch.no_grad(), self._weights(parts) as together:
            able = [self._is_able(part, inputs, together) for part in parts]  # processes ask alike
            if all(able):
                uniforms = _uniforms(rows, sampling, random).to(device)
                try:
                    return self._decode(parts, inputs, uniforms, Drawer(sampling, suppressed), together)
                except UnknownCache as error:
                    self._give_up(inner, str(error))
            if len(parts) > 1:
                raise UserError(
                    f"A mixture of models is written with their key/value caches, which "
                    f"{' and '.join(sorted({type(part.inner).__name__ for part in parts}))} cannot (see the warning)."
                )
            with parts[0].around():
                return self._whole_rows(
                    parts[0].model, inner, inputs, group_size, sampling, random, together, suppressed
                )

    @contextlib.contextmanager
    def _weights(self, parts: tuple[Part, ...]) -> Iterator[bool]:
        """Gives whether processes have to run the same passes."""
        models = {id(part.model): part.model for part in parts}.values()
        with contextlib.ExitStack() as stack:
            cut_up = [stack.enter_context(self._weights_of(model)) for model in models]
            yield any(cut_up)

    @contextlib.contextmanager
    def _weights_of(self, model: nn.Module) -> Iterator[bool]:
        if not sharded(model):
            yield False
            return
        try:
            with whole_weights(model) if self._gather_weights else contextlib.nullcontext(False) as whole:
                yield not whole
        finally:
            reshard(model)

    def _ends(self, inner: nn.Module) -> list[int]:
        if self._end_ids is not None:
            return sorted(self._end_ids)
        return _end_ids(inner, self._tokenizer)

    def _decode(
        self,
        parts: tuple[Part, ...],
        inputs: dict[str, Any],
        uniforms: Tensor,
        drawer: Drawer,
        together: bool,
    ) -> Completions:
        device = inputs["input_ids"].device
        decoder = Decoder(
            passes_of(parts),
            drawer,
            torch.tensor(self._ends(parts[0].inner), dtype=torch.long, device=device),
            StopStrings(self._tokenizer, drawer.sampling.stop),
            (lambda on: bool(largest(int(on), device))) if together else bool,
            together,
        )
        prompts = len(inputs["input_ids"])
        group = len(uniforms) // prompts
        each = prompts if self._max_rows is None else max(1, self._max_rows // group)
        chunks = [torch.arange(at, min(at + each, prompts)) for at in range(0, prompts, each)]
        most = largest(len(chunks), device) if together else len(chunks)
        result = Completions([], [], [])
        # Which image belongs to which prompt is not known here: with images, all prompts are run at once.
        images = bool(split_extras(inputs)[1])
        before = decoder.passes.prefill(inputs) if images else None
        for number in range(most):
            idle = number >= len(chunks)
            chunk = chunks[0 if idle else number].to(device)
            draws = uniforms.view(prompts, group, -1)[chunk].flatten(0, 1)
            part = rows_of(inputs, chunk)
            logits, past = before or decoder.passes.prefill(trimmed(part))
            seen = None
            if decoder.drawer.penalises:
                seen = decoder.drawer.seen(part["input_ids"], part["attention_mask"], logits.shape[1])
            here = chunk if images else torch.arange(len(chunk), device=device)
            past = past.expand(here, group, draws.shape[1], keep=images and number + 1 < most)
            made = decoder.run(logits[here], past, draws, seen, idle=idle)
            if not idle:
                _append(result, *made)
        return result

    def _is_able(self, part: Part, inputs: dict[str, Any], together: bool) -> bool:
        inner = part.inner
        if inner not in self._able:
            self._able[inner] = True
            with part.around():
                reason = self._obstacle(part.model, inner, inputs, together)
            if several_processes() and largest(int(reason is not None), inner.device) and reason is None:
                reason = "so says another process"
            if reason is not None:
                self._give_up(inner, reason)
        return self._able[inner]

    def _obstacle(self, model: nn.Module, inner: nn.Module, inputs: dict[str, Any], together: bool) -> str | None:
        passes = Passes(model, inner)
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            return "its adapter puts tokens of its own before each prompt"
        if not passes.takes_cache:
            return "it takes no key/value cache"
        if together:
            return None
        try:
            return disagreement(model, passes, inputs)
        except (torch.OutOfMemoryError, UserError):
            raise
        except (UnknownCache, *_MODEL_CANNOT) as error:
            return f"{type(error).__name__}: {error}"

    def _give_up(self, inner: nn.Module, reason: str) -> None:
        self._able[inner] = False
        logger.warning(
            "%s cannot run a prompt once for its group of completions (%s): transformers' generate runs each "
            "completion as a row of its own, which is right but slower.",
            type(inner).__name__,
            reason,
        )

    def _whole_rows(
        self,
        model: nn.Module,
        inner: nn.Module,
        inputs: dict[str, Any],
        group_size: int,
        sampling: Sampling,
        random: Random,
        together: bool,
        suppressed: Collection[int],
    ) -> Completions:
        ends, pad = self._ends(inner), self._tokenizer.pad_token_id
        device = inputs["input_ids"].device
        prompts = len(inputs["input_ids"])
        each = max(1, self._max_rows // group_size) if self._max_rows and not split_extras(inputs)[1] else prompts
        chunks = [torch.arange(at, min(at + each, prompts)) for at in range(0, prompts, each)]
        result = Completions([], None, [])
        for number in range(largest(len(chunks), device) if together else len(chunks)):
            idle = number >= len(chunks)
            chunk = chunks[0 if idle else number].to(device)
            ids, finished = generate_rows(
                model,
                inputs if len(chunks) == 1 else trimmed(rows_of(inputs, chunk)),
                group_size,
                sampling,
                stops=StopStrings(self._tokenizer, sampling.stop),
                ends=ends,
                pad=pad if pad is not None else (ends or [0])[0],
                suppressed=suppressed,
                seed=_seed(random),
                synced=together,
            )
            if not idle:
                result.ids += ids
                result.finished += finished
        return result


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def _device_of(random: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if random is None else random.device


def _seed(random: Random) -> int:
    one = random[0] if isinstance(random, Sequence) else random
    return int(torch.randint(2**62, (), generator=one, device=_device_of(one)))


def _uniforms(rows: int, sampling: Sampling, random: Random) -> Tensor:
    if sampling.greedy:
        return torch.zeros(rows, 1, dtype=torch.float64).expand(-1, sampling.max_new_tokens)
    if isinstance(random, Sequence):
        assert len(random) == rows, "one generator for each row"
        return torch.stack([torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=r) for r in random])
    size = rows, sampling.max_new_tokens
    return torch.rand(size, dtype=torch.float64, generator=random, device=_device_of(random))


def _cast(inner: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Images in the model's type where the weights are held in half precision; autocast sees to the rest."""
    if inner.dtype not in (torch.bfloat16, torch.float16):
        return inputs
    floating = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.to(inner.dtype) if k in floating else v for k, v in inputs.items()}


def _check_length(inner: nn.Module, inputs: dict[str, Any], sampling: Sampling) -> None:
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    prompt = inputs["input_ids"].shape[1]
    if limit and prompt + sampling.max_new_tokens > limit:
        raise UserError(
            f"A prompt of {prompt} tokens and {sampling.max_new_tokens} new ones are more than the {limit} positions "
            "of the model: lower max_prompt_length and max_completion_length (max_length and max_new_tokens in "
            "distillation), or leave such prompts out."
        )


def _append(result: Completions, tokens: Tensor, logp: Tensor, lengths: Tensor, finished: Tensor) -> None:
    for row, length in enumerate(lengths.tolist()):
        result.ids.append(tokens[row, :length].clone())
        result.logp.append(logp[row, :length].clone())
    result.finished += finished.tolist()


def greedy_answers(model: Any, inputs: dict[str, Any], tokenizer: Any, *, max_new_tokens: int) -> list[str]:
    """The most likely continuation of each prompt, as text without special tokens.

    Args:
        model: a transformers model that generates, or a PEFT model around one.
        inputs: left-padded `input_ids` `(B, L)`, `attention_mask`, and whatever else the model takes.
        tokenizer: decodes; its end-of-sequence token ends an answer, besides those of the model.
        max_new_tokens: the longest answer, in tokens.
    """
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=_end_ids(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
