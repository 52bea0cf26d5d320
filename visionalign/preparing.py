"""What every vision-language trainer does before it trains: family and processor first, the model at last."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.integrations.deepspeed import deepspeed_config

from shared.data.schema import Kind
from shared.errors import UserError
from shared.runtime.adapters import attach_adapter
from shared.runtime.launch import engine_asked
from shared.runtime.models import HUB_OPTIONS, Head, load_config, load_model, load_processor, without_dropout
from shared.trainers.datasets import checked_rows, kind_of
from visionalign.families import PARTS, Family, family_of, parameters
from visionalign.image_options import check_image_options, check_processor_kwargs, with_image_options


@dataclass(frozen=True)
class VLMRun:
    """A vision-language model that is still to be loaded: its name for titles, its family, its processor."""

    model_name: str
    family: Family
    processor: ProcessorMixin


def prepare_vlm(model: str | nn.Module, args: Any, processing_class: ProcessorMixin | None) -> VLMRun:
    """Family and processor of a model; which one it is is printed.

    Args:
        model, args, processing_class: the trainer's.

    Raises:
        UserError: a text-only model, or one that does not say where its processor is; options on images that it
            cannot follow.
    """
    if not isinstance(model, (str, nn.Module)):
        raise UserError(f"model is a {type(model).__name__}: give its name or folder as a string, or a loaded model.")
    options = args.model_init_kwargs or {}
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    family = family_of(load_config(model, **hub) if isinstance(model, str) else model.config)
    check_image_options(args, family)
    given = getattr(args, "processor_kwargs", None) or {}
    if processing_class is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise UserError("processing_class is missing: this model does not say where its processor is.")
        processing_class = load_processor(name, **{**hub, **given})
        check_processor_kwargs(given, processing_class)
    elif given:
        raise UserError("processor_kwargs: the processor is given, so none is loaded; set them on that one.")
    processing_class = with_image_options(processing_class, args, family)
    name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
    if args.should_log:
        print(f"model: {name} ({family.name})", flush=True)
    return VLMRun(name, family, processing_class)


def prepare_rows(train: Any, held_out: Any, allowed: Collection[Kind], args: Any) -> tuple[Kind, Any, Any]:
    """What the rows are, and those that can be used of the training and of the held-out ones.

    Images and videos are opened in so many rows as `args.check_rows` says.

    Args:
        train, held_out, args: the trainer's.
        allowed: the kinds that the trainer takes.

    Raises:
        UserError: no rows, or something that is no data set.
        DataError: columns or rows that cannot be used, named.
    """
    kind = kind_of(train, allowed)
    opened = sys.maxsize if args.check_rows is None else args.check_rows
    return kind, *checked_rows(train, held_out, kind, args, check_images=opened)


def left_out_notes(rows: Any) -> dict[int, str]:
    """Row number -> that it is left out, and why."""
    return {row: f"left out: {why}" for row, why in getattr(rows, "left_out", {}).items()}


def load_vlm(
    model: str | PreTrainedModel | nn.Module,
    args: Any,
    *,
    head: Head = "image-text-to-text",
    peft_config: Any = None,
    **options: Any,
) -> nn.Module:
    """The model to train: loaded where it is given by name, with its adapter, parts of it frozen as the options say.

    Args:
        model, args, peft_config: the trainer's.
        head: which of transformers' heads.
        options: more for `from_pretrained`.

    Raises:
        UserError: see shared.runtime.models.load_model and shared.runtime.adapters.attach_adapter; or everything is
            frozen.
    """
    set_seed(args.seed)  # weights that are drawn here are alike in all processes
    if isinstance(model, str):
        init = {**(args.model_init_kwargs or {}), **options}
        frozen = peft_config is not None
        model = load_model(model, head=head, frozen=frozen, seed=args.seed, **init)
    set_seed(args.seed)  # what loading draws differs between engines, and an adapter should not
    adapter = {"path": peft_config} if isinstance(peft_config, str) else {"config": peft_config}
    model = attach_adapter(model, **adapter, checkpointing=bool(args.activation_checkpointing))
    _freeze(model, args)
    if getattr(args, "disable_dropout", False):
        without_dropout(model)
    return model


def shards_the_model() -> bool:
    """Whether processes share out the model's weights or gradients, so that all must run its vision tower each time.

    Also ZeRO-1 and 2: they add up gradients in the order in which they come, which has to be alike everywhere.
    """
    return deepspeed_config() is not None or engine_asked("DEEPSPEED") or engine_asked("FSDP")


def _freeze(model: nn.Module, args: Any) -> None:
    frozen = (args.freeze_vision_tower, args.freeze_projector, args.freeze_language_model)
    for part, freeze in zip(PARTS, frozen, strict=True):
        for parameter in parameters(model, part).values() if freeze else []:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("Every part of the model is frozen: nothing would be trained. Leave one --freeze_… out.")
