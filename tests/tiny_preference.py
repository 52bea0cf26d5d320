"""Trainers of pairs of their own completions on the tiny text model."""

from __future__ import annotations

import torch
from tiny_online import Recorded, even, questions

import textalign


def pairs_trainer(name, model_path, folder, reward=even, rows=None, **options):
    """A trainer of small rounds: 4 pairs a step."""
    own = ("model", "ref_model", "peft_config", "eval_dataset", "judge")
    rest = {key: options.pop(key) for key in own if key in options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "max_steps": 4,
        "eval_answers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return getattr(textalign, f"{name}Trainer")(
        rest.pop("model", model_path),
        reward_funcs=reward,
        args=getattr(textalign, f"{name}Config")(**config),
        train_dataset=questions() if rows is None else rows,
        **rest,
    )


class TwoWriters(Recorded):
    """Fixed completions of each prompt, others of each further call for the same prompt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls: dict[int, int] = {}

    def generate(self, model, inputs, group_size, sampling, *, random=None):
        done = super().generate(model, inputs, group_size, sampling, random=random)
        for at, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            prompt = int(ids[mask.bool()].sum())
            call = self.calls[prompt] = self.calls.get(prompt, -1) + 1
            for row in range(at * group_size, (at + 1) * group_size):
                moved = torch.cat([done.ids[row], done.ids[row][:1]]) if call % 2 else done.ids[row]
                done.ids[row] = (moved[: self.longest] - 5 + 37 * call) % 250 + 5
        return done
