"""The base of the text trainers' configurations, and what scripts written for TRL give it under other names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from transformers import TrainingArguments

from shared.errors import UserError
from shared.trainers.config import FOLLOWED, AlignConfig
from shared.trainers.online_config import WithRecipe

# what other versions of these configurations take -> what to do instead
NOT_TAKEN = {
    "max_seq_length": "It is called max_length.",
    "max_target_length": "It is called max_completion_length.",
    "evaluation_strategy": "It is called eval_strategy.",
    "tokenizer": "Give the tokenizer to the trainer, as processing_class.",
    "dataset_batch_size": "Leave it out: rows are turned into tokens in batches of a fixed size.",
    "num_of_sequences": "Leave it out: packed rows are made before training, max_length tokens each.",
    "chars_per_token": "Leave it out: packed rows are made of tokens, not of characters.",
    "router_aux_loss_coef": "A router's auxiliary loss is not part of the objectives here: leave it out.",
    "use_liger_loss": "Leave it out: whole logits never exist here in any case.",
    "vllm_mode": "Leave it out: the server that vllm_server_base_url names is used.",
    "vllm_server_host": "Give the whole address, vllm_server_base_url.",
    "vllm_server_port": "Give the whole address, vllm_server_base_url.",
    "vllm_gpu_memory_utilization": "Give it to the server when it is started.",
    "vllm_importance_sampling_clip_max": "It is called vllm_importance_sampling_cap.",
    "cache_implementation": "Leave it out: the cache grows as it is needed.",
    "use_transformers_paged": "Leave it out: finished completions leave the batch in any case.",
    "log_unique_prompts": "Leave it out: tables show whole groups.",
    "num_mini_batches": "Give steps_per_generation, or gradient_accumulation_steps.",
    "rloo_k": "It is called num_generations.",
    "kl_coef": "It is called beta.",
    "response_length": "It is called max_completion_length.",
    "generate_during_eval": "Leave it out: eval_answers held-out rows are answered before and after training.",
}


class _TextConfigClass(WithRecipe):
    """Looks at the words before a dataclass does, which would answer with a bare TypeError."""

    def __call__(cls, *args: Any, trust_remote_code: bool | None = None, **given: Any):
        for name in given.keys() & NOT_TAKEN.keys():
            raise UserError(f"{name} is not an option of {cls.__name__}. {NOT_TAKEN[name]}")
        config = super().__call__(*args, **given)
        if trust_remote_code is not None:  # on the command line it is one of the model's options
            config.model_init_kwargs = {"trust_remote_code": trust_remote_code, **(config.model_init_kwargs or {})}
        return config


@dataclass
class TextConfig(AlignConfig, metaclass=_TextConfigClass):
    """AlignConfig of trainers whose rows are turned into tokens before training, so that their lengths are known.

    In Python `trust_remote_code` is taken too, and goes into `model_init_kwargs`.

    Raises:
        UserError: names that other libraries' configurations take and this one does not, with what to give instead.
    """

    followed: ClassVar[dict[str, tuple]] = {
        **FOLLOWED,
        "train_sampling_strategy": ("group_by_length", "random", "sequential"),
    }

    @classmethod
    def of(cls, args: Any) -> Self:
        """The options a trainer is given, as its own class: the defaults for None.

        A plain transformers.TrainingArguments gives what differs from its defaults; the rest is the suite's.

        Raises:
            UserError: the options of another trainer.
        """
        if args is None:
            return cls()
        if type(args) is TrainingArguments:
            usual = TrainingArguments()
            names = (field.name for field in fields(TrainingArguments) if field.init)
            return cls(**{n: getattr(args, n) for n in names if getattr(args, n) != getattr(usual, n)})
        if not isinstance(args, cls):
            raise UserError(f"args is a {type(args).__name__}; give a {cls.__name__}, which takes the same options.")
        return args

    def _check_options(self) -> None:
        super()._check_options()
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = None  # no device here wants rows of certain lengths
