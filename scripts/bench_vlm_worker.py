"""One of those that bench_vlm.py measures, in a process of its own: the trainer here, or trl's.

It is started by bench_vlm.py, in the interpreter that has what it needs, and imports nothing of this project but for
the trainer here; bench_turns.py says how the two talk.

    python scripts/bench_vlm_worker.py trl FOLDER
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_turns import Turns, answering

LOGPS = ("logps/chosen", "logps/rejected")
BETA = 0.1
LIBRARIES = {
    "ours": ("visionalign.sft", "visionalign.preference"),
    "trl": ("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"),
}
TOWER = {
    "llava": ("model.vision_tower",),
    "qwen2_vl": ("model.visual.patch_embed", "model.visual.blocks"),
    "idefics3": ("model.vision_model",),
}


class Timed:
    """An iterator whose `next` is timed; nothing is taken from it before it is asked for."""

    def __init__(self, iterator: Iterator, turns: Turns):
        self.next = turns.timed("data", iterator.__next__)

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Any:
        return self.next()


def timing_data(get_batches: Callable, turns: Turns) -> Callable:
    """A trainer's `get_batch_samples` with the time counted in which rows are read, decoded and collated."""
    return lambda iterator, *args: get_batches(Timed(iterator, turns), *args)


def options_of(setting: dict[str, Any], folder: Path, by: str) -> dict[str, Any]:
    """What both trainers are given."""
    options = {
        "output_dir": str(folder / by), "learning_rate": 1e-5, "lr_scheduler_type": "constant", "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "report_to": [], "seed": 0, "max_steps": 1_000_000,
        "per_device_train_batch_size": setting["batch"], "train_sampling_strategy": "sequential",
        "optim": "adamw_torch_fused", "logging_first_step": True, "logging_steps": 10, "max_grad_norm": 1.0,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    return {**options, "beta": BETA} if setting["case"].startswith("dpo") else options


def dataset_of(rows: list[dict]) -> Any:
    from datasets import Dataset, Image, List

    return Dataset.from_list(rows).cast_column("images", List(Image()))


def trainer_here(model: Any, processor: Any, rows: Any, setting: dict, folder: Path) -> Any:
    os.environ["TRIALIGN_CACHE"] = str(folder / "cache")
    case, options = setting["case"], options_of(setting, folder, "ours")
    if case.startswith("dpo"):
        from visionalign.preference import VLMDPOConfig, VLMDPOTrainer

        args = VLMDPOConfig(**options, precompute_ref_log_probs=case == "dpo-precomputed", eval_answers=0)
        return VLMDPOTrainer(model, None, args, train_dataset=rows, processing_class=processor)
    from visionalign.sft import VLMSFTConfig, VLMSFTTrainer

    options |= {"freeze_vision_tower": True} if case in ("sft-frozen", "sft-cached") else {}
    options |= {"cache_vision_features": True} if case == "sft-cached" else {}
    args = VLMSFTConfig(**options, eval_answers=0)
    return VLMSFTTrainer(model, args, train_dataset=rows, processing_class=processor)


def trainer_of_trl(model: Any, processor: Any, rows: Any, setting: dict, folder: Path) -> Any:
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    if setting["trl_learnt_only"]:
        mock.patch.object(trl.trainer.utils, "_use_triton", return_value=True).start()
    dpo = setting["case"].startswith("dpo")
    if setting["case"] in ("sft-frozen", "sft-cached"):
        for name in TOWER[setting["family"]]:
            model.get_submodule(name).requires_grad_(False)
    more = {"gradient_checkpointing": False, "use_cpu": model.device.type == "cpu", "max_length": None}
    args = (DPOConfig if dpo else SFTConfig)(**options_of(setting, folder, "trl"), **more)
    trainer = DPOTrainer if dpo else SFTTrainer
    return trainer(model, args=args, train_dataset=rows, processing_class=processor)


def main() -> None:
    by, folder = sys.argv[1], Path(sys.argv[2])
    said = answering()
    setting = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    torch.set_num_threads(setting["threads"])
    from transformers import AutoModelForImageTextToText, AutoProcessor

    for library in LIBRARIES[by]:
        importlib.import_module(library)  # what these take is no memory of training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32).to(device)
    processor = AutoProcessor.from_pretrained(folder / "model")
    turns = Turns(said, setting["block_steps"], device)
    make = {"ours": trainer_here, "trl": trainer_of_trl}[by]
    turns.loaded()
    started = turns.clock()
    trainer = make(model, processor, dataset_of(setting["rows"]), setting, folder)
    turns.facts["setup_cpu_seconds"] = turns.clock()[1] - started[1]
    torch.set_num_threads(setting["threads"])  # the configuration here takes all cores
    trainer.get_batch_samples = timing_data(trainer.get_batch_samples, turns)
    turns.watch(trainer, *LOGPS)
    turns.begin()
    trainer.train()


if __name__ == "__main__":
    main()
