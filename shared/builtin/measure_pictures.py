"""What the shipped text-to-image pipelines reach on held-out prompts: their cards tell it, tests check it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shared.builtin import load_dataset, pipeline_path
from shared.builtin.pictures import SIZE
from shared.builtin.pictures_judge import right_colour, right_form

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

STEPS = 10
GUIDANCE = 2.5


def load_pipeline(name: str) -> DiffusionPipeline:
    """The built-in pipeline in float32, without a progress bar."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(pipeline_path(name), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: DiffusionPipeline, prompts: list[str], steps: int = STEPS, guidance: float = 1.0, seed: int = 0
) -> list[Image]:
    """A picture for each prompt, by the pipeline's own call; guidance of 1 is none."""
    # Of T5; the usual 256 tokens give the same pictures, only later.
    options = {"max_sequence_length": pipeline.tokenizer.model_max_length} if hasattr(pipeline, "transformer") else {}
    options |= {"num_inference_steps": steps, "guidance_scale": guidance, "height": SIZE, "width": SIZE}
    return pipeline(prompts, generator=torch.Generator().manual_seed(seed), **options).images


def pipeline_figures(name: str) -> dict[str, str]:
    """Measured of a pipeline, by what it is: without guidance and with, every test prompt at two seeds."""
    pipeline, prompts = load_pipeline(name), load_dataset("builtin/picture-prompts", "test")["prompt"][:]
    found = {}
    for guidance, told in ((1.0, "no guidance"), (GUIDANCE, f"guidance {GUIDANCE}")):
        pictures = [picture for seed in (0, 1) for picture in sample(pipeline, prompts, guidance=guidance, seed=seed)]
        for what, judge in (("colour", right_colour), ("form", right_form)):
            share = sum(judge(pictures, prompts * 2)) / len(pictures)
            found[f"{what} as asked for, {STEPS} steps, {told}"] = f"{share:.1%}"
    return found
