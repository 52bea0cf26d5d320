"""One launch of this script gathers what the tests of an engine compare; the result is JSON, written by process 0.

    accelerate launch --config_file PROFILE worker.py FOLDER TASK...

Tasks: engine (train, evaluate, save, resume), adapter (LoRA), accumulation, brief (a few steps, nothing else).
"""

import json
import sys
from pathlib import Path

from shared.runtime.command import run_command

ROWS, HELD_OUT, GLOBAL_BATCH, STEPS = 64, 22, 8, 6


def main() -> None:
    folder, tasks = Path(sys.argv[1]), sys.argv[2:]
    import torch

    from visionalign import VLMSFTConfig

    facts = {}
    for task in tasks:
        facts[task] = TASKS[task](folder / task)
    facts["processes"] = VLMSFTConfig(output_dir=str(folder / "unused")).world_size
    if int(_environment("RANK")) == 0:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _environment(name: str) -> str:
    import os

    return os.environ.get(name, "0" if name == "RANK" else "1")


def trainer(folder: Path, peft=None, model="builtin/vlm-small", **changed):
    from shared.builtin import load_dataset
    from visionalign import VLMSFTConfig, VLMSFTTrainer

    micro_steps = changed.get("gradient_accumulation_steps", 1)
    each = GLOBAL_BATCH // (int(_environment("WORLD_SIZE")) * micro_steps)
    options = {
        "per_device_train_batch_size": each, "per_device_eval_batch_size": 4, "learning_rate": 2e-3,
        "max_steps": STEPS, "logging_steps": 1, "save_steps": 3, "eval_answers": 5, "max_new_tokens": 6,
        "disable_tqdm": True, **changed,
    }  # fmt: skip
    args = VLMSFTConfig(output_dir=str(folder), **options)
    train = load_dataset("builtin/shapes", "train").select(range(ROWS))
    held_out = load_dataset("builtin/shapes", "test").select(range(HELD_OUT))
    return VLMSFTTrainer(str(model), args, train_dataset=train, eval_dataset=held_out, peft_config=peft)


def engine(folder: Path) -> dict:
    """Train six steps with a checkpoint in the middle; then again from that checkpoint."""
    import torch

    first = trainer(folder, eval_strategy="steps", eval_steps=3)
    first.train()
    facts = describe(first)
    facts["metrics"] = {k: v for k, v in first.evaluate().items() if "runtime" not in k and "per_second" not in k}
    facts["rng_digests"] = gathered(torch.random.get_rng_state().float().dot(torch.arange(5056).float()).item())
    first.save_model()
    whole = full_weights(first)
    facts["ranks_agree"] = len(set(gathered(digest(whole)))) == 1

    again = trainer(folder, eval_strategy="steps", eval_steps=3)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    resumed = full_weights(again)
    facts["resumed_from"] = STEPS - len([e for e in again.state.log_history if "loss" in e and e["step"] > 3])
    facts["resume_is_exact"] = whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
    return facts


def adapter(folder: Path) -> dict:
    from peft import LoraConfig

    peft = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    run = trainer(folder, peft, max_steps=3, eval_answers=0)
    first = {n: p for n, p in full_weights(run).items() if "lora_" in n}
    facts = {"initial": gathered(digest(first))}
    run.train()
    run.save_model()
    last = {n: p for n, p in full_weights(run).items() if "lora_" in n}
    return facts | {"moved": digest(first) != digest(last), "losses": losses(run), "norm": norm(last)}


def accumulation(folder: Path) -> dict:
    run = trainer(folder, gradient_accumulation_steps=2, eval_answers=0)
    run.train()
    return {"losses": losses(run)}


def evaluation(folder: Path) -> dict:
    """Evaluate before training, train, evaluate after."""
    run = trainer(folder, model=folder.parent.parent / "base", max_steps=2, eval_answers=0, save_strategy="no")
    before = run.evaluate()["eval_loss"]
    run.train()
    return {"before": before, "losses": losses(run), "after": run.evaluate()["eval_loss"]}


def brief(folder: Path) -> dict:
    run = trainer(folder, max_steps=2, eval_answers=0, save_strategy="no")
    run.train()
    return {"losses": losses(run), **describe(run)}


TASKS = {"engine": engine, "adapter": adapter, "accumulation": accumulation, "evaluation": evaluation, "brief": brief}


def describe(run) -> dict:
    from torch.distributed.tensor import DTensor

    from shared.runtime.fsdp import reshard

    reshard(run.model_wrapped)
    parameters = list(run.model_wrapped.parameters())
    return {
        "engine": run.accelerator.distributed_type.value,
        "wrapper": type(run.model_wrapped).__name__,
        "world": run.accelerator.num_processes,
        "losses": losses(run),
        "accuracies": [e["mean_token_accuracy"] for e in run.state.log_history if "mean_token_accuracy" in e],
        "parameters": len(parameters),
        "dtensors": sum(isinstance(p, DTensor) for p in parameters),
        "elements": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        "elements_here": sum(
            p.ds_tensor.numel() if hasattr(p, "ds_tensor")
            else p.to_local().numel() if isinstance(p, DTensor) else p.numel()
            for p in parameters
        ),
        "answers": [(sample.before, sample.after) for sample in run.report.samples],
    }  # fmt: skip


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def full_weights(run) -> dict:
    """Every weight, whole, on every process."""
    from torch.distributed.tensor import DTensor

    from shared.runtime.fsdp import reshard

    reshard(run.model)
    if any(hasattr(p, "ds_id") for p in run.model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(run.model.parameters())):
            return {name: p.detach().clone() for name, p in run.model.named_parameters()}
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in run.model.named_parameters()
    }


def digest(weights: dict) -> str:
    import hashlib

    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def norm(weights: dict) -> float:
    return sum(w.double().square().sum().item() for w in weights.values()) ** 0.5


def gathered(value) -> list:
    import torch

    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    run_command(main)
