"""What settles the options of the online trainers, beside AlignConfig."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from shared.errors import UserError
from shared.trainers.config import FOLLOWED
from shared.trainers.recipes import with_recipe
from shared.trainers.rollout import round_shape

SERVER = "Give it to the server when it is started."
ADDRESS = "Give the whole address, vllm_server_base_url."
AS_THEY_END = "Leave it out: finished completions leave the batch in any case."
# what other libraries' configurations of such trainers take -> what to do instead
NOT_TAKEN = {
    "vllm_mode": "Leave it out: the server that vllm_server_base_url names is used.",
    "vllm_server_host": ADDRESS,
    "vllm_server_port": ADDRESS,
    "vllm_group_port": "Leave it out: new weights go through files in vllm_sync_dir.",
    "vllm_gpu_memory_utilization": SERVER,
    "vllm_tensor_parallel_size": SERVER,
    "vllm_max_model_length": SERVER,
    "vllm_model_impl": SERVER,
    "vllm_enable_sleep_mode": "Leave it out: the server has devices of its own.",
    "vllm_structured_outputs_regex": "Completions are not held to a pattern here: reward those that have it.",
    "vllm_importance_sampling_clip_max": "It is called vllm_importance_sampling_cap.",
    "vllm_importance_sampling_clip_min": "Leave it out: the weight is bounded from above alone.",
    "off_policy_mask_threshold": "Leave it out: delta bounds the ratio of samples that are worse than their group.",
    "cast_lm_head_to_fp32": "Leave it out: logits become log-probabilities in float32 in any case.",
    "cache_implementation": "Leave it out: the cache grows as it is needed.",
    "use_transformers_paged": AS_THEY_END,
    "use_transformers_continuous_batching": AS_THEY_END,
    "transformers_continuous_batching_config": AS_THEY_END,
    "max_tool_calling_iterations": "Leave it out: completions that call tools are not written here.",
    "log_unique_prompts": "Leave it out: tables show whole groups.",
    "log_multimodal": "Leave it out: tables show the images that there are.",
    "log_completions_hub_repo": "Leave it out: samples are in the run report.",
    "num_mini_batches": "Give steps_per_generation, or gradient_accumulation_steps.",
    "rloo_k": "It is called num_generations.",
    "kl_coef": "It is called beta.",
    "response_length": "It is called max_completion_length.",
    "max_seq_length": "Give max_prompt_length and max_completion_length.",
    "max_length": "Give max_prompt_length and max_completion_length.",
}


class OnlineConfig:
    """Mixed into a configuration with RolloutOptions, before AlignConfig."""

    followed: ClassVar[dict[str, tuple]] = {
        **FOLLOWED,
        "train_sampling_strategy": ("random",),
        "auto_find_batch_size": (False,),
    }
    not_taken: ClassVar[dict[str, str]] = NOT_TAKEN

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With the recipe that is named below the options that are given."""
        given = super().completed(given)
        return with_recipe(given) if any(field.name == "recipe" for field in fields(cls)) else given

    def _check_options(self) -> None:
        if self.train_sampling_strategy != "random":
            raise UserError(
                f"train_sampling_strategy {self.train_sampling_strategy}: prompts are drawn in random order, or with "
                "shuffle_dataset false in that of the rows. Leave it at random."
            )
        super()._check_options()

    def __post_init__(self):
        super().__post_init__()
        self.logging_nan_inf_filter = False  # it would hide from the log that a run has broken down
        self._settle_the_round()
        for name in ("steps_per_generation", "num_iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1.")
        round_shape(self, self.world_size)
        if (
            self.reward_weights is not None
            and self.reward_funcs
            and len(self.reward_weights) != len(self.reward_funcs)
        ):
            raise UserError(
                f"reward_weights has {len(self.reward_weights)} number(s) for {len(self.reward_funcs)} reward(s): "
                "give one each."
            )

    def _settle_the_round(self) -> None:
        """Say how long a round of sampling lasts by steps_per_generation, however that was asked for."""
        if self.generation_batch_size is None:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            return
        rows = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size % rows:
            raise UserError(
                f"generation_batch_size {self.generation_batch_size}: must be a multiple of {rows}, the rows of a "
                "micro-batch over all processes."
            )
        steps = self.generation_batch_size // rows
        if self.steps_per_generation not in (None, steps):
            raise UserError(
                f"generation_batch_size {self.generation_batch_size} asks for {steps} micro-batches a round and "
                f"steps_per_generation for {self.steps_per_generation}; the two say the same: give one of them."
            )
        self.steps_per_generation = steps

    def chosen(self) -> dict[str, Any]:
        chosen = super().chosen()
        if self.generation_batch_size is not None:
            chosen.pop("steps_per_generation", None)  # follows from it, and from the number of processes
        return chosen
