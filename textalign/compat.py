"""What scripts written for TRL import beside the trainers, over this suite's own options.

    from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

becomes `from textalign import …`, and the rest of the script stays. The parser is this suite's: it knows the same
names, and refuses what it does not know instead of passing it by.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from shared.errors import UserError
from shared.runtime.adapters import lora_config
from shared.runtime.arguments import AlignOptions, ModelArguments
from shared.runtime.launch import quiet_libraries
from shared.runtime.models import model_init_kwargs
from shared.runtime.options import option
from shared.runtime.parser import parse_arguments


@dataclass
class ScriptArguments:
    """Data of a script that loads its data itself."""

    dataset_name: str | None = option(None, "Data to train on: a hub id, or a local file or folder.")
    dataset_config: str | None = option(None, "Configuration (subset) of a hub data set.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    dataset_streaming: bool = option(False, "Read rows while training instead of loading the data set first.")
    ignore_bias_buffers: bool = option(False, "Leave truth-valued buffers out of what processes exchange.")


@dataclass
class DatasetMixtureConfig:
    """Mixture of data sets."""

    datasets: list[dict] = option(
        [], 'Data sets as JSON objects: {"path": …, "name": …, "data_files": …, "split": …, "columns": […]}.'
    )
    streaming: bool = option(False, "Read rows while training instead of loading the data sets first.")
    test_split_size: float | None = option(None, "Share of the rows, or number of rows, held out.")


@dataclass
class ModelConfig(ModelArguments):
    """Model and adapter."""


@dataclass
class _Environment:
    """Environment."""

    env: dict[str, Any] | None = option(None, "Environment variables to set: JSON, or a mapping in the YAML file.")


class TrlParser:
    """Reads dataclasses from the command line and from the YAML file of `--config`; the command line wins.

    Args:
        dataclass_types: the classes to fill: trainers' configurations, the classes above, and a script's own.
        prog: the script's name in the help text.
        description: what the script does, for the help text.
    """

    def __init__(
        self,
        dataclass_types: type | Iterable[type] = (),
        prog: str | None = None,
        description: str | None = None,
    ):
        self.dataclass_types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        self.prog, self.description = prog, description
        quiet_libraries()

    def parse_args_and_config(
        self, args: Sequence[str] | None = None, return_remaining_strings: bool = False, **_: Any
    ) -> tuple[Any, ...]:
        """One instance of each class, in order.

        An unknown option is always an error: the arguments of TRL's method that let one pass have no effect, and the
        list of remaining words, where it is asked for, is empty.

        Args:
            args: the words; those of this process where None.
            return_remaining_strings: add that list behind the instances.

        Raises:
            SystemExit: status 2 with one line for each fault, or 0 after `--help`.
        """
        try:
            built = self._parse(args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        return (*built, []) if return_remaining_strings else built

    parse_args_into_dataclasses = parse_args_and_config

    def _parse(self, args: Sequence[str] | None) -> tuple[Any, ...]:
        groups = [_options_of(group) for group in self.dataclass_types]
        options = parse_arguments([*groups, _Environment], args, prog=self.prog, description=self.description)
        for name, value in (options.build(_Environment).env or {}).items():
            os.environ[str(name)] = str(value)
        built = tuple(map(options.build, groups, self.dataclass_types))
        model = next((each for each in built if isinstance(each, ModelArguments)), None)
        for each in built:
            if isinstance(each, TrainingArguments) and model is not None:
                each.trust_remote_code = model.trust_remote_code  # scripts look for it on either
        return built


HfArgumentParser = TrlParser  # for scripts that take transformers' parser, which stumbles over these classes


def _options_of(group: type) -> type:
    """The part of a trainer's configuration that is the suite's own; the parser knows transformers' part itself."""
    if not issubclass(group, TrainingArguments):
        return group
    candidates = (base for base in group.__mro__ if not issubclass(base, TrainingArguments))
    own = next((base for base in candidates if issubclass(base, AlignOptions)), None)
    if own is None:
        raise UserError(f"{group.__name__} is transformers' own: give the configuration of a trainer of this suite.")
    known = {item.name for base in (own, TrainingArguments) for item in fields(base)}
    added = [item.name for item in fields(group) if item.name not in known]
    if added:
        raise UserError(
            f"{group.__name__} adds {', '.join(added)}: put a script's own options into a class of their own."
        )
    return own


def get_peft_config(model_args: ModelArguments) -> Any:
    """The LoRA configuration that the options ask for; None without `--use_peft`."""
    return lora_config(model_args)


def get_quantization_config(model_args: ModelArguments) -> Any:
    """The configuration of `--load_in_4bit` or `--load_in_8bit`; None without them."""
    return model_init_kwargs(model_args).get("quantization_config")


def get_kbit_device_map() -> dict[str, int | str]:
    """Where a quantised model is put, all of it: this process's GPU, or the processor."""
    import torch
    from accelerate import PartialState

    return {"": PartialState().local_process_index if torch.cuda.is_available() else "cpu"}


def get_dataset(mixture_config: DatasetMixtureConfig) -> Any:
    """Load the data sets of a mixture and join them.

    Returns:
        A datasets.DatasetDict with the split "train", and "test" where `test_split_size` is given.

    Raises:
        UserError: the mixture is empty, or a stream is to be split.
    """
    import datasets

    if not mixture_config.datasets:
        raise UserError("datasets is empty: name at least one data set.")
    if mixture_config.streaming and mixture_config.test_split_size is not None:
        raise UserError("test_split_size: a stream cannot be split. Leave out one of the two.")
    parts = []
    for given in mixture_config.datasets:
        loading = {"split": "train", **given}
        columns = loading.pop("columns", None)
        part = datasets.load_dataset(**loading, streaming=mixture_config.streaming)
        parts.append(part.select_columns(columns) if columns else part)
    joined = datasets.concatenate_datasets(parts)
    if mixture_config.test_split_size is not None:
        return joined.train_test_split(test_size=mixture_config.test_split_size)
    return datasets.DatasetDict({"train": joined})
