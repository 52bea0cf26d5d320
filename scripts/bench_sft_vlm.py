"""Measure VLMSFTTrainer against a bare PyTorch loop: samples per second, and memory above the loaded model.

Same weights, rows, processor, fused AdamW and gradient clipping in both, float32; the losses of a batch are compared
first. The two take turns within one process, a block of steps each, the trainer being halted at the end of a step
while the loop runs; memory is measured with each alone in a process of its own. Needs no network.
A ratio above 1 in speed, and one below 1 in processor time and memory, speaks for the trainer.

    python scripts/bench_sft_vlm.py                      # all settings, some minutes on two cores
    python scripts/bench_sft_vlm.py --vocab 0 --batch_sizes 8 32 128 --images 1 --output bench.json
    python scripts/bench_sft_vlm.py --vocab 151936 --batch_sizes 8 --blocks 9 --threads 1

`--vocab 0` is the built-in model (0.6 M parameters); any other is a LLaVA-class model with that many tokens, hidden
size 256 and 4 layers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.runtime.command import run_command

BUILTIN = "builtin/vlm-small"
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
HEADER = """             rows of  samples a second   ratios: speed    MiB above the model
   vocab images batch   trainer      bare  wall  cpu time  trainer      bare  ratio"""
ROW = (
    "{vocab:>8,} {images:>6} {batch:>5} {trainer_samples_per_second:>9.1f} {bare_samples_per_second:>9.1f} "
    "{speed_ratio:>5.2f} {cpu_time_ratio:>9.2f} {trainer_mib:>8.0f} {bare_mib:>9.0f} {memory_ratio:>6.2f}"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[0, 32_000, 151_936], help="models, see above")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4], help="images in each row")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each of the two; medians are reported")
    parser.add_argument("--block_samples", type=int, default=64, help="of a block; a quarter for --vocab > 0")
    parser.add_argument("--max_logits", type=float, default=4e7, help="leave out settings with more in a batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


def build_rows(count: int, images: int):
    """Rows of `builtin/shapes`, each question with `images` pictures before it."""
    from datasets import Dataset

    from shared.builtin import load_dataset

    shapes = load_dataset("builtin/shapes").select(range(count)).select_columns(["images", "messages"])
    rows = shapes.to_list()
    for at, row in enumerate(rows):
        row["images"] = [rows[(at + i) % count]["images"][0] for i in range(images)]
        question = row["messages"][0]
        question["content"] = [question["content"][0]] * images + question["content"][1:]
    return Dataset.from_list(rows, features=shapes.features)


def build_model(vocab: int):
    """The built-in model (0), or one of its class with a larger language model and `vocab` tokens."""
    import torch
    from transformers import AutoModelForImageTextToText

    from shared.builtin.models import load_model

    model = load_model(BUILTIN, seed=0)
    if vocab:
        for name, value in {**LARGE, "vocab_size": vocab}.items():
            setattr(model.config.text_config, name, value)
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(model.config, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def bare_collate(processor: Any) -> Callable[[list[dict]], dict]:
    """Rows to model inputs with labels, in the cheapest way there is: every row ends with its answer, so the answers'
    token counts say where the labels begin."""

    def collate(rows: list[dict]) -> dict:
        texts = processor.apply_chat_template([row["messages"] for row in rows], tokenize=False)
        images = [row["images"] for row in rows]
        inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        ids, ends = inputs["input_ids"], inputs["attention_mask"].sum(1).tolist()
        answers = [row["messages"][-1]["content"][0]["text"] + "<end>" for row in rows]
        labels = ids.new_full(ids.shape, -100)
        for at, (end, answer) in enumerate(zip(ends, processor.tokenizer(answers)["input_ids"], strict=True)):
            labels[at, end - len(answer) : end] = ids[at, end - len(answer) : end]
        return {**inputs, "labels": labels}

    return collate


def bare_steps(model: Any, processor: Any, rows: Any, size: int) -> Iterator[float]:
    """The bare loop: trains, and gives the loss after each step."""
    import torch
    from torch.utils.data import DataLoader

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = DataLoader(rows, batch_size=size, collate_fn=bare_collate(processor), drop_last=True)
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def build_trainer(model: Any, processor: Any, rows: Any, size: int, folder: str, steps: int, *callbacks: Any):
    """The trainer with its default options, but for those that would make it another task than the bare loop's."""
    from visionalign import VLMSFTConfig, VLMSFTTrainer

    args = VLMSFTConfig(
        output_dir=folder, per_device_train_batch_size=size, max_steps=steps, learning_rate=1e-4, bf16=False,
        save_strategy="no", eval_answers=0, check_rows=0, disable_tqdm=True, dataloader_drop_last=True,
        train_sampling_strategy="sequential", lr_scheduler_type="constant",
    )  # fmt: skip
    return VLMSFTTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=list(callbacks))


def clock() -> tuple[float, float]:
    """Wall and processor seconds, once the device has done its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def check_same_loss(trainer: Any, bare: Any, rows: list[dict]) -> None:
    """The comparison is void where the two do not compute the same number."""
    import torch

    with torch.no_grad():
        ours = trainer.policy.log_probs(trainer.model, trainer.data_collator(rows).to(bare.device))
        batch = bare_collate(trainer.processing_class)(rows)
        theirs = bare(**{name: value.to(bare.device) for name, value in batch.items()}).loss.item()
    mine = -(ours.logp.sum() / ours.mask.sum()).item()
    assert abs(mine - theirs) < 1e-4 * theirs, f"the losses differ: trainer {mine}, bare loop {theirs}"


def speed(model: Any, processor: Any, rows: Any, size: int, samples: int, folder: str, options: Any) -> dict:
    """Both take turns in blocks of so many samples; the first block of each is warm-up."""
    import torch
    from transformers import TrainerCallback

    other = copy.deepcopy(model)
    loop = bare_steps(other, processor, rows, size)
    steps = max(2, samples // size)
    blocks: list[tuple[tuple[float, float], ...]] = []  # of both: wall and processor seconds

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.started = clock()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % steps == 0:
                halted = clock()
                for _ in range(steps):
                    next(loop)
                times = self.started, halted, clock()
                blocks.append(tuple((b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)))
                control.should_training_stop = len(blocks) == options.blocks + 1
                self.started = clock()

    trainer = build_trainer(model, processor, rows, size, folder, 1_000_000, TakeTurns())
    torch.set_num_threads(options.threads)  # the trainer's configuration takes all cores
    check_same_loss(trainer, other, [rows[at] for at in range(size)])
    trainer.train()
    measured = blocks[1:]
    return {
        "trainer_samples_per_second": statistics.median(steps * size / ours[0] for ours, _ in measured),
        "bare_samples_per_second": statistics.median(steps * size / bare[0] for _, bare in measured),
        "speed_ratio": statistics.median(bare[0] / ours[0] for ours, bare in measured),
        "cpu_time_ratio": statistics.median(ours[1] / bare[1] for ours, bare in measured),
        "speed_ratios": [bare[0] / ours[0] for ours, bare in measured],
        "steps_per_block": steps,
    }


def measure(kind: str, vocab: int, images: int, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one setting, in this process: `kind` is speed, or trainer or bare for the memory of one."""
    import psutil

    from shared.builtin.models import load_processor
    from shared.runtime.report import peak_memory

    processor, rows, model = load_processor(BUILTIN), build_rows(4 * size, images), build_model(vocab)
    resident = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if kind == "speed":
            samples = options.block_samples // 4 if vocab else options.block_samples
            return speed(model, processor, rows, size, samples, folder, options)
        if kind == "trainer":
            build_trainer(model, processor, rows, size, folder, 3).train()
        else:
            list(itertools.islice(bare_steps(model, processor, rows, size), 3))
    peak = peak_memory()
    return {f"{kind}_mib": (peak.get("cuda:0") or peak["process"] - resident) / 2**20}


def in_own_process(*what: Any) -> dict[str, Any]:
    """`measure(*what)` in a fork: what one setting leaves behind in memory does not reach the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(measure, *what).result()


def main() -> None:
    options = arguments()
    every = itertools.product(options.vocab, options.images, options.batch_sizes)
    settings = [(v, n, size) for v, n, size in every if v * size * (20 + 9 * n) <= options.max_logits]
    if not settings or options.blocks < 1:
        raise UserError("nothing to measure: raise --max_logits, or --blocks above 0.")
    import datasets  # noqa: F401  (imported once, here, for all the forks)

    import visionalign.sft  # noqa: F401

    print(HEADER, flush=True)
    figures = []
    for vocab, images, size in settings:
        figure: dict[str, Any] = {"vocab": vocab, "images": images, "batch": size}
        for kind in ("speed", "trainer", "bare"):
            figure |= in_own_process(kind, vocab, images, size, options)
        figure["memory_ratio"] = figure["trainer_mib"] / figure["bare_mib"]
        figure |= {"blocks": options.blocks, "threads": options.threads, "load_average": os.getloadavg()[0]}
        figures.append(figure)
        print(ROW.format(**figure), flush=True)
    load = statistics.median(figure["load_average"] for figure in figures)
    print(f"Medians of {options.blocks} blocks; {options.threads} of {os.cpu_count()} cores, load average {load:.1f}.")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
