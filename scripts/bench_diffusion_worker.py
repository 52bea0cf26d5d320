"""One of those that bench_diffusion.py and bench_diffusion_reward.py measure, in a process of its own: the trainers
here, or trl's.

It is started by these, in the interpreter that has what it needs, and imports nothing of this project but for the
trainers here and a reward. A line on standard input lets it make a block of steps; a line of JSON on standard output
tells how long they took. For bench_diffusion.py the noise of the very first step, and where the adapter begins, are
given, so that all train on the same pictures; for bench_diffusion_reward.py a block ends with the reward of held-out
pictures, by plain diffusers, which is no part of its time.

    python scripts/bench_diffusion_worker.py trl FOLDER
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_turns import Turns, answering
from torch import Tensor, nn

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # those of trl's pipelines, with rank and alpha 4
EVER = 1_000_000
ROOT = Path(__file__).resolve().parent.parent


def brightness(images: Tensor) -> Tensor:
    """A reward that costs nothing, with a gradient; trl clamps pictures before it, which the trainers here do not."""
    return images.float().clamp(0, 1).mean((1, 2, 3))


def reward_of(setting: dict[str, Any]) -> Callable[[Tensor, list[str]], Tensor]:
    """The reward of pictures for their prompts."""
    if setting["reward"] == "brightness":
        return lambda images, prompts: brightness(images)
    sys.path.insert(0, str(ROOT))  # trl's interpreter does not know this project
    from shared.rewards.images import colour_reward

    return colour_reward


def held_out(pipeline: Any, setting: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """What measures the reward of the same held-out pictures each time it is called."""
    reward, prompts = reward_of(setting), setting["held_out"]

    @torch.no_grad()
    def measure() -> dict[str, float]:
        training = pipeline.unet.training
        pipeline.unet.eval()
        images = pipeline(
            prompts,
            num_inference_steps=setting["steps"],
            guidance_scale=setting["guidance"],
            generator=[torch.Generator().manual_seed(at) for at in range(len(prompts))],
            output_type="pt",
        ).images
        pipeline.unet.train(training)
        return {"held_out": float(reward(images.float(), prompts).mean())}

    return measure


def start_adapter(model: nn.Module) -> None:
    """Set the adapter to values that a formula gives: neither part is 0, so that both have a gradient."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[min(name[name.find(part) :] for part in ("down_", "mid_", "up_blocks") if part in name)] = parameter
    drawn = torch.Generator().manual_seed(0)
    for _, parameter in sorted(found.items()):
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=drawn))


class FirstNoise:
    """Functions that draw noise, replaced for the first step by ones that draw from one and the same source."""

    def __init__(self, *places: tuple[Any, str]):
        self.kept = [(module, name, getattr(module, name)) for module, name in places]
        self.random = torch.Generator().manual_seed(1)
        for module, name in places:
            setattr(module, name, self.draw)

    def draw(self, like: Any, *_: Any, **options: Any) -> Tensor:
        shape = like.shape if isinstance(like, Tensor) else like
        device = like.device if isinstance(like, Tensor) else options.get("device")
        return torch.randn(tuple(shape), generator=self.random).to(device)

    def end(self) -> None:
        for module, name, function in self.kept:
            setattr(module, name, function)
        self.kept = []


# ---- The trainers here ----------------------------------------------------------------------------------------------


def train_here(by: str, setting: dict[str, Any], folder: Path, turns: Turns) -> None:
    from peft import LoraConfig
    from transformers import TrainerCallback

    os.environ["TRIALIGN_CACHE"] = str(folder / "cache")
    own = dict(setting["sides"][by])
    case, micro = own.pop("case"), setting["micro"]
    options = {
        "output_dir": str(folder / by), "learning_rate": setting["lr"], "lr_scheduler_type": "constant",
        "weight_decay": 1e-4, "save_strategy": "no", "disable_tqdm": True, "report_to": [], "seed": setting["seed"],
        "max_steps": EVER, "bf16": False, "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": setting["rows"] // micro, "num_inference_steps": setting["steps"],
        "guidance_scale": setting["guidance"], "sampler": "ddim", "generation_rows": setting["rows"],
        "shuffle_dataset": False, "logging_first_step": True, "logging_steps": 10, "eval_answers": 0,
        "sample_every": 0, "max_grad_norm": 1.0, **own,
    }  # fmt: skip
    rows = [{"prompt": prompt} for prompt in setting["prompts"]]
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS)
    make = ddpo_here if case == "ddpo" else alignprop_here
    trainer = make(str(folder / "model"), options, rows, lora, setting)
    trainer.actor.act = turns.timed("generation", trainer.actor.act)
    torch.set_num_threads(setting["threads"])
    turns.watch(trainer, "reward")
    if setting["held_out"]:
        trainer.adapter.pipeline.set_progress_bar_config(disable=True)
        turns.history = held_out(trainer.adapter.pipeline, setting)
    else:
        start_adapter(trainer.model)
        modules = ("diffusionalign.sampling", "diffusionalign.actor" if case == "ddpo" else "diffusionalign.alignprop")
        noise = FirstNoise(*((sys.modules[module], "normal") for module in modules))

        class First(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                noise.end()

        trainer.add_callback(First())
    turns.begin()
    trainer.train()


def ddpo_here(model: str, options: dict, rows: list[dict], lora: Any, setting: dict) -> Any:
    from diffusionalign.ddpo import DDPOConfig, DDPOTrainer

    judge = reward_of(setting)
    args = DDPOConfig(**{"num_generations": setting["group"], "advantages": "batch", "beta": 0.0, **options})
    return DDPOTrainer(model, lambda images, prompts, **_: judge(images, prompts), args, rows, peft_config=lora)


def alignprop_here(model: str, options: dict, rows: list[dict], lora: Any, setting: dict) -> Any:
    from diffusionalign.alignprop import AlignPropConfig, AlignPropTrainer

    judge = reward_of(setting)

    def reward(images: Tensor, prompts: list[str], **_: Any) -> Tensor:
        return judge(images, prompts)

    reward.differentiable = True
    args = AlignPropConfig(**{"backprop_strategy": "fixed", "num_generations": 1, **options})
    return AlignPropTrainer(model, reward, args, rows, peft_config=lora)


# ---- trl's ----------------------------------------------------------------------------------------------------------


def train_by_trl(by: str, setting: dict[str, Any], folder: Path, turns: Turns) -> None:
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())  # its pipeline logs before its trainer would make one
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion as drawing
    import trl
    from trl.models import modeling_sd_base

    own = dict(setting["sides"][by])
    case = own.pop("case")
    pipeline = trl.DefaultDDPOStableDiffusionPipeline(str(folder / "model"), use_lora=True)
    options = {
        "num_epochs": EVER, "save_freq": EVER, "sample_num_steps": setting["steps"], "sample_eta": 1.0,
        "sample_guidance_scale": setting["guidance"], "train_learning_rate": setting["lr"],
        "train_batch_size": setting["micro"], "seed": setting["seed"],
        "train_gradient_accumulation_steps": setting["rows"] // setting["micro"], "mixed_precision": "no",
        "log_with": None, "accelerator_kwargs": {"cpu": not torch.cuda.is_available()},
        "project_kwargs": {"project_dir": str(folder / by)}, **own,
    }  # fmt: skip
    judge, copies = reward_of(setting), setting["group"] if case == "ddpo" else 1
    prompts = itertools.cycle([prompt for prompt in setting["prompts"] for _ in range(copies)])

    def reward(images: Tensor, prompts: tuple[str, ...], _: Any) -> tuple[Tensor, dict]:
        return judge(images.float(), list(prompts)), {}

    if case == "ddpo":
        args = trl.DDPOConfig(**options, sample_batch_size=setting["rows"], sample_num_batches_per_epoch=1)
        trainer = trl.DDPOTrainer(args, reward, lambda: (next(prompts), {}), pipeline)
        trainer._generate_samples = turns.timed("generation", trainer._generate_samples)
    else:
        args = trl.AlignPropConfig(**options, truncated_backprop_rand=False)
        trainer = trl.AlignPropTrainer(args, reward, lambda: (next(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    torch.set_num_threads(setting["threads"])
    noise = FirstNoise()
    if setting["held_out"]:
        turns.history = held_out(pipeline.sd_pipeline, setting)
    else:
        turns.history = first_of(trainer, case, setting["rows"])
        start_adapter(pipeline.unet)
        noise = FirstNoise((drawing, "randn_tensor"), (modeling_sd_base, "randn_tensor"))
    step = trainer.step

    def stepped(*given: Any) -> int:
        count = step(*given)
        noise.end()
        turns.step()
        return count

    trainer.step = stepped
    turns.begin()
    trainer.train()


def first_of(trainer: Any, case: str, rows: int) -> Callable[[], dict[str, float]]:
    """What tells the reward and the norm of the gradient of the first step of one of trl's trainers."""
    first: dict[str, float] = {}
    log, clip = trainer.accelerator.log, trainer.accelerator.clip_grad_norm_
    # its advantages are in standard deviations of a population, those here of a sample
    scale = (1 - 1 / rows) ** 0.5 if case == "ddpo" else 1.0

    def logged(values: dict[str, Any], **options: Any) -> None:
        if "reward_mean" in values:
            first.setdefault("reward", float(values["reward_mean"]))
        log(values, **options)

    def clipped(*args: Any, **options: Any) -> Tensor:
        norm = clip(*args, **options)
        first.setdefault("grad_norm", float(norm) * scale)
        return norm

    trainer.accelerator.log, trainer.accelerator.clip_grad_norm_ = logged, clipped
    return lambda: first


def main() -> None:
    by, folder = sys.argv[1], Path(sys.argv[2])
    said = answering()
    setting = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    torch.set_num_threads(setting["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = train_by_trl if by.startswith("trl") else train_here
    train(by, setting, folder, Turns(said, setting["block_steps"], device))


if __name__ == "__main__":
    main()
