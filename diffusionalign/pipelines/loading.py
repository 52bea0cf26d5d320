"""Pipelines from hub ids, folders and built-in names, and the adapter of each; errors before anything is downloaded.

Weights are read from safetensors alone, and no code that comes with a pipeline is run. Which weights are trained is
decided in `saving`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusionalign.pipelines.base import PipelineAdapter
from shared.builtin import is_builtin, pipeline_path
from shared.errors import UserError
from shared.hub import require_available
from shared.runtime.models import without_progress_bars

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# pipeline class -> its adapter
ADAPTERS = {
    "StableDiffusionPipeline": "diffusionalign.pipelines.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "diffusionalign.pipelines.stable_diffusion:StableDiffusionXL",
    "StableDiffusion3Pipeline": "diffusionalign.pipelines.flow:StableDiffusion3",
    "FluxPipeline": "diffusionalign.pipelines.flow:Flux",
}
LORA_FILE = "pytorch_lora_weights.safetensors"
# options of loading that other models take -> what is so of pipelines; None and False ask for nothing
NOT_TAKEN = {
    "attn_implementation": "diffusers chooses the attention itself. Leave it out.",
    "quantization_config": "pipelines are not quantised here. Leave load_in_4bit and load_in_8bit out.",
    "trust_remote_code": "no code that comes with a pipeline is run. Leave it out.",
}
EXACT = ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler")  # whose steps are those of the deterministic sampler
TAKEN = ("dtype", "torch_dtype", "revision", "variant")


def adapter_of(pipeline: DiffusionPipeline, *, max_sequence_length: int | None = None) -> PipelineAdapter:
    """The adapter of a loaded pipeline.

    Args:
        pipeline: of diffusers.
        max_sequence_length: tokens of a prompt for a T5 encoder; None: as many as the pipeline's own call takes.

    Raises:
        UserError: a pipeline, or a scheduler, that cannot be trained here.
    """
    names = [each.__name__ for each in type(pipeline).__mro__]
    found = next((ADAPTERS[name] for name in names if name in ADAPTERS), None)
    if found is None:
        raise UserError(_unsupported(names[0]))
    module, _, name = found.partition(":")
    return getattr(importlib.import_module(module), name)(pipeline, max_sequence_length=max_sequence_length)


def load_pipeline(
    model: str | DiffusionPipeline,
    *,
    dtype: torch.dtype | str | Mapping[str, torch.dtype] | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a pipeline.

    Args:
        model: hub id, folder or built-in name; a loaded pipeline is given back as it is.
        dtype: a torch type or its name, or a type for each part and for the "default"; None: float32.
        revision: branch, tag or commit.
        variant: of the files, for example "fp16".

    Raises:
        UserError: unknown id, no network, no pipeline, or one that cannot be trained here.
    """
    if not isinstance(model, str | Path):
        return model
    from diffusers import DiffusionPipeline

    name = str(pipeline_path(model)) if is_builtin(model) else str(model)
    require_available(name, file="model_index.json", what="pipeline", revision=revision)
    if Path(name).exists() and not (Path(name) / "model_index.json").is_file():
        what = "is a LoRA adapter: name its pipeline, and the adapter with adapter_name_or_path (peft_config)"
        if not (Path(name) / LORA_FILE).is_file():
            what = "holds no pipeline (no model_index.json). Give the folder that save_pretrained wrote, or a hub id"
        raise UserError(f"pipeline {model!r} {what}.")
    try:
        config = DiffusionPipeline.load_config(name, revision=revision)
        if config.get("_class_name") not in ADAPTERS:
            raise UserError(_unsupported(config.get("_class_name")))
        checker = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
        if isinstance(dtype, Mapping):
            dtype = {part: each for part, each in dtype.items() if part == "default" or part in config}
        with _without_bars():
            pipeline = DiffusionPipeline.from_pretrained(
                name,
                dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
                revision=revision,
                variant=variant,
                use_safetensors=True,
                **checker,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"pipeline {model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_pipeline(
    model: str | DiffusionPipeline, args: Any, peft_config: Any, *, max_sequence_length: int | None = None
) -> PipelineAdapter:
    """A pipeline loaded for training, in the number types that go with it.

    Weights that are trained are held in float32, because half precision loses small updates. All others are held in
    the type of the mixed precision (float32 without), or in `model_init_kwargs["dtype"]`.

    Args:
        model: hub id, folder, built-in name or a loaded pipeline.
        args: the trainer's; `bf16`, `fp16` and `model_init_kwargs` are read.
        peft_config: as the trainers take it; None: the whole denoiser is trained.
        max_sequence_length: as `adapter_of`.

    Raises:
        UserError: as `load_pipeline` and `adapter_of`; options of loading that pipelines do not take.
    """
    if model is None:
        raise UserError("model is missing: give a diffusers pipeline, or its hub id, folder or built-in name.")
    init = {key: value for key, value in (args.model_init_kwargs or {}).items() if value is not None}
    for name, value in init.items():
        if name not in TAKEN and value is not False:
            why = NOT_TAKEN.get(name, f"pipelines take {', '.join(TAKEN)}.")
            raise UserError(f"model_init_kwargs: {name}: {why}")
    dtype = {"default": frozen_type(args)}
    if peft_config is None:
        dtype |= dict.fromkeys(("unet", "transformer"), torch.float32)
    pipeline = load_pipeline(model, dtype=dtype, revision=init.get("revision"), variant=init.get("variant"))
    adapter = adapter_of(pipeline, max_sequence_length=max_sequence_length)
    if args.should_log and (name := type(pipeline.scheduler).__name__) not in EXACT:
        print(f"pipeline: its {name} is read for its noise levels; the steps are those of the sampler.", flush=True)
    return adapter


def frozen_type(args: Any) -> torch.dtype:
    """The type in which weights that are not trained are held.

    Raises:
        UserError: as `asked_type`.
    """
    return asked_type(args) or (torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32)


def asked_type(args: Any) -> torch.dtype | None:
    """The type that `model_init_kwargs` names, if it does.

    Raises:
        UserError: it is no floating type.
    """
    init = args.model_init_kwargs or {}
    asked = init.get("dtype", init.get("torch_dtype"))
    if asked in (None, "auto"):
        return None
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"model_init_kwargs: dtype {asked!r}: give auto, float32, bfloat16 or float16.")
    return found


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Neither diffusers' nor transformers'."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with without_progress_bars():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _unsupported(name: Any) -> str:
    return f"{name} is not a pipeline that can be trained here; these are: {', '.join(ADAPTERS)}."
