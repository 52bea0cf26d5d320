"""Online DPO, XPO and Nash-MD in one launch: what the tests compare as JSON, written by process 0.

accelerate launch --config_file PROFILE online_preference_worker.py FOLDER MODELS TASK...

A run is to be that of one process: completions are written that depend on the prompt and the writer alone.
"""

import json
import os
import sys
from pathlib import Path

from online_worker import even, facts_of, row

from shared.runtime.command import run_command

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def main() -> None:
    folder, models, tasks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    facts = {task: TASKS[task](models, folder / task) for task in tasks}
    if RANK == 0:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))


class Written:
    """An engine whose completions are fixed: of each member of a group others, whoever its writer is."""

    exact = True

    def __init__(self):
        self.calls = 0

    def generate(self, model, inputs, group_size, sampling, *, random=None):
        import torch

        from shared.runtime.generation import Completions

        first = self.calls % (2 // group_size)
        self.calls += 1
        done = Completions([], None, [])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            prompt = int((ids * mask * torch.arange(1, len(ids) + 1).flip(0)).sum())
            for member in range(first, first + group_size):
                own = torch.Generator().manual_seed(prompt * 2 + member)
                count = int(torch.randint(1, 7, (), generator=own))
                done.ids.append(torch.randint(10, 256, (count,), generator=own))
                done.finished.append(count < 6)
        return done

    def update_weights(self, model, state_dict=None):
        pass


def trainer(kind: str, models: Path, folder: Path, *, written=True, peft=None, **changed):
    import textalign

    options = {
        "output_dir": str(folder), "max_completion_length": 6, "max_steps": 5, "beta": 0.3,
        "per_device_train_batch_size": 8 // WORLD, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
        "logging_steps": 1, "eval_answers": 0, "save_strategy": "no", "disable_tqdm": True, "sample_every": 0,
        **changed,
    }  # fmt: skip
    made = getattr(textalign, f"{kind}Trainer")(
        str(models / "lm"),
        reward_funcs=even,
        args=getattr(textalign, f"{kind}Config")(**options),
        train_dataset=[row(number) for number in range(20)],
        peft_config=peft,
    )
    if written:
        made.actor.engine = Written()
    return made


def compared(kind: str, models: Path, folder: Path, **options) -> dict:
    run = trainer(kind, models, folder, **options)
    run.train()
    names = ("rewards/chosen", "rewards/margins", "objective/kl", "scores/chosen", "frac_reward_zero_std")
    return facts_of(run) | {name: [entry[name] for entry in run.state.log_history if name in entry] for name in names}


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def mixing(models: Path, folder: Path, **options) -> dict:
    """Real samples, of model and reference together."""
    run = trainer("NashMD", models, folder / "nash_md", written=False, **options)
    run.train()
    other = trainer("XPO", models, folder / "xpo", written=False, **options)
    other.train()
    return facts_of(run) | {"of xpo": facts_of(other)}


TASKS = {
    "online_dpo": lambda *given: compared("OnlineDPO", *given, loss_type=["sigmoid", "sft"]),
    "xpo": lambda *given: compared("XPO", *given, alpha=0.01),
    "nash_md": lambda *given: compared("NashMD", *given),
    "adapter": lambda *given: compared("NashMD", *given, peft=lora()),
    "mixing": mixing,
    "mixing_adapter": lambda *given: mixing(*given, peft=lora()),
}


if __name__ == "__main__":
    run_command(main)
