"""DenoisingActor: pictures of prompts as an online trainer's rollouts, a denoising step as the action.

The noise of a picture does not depend on the batch or the process that draws it: in training it follows from the
picture's number in the run, in evaluations from its row and its place among that row's pictures. Of a sampling run the
recorded steps alone are kept, neighbours sharing the latents between them, in the type that sampling rounds to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusionalign.pipelines.base import Conditioning, PipelineAdapter
from diffusionalign.policy import DenoisingBatch
from diffusionalign.prompts import check_prompt
from diffusionalign.sampling import Trajectory, denoise, normal
from diffusionalign.schedules import Schedule
from diffusionalign.steps import Sampler
from diffusionalign.windows import Actions, ActionWindow
from shared.data.rows import ROW
from shared.errors import DataError, UserError
from shared.rewards.base import Sample
from shared.trainers.rollout import Rollout

NEGATIVE = "negative_prompt"  # an option, and a column that wins over it
TRAINING, HELD_OUT, SHARED = range(3)  # what noise is for


@dataclass
class DenoisingActions:
    """What was drawn.

    Args:
        chains: `(L, C, h, w)` a row: the latents before and after its K recorded steps, each once, in order.
        slots: `(B, K)`, where in its chain a step begins; it ends one further on.
        at: `(B, K)`, the steps.
        final: `(B, C, h, w)`, the clean latents.
    """

    chains: list[Tensor]
    slots: Tensor
    at: Tensor
    final: Tensor

    @classmethod
    def of(cls, trajectory: Trajectory) -> DenoisingActions:
        """Those of a sampling run, on the processor."""
        steps = trajectory.at[0].tolist()
        pieces, slots, length = [], [], 0
        for place, step in enumerate(steps):
            if place == 0 or steps[place - 1] != step - 1:
                pieces.append(trajectory.before[:, place])
                length += 1
            slots.append(length - 1)
            pieces.append(trajectory.after[:, place])
            length += 1
        final, rows = trajectory.final.cpu(), len(trajectory.final)
        chains = list(torch.stack(pieces, 1).cpu()) if pieces else [final.new_empty((0, *final.shape[1:]))] * rows
        return cls(chains, torch.tensor(slots, dtype=torch.long).expand(rows, -1), trajectory.at.cpu(), final)

    def of_rows(self, rows: Sequence[int]) -> DenoisingActions:
        """Those of some rows."""
        rows = list(rows)
        return DenoisingActions([self.chains[row] for row in rows], self.slots[rows], self.at[rows], self.final[rows])

    @classmethod
    def joined(cls, parts: Sequence[DenoisingActions]) -> DenoisingActions:
        """Several, one behind the other."""
        rest = (torch.cat([getattr(part, name) for part in parts]) for name in ("slots", "at", "final"))
        return cls([chain for part in parts for chain in part.chains], *rest)


@dataclass(frozen=True)
class Plan:
    """How pictures are drawn: for training, or for an evaluation."""

    schedule: Schedule
    sampler: Sampler
    guidance_scale: float
    actions: Actions | None = None  # None: every step that the sampler gives noise has it, none is recorded


class DenoisingActor:
    """Draws pictures with a pipeline.

    Args:
        adapter: the pipeline, its denoiser where it will run.
        args: DiffusionOptions; DenoisingOptions where steps are recorded.
        records: record the steps that are learnt from.

    Raises:
        UserError: sizes, steps or a sampler that do not go with the pipeline; no step to learn from.
    """

    exact = True
    unit = "step"
    makes_images = True

    def __init__(self, adapter: PipelineAdapter, args: Any, *, records: bool = False):
        self.adapter, self.args = adapter, args
        self.shape = adapter.latent_shape(args.height, args.width)
        self.schedule, self.sampler = self._schedule(args.num_inference_steps), sampler_of(adapter, args)
        stochastic = self.sampler.stochastic(self.schedule)
        self.window = ActionWindow(stochastic, args) if records else None
        self._plan = Plan(self.schedule, self.sampler, args.guidance_scale)
        sampler = self.sampler if args.eval_sampler == "same" else replace(self.sampler, kind=args.eval_sampler)
        guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        self._held_out = Plan(
            self._schedule(args.eval_num_inference_steps or args.num_inference_steps), sampler, guidance
        )
        sampler.stochastic(self._held_out.schedule)
        self._number = 0  # of the first picture that is drawn next, in the run

    def _schedule(self, steps: int) -> Schedule:
        return self.adapter.schedule(steps, self.args.height, self.args.width)

    # ---- Drawing ---------------------------------------------------------------------------------------------------

    def refresh(self, trainer: Any) -> None:
        """Take note of how far the run is: noise, and the steps that are learnt from, follow from it."""
        self._number = trainer.first_number
        if self.window is not None:
            actions = self.window.actions(trainer.drawn_before, trainer.state.global_step)
            self._plan = replace(self._plan, actions=actions)

    @torch.no_grad()
    def act(
        self,
        model: nn.Module,
        rows: Sequence[dict[str, Any]],
        group_size: int,
        *,
        random: torch.Generator | None = None,
        mode: str = "train",
    ) -> Rollout:
        """Draw `group_size` pictures for each row. `mode`: train, or eval and greedy, which are the same here."""
        places = [(row, copy) for row in rows for copy in range(group_size)]
        found, images = [], []
        plan = self._plan if mode == "train" else self._held_out
        for start, stop in self._batches(len(places), group_size):
            part = places[start:stop]
            sources = self._sources(part, start, mode)
            trajectory = self.draw(model, plan, [row for row, _ in part], sources)
            images += self._decoded(trajectory.final)
            found.append((DenoisingActions.of(trajectory), trajectory.logp.cpu()))
        self._number += len(places)
        rollout = self._rollout(DenoisingActions.joined([actions for actions, _ in found]), rows, group_size, images)
        rollout.logp = list(torch.cat([logp for _, logp in found]))
        return rollout

    def _batches(self, count: int, group_size: int) -> list[tuple[int, int]]:
        """First and last (exclusive) of the pictures that are drawn at once; whole groups, or parts of one."""
        size = self.args.generation_rows or self.args.per_device_train_batch_size
        whole = max(1, size // group_size) * group_size
        cuts = [at for block in range(0, count, whole) for at in range(block, min(block + whole, count), size)]
        return list(zip(cuts, [*cuts[1:], count], strict=True))

    def draw(self, model: nn.Module, plan: Plan, rows: Sequence[Mapping[str, Any]], sources: Sources) -> Trajectory:
        """One batch of pictures' latents, a row each."""
        positive, negative = self.conditioning(rows, guidance_scale=plan.guidance_scale)
        schedule, actions = plan.schedule, plan.actions

        def predict(latents: Tensor, at: Tensor) -> Tensor:
            options = {"negative": negative, "guidance_scale": plan.guidance_scale}
            return self.adapter.predict(model, latents, schedule.timesteps[at], positive, **options)

        like = torch.empty(len(rows), *self.shape, device=self.adapter.device)
        return denoise(
            predict,
            normal(like, sources.initial),
            schedule,
            plan.sampler,
            record=() if actions is None else actions.learnt,
            window=None if actions is None else actions.noisy,
            random=sources.steps,
            storage=self.adapter.dtype,
        )

    def _sources(self, part: Sequence[tuple[Mapping[str, Any], int]], start: int, mode: str) -> Sources:
        if mode != "train":
            own = [self.noise(HELD_OUT, row.get(ROW, 0), copy) for row, copy in part]
            return Sources(own, own)
        numbers = range(self._number + start, self._number + start + len(part))
        own = [self.noise(TRAINING, number) for number in numbers]
        if not getattr(self.args, "same_initial_noise", False):
            return Sources(own, own)
        return Sources([self.noise(SHARED, number // self.args.num_generations) for number in numbers], own)

    def noise(self, *key: int) -> torch.Generator:
        """The source of a picture's noise: of training by TRAINING and its number in the run."""
        seed = np.random.SeedSequence((self.args.seed, *key)).generate_state(1, np.uint64).item()
        return torch.Generator(self.adapter.device).manual_seed(seed >> 1)

    def conditioning(
        self, rows: Sequence[Mapping[str, Any]], *, guidance_scale: float
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the denoiser is told of each row's prompt, and of what guidance leads away from."""
        return conditioning(self.adapter, [row["prompt"] for row in rows], self.negatives(rows), guidance_scale)

    def negatives(self, rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
        """The negative prompt of each row: its own, or one of the options' in turn."""
        given = self.args.negative_prompt or [None]
        return [given[row.get(ROW, 0) % len(given)] if row.get(NEGATIVE) is None else row[NEGATIVE] for row in rows]

    def _decoded(self, latents: Tensor) -> list[Tensor]:
        device, size = self.adapter.device, self.args.vae_slice
        return list(self.adapter.decode(latents.to(device), slice_size=size).float().cpu())

    def _rollout(
        self, actions: DenoisingActions, rows: Sequence[Mapping[str, Any]], group_size: int, images: Sequence[Tensor]
    ) -> Rollout:
        samples = []
        for at, image in enumerate(images):
            row = rows[at // group_size]
            columns = {name: value for name, value in row.items() if name != "prompt"}
            samples.append(Sample(row["prompt"], image, columns))
        return Rollout(
            samples, group_size, actions, self._lengths(actions), torch.zeros(len(samples), dtype=torch.bool)
        )

    def _lengths(self, actions: DenoisingActions) -> Tensor:
        rows, count = actions.at.shape
        return torch.full((rows,), count or self.args.num_inference_steps)

    # ---- What the trainer asks for ---------------------------------------------------------------------------------

    def check(self, row: dict[str, Any]) -> str | None:
        """Nothing happens to prompts: what is too long for a text encoder it leaves out itself."""
        check_prompt(row)
        if not isinstance(own := row.get(NEGATIVE), str | None):
            raise DataError(f"row {row.get(ROW, 0)}: {NEGATIVE} is a {type(own).__name__}, expected a text")
        return None

    def batch(
        self, rollout: Rollout, rows: Sequence[int], group_size: int, *, skipped: Tensor | None = None
    ) -> DenoisingBatch:
        """See shared.trainers.rollout.Actor."""
        own: DenoisingActions = rollout.actions.of_rows(rows)
        chains = list(zip(own.chains, own.slots, strict=True))
        samples = [rollout.samples[row] for row in rows]
        mask = torch.ones(own.at.shape, dtype=torch.bool)
        return DenoisingBatch(
            before=torch.stack([chain[slots] for chain, slots in chains]),
            after=torch.stack([chain[slots + 1] for chain, slots in chains]),
            at=own.at,
            prompts=[sample.prompt for sample in samples],
            negatives=self.negatives([sample.columns for sample in samples]),
            action_mask=mask if skipped is None else mask & ~skipped[list(rows), None],
        )

    def join(self, parts: Sequence[Rollout], rows: Sequence[Sequence[int]]) -> Rollout:
        """See shared.trainers.rollout.Actor."""
        actions = DenoisingActions.joined([part.actions.of_rows(kept) for part, kept in zip(parts, rows, strict=True)])
        places = [(part, row) for part, kept in zip(parts, rows, strict=True) for row in kept]
        truncated = torch.stack([part.truncated[row] for part, row in places])
        logp = [part.logp[row] for part, row in places]
        samples = [part.samples[row] for part, row in places]
        return Rollout(samples, parts[0].group_size, actions, self._lengths(actions), truncated, logp)

    def state(self, rollout: Rollout) -> dict[str, Any]:
        """See shared.trainers.rollout.Actor."""
        actions: DenoisingActions = rollout.actions
        # a chain by itself: it may be a part of a tensor with rows that are not kept
        chains = [chain.clone() for chain in actions.chains]
        return {"chains": chains, "slots": actions.slots, "at": actions.at, "final": actions.final}

    @torch.no_grad()
    def restored(self, state: dict[str, Any], rows: Sequence[dict[str, Any]], group_size: int) -> Rollout:
        """See shared.trainers.rollout.Actor."""
        actions = DenoisingActions(**state)
        shape, most = tuple(actions.final.shape[1:]), max([0, *actions.at.flatten().tolist()])
        if shape != tuple(self.shape) or most >= self.schedule.steps:
            raise UserError(
                f"The checkpoint's round has latents of {shape} and step {most}; the pipeline makes "
                f"{tuple(self.shape)}, in {self.schedule.steps} steps. Resume with the options of the run."
            )
        size = self.args.generation_rows or self.args.per_device_train_batch_size
        images = [image for part in actions.final.split(size) for image in self._decoded(part)]
        return self._rollout(actions, rows, group_size, images)

    def question(self, row: Mapping[str, Any]) -> tuple[list[Any], str]:
        """No image: those that are drawn are the answer."""
        return [], row["prompt"]

    def shown(self, sample: Sample) -> tuple[list[Any], str, str]:
        """The picture itself is the sample's output."""
        return [], sample.prompt, ""


@dataclass
class Sources:
    """Where the noise of a batch comes from, a generator a row: of its beginning, and of its steps."""

    initial: list[torch.Generator]
    steps: list[torch.Generator]


def conditioning(
    adapter: PipelineAdapter, prompts: Sequence[str], negatives: Sequence[str | None], guidance_scale: float
) -> tuple[Conditioning, Conditioning | None]:
    """What the denoiser is told of N prompts, and of N negative ones where there is guidance by them."""
    guided = adapter.guided and guidance_scale > 1
    return adapter.encode_prompts(prompts), adapter.encode_prompts(negatives) if guided else None


def sampler_of(adapter: PipelineAdapter, args: Any) -> Sampler:
    """The sampler that DiffusionOptions ask for.

    Raises:
        UserError: an option out of its range.
    """
    kind = args.sampler
    if kind is None:
        flow = adapter.schedule(args.num_inference_steps, args.height, args.width).prediction == "flow"
        kind = "sde" if flow else "ddim"
    return Sampler(kind, eta=args.eta, noise_level=args.noise_level, solver=args.solver)
