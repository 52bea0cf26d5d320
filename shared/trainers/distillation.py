"""Distillation: a student learns the distribution of a teacher's next token, on recorded answers and on its own.

Agarwal et al. 2023, arXiv:2306.13649. Before each optimizer step some rows lose the answer that they were read with:
the student, or the teacher, writes another. The divergence of a step is a sum over its counted tokens, divided once by
their number over all micro-batches and processes.

The teacher reads a micro-batch first and leaves the states of the counted tokens; logits of whole rows never exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.data.collators import SupervisedCollator, left_padded
from shared.objectives.distillation import DistillationStats, Head, common_tokens, head_jsd_sum
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating, is_sharded
from shared.policies.token import TokenPolicy
from shared.runtime.fsdp import reshard
from shared.runtime.generation import InProcessGenerator, Sampling
from shared.trainers.distillation_rows import (
    draws,
    evenly_chosen,
    last_prompt,
    places_in_step,
    unpadded,
    with_answers,
)
from shared.trainers.keeping import preserved_randomness
from shared.trainers.offline import OfflineTrainer
from shared.trainers.reference import AdapterOff, FrozenCopy, unwrapped


class DistillationTrainer(OfflineTrainer):
    """Base of the distillation trainers; a subclass loads student and teacher and reads the rows.

    Args:
        policy: the token policy around `model`.
        longest_prompt: prompts lose their beginning beyond so many tokens before they are answered; None: no cut.
        answered: whether the rows come with answers; the student answers held-out rows that have none.
        processing_class: the tokenizer.
        As OfflineTrainer otherwise, with DistillationOptions.

    Attributes:
        teacher, generator: set by `take_teacher`.
    """

    teacher: FrozenCopy | AdapterOff
    generator: InProcessGenerator

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        policy: TokenPolicy,
        longest_prompt: int | None,
        answered: bool,
        processing_class: Any,
        **kwargs: Any,
    ):
        self.policy, self.longest_prompt, self.answered = policy, longest_prompt, answered
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.report.units = {"loss": "nats per token", "entropy": "nats per token"}
        pad = processing_class.pad_token_id
        self.pads = SupervisedCollator(pad, pad_to_multiple_of=args.pad_to_multiple_of)

    def take_teacher(self, model: nn.Module | None) -> None:
        """Put the teacher where it can be run, frozen; None: the student without its adapter."""
        known = sorted(each.config.get_text_config().vocab_size for each in (self.model, model or self.model))
        self.generator = InProcessGenerator(
            self.processing_class,
            suppressed=range(*known),  # what one head is padded with, the other model cannot read
            max_rows=self.args.generation_rows,
            gather_weights=self.args.ds3_gather_for_generation,
        )
        if model is None:
            self.teacher = AdapterOff(self.policy)
            return
        self.teacher = FrozenCopy(model, accelerator=self.accelerator, policy=self.policy, share_prefix=False)

    # ---- Answers ---------------------------------------------------------------------------------------------------

    def rewritten(self, batches: list[GroupedBatch]) -> list[GroupedBatch]:
        args = self.args
        if not (args.lmbda or args.seq_kd):
            return batches
        device = batches[0].completion_ids.device
        batches = [batch.to("cpu") for batch in batches]
        sizes = [batch.rows for batch in batches]
        places = places_in_step(sizes, args.process_index, args.world_size)
        seeds = (args.seed, self.state.global_step)
        own = evenly_chosen(sum(sizes) * args.world_size, args.lmbda, seeds)
        answers: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in batches]
        for teacher in (False, True) if args.seq_kd else (False,):
            if all(each == teacher for each in own):  # of no process
                continue
            asked = [(at, row) for at, each in enumerate(places) for row, p in enumerate(each) if own[p] != teacher]
            asked = [(at, row) for at, row in asked if batches[at].columns["counted"][row]]
            random = [draws(*seeds, places[at][row]) for at, row in asked]
            sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
            written = self.write(batches, asked, sampling, random, teacher=teacher)
            for (at, row), pair in zip(asked, written, strict=True):
                answers[at][row] = pair
        self._record_own(batches, places, own)
        made = [with_answers(batch, found, self.pads) for batch, found in zip(batches, answers, strict=True)]
        return [batch.to(device) for batch in made]

    def write(
        self,
        batches: Sequence[GroupedBatch],
        asked: Sequence[tuple[int, int]],
        sampling: Sampling,
        random: Sequence[torch.Generator] | None,
        *,
        teacher: bool = False,
        measured: bool = True,
    ) -> list[tuple[Tensor, Tensor]]:
        """Prompts of some rows, cut where they are too long, with answers to them. To be called by every process.

        Args:
            batches: of whole rows, on the CPU.
            asked: number of the batch and of the row in it; may be none of this process's.
            sampling, random: how tokens are drawn; a generator for each row.
            teacher: who writes.
            measured: put lengths into the log.
        """
        rows = {at: unpadded(batches[at]) for at in {0, *(at for at, _ in asked)}}
        prompts = [last_prompt(*rows[at][row], self.longest_prompt) for at, row in asked]
        if idle := not prompts:  # the passes of another process may need this one
            if self.args.world_size == 1:
                return []
            prompts, random = [rows[0][0][0][:1]], None if random is None else [draws(0)]
        inputs = left_padded([prompt.numpy() for prompt in prompts], self.processing_class.pad_token_id)
        with self._writing(teacher) as model:
            done = self.generator.generate(model, inputs, 1, sampling, random=random)
        if idle:
            return []
        if measured:
            lengths = torch.tensor([float(len(ids)) for ids in done.ids], device=self.args.device)
            cut = torch.tensor([not each for each in done.finished], device=self.args.device)
            self.record("completions/mean_length", lengths.sum(), len(lengths))
            self.record("completions/clipped_ratio", cut.sum(), len(lengths))
        return list(zip(prompts, done.ids, strict=True))

    @contextlib.contextmanager
    def _writing(self, teacher: bool) -> Iterator[nn.Module]:
        with preserved_randomness():
            if teacher:
                with self.teacher.running(self.model) as model:
                    yield unwrapped(model)
            else:
                with evaluating(self.model), self.accelerator.autocast():
                    yield self.model
                    reshard(self.model)

    def _record_own(self, batches: Sequence[GroupedBatch], places: Sequence[range], own: Sequence[bool]) -> None:
        counted = torch.cat([batch.columns["counted"] for batch in batches])
        chosen = torch.tensor([own[place] for each in places for place in each]) & counted
        device = self.args.device
        self.record("on_policy", chosen.sum().to(device), counted.sum().to(device))

    # ---- Divergence ------------------------------------------------------------------------------------------------

    def divergence(self, model: nn.Module, batch: GroupedBatch, *, entropy: bool) -> tuple[Tensor, DistillationStats]:
        """Sum of the divergence over the counted tokens, with its gradient where the model has one, and figures.

        Args:
            model: the student as the engine wraps it.
            batch: whole rows.
            entropy: also measure the student's entropy.
        """
        args = self.args
        target = self._of_teacher(model, batch)

        def at_head(student: Head | Tensor) -> tuple[Tensor | None, ...]:
            pair = common_tokens(student, target)
            total, stats = head_jsd_sum(*pair, beta=args.beta, temperature=args.loss_temperature, entropy=entropy)
            return total, *stats

        return self.policy.at_head(model, batch, at_head, DistillationStats)

    def _of_teacher(self, model: nn.Module, batch: GroupedBatch) -> Head | Tensor:
        """The teacher's head at the counted tokens, or its logits."""
        found: list[Head | Tensor] = []

        def keep(head: Head | Tensor) -> tuple[Tensor, ...]:
            whole = isinstance(head, Head) and is_sharded(own)  # gathered for this call alone
            found.append(head._replace(weight_VH=head.weight_VH.clone(), bias=_copy(head.bias)) if whole else head)
            return (batch.completion_ids.new_zeros((), dtype=torch.float32),)

        with self.teacher.running(model) as own:
            self.teacher.policy.at_head(own, batch, keep, tuple)
        return found[-1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: GroupedBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean divergence per counted token, times the number of processes."""
        total, stats = self.divergence(model, inputs, entropy=self.logs_this_step())
        self.record("agreement", stats.agrees.sum(), stats.agrees.numel())
        if stats.entropy is not None:
            self.record("entropy", stats.entropy.sum(), stats.entropy.numel())
        loss = total * (self.args.world_size / self.step["counted"])
        return (loss, stats) if return_outputs else loss

    def evaluation_sums(self, model: nn.Module, batch: GroupedBatch) -> dict[str, Tensor]:
        if not self.answered:
            batch = self._answered_greedily(batch)
        total, stats = self.divergence(model, batch, entropy=True)
        tokens = torch.tensor(stats.agrees.numel(), device=total.device)
        return {"loss": total, "agreement": stats.agrees.sum(), "entropy": stats.entropy.sum(), "tokens": tokens}

    def _answered_greedily(self, batch: GroupedBatch) -> GroupedBatch:
        device, batch = batch.completion_ids.device, batch.to("cpu")
        asked = [(0, row) for row, counted in enumerate(batch.columns["counted"].tolist()) if counted]
        greedy = Sampling(max_new_tokens=self.args.max_new_tokens, temperature=0.0)
        written = self.write([batch], asked, greedy, None, measured=False)
        answers = {row: pair for (_, row), pair in zip(asked, written, strict=True)}
        return with_answers(batch, answers, self.pads).to(device)

    def evaluation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        tokens = max(sums.pop("tokens"), 1.0)
        return {name: value / tokens for name, value in sums.items()}


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
