"""The online trainers in one launch: what the tests of an engine compare as JSON, written by process 0.

accelerate launch --config_file PROFILE online_worker.py FOLDER MODELS TASK...

MODELS holds the folders `lm` and `llava`. What processes sample depends on how many there are; where a run is to be
that of one process, completions are written that depend on the prompt and the place in its group alone.
"""

import json
import os
import sys
from pathlib import Path

from shared.runtime.command import run_command

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
SHAPES = ("circle", "square", "triangle")
SIZE = 4  # completions of a prompt
TIMES = ("runtime", "per_second", "epoch")


def main() -> None:
    folder, models, tasks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    facts = {task: TASKS[task](models, folder / task) for task in tasks}
    if RANK == 0:
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))


def row(number: int) -> dict:
    return {"prompt": f"What colour is {'the ' * (number % 4)}{SHAPES[number % 3]} {number}?", "number": number}


def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def noisy(completion_ids, **_):
    import random

    return [random.random() + len(ids) / 6 for ids in completion_ids]


class Written:
    """An engine whose completions are fixed; the most likely ones are the real engine's.

    Args:
        real: the trainer's own.
        rows: that each process has of a round.
    """

    exact = True

    def __init__(self, real, rows: int):
        self.real, self.first = real, RANK * rows

    def generate(self, model, inputs, group_size, sampling, *, random=None):
        if sampling.greedy:
            return self.real.generate(model, inputs, group_size, sampling, random=random)
        import torch

        from shared.runtime.generation import Completions

        done = Completions([], None, [])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            prompt = int((ids * mask * torch.arange(1, len(ids) + 1).flip(0)).sum())
            for at in range(group_size):
                member = (self.first + at) % SIZE
                own = torch.Generator().manual_seed(prompt * SIZE + member)
                count = int(torch.randint(1, 7, (), generator=own))
                done.ids.append(torch.randint(10, 256, (count,), generator=own))
                done.finished.append(count < 6)
        return done

    def update_weights(self, model, state_dict=None):
        pass


def trainer(kind: str, models: Path, folder: Path, *, rows=None, reward=even, written=True, peft=None, **changed):
    import textalign
    import visionalign

    vision = kind.startswith("VLM")
    package = visionalign if vision else textalign
    options = {
        "output_dir": str(folder), "num_generations": SIZE, "max_completion_length": 6, "max_steps": 6,
        "per_device_train_batch_size": 8 // WORLD, "gradient_accumulation_steps": 2, "steps_per_generation": 2,
        "per_device_eval_batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1, "eval_answers": 0,
        "eval_temperature": 0.0, "save_strategy": "no", "disable_tqdm": True, "sample_every": 0, **changed,
    }  # fmt: skip
    rows = rows or [row(number) for number in range(20)]
    made = getattr(package, f"{kind}Trainer")(
        str(models / ("llava" if vision else "lm")),
        reward,
        getattr(package, f"{kind}Config")(**options),
        train_dataset=rows,
        eval_dataset=rows[:7],
        peft_config=peft,
    )
    if written:
        made.actor.engine = Written(made.actor.engine, made.local_rows)
    return made


def facts_of(run) -> dict:
    from worker import digest, full_weights, gathered

    return {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry],
        "rewards": [entry["reward"] for entry in run.state.log_history if "reward" in entry],
        "kl": [entry["kl"] for entry in run.state.log_history if "kl" in entry],
        "value_errors": [entry["value/error"] for entry in run.state.log_history if "value/error" in entry],
        "ranks agree": len(set(gathered(digest(full_weights(run))))) == 1,
    }


def compared(kind: str, models: Path, folder: Path, **options) -> dict:
    run = trainer(kind, models, folder, **options)
    run.train()
    metrics = run.evaluate()
    return facts_of(run) | {"held_out": {k: v for k, v in metrics.items() if not k.endswith(TIMES)}}


def grpo(models: Path, folder: Path) -> dict:
    """Rounds of one step, each trained on twice; of longer ones each process would split its own share."""
    return compared("GRPO", models, folder, beta=0.1, num_iterations=2)


def rloo(models: Path, folder: Path) -> dict:
    return compared("RLOO", models, folder, beta=0.1, num_iterations=2)


def bonus(models: Path, folder: Path) -> dict:
    """What needs figures of all processes before a step, and idle samples that are skipped on some of them."""
    options = {"top_entropy_quantile": 0.5, "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 9.0}
    return compared("GRPO", models, folder, reward=some_equal, scale_rewards="batch", **options)


def idle(models: Path, folder: Path) -> dict:
    return compared("GRPO", models, folder, reward=some_equal, num_iterations=2)


def some_equal(number, completion_ids, **_):
    """All the same for most prompts."""
    return [0.5 if at % 3 else float(len(ids)) for at, ids in zip(number, completion_ids, strict=True)]


def split(models: Path, folder: Path) -> dict:
    """Of each group some samples on either process."""
    shape = {"per_device_train_batch_size": SIZE // WORLD, "steps_per_generation": 1}
    return compared("GRPO", models, folder, beta=0.1, num_iterations=2, **shape)


def adapter(models: Path, folder: Path) -> dict:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return compared("GRPO", models, folder, beta=0.1, num_iterations=2, peft=lora)


def judged(models: Path, folder: Path) -> dict:
    """The reward model is an adapter on the policy's base, which an engine may have cut up."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    reward = f"adapter:{models / 'judge'}"
    return compared("GRPO", models, folder, reward=reward, beta=0.1, num_iterations=2, peft=lora)


def vision(models: Path, folder: Path, imageless: int = 0) -> dict:
    """Prompts with one and two images; every so many-th without."""
    from PIL import Image

    rows = []
    for number in range(12):
        colours = [(20 * number, 80, 200 - 10 * number), (10, 20 * number, 90)][: 1 + number % 2]
        images = [Image.new("RGB", (40, 32 + number), colour) for colour in colours]
        rows.append({**row(number), "images": [] if imageless and number % imageless == 0 else images})
    return compared("VLMGRPO", models, folder, rows=rows, beta=0.1, num_iterations=2)


def mixed(models: Path, folder: Path) -> dict:
    """A process can have a micro-batch without images, for which the vision tower does not run."""
    return vision(models, folder, imageless=2)


def learns(models: Path, folder: Path) -> dict:
    """Real samples."""
    run = trainer(
        "GRPO", models, folder, written=False, max_steps=16, learning_rate=3e-2, lr_scheduler_type="constant",
        gradient_accumulation_steps=1, steps_per_generation=2, per_device_train_batch_size=16 // WORLD, beta=0.01,
    )  # fmt: skip
    run.train()
    return facts_of(run) | {"first": run.random.initial_seed()}


def dynamic(models: Path, folder: Path) -> dict:
    """On one process most groups teach nothing, on the other all do; the last steps find none at all."""
    calls = []

    def reward(number, completion_ids, trainer_state, **_):
        calls.append(len(number))
        if trainer_state.global_step >= 4:
            return [1.0] * len(number)
        lengths = [sum(ids) / 999 for ids in completion_ids]
        return [0.5 if RANK == 0 and at % 3 else value for at, value in zip(number, lengths, strict=True)]

    from worker import gathered

    run = trainer(
        "GRPO", models, folder, reward=reward, written=False, dynamic_sampling=True, max_resampling=3,
        ds3_gather_for_generation=False, max_completion_length=4, max_steps=5,
    )  # fmt: skip
    run.train()
    return facts_of(run) | {"calls": gathered(calls), "cursors": gathered(run.prompts.cursor)}


def resumed(models: Path, folder: Path, kind: str = "GRPO", **options) -> dict:
    """Stopped in the middle of a round, and gone on with."""
    import random

    import torch
    from worker import full_weights, gathered

    def run(name: str, resume: Path | None = None):
        made = trainer(
            kind, models, folder / name, reward=noisy, written=False, save_strategy="steps", save_steps=3,
            save_total_limit=None, beta=0.1, num_iterations=2, steps_per_generation=4, **options,
        )  # fmt: skip
        if resume is not None:
            random.seed(99 + RANK)
            torch.manual_seed(99 + RANK)
        made.train(resume_from_checkpoint=str(resume) if resume else None)
        return made

    whole = run("run")
    expected = full_weights(whole)
    middle = folder / "run" / "checkpoint-3"
    kept = torch.load(middle / f"online-{RANK}.pt", weights_only=True)
    again = run("run", middle)
    found = full_weights(again)
    exact = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    return facts_of(again) | {
        "exact": all(gathered(exact)),
        "cursor": kept["buffer"]["cursor"],
        "first prompts": gathered(kept["buffer"]["rows"]),
        "drawn": gathered([ids.tolist() for ids in kept["buffer"]["actions"]["ids"]]),
    }


def ppo(models: Path, folder: Path, value_model: str = "separate", **options) -> dict:
    """What is averaged over a round's actions, and the critic's own step, are those of all processes."""
    shape = {"num_generations": 1, "num_iterations": 2, "vf_coef": 0.5, "use_score_scaling": True, **options}
    return compared("PPO", models, folder, kl_coef=0.1, value_model=value_model, adap_kl_ctrl=True, **shape)


def ppo_adapter(models: Path, folder: Path) -> dict:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return ppo(models, folder, value_model="adapter", peft=lora, whiten_rewards=True, target_kl=0.5)


def ppo_steps(models: Path, folder: Path) -> dict:
    """A loop of one's own: each process hands over its part."""
    import torch

    made = trainer("PPO", models, folder, num_generations=1, value_model="shared", kl_penalty="full", vf_coef=0.5)
    rows, found = made.local_rows, []
    for number in range(3):
        own = torch.Generator().manual_seed(number)
        asked = torch.randint(10, 256, (rows * WORLD, 5), generator=own)
        said = [torch.randint(10, 256, (2 + at % 4,), generator=own) for at in range(rows * WORLD)]
        part = slice(RANK * rows, (RANK + 1) * rows)
        scores = [float(ids[0] % 3) for ids in said[part]]
        found.append(made.step(list(asked[part]), said[part], scores))
    names = ("loss/total", "objective/kl", "value/error", "returns/mean", "advantages/mean", "policy_kl", "reward")
    return {"stats": [{name: stats[name] for name in names} for stats in found]}


def ppo_resumed(models: Path, folder: Path) -> dict:
    """The critic is in a file of its own, whatever the engine has cut up."""
    return resumed(models, folder, "PPO", value_model="separate", adap_kl_ctrl=True, vf_coef=0.5)


TASKS = {
    "ppo_resumed": ppo_resumed, "ppo": ppo, "ppo_adapter": ppo_adapter, "ppo_steps": ppo_steps,
    "grpo": grpo, "rloo": rloo, "bonus": bonus, "idle": idle, "split": split, "adapter": adapter, "vision": vision,
    "mixed": mixed, "judged": judged, "learns": learns, "dynamic": dynamic, "resumed": resumed,
}  # fmt: skip


if __name__ == "__main__":
    run_command(main)
