"""Learning from pairs of samples that have just been compared: online DPO, XPO and Nash-MD.

Each prompt has two completions, and rewards or a judge say which is better, or how likely the first is to be. The
loss of an optimizer step does not depend on how its pairs are cut into micro-batches and processes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.objectives.online_preference import Answers, judged_pairs, nash_md_losses, xpo_losses
from shared.objectives.pair_losses import PER_TOKEN, Pairs
from shared.objectives.preference import PairLosses, PairObjective
from shared.policies.prefix import evaluating
from shared.rewards.combine import RewardTable
from shared.runtime.generation import InProcessGenerator, Mixture, Part
from shared.trainers.online import OnlineTrainer
from shared.trainers.online_preference_config import scheduled
from shared.trainers.policy_gradient import completion_figures
from shared.trainers.preference import LEVEL, paired_objective, share_above
from shared.trainers.reference import Reference
from shared.trainers.rollout import Buffer, MicroBatch, Rollout, padded, row_number

PREFERRED = "preferred"  # column of a rollout: how likely a sample is to be preferred to the other of its prompt


class OnlinePreferenceTrainer(OnlineTrainer):
    """Online DPO (Guo et al. 2024, arXiv:2402.04792), and the base of trainers with another writer or another loss.

    Args:
        judged: the first of the rewards is a judge's, see shared.rewards.pairwise.PairReward, and decides.
        ref_model: what `reference_of` is given, once the trainer, and with it the engine, is there.
        As OnlineTrainer otherwise.

    Attributes:
        level: implicit rewards no further apart than this are taken for equal.
    """

    both_own: ClassVar[bool] = True  # both completions are the policy's; False: the first alone is
    level: ClassVar[float] = LEVEL

    def __init__(self, model: nn.Module, args: Any, *, judged: bool, ref_model: Any = None, **kwargs: Any):
        self.judged = judged
        self._objectives: dict[float, PairObjective] = {}
        super().__init__(model, args, **kwargs)
        self.reference: Reference = self.reference_of(ref_model)
        self.report.units = {"loss": "per pair", "kl": "nats", "logps/chosen": "nats", "logps/rejected": "nats"}

    def reference_of(self, ref_model: Any) -> Reference:
        """The reference that β holds the policy near to."""
        raise NotImplementedError

    def in_this_epoch(self, values: float | Sequence[float]) -> float:
        """An option's number at this step, where there may be one for each epoch."""
        return scheduled(values, int(self.last_epoch))

    # ---- Who writes ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        if self.both_own:
            yield self.model
            return
        share = self.reference_share()
        with self.reference.beside(self.model) as (reference, around):
            yield self.model, Mixture((Part(reference, share, around), Part(self.model, 1 - share)))

    def reference_share(self) -> float:
        """How much of the other completion's writer is the reference; the rest is the policy."""
        return 1.0

    # ---- Which is better -------------------------------------------------------------------------------------------

    def sampled(self, indices: list[int], group_size: int | None = None) -> Rollout:
        rollout = super().sampled(indices, group_size)
        if self.args.missing_eos_penalty:
            rollout.total = rollout.total - self.args.missing_eos_penalty * rollout.truncated
        return rollout

    def preferred(self, rollout: Rollout) -> Tensor:
        """`(B,)` how likely each sample is to be preferred to the other of its prompt; NaN: not known.

        By the judge or, where there is none, σ of how far the rewards are apart.
        """
        values = (rollout.rewards[:, 0] if self.judged else rollout.total).float()
        apart = values[0::2] - values[1::2]
        first = (apart + 1) / 2 if self.judged else apart.sigmoid()
        return torch.stack([first, 1 - first], 1).flatten()

    def teaches(self, preferred: Tensor) -> Tensor:
        """Whether pairs are learnt from, by how likely their first sample is preferred: not where neither is."""
        return ~preferred.isnan() & (preferred != 0.5)

    def informative(self, rollout: Rollout) -> Tensor:
        return self.teaches(self.preferred(rollout)[0::2])

    def finish_round(self, rollout: Rollout) -> dict[str, float]:
        rollout.ref = [None] * rollout.rows
        preferred = self.preferred(rollout)
        rollout.columns[PREFERRED] = [each.clone() for each in preferred]
        rollout.extras[PREFERRED] = [None if chance != chance else f"{chance:.2f}" for chance in preferred.tolist()]
        facts = [rollout.total.float(), preferred, rollout.lengths.float(), rollout.truncated.float()]
        own = torch.cat([rollout.rewards.float(), torch.stack(facts, 1)], 1)
        everyones = self.accelerator.gather(own.to(self.args.device))
        figures = self._figures(everyones[:, : -len(facts)], *everyones[:, -len(facts) :].unbind(1))
        return {name: float(value) for name, value in figures.items()}

    def _figures(
        self, rewards: Tensor, total: Tensor, preferred: Tensor, lengths: Tensor, truncated: Tensor
    ) -> dict[str, Tensor]:
        own = slice(None) if self.both_own else slice(0, None, 2)
        first = preferred[0::2]
        figures = {"frac_reward_zero_std": (first.isnan() | (first == 0.5)).float().mean()}
        named = list(zip(self.rewards.names, rewards[own].unbind(1), strict=True))[int(self.judged) :]
        for name, values in named:
            if len(values := values[~values.isnan()]) > 1:
                figures |= {f"rewards/{name}/mean": values.mean(), f"rewards/{name}/std": values.std()}
        known = ~total.isnan()
        if not self.judged and len(values := total[own][known[own]]) > 1:
            figures |= {"reward": values.mean(), "reward_std": values.std(), "objective/scores": values.mean()}
        better, worse = total[(preferred > 0.5) & known], total[(preferred < 0.5) & known]
        if not self.judged and len(better) and len(better) == len(worse):
            figures |= {"scores/chosen": better.mean(), "scores/rejected": worse.mean()}
            figures["objective/scores_margin"] = better.mean() - worse.mean()
        figures["val/contain_eos_token"] = 1 - truncated[own].mean()
        if not self.both_own:
            figures["val/other_contain_eos_token"] = 1 - truncated[1::2].mean()
            if len(chances := first[~first.isnan()]):
                figures |= {"win_rate": _wins(chances).mean(), "rewards/probabilities": chances.mean()}
        return figures | completion_figures(lengths[own], truncated[own])

    # ---- The update ------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> int:
        """How many of a pair's samples, from the first one on, are learnt from."""
        return 2

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        rollout, size = buffer.rollout, self.trained
        firsts = rows[0::2]
        chance = torch.stack(rollout.columns[PREFERRED])
        taught = [at for at in firsts if bool(self.teaches(chance[at]))]
        # every process runs its model in every micro-batch: of one that teaches nothing the shortest pair
        held = taught or [min(firsts, key=lambda at: int(rollout.lengths[at : at + 2].max()))]
        own = [at + member for at in held for member in range(size)]
        batch = self.actor.batch(rollout, own, size)
        batch.columns[PREFERRED] = chance[held]
        batch.columns["counted"] = torch.full((len(held),), bool(taught))
        if all(rollout.ref[row] is not None for row in own):
            batch.columns["ref"] = padded([rollout.ref[row] for row in own], batch.action_mask.shape[1])
        counted = own if taught else []
        self._noted["frac_rows_trained"].append(len(taught) / len(firsts))
        on_policy = buffer.born == self.state.global_step
        counts = (2 * len(taught), int(rollout.lengths[counted].sum()))
        return MicroBatch(batch, rollout, own, counts, on_policy)

    def prepare_step(self, batches: list[MicroBatch]) -> None:
        """What terms that are means over tokens are divided by."""
        self.step_sums["chosen_tokens"] = torch.ones((), device=self.args.device)
        if self.trained == 2 and PER_TOKEN & set(self.objective.names):
            tokens = [_chosen_tokens(micro.batch) for micro in batches]
            total = torch.stack(tokens).sum().float().to(self.args.device)
            self.step_sums["chosen_tokens"] = self.accelerator.reduce(total, "sum").clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """These pairs' share of the step's mean loss, times the number of processes."""
        batch = inputs.batch
        out = self.policy.log_probs(model, batch)
        ref = batch.columns.get("ref")
        if ref is None:
            ref = self.reference.log_probs(model, batch)
            self._remember(inputs, ref)
        mask = batch.action_mask.bool()
        loss = self.loss(inputs, out.logp, ref, mask) * self.args.world_size
        return (loss, out.logp) if return_outputs else loss

    def loss(self, inputs: MicroBatch, logp: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        """Scalar: these pairs' share of the step's mean.

        Args:
            inputs: what the rows are.
            logp, ref: `(B, T)` under policy and reference, 0 where nothing is counted; rows are pairs.
            mask: `(B, T)` bool.
        """
        counted, preferred = inputs.batch.columns["counted"], inputs.batch.columns[PREFERRED]
        sums = [values.masked_fill(~mask, 0).sum(1) for values in (logp, ref)]
        tokens = mask.sum(1).float()
        first, second = (Answers(*(values[at::2][counted] for values in (*sums, tokens))) for at in (0, 1))
        wins = preferred[counted] > 0.5
        losses = self.pair_losses(first, second, wins)
        self._record_pairs(judged_pairs(first, second, wins), losses)
        own = counted.repeat_interleave(2)
        own[1::2] &= self.both_own
        self._record_own(*(values[own].detach() for values in (*sums, tokens)))
        return losses.total(pairs=self.step_sums["rows"] / 2, tokens=self.step_sums["chosen_tokens"])

    @property
    def objective(self) -> PairObjective:
        """The loss of pairs, by this epoch's β."""
        beta = self.in_this_epoch(self.args.beta)
        if beta not in self._objectives:
            self._objectives[beta] = paired_objective(self.args, beta=beta)
        return self._objectives[beta]

    def pair_losses(self, first: Answers, second: Answers, wins: Tensor) -> PairLosses:
        """The losses of pairs whose first answer wins where `wins`."""
        return self.objective(judged_pairs(first, second, wins))

    def _remember(self, inputs: MicroBatch, ref: Tensor) -> None:
        """Keep what the reference gave, for the round's further iterations."""
        if self.args.num_iterations == 1:
            return
        values, rollout = ref.float().cpu(), inputs.rollout
        for at, row in enumerate(inputs.rows):
            rollout.ref[row] = values[at, : rollout.lengths[row]].clone()

    def _record_pairs(self, pairs: Pairs, losses: PairLosses) -> None:
        chosen, rejected = losses.chosen_rewards, losses.rejected_rewards
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": share_above(chosen - rejected, self.level),
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
        for name, value in values.items():
            self.record(name, value.sum(), len(value))
        for name, term in losses.terms.items() if len(losses.terms) > 1 else ():
            self.record(f"loss/{name}", term.sum(), pairs.chosen_tokens.sum() if name in PER_TOKEN else len(term))

    def _record_own(self, logp: Tensor, ref: Tensor, tokens: Tensor) -> None:
        """How far the policy's own samples are from the reference; the sampled estimates, all `(n,)`."""
        beta = self.in_this_epoch(self.args.beta)
        self.record("objective/kl", (logp - ref).sum(), len(logp))
        self.record("objective/non_score_reward", -beta * (logp - ref).sum(), len(logp))
        self.record("objective/entropy", -logp.sum(), len(logp))
        self.record("kl", (logp - ref).sum(), tokens.sum())
        self.record("entropy", -logp.sum(), tokens.sum())

    # ---- Held-out prompts ------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout, mode: str = "train") -> RewardTable:
        """Rewards; where a judge decides, held-out answers are judged against the reference's to the same prompts."""
        if not self.judged or mode == "train":
            return super().score(rollout, mode)
        rows = [{**sample.columns, "prompt": sample.prompt} for sample in rollout.samples[:: rollout.group_size]]
        random = torch.Generator(self.args.device).manual_seed(row_number(rollout.samples[0]) + 1)
        with self.reference.beside(self.model) as (reference, around):
            writer = Mixture((Part(reference, 1.0, around),))
            others = self._beside.act(writer, rows, rollout.group_size, random=random, mode=mode)
        pairs = [each for pair in zip(rollout.samples, others.samples, strict=True) for each in pair]
        rewards = self.rewards_of_answers if mode == "greedy" else self.rewards
        table = rewards(pairs, trainer_state=self.state, group_size=2, mode=mode)
        extras = {name: values[0::2] for name, values in table.extras.items()}
        return replace(table, values=table.values[0::2], extras=extras)

    @property
    def _beside(self) -> Any:
        """Writes the reference's answers in this process, also where a server writes the policy's."""
        if self.actor.exact:
            return self.actor
        actor = copy.copy(self.actor)
        actor.engine = InProcessGenerator(self.processing_class, max_rows=self.args.generation_rows)
        return actor


class ExploringPreferenceTrainer(OnlinePreferenceTrainer):
    """XPO (Xie et al. 2024, arXiv:2405.21046): own samples against the reference's, which are made less likely.

    Arguments as OnlinePreferenceTrainer.
    """

    both_own = False

    def pair_losses(self, first: Answers, second: Answers, wins: Tensor) -> PairLosses:
        losses, alpha = super().pair_losses(first, second, wins), self.in_this_epoch(self.args.alpha)
        per_pair = xpo_losses(first, second, wins, lambda _: losses.per_pair, alpha=alpha)
        terms = losses.terms | {"xpo": (per_pair - losses.per_pair).detach()}
        return replace(losses, per_pair=per_pair, terms=terms)


class NashPreferenceTrainer(OnlinePreferenceTrainer):
    """Nash-MD-PG (Munos et al. 2023, arXiv:2312.00886): own samples against those of a mixture with the reference.

    The policy's sample alone is learnt from, by how likely it is to be preferred. Right on policy alone. Arguments as
    OnlinePreferenceTrainer.
    """

    both_own = False

    def reference_share(self) -> float:
        return self.in_this_epoch(self.args.mixture_coef)

    def teaches(self, preferred: Tensor) -> Tensor:
        return ~preferred.isnan()  # where neither is better the divergence counts all the same

    @property
    def trained(self) -> int:
        return 1

    def loss(self, inputs: MicroBatch, logp: Tensor, ref: Tensor, mask: Tensor) -> Tensor:
        assert inputs.on_policy, "the objective's gradient is right on policy alone"
        columns, beta = inputs.batch.columns, self.in_this_epoch(self.args.beta)
        # first of all: of a row that does not count the chance is NaN, and so would be its share of the gradient
        logp, ref, mask, chance = (each[columns["counted"]] for each in (logp, ref, mask, columns[PREFERRED]))
        losses = nash_md_losses(logp, ref, mask, chance, beta=beta, credit=self.args.kl_credit)
        sums = [values.detach().masked_fill(~mask, 0).sum(1) for values in (logp, ref)]
        self._record_own(*sums, mask.sum(1).float())
        if self._logs_next():
            self._measure_pairs(inputs, *sums, beta)
        return losses.sum() / (self.step_sums["rows"] / 2)

    @torch.no_grad()
    def _measure_pairs(self, inputs: MicroBatch, own: Tensor, own_ref: Tensor, beta: float) -> None:
        """The implicit rewards of both samples; those of the mixture's are run for this alone."""
        counted = inputs.batch.columns["counted"]
        others = [row + 1 for row in inputs.rows]
        batch = self.actor.batch(inputs.rollout, others, 1).to(self.args.device)
        with evaluating(self.model):
            logp = self.policy.log_probs(self.model_wrapped, batch).logp.float().sum(1)[counted]
        ref = self.reference.log_probs(self.model_wrapped, batch).sum(1)[counted]
        chance = inputs.batch.columns[PREFERRED][counted]
        decided = chance != 0.5
        tokens = torch.ones_like(own)
        first, second = (
            Answers(*(values[decided] for values in (one, other, tokens)))
            for one, other in ((own, own_ref), (logp, ref))
        )
        pairs = judged_pairs(first, second, chance[decided] > 0.5)
        rewards = beta * pairs.u, beta * pairs.v
        self._record_pairs(pairs, PairLosses(pairs.u, pairs.v, {}, *rewards))


def _wins(chances: Tensor) -> Tensor:
    """1 where the first is likelier to be preferred, 0 where the second is, ½ where neither."""
    return (chances > 0.5).float() + 0.5 * (chances == 0.5)


def _chosen_tokens(batch: Any) -> Tensor:
    lengths, first = batch.action_mask.sum(1).view(-1, 2), batch.columns[PREFERRED] > 0.5
    return torch.where(first, lengths[:, 0], lengths[:, 1])[batch.columns["counted"]].sum()
