"""DiffusionTrainerMixin: a trained denoiser is written so that plain diffusers loads it, and read back in place.

A LoRA is one file, `pytorch_lora_weights.safetensors`, that has its scale: `pipeline.load_lora_weights(folder)` gives
what was trained. Full training ends in a folder that `from_pretrained` takes. Checkpoints have the denoiser's weights
alone, in the same files; what else a resumed run needs is written by `shared.trainers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusionalign.pipelines.base import PipelineAdapter
from diffusionalign.pipelines.loading import LORA_FILE
from shared.errors import UserError
from shared.runtime.models import without_progress_bars

PEFT_PREFIX = "base_model.model."
METADATA = "lora_adapter_metadata"  # where diffusers looks for a LoRA's configuration
# what of it makes a difference to one who loads it
SHAPE = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora",
)  # fmt: skip
SCALE = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
HOW = "Go on with the options of the run that wrote it; run.yaml beside it holds them."


class DiffusionTrainerMixin:
    """How diffusion trainers write and read weights; stands before a trainer of `shared.trainers` among the bases.

    `self.adapter` is set before transformers' part is initialised.
    """

    adapter: PipelineAdapter
    _whole = True  # whether a pipeline is written, or what a checkpoint needs

    def title(self) -> str:
        """The trainer and what it trains."""
        return f"{type(self).__name__.removesuffix('Trainer')}: {type(self.adapter.pipeline).__name__}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the LoRA as `load_lora_weights` takes it, or the whole pipeline as `from_pretrained` does; say where.

        Args:
            output_dir: the folder; `args.output_dir` where None.
        """
        self._whole = not _internal_call
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            with without_progress_bars():
                save_denoiser(self.adapter, self.model, folder, state=state_dict, whole=self._whole)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_denoiser(self.adapter, self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            restore_denoiser(self.adapter, self.model, Path(self.state.best_model_checkpoint))


def save_denoiser(
    adapter: PipelineAdapter,
    model: nn.Module,
    folder: Path,
    *,
    state: dict[str, Tensor] | None = None,
    whole: bool = True,
) -> None:
    """Write a trained denoiser.

    Args:
        adapter: of its pipeline.
        model: the denoiser, or the PEFT model around it.
        folder: is made where it is not there.
        state: the model's weights where an engine has gathered them.
        whole: with the rest of the pipeline, where the whole denoiser is trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, name = adapter.pipeline, adapter.denoiser_name
    if hasattr(model, "peft_config"):
        chosen = model.peft_config["default"].to_dict()
        given = {
            key: sorted(value) if isinstance(value, set) else value for key, value in chosen.items() if key in SHAPE
        }
        layers = {key: value.contiguous() for key, value in _lora_state(model, state).items()}
        pipeline.save_lora_weights(folder, **{f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": given})
        return
    own = folder / name
    model.save_config(own)
    weights = {key: value.contiguous() for key, value in (state or model.state_dict()).items()}
    save_file(weights, own / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    if whole:
        for key, part in pipeline.components.items():
            if part is not None and key != name:
                part.save_pretrained(folder / key)
        pipeline.save_config(folder)


def restore_denoiser(adapter: PipelineAdapter, model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into the parameters that are there, which are those that the optimizer holds.

    Raises:
        UserError: it is a checkpoint of another pipeline, or of another adapter.
    """
    from peft import set_peft_model_state_dict

    lora, full = folder / LORA_FILE, folder / adapter.denoiser_name
    adapted = hasattr(model, "peft_config")
    if not (lora.is_file() if adapted else full.is_dir()):
        other = "a LoRA" if lora.is_file() else "a whole denoiser" if full.is_dir() else "another kind of model"
        ours = f"a LoRA on a {type(adapter.denoiser).__name__}" if adapted else f"a {type(adapter.denoiser).__name__}"
        raise UserError(f"{folder} is a checkpoint of {other}, not of {ours}. {HOW}")
    if not adapted:
        parts = [load_file(path) for path in sorted(full.glob("*.safetensors"))]
        saved = {name: value for part in parts for name, value in part.items()}
        _same(folder, saved, model.state_dict())
        model.load_state_dict(saved, strict=True)
        return
    prefix = f"{adapter.denoiser_name}."
    saved = {name.removeprefix(prefix): value for name, value in load_file(lora).items() if name.startswith(prefix)}
    _same(folder, saved, _lora_state(model))
    with safetensors.safe_open(lora, "pt") as file:
        told = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    for name in SCALE:
        ours, theirs = getattr(model.peft_config["default"], name), told.get(f"{prefix}{name}")
        if f"{prefix}{name}" in told and theirs != ours:
            raise UserError(f"{folder} is a checkpoint of a LoRA with {name}={theirs!r}, this one has {ours!r}. {HOW}")
    set_peft_model_state_dict(model, {PEFT_PREFIX + name: value for name, value in saved.items()})


def _lora_state(model: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The trained adapter's weights, by the denoiser's own names."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, state_dict=state, adapter_name="default")
    return {name.removeprefix(PEFT_PREFIX): value for name, value in found.items()}


def _same(folder: Path, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise UserError unless the two have weights of the same names and shapes."""
    for name in sorted(set(saved) | set(own)):
        theirs, ours = (tuple(each[name].shape) if name in each else "nothing" for each in (saved, own))
        if theirs != ours:
            raise UserError(
                f"{folder} is not a checkpoint of this pipeline: {name} is {theirs} there, {ours} here. {HOW}"
            )
