"""Options of PPO on text, settled; and what scripts written for TRL's two kinds of PPO give it under other names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from shared.errors import UserError
from shared.trainers.online_config import OnlineConfig
from textalign.config import TextConfig
from textalign.ppo_options import PPOOptions

COMPUTED = "Leave it out: it follows from the others."
TRACKERS = "Leave it out: trackers are set up by their own variables; report_to names them."
ADAPTERS = "Leave it out: the active adapter is trained, and the model without it is the reference."
# options of trl's PPO configurations, 0.11 and 1.12 -> what to do instead
NOT_TAKEN = {
    "sft_model_path": "Give it as the model: as it is at the start it is the reference too.",
    "local_rollout_forward_batch_size": "Leave it out: a micro-batch is run at once; generation_rows bounds writing.",
    "num_sample_generations": "Give sample_every, the steps between two tables of samples.",
    "stop_token_id": "Give its text as stop_strings, or eos_token.",
    "exp_name": "It is called run_name.",
    "model_adapter_name": ADAPTERS,
    "ref_adapter_name": ADAPTERS,
    "world_size": COMPUTED,
    "num_total_batches": COMPUTED,
    "micro_batch_size": COMPUTED,
    "local_batch_size": COMPUTED,
    "local_mini_batch_size": COMPUTED,
    "backward_batch_size": COMPUTED,
    "global_backward_batch_size": COMPUTED,
    "global_batch_size": COMPUTED,
    "steps": "It is called max_steps, and counts optimizer steps.",
    "log_with": "It is called report_to.",
    "tracker_kwargs": TRACKERS,
    "tracker_project_name": TRACKERS,
    "project_kwargs": "Give output_dir.",
    "accelerator_kwargs": "Leave it out: a launch profile says how processes run (accelerate launch --config_file).",
    "task_name": "Leave it out: it only names a run, as run_name does.",
    "model_name": "Give it to the trainer, as model.",
    "query_dataset": "Give it to the trainer, as train_dataset.",
    "reward_model": "Give it to the trainer, or its name as reward_model_path.",
    "compare_steps": "Leave it out: it has no effect.",
    "optimize_cuda_cache": "Leave it out: torch_empty_cache_steps empties the cache.",
    "optimize_device_cache": "Leave it out: torch_empty_cache_steps empties the cache.",
    "is_encoder_decoder": "Leave it out: models that continue a prompt are trained here.",
    "is_peft_model": "Leave it out: the model says so itself.",
    "push_to_hub_if_best_kwargs": "Give push_to_hub and load_best_model_at_end.",
    "forward_batch_size": "It is called mini_batch_size, or per_device_train_batch_size.",
}


@dataclass
class PPOConfig(OnlineConfig, PPOOptions, TextConfig):
    """Options of PPOTrainer: PPOOptions and transformers.TrainingArguments.

    Names of TRL's configurations that mean an option here are taken: see shared.trainers.actor_critic_options.ALIASES.
    In Python `batch_size`, a process's samples of a round, `early_stopping` and `stop_token="eos"` are taken too.
    """

    run_name_stem: ClassVar[str] = "ppo"
    least_generations: ClassVar[int] = 1
    not_taken: ClassVar[dict[str, str]] = NOT_TAKEN

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With what a few options of TRL's mean here."""
        given = super().completed(given)
        if given.pop("stop_token", None) not in (None, "eos"):
            raise UserError(
                "stop_token: completions end at the tokenizer's ending token. Give others as stop_strings."
            )
        if (early := given.pop("early_stopping", None)) is not None:
            given["target_kl"] = given.get("target_kl", 1.0) if early else None
        if (rows := given.pop("batch_size", None)) is not None:
            size = given.setdefault("per_device_train_batch_size", rows)
            if rows % size:
                raise UserError(f"batch_size {rows}: must be a multiple of mini_batch_size {size}.")
            given["steps_per_generation"] = rows // size
        return given

    def __post_init__(self):
        if self.reward_model_path is not None and self.reward_model_path not in self.reward_funcs:
            self.reward_funcs = [*self.reward_funcs, self.reward_model_path]
        super().__post_init__()
        if self.total_episodes is None:
            return
        a_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        steps = math.ceil(self.total_episodes * self.num_iterations / a_step)
        if self.max_steps not in (-1, steps):
            raise UserError(f"max_steps {self.max_steps}: total_episodes says how long the run is. Give one of them.")
        self.max_steps = steps

    def _settle_the_round(self) -> None:
        if self.num_mini_batches < 1:
            raise UserError(f"num_mini_batches {self.num_mini_batches}: must be at least 1.")
        steps = self.gradient_accumulation_steps * self.num_mini_batches
        if self.steps_per_generation is None and self.generation_batch_size is None:
            self.steps_per_generation = steps
        super()._settle_the_round()
        if self.num_mini_batches > 1 and self.steps_per_generation != steps:
            raise UserError(
                f"num_mini_batches {self.num_mini_batches} asks for {steps} micro-batches a round, and "
                f"steps_per_generation (or generation_batch_size) for {self.steps_per_generation}. Give one of them."
            )
