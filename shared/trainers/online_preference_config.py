"""What settles the options of the trainers that learn from pairs of their own samples, beside AlignConfig."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from shared.errors import UserError
from shared.trainers.online_config import OnlineConfig


class OnlinePreferenceConfig(OnlineConfig):
    """Mixed into a configuration with OnlinePreferenceOptions, before AlignConfig."""

    not_taken: ClassVar[dict[str, str]] = {
        "vllm_guided_decoding_regex": "Completions are not held to a pattern here: reward those that have it.",
        "gpu_memory_utilization": "Give it to the server when it is started.",
        "num_mini_batches": "Give steps_per_generation, or gradient_accumulation_steps.",
        "num_ppo_epochs": "It is called num_iterations.",
        "dataset_num_proc": "Leave it out: prompts become tokens as they are drawn.",
        "reward_model": "Give its folder or hub id as reward_model_path, or the model to the trainer as reward_funcs.",
    }

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With max_new_tokens, by other libraries' name, as the longest completion where none is given."""
        longest = given.get("max_new_tokens")
        if longest is not None and given.get("max_completion_length") is None:
            given = {**given, "max_completion_length": longest}
        return super().completed(given)

    def _check_options(self) -> None:
        super()._check_options()
        if self.num_generations != 2:
            raise UserError(f"num_generations {self.num_generations}: must be 2, since pairs of samples are compared.")
        if self.per_device_train_batch_size % 2:
            raise UserError(
                f"per_device_train_batch_size {self.per_device_train_batch_size}: must be even. It counts samples, of "
                "which each prompt has two that are learnt from together."
            )
        if self.reward_model_path is not None:
            if self.reward_funcs not in ([], [self.reward_model_path]):
                raise UserError("reward_model_path and reward_funcs are both given: name all rewards in reward_funcs.")
            self.reward_funcs = [self.reward_model_path]
        if self.judge is not None:
            check_judged(self)
        if self.missing_eos_penalty is not None and self.missing_eos_penalty < 0:
            raise UserError(f"missing_eos_penalty {self.missing_eos_penalty}: must be at least 0; it is taken off.")
        check_schedule("beta", self.beta)

    def on_policy_alone(self, why: str) -> None:
        """Raise UserError where a sample would be learnt from after the model has moved; to be called when settled."""
        steps, window = self.steps_per_generation, self.gradient_accumulation_steps
        if self.num_iterations > 1:
            raise UserError(f"num_iterations {self.num_iterations}: must be 1. {why}")
        if window % steps:
            raise UserError(
                f"steps_per_generation {steps}: must divide gradient_accumulation_steps {window}, so that a round "
                f"ends with an optimizer step. {why}"
            )


def check_judged(args: Any) -> None:
    """Raise UserError for options that say something of rewards where a judge decides."""
    for name in ("missing_eos_penalty", "reward_weights"):
        if getattr(args, name) is not None:
            raise UserError(
                f"{name}: there is a judge, beside which rewards are only measured. Leave one of them out."
            )


def check_schedule(name: str, values: float | Sequence[float], *, most: float = float("inf")) -> None:
    """Raise UserError unless an option's number, or those of each epoch, are from 0 to `most`."""
    each = values if isinstance(values, (list, tuple)) else [values]
    if not each or not all(isinstance(value, (int, float)) and 0 <= value <= most for value in each):
        bound = "at least 0" if most == float("inf") else f"from 0 to {most:g}"
        raise UserError(f"{name} {values}: must be {bound}, one number or one for each epoch.")


def scheduled(values: float | Sequence[float], epoch: int) -> float:
    """An option's number in an epoch; of a list the last one is for all further epochs."""
    return float(values[min(epoch, len(values) - 1)] if isinstance(values, (list, tuple)) else values)
