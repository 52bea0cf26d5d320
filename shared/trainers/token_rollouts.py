"""TokenActor: completions of prompts, text-only or with images, as an online trainer's rollouts.

How a row becomes a prompt is its encoder's; how tokens are written is its engine's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.errors import UserError
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy
from shared.rewards.base import Sample
from shared.runtime.generation import Completions, Generator, InProcessGenerator, Mixture, Sampling
from shared.runtime.servers import ServerGenerator
from shared.trainers.rollout import Rollout


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens `(L,)`, and what the model takes beside them (images), of this prompt alone."""

    ids: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class PromptEncoder(Protocol):
    """How a modality's rows become prompts."""

    tokenizer: Any
    beyond: dict[str, int]  # see GroupedBatch.beyond

    def prompts(self, rows: Sequence[dict[str, Any]]) -> list[Prompt]:
        """Raises DataError where a row cannot be read."""
        ...

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded `input_ids` `(P, L)`, `attention_mask` and extras, as `model.generate` takes them."""
        ...

    def check(self, row: dict[str, Any]) -> str | None:
        """What happens to a row's prompt (a cut), as a note; None: nothing. Raises DataError as `prompts`."""
        ...

    def asked(self, row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A row's prompt, and its other columns, as rewards see them."""
        ...

    def shown(self, row: Mapping[str, Any]) -> tuple[list[Any], str]:
        """A prompt's images and text, for people."""
        ...


class PromptsOnce:
    """The part of a PromptEncoder that makes each row's prompt once, though it is checked before it is asked for."""

    def __init__(self):
        self._checked: dict[int, tuple[dict[str, Any], Prompt]] = {}  # by id, which is the row's while it is held

    def made(self, row: dict[str, Any]) -> tuple[Prompt, str | None]:
        """A row's prompt, and what happened to it; see PromptEncoder.check."""
        raise NotImplementedError

    def prompts(self, rows: Sequence[dict[str, Any]]) -> list[Prompt]:
        known = {key: prompt for key, (_, prompt) in self._checked.items()}
        self._checked = {}
        return [known.get(id(row)) or known.setdefault(id(row), self.made(row)[0]) for row in rows]

    def check(self, row: dict[str, Any]) -> str | None:
        """What happens to the row's prompt, which is kept until it is asked for; raises DataError as `prompts`."""
        prompt, note = self.made(row)
        self._checked[id(row)] = (row, prompt)
        return note


@dataclass
class TokenActions:
    """What was written: a prompt for each `group_size` rows, and the tokens `(n_i,)` of each row."""

    prompts: list[Prompt]
    ids: list[Tensor]


class TokenActor:
    """Writes completions with an engine.

    Args:
        encoder: makes prompts of rows.
        engine: writes tokens; see shared.runtime.generation.
        sampling: `train`, `eval` and `greedy` -> how tokens are drawn.
        pad_token_id: fills rows up.
        pad_to_multiple_of: widths of completions are a multiple of so many tokens.
    """

    unit, makes_images = "token", False

    def __init__(
        self,
        encoder: PromptEncoder,
        engine: Generator,
        *,
        sampling: Mapping[str, Sampling],
        pad_token_id: int,
        pad_to_multiple_of: int | None = None,
    ):
        self.encoder, self.engine, self.sampling = encoder, engine, dict(sampling)
        self._sent: int | None = None  # the step whose weights the engine has
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of or 1

    @property
    def exact(self) -> bool:
        """Whether the engine computes as the trainer does."""
        return self.engine.exact

    def act(
        self,
        model: nn.Module | Mixture | tuple[nn.Module | Mixture, ...],
        rows: Sequence[dict[str, Any]],
        group_size: int,
        *,
        random: torch.Generator | None = None,
        mode: str = "train",
    ) -> Rollout:
        """See Actor.act.

        Args:
            model: what writes; of several, each writes an equal share of a prompt's completions, in their order.
        """
        prompts = self.encoder.prompts(rows)
        inputs, sampling = self.encoder.inputs(prompts), self.sampling[mode]
        writers = model if isinstance(model, tuple) else (model,)
        share, rest = divmod(group_size, len(writers))
        assert not rest, "the writers share a group equally"
        done = _woven([self.engine.generate(each, inputs, share, sampling, random=random) for each in writers], share)
        rollout = self._rollout(TokenActions(prompts, done.ids), rows, group_size)
        rollout.truncated = ~torch.tensor(done.finished)
        rollout.logp = done.logp
        return rollout

    def _rollout(self, actions: TokenActions, rows: Sequence[dict[str, Any]], group_size: int) -> Rollout:
        texts = self.encoder.tokenizer.batch_decode(actions.ids, skip_special_tokens=True)
        asked = [self.encoder.asked(row) for row in rows]
        samples = []
        for at, (text, ids) in enumerate(zip(texts, actions.ids, strict=True)):
            prompt, columns = asked[at // group_size]
            output = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            samples.append(Sample(prompt, output, {**columns, "completion_ids": ids.tolist()}))
        lengths = torch.tensor([len(ids) for ids in actions.ids])
        return Rollout(samples, group_size, actions, lengths, torch.zeros(len(samples), dtype=torch.bool))

    def check(self, row: dict[str, Any]) -> str | None:
        return self.encoder.check(row)

    def batch(
        self, rollout: Rollout, rows: Sequence[int], group_size: int, *, skipped: Tensor | None = None
    ) -> GroupedBatch:
        """Rows of a rollout for the policy.

        Args:
            rows: which; of each prompt `group_size` in a row.
            group_size: a divisor of the rollout's own.
            skipped: `(B,)` bool over all rows of the rollout, those of which no token counts.
        """
        actions: TokenActions = rollout.actions
        inputs = self.encoder.inputs([actions.prompts[row // rollout.group_size] for row in rows[::group_size]])
        written = [actions.ids[row] for row in rows]
        width = -(-max(map(len, written)) // self.multiple) * self.multiple
        ids = torch.full((len(rows), width), self.pad_token_id)
        attention = torch.zeros_like(ids)
        for at, tokens in enumerate(written):
            ids[at, : len(tokens)] = tokens
            attention[at, : len(tokens)] = 1
        mask = attention if skipped is None else attention * ~skipped[list(rows), None]
        prompt_ids, prompt_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        more: dict[str, Any] = {"beyond": self.encoder.beyond}
        if inputs and group_size > 1:
            more["alone"] = lambda: self.batch(rollout, rows, 1, skipped=skipped)
        return GroupedBatch(prompt_ids, prompt_mask, ids, attention, mask, inputs, group_size, **more)

    def join(self, parts: Sequence[Rollout], rows: Sequence[Sequence[int]]) -> Rollout:
        size = parts[0].group_size
        places = [(part, row) for part, kept in zip(parts, rows, strict=True) for row in kept]
        actions = TokenActions(
            [part.actions.prompts[row // size] for part, row in places[::size]],
            [part.actions.ids[row] for part, row in places],
        )
        logp = None if parts[0].logp is None else [part.logp[row] for part, row in places]
        lengths = torch.tensor([len(ids) for ids in actions.ids])
        truncated = torch.stack([part.truncated[row] for part, row in places])
        return Rollout([part.samples[row] for part, row in places], size, actions, lengths, truncated, logp)

    def state(self, rollout: Rollout) -> dict[str, Any]:
        return {"ids": rollout.actions.ids}

    def restored(self, state: dict[str, Any], rows: Sequence[dict[str, Any]], group_size: int) -> Rollout:
        return self._rollout(TokenActions(self.encoder.prompts(rows), state["ids"]), rows, group_size)

    def refresh(self, trainer: Any) -> None:
        """Hand an engine of its own weights the trainer's."""
        if self.engine.exact or self._sent == trainer.state.global_step:
            return
        self._sent = trainer.state.global_step
        sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        gather = (lambda: trainer.accelerator.get_state_dict(trainer.model_wrapped)) if sharded else None
        self.engine.update_weights(trainer.model, state_dict=gather)

    def question(self, row: Mapping[str, Any]) -> tuple[list[Any], str]:
        return self.encoder.shown(row)

    def shown(self, sample: Sample) -> tuple[list[Any], str, str]:
        images, prompt = self.encoder.shown({**sample.columns, "prompt": sample.prompt})
        output = sample.output
        return images, prompt, output if isinstance(output, str) else output[-1]["content"]


def _woven(parts: Sequence[Completions], share: int) -> Completions:
    """Completions of the same prompts by several writers, `share` a prompt each, prompt by prompt."""
    if len(parts) == 1:
        return parts[0]
    starts = range(0, len(parts[0].ids), share)
    places = [(part, at) for start in starts for part in parts for at in range(start, start + share)]
    known = all(part.logp is not None for part in parts)
    return Completions(
        [part.ids[at] for part, at in places],
        [part.logp[at] for part, at in places] if known else None,
        [part.finished[at] for part, at in places],
    )


# option of SamplingOptions -> its name in Sampling and in generation_kwargs
FIELDS = {
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
}


def sampling_of(args: Any) -> dict[str, Sampling]:
    """How tokens are drawn in training, in evaluations, and before and after training, by SamplingOptions.

    Raises:
        UserError: numbers out of range, or generation_kwargs that are not known.
    """
    values = {name: getattr(args, option) for option, name in FIELDS.items()}
    more = dict(args.generation_kwargs or {})
    more = {"stop" if name == "stop_strings" else name: value for name, value in more.items()}
    if unknown := sorted(more.keys() - values.keys()):
        raise UserError(
            f"generation_kwargs: {', '.join(unknown)} not known; allowed: {', '.join(values)}. Beams and the like do "
            "not sample."
        )
    values |= more
    stop = values["stop"] or ()
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    changed = {name: getattr(args, f"eval_{name}") for name in ("temperature", "top_p", "top_k")}
    held_out = {**values, **{name: value for name, value in changed.items() if value is not None}}
    longest = args.max_new_tokens or values["max_new_tokens"]
    greedy = Sampling(max_new_tokens=longest, temperature=0.0, stop=values["stop"])
    return {"train": Sampling(**values), "eval": Sampling(**held_out), "greedy": greedy}


def engine_of(args: Any, tokenizer: Any, *, suppressed: Collection[int] = ()) -> Generator:
    """What writes tokens, by SamplingOptions.

    Args:
        suppressed: tokens that are never written, such as an image's places.

    Raises:
        UserError: a server that cannot be reached, or serves another model.
    """
    if args.use_vllm:
        return ServerGenerator(
            args.vllm_server_base_url,
            tokenizer,
            sync_dir=args.vllm_sync_dir or Path(args.output_dir) / "served",
            timeout=args.vllm_server_timeout,
        )
    return InProcessGenerator(
        tokenizer,
        suppressed=suppressed,
        max_rows=args.generation_rows,
        gather_weights=args.ds3_gather_for_generation,
    )


def token_parts(
    model: nn.Module, args: Any, encoder: PromptEncoder, engine: Generator
) -> tuple[TokenPolicy, TokenActor]:
    """Policy and actor of a model that writes tokens, by SamplingOptions.

    Args:
        engine: see `engine_of`.

    Raises:
        UserError: options out of range.
    """
    sampling = sampling_of(args)
    policy = TokenPolicy(model, temperature=sampling["train"].temperature or 1.0, share_prefix=args.share_prefix)
    pad = encoder.tokenizer.pad_token_id
    actor = TokenActor(
        encoder, engine, sampling=sampling, pad_token_id=pad, pad_to_multiple_of=args.pad_to_multiple_of
    )
    return policy, actor
