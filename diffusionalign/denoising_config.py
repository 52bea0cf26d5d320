"""What settles the options of the trainers whose actions are denoising steps, and other libraries' names for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from shared.errors import UserError
from shared.trainers.online_config import OnlineConfig

TRAINER = "Give it to the trainer"
NOT_TAKEN = {
    "sample_num_steps": "It is called num_inference_steps.",
    "sample_eta": "It is called eta.",
    "sample_guidance_scale": "It is called guidance_scale.",
    "sample_batch_size": "It is called generation_rows.",
    "sample_num_batches_per_epoch": "Give steps_per_generation, or generation_batch_size: pictures of a round.",
    "train_batch_size": "It is called per_device_train_batch_size: pictures, of whose steps pairs_at_once are run.",
    "train_gradient_accumulation_steps": "It is called gradient_accumulation_steps, of whole pictures.",
    "train_num_inner_epochs": "It is called num_iterations.",
    "train_learning_rate": "It is called learning_rate.",
    "train_clip_range": "It is called epsilon.",
    "train_adv_clip_max": "It is called advantage_clip.",
    "train_cfg": "Leave it out: guidance is in training what it is in sampling; guidance_scale 1 is without.",
    "train_max_grad_norm": "It is called max_grad_norm.",
    "train_use_8bit_adam": "Give optim: adamw_bnb_8bit.",
    "train_adam_beta1": "It is called adam_beta1.",
    "train_adam_beta2": "It is called adam_beta2.",
    "train_adam_weight_decay": "It is called weight_decay.",
    "train_adam_epsilon": "It is called adam_epsilon.",
    "negative_prompts": "It is called negative_prompt.",
    "per_prompt_stat_tracking": "Give advantages: prompt.",
    "per_prompt_stat_tracking_buffer_size": "It is called prompt_buffer_size.",
    "per_prompt_stat_tracking_min_count": "It is called prompt_min_count.",
    "async_reward_computation_workers": "Leave it out: rewards are scored in order, in one thread.",
    "max_workers": "Leave it out: rewards are scored in order, in one thread.",
    "num_epochs": "Give max_steps, or num_train_epochs: how often all prompts are drawn.",
    "mixed_precision": "Give bf16 or fp16.",
    "allow_tf32": "It is called tf32.",
    "log_with": "It is called report_to.",
    "project_kwargs": "Give output_dir.",
    "tracker_kwargs": "Leave it out: trackers are set up by their own variables.",
    "accelerator_kwargs": "Leave it out: give accelerate launch a configuration.",
    "tracker_project_name": "Leave it out: trackers are set up by their own variables.",
    "logdir": "Give output_dir.",
    "resume_from": "It is called resume_from_checkpoint.",
    "save_freq": "It is called save_steps.",
    "num_checkpoint_limit": "It is called save_total_limit.",
    "use_lora": "Leave it out: a LoRA is trained unless peft_config is None.",
    "num_image_per_prompt": "It is called num_generations.",
    "sde_window_size": "It is called window_size.",
    "sde_window_range": "Give window: random with window_start and window_end.",
    "global_std": "Give scale_rewards: batch.",
}  # fmt: skip


# of DiffusionOptions
COUNTS = (
    "num_inference_steps", "eval_num_inference_steps", "height", "width", "max_sequence_length", "generation_rows",
    "vae_slice",
)  # fmt: skip


def check_counts(args: Any, names: Iterable[str] = COUNTS) -> None:
    """Raise UserError where one of these options is given and below 1."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"{name} {value}: must be at least 1.")


class DenoisingConfig(OnlineConfig):
    """Mixed into a configuration with DenoisingOptions, before AlignConfig."""

    not_taken: ClassVar[dict[str, str]] = NOT_TAKEN

    @property
    def least_generations(self) -> int:
        """Of each prompt: alone a picture has no group to be compared with."""
        return 2 if self.advantages == "group" else 1

    def _check_options(self) -> None:
        super()._check_options()
        check_counts(self, ("prompt_buffer_size", "prompt_min_count", "pairs_at_once", *COUNTS))
        if self.advantage_clip is not None and self.advantage_clip <= 0:
            raise UserError(f"advantage_clip {self.advantage_clip}: must be above 0; none does not hold them.")
        if self.advantages == "prompt" and self.prompt_min_count > self.prompt_buffer_size:
            raise UserError(
                f"prompt_min_count {self.prompt_min_count}: more than the {self.prompt_buffer_size} rewards that "
                "prompt_buffer_size keeps of a prompt, so that its own would never be used."
            )
        if self.advantages != "group" and self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError("multi_objective_aggregation normalize_then_sum: for advantages group alone.")
        if self.advantages != "group" and self.scale_rewards not in (True, "group"):
            raise UserError(
                f"scale_rewards {self.scale_rewards}: for advantages group alone; those of {self.advantages} are "
                "divided by the deviation of what they are compared with."
            )
        if self.dynamic_sampling and self.num_generations < 2:
            raise UserError("dynamic_sampling looks at groups: give num_generations of at least 2, or leave it out.")
