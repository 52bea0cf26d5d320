"""Diffusion trainers in one launch: their losses, figures and final weights as JSON, written by process 0.

accelerate launch --config_file PROFILE diffusion_worker.py FOLDER RUN...
"""

import json
import os
import sys
from pathlib import Path

from shared.runtime.command import run_command

sys.path.append(str(Path(__file__).parent.parent))  # last: its folders bear the packages' names

GLOBAL_BATCH = 4


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    facts = {name: train(name, folder / name) for name in names}
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def train(name: str, folder: Path) -> dict:
    """What a run gives; plain SGD, since Adam's first steps are the signs of rounding errors."""
    from accelerate.utils import gather_object

    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": GLOBAL_BATCH // processes, "max_steps": 3,
        "per_device_eval_batch_size": 2, "learning_rate": 0.1, "logging_steps": 1, "eval_answers": 0, "optim": "sgd",
        "save_strategy": "no", "disable_tqdm": True, "sample_every": 0,
    }  # fmt: skip
    trainer = RUNS[name](options)
    trainer.train()
    weights = [float(p.detach().double().square().sum()) for p in trainer.model.parameters() if p.requires_grad]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "held_out": {key: value for key, value in trainer.evaluate().items() if "loss" in key or "reward" in key},
        "weights": weights,
        "ranks": gather_object([weights]),
    }


def preference(options: dict):
    import numpy as np
    from PIL import Image
    from tiny_pipelines import tiny_pipeline

    from diffusionalign import DiffusionDPOConfig, DiffusionDPOTrainer

    def picture(seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))

    # of the second step of an epoch one row, which only one process has
    rows = [{"prompt": f"row {at}", "chosen": picture(at), "rejected": picture(at + 50)} for at in range(5)]
    args = DiffusionDPOConfig(beta=500, **options)
    return DiffusionDPOTrainer(tiny_pipeline("sd"), args=args, train_dataset=rows, eval_dataset=rows[:3])


def forward_process(options: dict):
    from tiny_pipelines import tiny_pipeline

    from diffusionalign import DiffusionNFTConfig, DiffusionNFTTrainer

    args = DiffusionNFTConfig(
        **options,
        num_generations=2,
        num_inference_steps=3,
        eval_num_inference_steps=2,
        noise_levels=2,
        num_iterations=2,
    )
    rows = {"train_dataset": ["a", "bb", "c d"], "eval_dataset": ["e", "f f"]}
    return DiffusionNFTTrainer(tiny_pipeline("sd3"), brightness, args, **rows)


def backpropagation(options: dict):
    """All that could come between a process's gradient and the others': steps and layers run again, a second pass."""
    from tiny_pipelines import tiny_pipeline

    from diffusionalign import AlignPropConfig, AlignPropTrainer

    args = AlignPropConfig(
        **options,
        backprop_strategy="uniform",
        sampler="ddim",
        num_inference_steps=3,
        guidance_scale=2.0,
        beta=0.5,
        checkpoint_steps=True,
        activation_checkpointing=True,
    )
    rows = {"train_dataset": ["a", "bb", "c d"], "eval_dataset": ["e", "f f"]}
    return AlignPropTrainer(tiny_pipeline("sd"), lambda images, **_: 100 * images.mean((1, 2, 3)), args, **rows)


def denoising_steps(options: dict):
    """With parts of micro-batches, on which gradients are not exchanged, and rounds of unequal parts."""
    from tiny_pipelines import tiny_pipeline

    from diffusionalign import DDPOConfig, DDPOTrainer

    args = DDPOConfig(
        **options | {"learning_rate": 2.0},  # of advantages that cancel little is left
        num_generations=2,
        num_inference_steps=3,
        guidance_scale=2.0,
        num_iterations=2,
        beta=0.1,
        pairs_at_once=2,
        advantages="prompt",
        prompt_min_count=3,
        train_timestep_fraction=0.7,
    )
    rows = {"train_dataset": ["a", "bb", "c d"], "eval_dataset": ["e", "f f"]}
    return DDPOTrainer(tiny_pipeline("sd"), brightness, args, **rows)


def brightness(images, prompts):
    """Mean of all pixels."""
    return [float(image.mean()) for image in images]


RUNS = {"ddpo": denoising_steps, "dpo": preference, "nft": forward_process, "alignprop": backpropagation}

if __name__ == "__main__":
    run_command(main)
