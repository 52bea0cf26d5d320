"""PPO with a loop of one's own: write answers, score them, and hand both back for an update.

    for batch in trainer.dataloader:
        responses = trainer.generate(batch["input_ids"], return_prompt=False)
        scores = [my_reward(text) for text in tokenizer.batch_decode(responses)]
        stats = trainer.step(batch["input_ids"], responses, scores)

That is the contract of TRL's PPOTrainer up to 0.11. A call of `step` is a round as `train` has it, by the same code:
it takes `num_iterations` epochs of optimizer steps. With several processes each hands over its own rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_constant_schedule

from shared.data.collators import left_padded
from shared.errors import UserError
from shared.objectives.moments import mean_and_variance, moment_sums
from shared.rewards.base import Sample
from shared.runtime.generation import InProcessGenerator, Sampling
from shared.trainers.rollout import Buffer, Rollout, cut
from shared.trainers.token_rollouts import Prompt, TokenActions
from textalign.best_of_n_settings import settings_of
from textalign.preparing import load_tokenizer
from textalign.prompting import prompts_are_tokens, with_texts

NO_ROWS = [{"prompt": "-"}]  # what stands where a loop of one's own needs no data set


class StepByStep:
    """Mixed into PPOTrainer, before what makes it a trainer.

    Attributes:
        without: what the trainer was not given, so that `train` cannot be called.
    """

    without: str | None = None

    # ---- What may be left out where train() is not called -----------------------------------------------------------

    def given_rows(self, model: Any, args: Any, tokenizer: Any, train: Any, held_out: Any) -> tuple[Any, Any, Any]:
        """Tokenizer and rows, prompts that are given as tokens with their text beside them."""
        if train is None:
            self.without = "train_dataset is missing: give the rows to train on."
            train, held_out = NO_ROWS, None
        several = held_out if isinstance(held_out, dict) else {"": held_out}
        if any(prompts_are_tokens(rows) for rows in (train, *several.values())):
            tokenizer = load_tokenizer(model, args, tokenizer)
            train = with_texts(train, tokenizer)
            several = {name: with_texts(rows, tokenizer) for name, rows in several.items()}
        return tokenizer, train, several if isinstance(held_out, dict) else several[""]

    def without_reward(self) -> Callable:
        """What stands where there is no reward: scores are handed to `step`."""
        said = "There is no reward: give reward_funcs or reward_model, or score samples yourself and call step()."
        self.without = self.without or said

        def scores(completions: list, **_: Any) -> list[float]:
            raise UserError(said)

        return scores

    def train(self, *args: Any, **kwargs: Any):
        """As shared.trainers.base.AlignTrainer.train."""
        if self.without is not None:
            raise UserError(self.without)
        return super().train(*args, **kwargs)

    @property
    def dataloader(self) -> DataLoader:
        """The training prompts, in an order of their own each time: `step`'s rows for this process.

        A batch has a list for each column of the rows, `query` with the prompts' texts, and `input_ids` with their
        tokens, `(L,)` each. What does not fill a batch is left out.
        """
        if self.train_dataset.dataset is NO_ROWS:
            raise UserError("train_dataset is missing: give the rows whose prompts are to be drawn.")
        share = self.train_dataset.share(self.args.process_index, self.args.world_size)
        return DataLoader(
            share,
            batch_size=self.local_rows,
            shuffle=self.args.shuffle_dataset,
            drop_last=True,
            collate_fn=self._asked,
        )

    def _asked(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        names = [name for name in rows[0] if not name.startswith("__")]
        encoder = self.actor.encoder
        return {
            **{name: [row.get(name) for row in rows] for name in names},
            "query": [encoder.shown(row)[1] for row in rows],
            "input_ids": [prompt.ids for prompt in encoder.prompts(rows)],
        }

    # ---- Writing ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Answers of the policy as it is, sampled as in training where nothing else is said.

        Args:
            query_tensor: prompts' tokens `(L,)`, or one prompt's.
            length_sampler: gives the longest answer's tokens, once a batch.
            batch_size: prompts answered at once; None: all.
            return_prompt: put the prompt before each answer.
            generate_ref_response: also give the reference's answers.
            generation_kwargs: settings of transformers' generation that sample: max_new_tokens, temperature, top_k, …

        Returns:
            A list of tensors on the model's device; of one prompt alone a tensor `(1, n)`. With the reference's
            answers a pair of these.

        Raises:
            UserError: prompts that are no tokens, or settings that are not followed.
        """
        alone = isinstance(query_tensor, Tensor) and query_tensor.dim() == 1
        queries = self._tokens("query_tensor", [query_tensor] if alone else list(query_tensor))
        values, ends = settings_of(None, None, generation_kwargs)
        engine = self.actor.engine if ends is None else InProcessGenerator(self.run.tokenizer, end_ids=ends)

        def answers(model: Any) -> list[Tensor]:
            found = []
            size = batch_size or len(queries)
            for start in range(0, len(queries), size):
                own = queries[start : start + size]
                longest = {} if length_sampler is None else {"max_new_tokens": int(length_sampler())}
                sampling = Sampling(**{**asdict(self.actor.sampling["train"]), **values, **longest})
                inputs = left_padded(own, self.run.tokenizer.pad_token_id)
                done = engine.generate(model, inputs, 1, sampling, random=self.random)
                pairs = zip(own, done.ids, strict=True)
                found += [torch.cat([query, ids]) if return_prompt else ids for query, ids in pairs]
            found = [ids.to(self.args.device) for ids in found]
            return found[0][None] if alone else found

        with self.acting() as model:
            written = answers(model)
        if not generate_ref_response:
            return written
        if not self.args.beta:
            raise UserError("generate_ref_response: there is no reference where beta (kl_coef) is 0.")
        with self.reference.running(self.model_wrapped) as model:
            return written, answers(self.accelerator.unwrap_model(model))

    def _tokens(self, name: str, given: Sequence[Any]) -> list[Tensor]:
        for at, each in enumerate(given):
            whole = isinstance(each, Tensor) and not each.is_floating_point() and each.dtype != torch.bool
            if not whole or each.dim() != 1 or not len(each):
                said = f"a tensor {list(each.shape)}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
                raise UserError(f"{name}[{at}] is {said}: give tokens, a tensor (n,) of whole numbers with n > 0.")
        return [each.detach().long().cpu() for each in given]

    # ---- Learning --------------------------------------------------------------------------------------------------

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float] | Tensor,
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, float]:
        """Learn from scored answers: one round.

        Args:
            queries: prompts' tokens `(L,)`, as many as this process has of a round: per_device_train_batch_size ×
                steps_per_generation (`args.batch_size` of TRL).
            responses: their answers' tokens `(n,)`, the ending token with them.
            scores: one number each; NaN where none is known.
            response_masks: 1 at the tokens of an answer that are learnt from, 0 at others (what a tool wrote); all
                where None.

        Returns:
            The figures that `train` logs, of this round and its steps, over all processes.

        Raises:
            UserError: other counts, types or shapes.
        """
        rollout = self._given_round(queries, responses, scores, response_masks)
        self._ready()
        for name, value in self.finish_round(rollout).items():
            self._noted[name].append(value)
        window = self.args.gradient_accumulation_steps
        parts = cut(rollout.lengths, self.unit, self.args.per_device_train_batch_size, window)
        self.buffer = Buffer(rollout, parts, self.args.num_iterations, born=self.state.global_step)
        micro_batches = iter(self._micro_batches, None)
        loss, steps = 0.0, 0
        while not self.buffer.spent:
            left = len(parts) * self.args.num_iterations - self.buffer.cursor
            loss += self._update(micro_batches, min(left, self.args.gradient_accumulation_steps))
            steps += 1
        stats = {**self._means(), **self._drain_metrics(), "loss/total": loss / steps, **self._spread(rollout)}
        self._noted.clear()
        self.buffer = None
        return stats

    def log_stats(self, stats: dict[str, float], batch: Any = None, rewards: Sequence[Tensor | float] = ()) -> None:
        """Log what `step` gave, as `train` logs: in `state.log_history`, and to the trackers of `report_to`.

        Args:
            stats: as `step` gives it.
            batch: not looked at; TRL's name of an argument.
            rewards: the scores, whose mean and spread are logged as `env/reward_mean` and `env/reward_std`.
        """
        found = _scores(rewards)
        more = {"env/reward_mean": found.mean().item(), "env/reward_std": found.std().item()} if len(found) > 1 else {}
        self.log({**stats, **more})

    def _micro_batches(self):
        return self.micro_batch(self.buffer, self.buffer.next())

    def _update(self, micro_batches: Any, count: int) -> float:
        """One optimizer step, as transformers' loop takes it; gives its loss."""
        batches, items = self.get_batch_samples(micro_batches, count, self.args.device)
        model, total = self.model_wrapped, torch.zeros((), device=self.args.device)
        for at, batch in enumerate(batches):
            last = at == count - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                total += self.training_step(model, batch, items)
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.before_step()
        self.optimizer.step()
        self.lr_scheduler.step()
        model.zero_grad()
        self.state.global_step += 1
        self.after_step()
        return self.accelerator.reduce(total, "mean").item()

    def _ready(self) -> None:
        """Make optimizer and schedule, and wrap the model, at the first step."""
        if isinstance(self.optimizer, AcceleratedOptimizer):
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError("step() runs in one process or several whole ones; under DeepSpeed and FSDP call train().")
        self.create_optimizer()
        if self.lr_scheduler is None and self.args.max_steps <= 0:  # how long the loop is, is not known
            self.lr_scheduler = get_constant_schedule(self.optimizer)
        self._prepare_for_training(max(self.args.max_steps, 1), None, None)

    def _given_round(self, queries: Any, responses: Any, scores: Any, masks: Any) -> Rollout:
        for name, given in (("queries", queries), ("responses", responses)):
            if not isinstance(given, (list, tuple)):
                raise UserError(f"{name} is a {type(given).__name__}: give a list of tensors.")
        if not hasattr(scores, "__len__") or isinstance(scores, Tensor) and not scores.dim():
            raise UserError("scores is one number: give a list, one number for each answer.")
        counts = {"queries": len(queries), "responses": len(responses), "scores": len(scores)}
        counts |= {} if masks is None else {"response_masks": len(masks)}
        if set(counts.values()) != {self.local_rows}:
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise UserError(
                f"{found}: give {self.local_rows} of each, per_device_train_batch_size "
                f"{self.args.per_device_train_batch_size} × steps_per_generation {self.args.steps_per_generation} "
                "(batch_size)."
            )
        queries, responses = self._tokens("queries", queries), self._tokens("responses", responses)
        own = self.model.generation_config.eos_token_id
        known = [self.run.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        ends = torch.tensor([each for each in known if each is not None], dtype=torch.long)
        texts = [self.run.tokenizer.batch_decode(each, skip_special_tokens=True) for each in (queries, responses)]
        samples = [
            Sample(*pair, {"completion_ids": ids.tolist()}) for *pair, ids in zip(*texts, responses, strict=True)
        ]
        actions = TokenActions([Prompt(ids) for ids in queries], responses)
        lengths = torch.tensor([len(ids) for ids in responses])
        cut_off = torch.tensor([not torch.isin(ids[-1], ends) for ids in responses])
        rollout = Rollout(samples, 1, actions, lengths, cut_off)
        rollout.total = _scores(scores)
        rollout.rewards = rollout.total[:, None].expand(-1, len(self.rewards.names)).clone()
        if masks is not None:
            rollout.columns["counted"] = _masks(masks, responses)
        return rollout

    def _spread(self, rollout: Rollout) -> dict[str, float]:
        """Means of what the round's actions were worth, over all processes."""
        named = {"returns/mean": "returns", "advantages/mean": "advantages", "values/mean": "values"}
        counted = torch.cat(rollout.columns.get("counted", [torch.ones_like(row) for row in rollout.old]))
        sums = torch.stack([moment_sums(torch.cat(rollout.columns[name]), counted) for name in named.values()])
        return {name: mean_and_variance(own)[0].item() for name, own in zip(named, self._everyones(sums), strict=True)}


def _scores(given: Any) -> Tensor:
    """`(B,)` float32; raises UserError for what is no number each, or an infinite one."""
    found = []
    for at, each in enumerate(given):
        value = each.detach().float().cpu() if isinstance(each, Tensor) else each
        if isinstance(value, Tensor) and value.numel() != 1 or not isinstance(value, Tensor | Real):
            said = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"scores[{at}] is {said}: give one number for each answer.")
        found.append(float(value))
        if math.isinf(found[-1]):
            raise UserError(f"scores[{at}] is {found[-1]}: give finite numbers, or NaN where there is no score.")
    return torch.tensor(found)


def _masks(given: Sequence[Any], responses: Sequence[Tensor]) -> list[Tensor]:
    for at, (mask, ids) in enumerate(zip(given, responses, strict=True)):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise UserError(f"response_masks[{at}] is {shape}: give a tensor {list(ids.shape)}, as the answer.")
        if not mask.bool().any():
            raise UserError(f"response_masks[{at}] leaves no token to learn from.")
    return [mask.detach().bool().float().cpu() for mask in given]
