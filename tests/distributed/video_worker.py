"""Trains on rows of videos, images and text by turns, so that the processes of a launch rarely see the same kinds.

    accelerate launch --config_file PROFILE video_worker.py FOLDER

Writes the losses of the steps, and what was answered before and after, as JSON: process 0 does.
"""

import json
import os
import sys
from pathlib import Path

STEPS = 4


def main() -> None:
    folder = Path(sys.argv[1])
    import numpy as np
    import torch
    from PIL import Image

    from visionalign import VLMSFTConfig, VLMSFTTrainer

    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    draw = np.random.default_rng(0)

    def row(at: int) -> dict:
        answer = ("left", "right", "up", "down")[at % 4]
        turns = [{"role": "user", "content": "What moves?"}, {"role": "assistant", "content": answer}]
        noise = draw.integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
        shown = ({"video": {"frames": noise, "fps": 4.0}}, {"image": Image.fromarray(noise[0])}, {})[at % 3]
        return {"messages": turns, **shown}

    rows = [row(at) for at in range(16)]
    args = VLMSFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4 // world, per_device_eval_batch_size=2, max_steps=STEPS,
        learning_rate=2e-3, logging_steps=1, save_strategy="no", eval_answers=3, max_new_tokens=3, disable_tqdm=True,
        video_num_frames=2, report_to="none",
    )  # fmt: skip
    trainer = VLMSFTTrainer("builtin/video-small", args, train_dataset=rows, eval_dataset=rows[:3])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if rank == 0:
        answers = [(sample.before, sample.after) for sample in trainer.report.samples]
        (folder / "facts.json").write_text(json.dumps({"losses": losses, "answers": answers}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
