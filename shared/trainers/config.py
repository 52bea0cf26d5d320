"""The options of every trainer, settled: TrainingArguments plus the suite's own, fitted to the machine it runs on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import get_token
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from transformers.utils import logging

from shared.errors import UserError
from shared.runtime.arguments import AlignOptions
from shared.runtime.checkpoint import check_output_dir, default_output_dir, resume_path
from shared.runtime.launch import (
    check_devices,
    check_processes,
    has_accelerator,
    launch_request,
    prepare_cpu,
    shard_on_cpu,
)
from shared.runtime.options import BadValue, Option, choices, class_options, describe

# the least value of options that are numbers
LEAST = {
    "check_rows": 0,
    "eval_answers": 0,
    "max_new_tokens": 1,
    "max_length": 1,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "num_generations_eval": 1,
    "generation_rows": 1,
    "max_resampling": 0,
    "sample_every": 0,
    "num_completions_to_print": 0,
    "max_pixels": 1,
    "video_num_frames": 1,
    "video_min_frames": 1,
    "video_max_frames": 1,
    "video_max_pixels": 1,
    "video_total_pixels": 1,
    "pad_to_multiple_of": 1,
    "learning_rate": 0,
    "vision_learning_rate": 0,
    "projector_learning_rate": 0,
    "language_learning_rate": 0,
}
# options of transformers.TrainingArguments that would be taken and then not followed, with the values that are
FOLLOWED = {
    "label_smoothing_factor": (0.0,),
    "bf16_full_eval": (False,),
    "fp16_full_eval": (False,),
    "remove_unused_columns": (False,),
    "include_num_input_tokens_seen": ("no", False),
    "train_sampling_strategy": ("random", "sequential"),
    "use_liger_kernel": (False,),
    "include_for_metrics": ([],),
    "label_names": (None, [], ["labels"]),
}
# options that scripts written for other libraries give any trainer -> what to do instead
NOT_TAKEN = {
    "evaluation_strategy": "It is called eval_strategy.",
    "tokenizer": "Give the tokenizer, or the processor, to the trainer, as processing_class.",
    "max_seq_length": "It is called max_length.",
    "max_target_length": "It is called max_completion_length.",
    "router_aux_loss_coef": "A router's auxiliary loss is not part of the objectives here: leave it out.",
    "use_liger_loss": "Leave it out: whole logits never exist here in any case.",
    "recipe": "Recipes are of the trainers that write samples and learn by group-relative policy gradients (GRPO).",
}
# options of transformers.TrainingArguments that open accounts
SECRET = ("hub_token", "push_to_hub_token")
# what an option's value may be, besides the values that its type names
TYPES: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (Integral,),
    float: (Real,),
    str: (str, os.PathLike),
    list: (list, tuple),
    dict: (Mapping,),
    type(None): (type(None),),
}


class ConfigClass(type):
    """Looks at the words before a dataclass does, which would answer with a bare TypeError."""

    def __call__(cls, *args: Any, trust_remote_code: bool | None = None, **given: Any):
        hints = {
            name: hint for base in reversed(cls.__mro__) for name, hint in vars(base).get("not_taken", {}).items()
        }
        own = {field.name for field in fields(cls)}
        given = _renamed(given, cls.aliases)
        for name in given:
            if name in hints and name not in own:
                raise UserError(f"{name} is not an option of {cls.__name__}. {hints[name]}")
        config = super().__call__(*args, **cls.completed(given))
        if trust_remote_code is not None:  # on the command line it is one of the model's options
            config.model_init_kwargs = {"trust_remote_code": trust_remote_code, **(config.model_init_kwargs or {})}
        return config


@dataclass
class AlignConfig(AlignOptions, TrainingArguments, metaclass=ConfigClass):
    """Base of every trainer's configuration. Joining the other processes happens here, before any model is loaded.

    In Python `trust_remote_code` is taken too, and goes into `model_init_kwargs`.

    Raises:
        UserError: names that other libraries' configurations take and this one does not, with what to give instead;
            more processes than devices, or a run that is not what the launcher was asked for.
    """

    run_name_stem: ClassVar[str] = "run"  # names the folder of a run that is given none: runs/<stem>
    followed: ClassVar[dict[str, tuple]] = FOLLOWED
    not_taken: ClassVar[dict[str, str]] = NOT_TAKEN  # a class's own are told beside those of its bases

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The options that are given, with those that follow from them."""
        return given

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

    def __post_init__(self):
        self._check_options()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # LLaVA, for one, has layers behind the last one that is read
        self.use_cpu = self.use_cpu or not has_accelerator() or launch_request().cpu
        if self.use_cpu:
            self.dataloader_pin_memory = False
            prepare_cpu()
        check_devices(self.use_cpu)
        self._choose_precision()
        self._check_trackers()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else 4
        given_dir = self.output_dir
        if given_dir is None:
            self.output_dir = default_output_dir(f"runs/{self.run_name_stem}", self.resume_from_checkpoint)
        if self.data_seed is None:
            self.data_seed = self.seed  # else the order of the rows depends on the number of processes
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # each process reads its own share of a stream
        self._join()
        if self.local_process_index > 0:
            logging.disable_progress_bar()  # one bar for all
        if given_dir is None:
            self._agree_on_output_dir()

    def _check_options(self) -> None:
        own = next(base for base in type(self).__mro__ if _is_own(base))
        for name, each in class_options(own).items():
            setattr(self, name, _fitted(each, getattr(self, name)))
        for name, least in LEAST.items():
            value = getattr(self, name, None)
            if isinstance(value, Real) and value < least:
                raise UserError(f"{name} {value}: must be at least {least}.")
        for name, followed in self.followed.items():
            if (value := getattr(self, name)) not in followed:
                raise UserError(f"{name} {value} is not supported by this trainer: leave it at {followed[0]}.")
        if self.push_to_hub and self.hub_token is None and get_token() is None:
            raise UserError("--push_to_hub: nobody is logged in here. Log in (hf auth login) or give --hub_token.")

    def check_output_dir(self) -> None:
        """Say before a model is loaded what `train()` would say: that the folder is not free, or cannot be resumed.

        Raises:
            UserError: it holds another run, or no complete checkpoint to go on from.
        """
        resume = resume_path(self.resume_from_checkpoint, self.output_dir)
        check_output_dir(self.output_dir, resuming=resume is not None, overwrite=self.overwrite_output_dir)

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain values; none that opens an account."""
        given = self.to_dict()
        chosen = {}
        for field in fields(self):
            if field.name in SECRET:
                continue
            # to_dict hides whatever is called a token, those of a text too
            value = getattr(self, field.name) if field.name.endswith("_token") else given.get(field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if field.init and value != default and isinstance(value, str | int | float | bool | list | dict):
                chosen[field.name] = value
        chosen["output_dir"] = os.fspath(self.output_dir)
        return chosen

    def _choose_precision(self) -> None:
        cuda = has_accelerator() and not self.use_cpu
        if self.bf16 is None:
            capable = cuda and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
            self.bf16 = bool(capable and not self.fp16)
        elif self.bf16 and cuda and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name()
            raise UserError(f"--bf16: {name} has no bfloat16 arithmetic. Use --fp16 or --no_bf16 (float32).")
        if self.fp16 and not cuda:
            raise UserError("--fp16 needs a GPU. On the processor use --bf16, or leave both out (float32).")

    def _check_trackers(self) -> None:
        named = {self.report_to} if isinstance(self.report_to, str) else set(self.report_to)
        known = set(integration_utils.INTEGRATION_TO_CALLBACK)
        if unknown := named - known - {"none", "all"}:
            names = ", ".join(sorted(unknown))
            raise UserError(f"--report_to {names}: not one of none, all, {', '.join(sorted(known))}.")
        if missing := named - set(integration_utils.get_available_reporting_integrations()) - {"none", "all"}:
            names = " ".join(sorted(missing))
            raise UserError(f"--report_to {names}: not installed. Install it (pip install {names}), or leave it out.")

    def _join(self) -> None:
        """Form the process group, and see that it is the one that was asked for."""
        _ = self.device  # makes torch.distributed's process group
        if self.n_gpu > 1:
            self._n_gpu = 1  # torch.nn.DataParallel cannot split a batch of ours, and one process a GPU is faster
            warnings.warn(
                f"This machine shows {torch.cuda.device_count()} GPUs and one is used. To use all: accelerate launch "
                "--config_file shared/runtime/profiles/multi_gpu.yaml --num_processes …",
                stacklevel=4,
            )
        shard_on_cpu()
        check_processes(self.world_size)

    def _agree_on_output_dir(self) -> None:
        from accelerate.utils import broadcast_object_list

        self.output_dir = broadcast_object_list([self.output_dir])[0]


def _renamed(given: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Options by their names here; raises UserError where one is given under two."""
    renamed: dict[str, Any] = {}
    for name, value in given.items():
        if (known := aliases.get(name, name)) in renamed:
            raise UserError(f"{name}: another name of {known}, which is given too. Give one of them.")
        renamed[known] = value
    return renamed


def _is_own(group: type) -> bool:
    """Whether a class declares options of the suite, and none of transformers'."""
    return issubclass(group, AlignOptions) and not issubclass(group, TrainingArguments)


def _fitted(option: Option, value: Any) -> Any:
    """The value of an option that is set in Python: words are read as on the command line, the rest must fit.

    Raises:
        UserError: it does not fit the option's type.
    """
    if not option.is_writable or value in choices(option.kinds):
        return value
    if isinstance(value, str) and str not in option.kinds:
        try:
            return option.convert(value)
        except BadValue as error:
            raise UserError(f"{option.name} {value!r}: {error}.") from error
    if int in option.kinds and isinstance(value, float) and value.is_integer() and float not in option.kinds:
        return int(value)
    if not isinstance(value, tuple(kind for each in option.kinds for kind in TYPES.get(each, ()))):
        raise UserError(f"{option.name} {value!r}: must be {describe(option.kinds)}.")
    return value
