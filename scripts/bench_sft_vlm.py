"""Measure VLMSFTTrainer against a bare PyTorch loop: samples per second, and memory above the loaded model.

Same weights, same rows, same processor, float32, AdamW (fused) and gradient clipping in both; the losses of a batch are
compared first. The two take turns in short blocks within one process, the trainer being halted at the end of a step
while the loop runs; memory is measured with each alone in a process of its own. Needs no network. A ratio above 1 in
speed, and one below 1 in memory, speaks for the trainer.

    python scripts/bench_sft_vlm.py                      # all settings, some minutes on two cores
    python scripts/bench_sft_vlm.py --vocab 0 --batch_sizes 8 32 128 --images 1 --output bench.json
    python scripts/bench_sft_vlm.py --vocab 151936 --batch_sizes 8 --blocks 9 --threads 1

`--vocab 0` is the built-in model (0.6 M parameters); any other is a LLaVA-class model with that many tokens, hidden
size 256 and 4 layers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.runtime.command import run_command

STEPS = {"warm_up": 3, "memory": 3}
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[0, 32_000, 151_936], help="models, see above")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4], help="images in each row")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each of the two; medians are reported")
    parser.add_argument("--block_seconds", type=float, default=1.0, help="a block is as many steps as fill this")
    parser.add_argument("--max_logits", type=float, default=1.6e8, help="leave out settings with more in a batch")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as there are cores")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args(words)


def build_rows(count: int, images: int):
    """Rows of `builtin/shapes` put together so that each question has `images` pictures before it."""
    from datasets import Dataset

    from shared.builtin import load_dataset
    from shared.data.images import undecoded

    shapes = load_dataset("builtin/shapes")
    plain = undecoded(shapes)[: count * images]
    messages = plain["messages"][::images]
    for question, _ in messages:
        question["content"][:1] = [question["content"][0]] * images
    pictures = [sum(plain["images"][i : i + images], []) for i in range(0, count * images, images)]
    columns = {"images": pictures, "messages": messages}
    return Dataset.from_dict(columns, features=shapes.select_columns(list(columns)).features)


def build_model(vocab: int):
    """The built-in model (0), or one of its class with a larger language model and `vocab` tokens."""
    import torch
    from transformers import AutoModelForImageTextToText

    from shared.builtin.models import load_model

    model = load_model("builtin/vlm-small", seed=0)
    if not vocab:
        return model
    config = model.config
    for name, value in {**LARGE, "vocab_size": vocab}.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def bare_collate(processor: Any) -> Callable[[list[dict]], dict]:
    """Rows to model inputs with labels: all but the answer and what ends it is masked, in the cheapest way there is.

    Every row ends with its answer, so the answers' token counts say where the labels begin.
    """

    def collate(rows: list[dict]) -> dict:
        texts = processor.apply_chat_template([row["messages"] for row in rows], tokenize=False)
        inputs = processor(
            text=texts, images=[row["images"] for row in rows], padding=True, padding_side="right", return_tensors="pt"
        )
        answers = [row["messages"][-1]["content"][0]["text"] + "<end>" for row in rows]
        lengths = inputs["attention_mask"].sum(1).tolist()
        labels = inputs["input_ids"].new_full(inputs["input_ids"].shape, -100)
        for row, (end, answer) in enumerate(zip(lengths, processor.tokenizer(answers)["input_ids"], strict=True)):
            labels[row, end - len(answer) : end] = inputs["input_ids"][row, end - len(answer) : end]
        return {**inputs, "labels": labels}

    return collate


def bare_steps(model: Any, processor: Any, rows: Any, size: int) -> Iterator[float]:
    """Train; give back the loss after each step."""
    import torch
    from torch.utils.data import DataLoader

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = DataLoader(rows, batch_size=size, collate_fn=bare_collate(processor), drop_last=True)
    while True:
        for batch in loader:
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


def build_trainer(model: Any, processor: Any, rows: Any, size: int, folder: str, steps: int, watch: Any):
    """The trainer with its default options, as far as they change nothing about the model's arithmetic."""
    from visionalign import VLMSFTConfig, VLMSFTTrainer

    args = VLMSFTConfig(
        output_dir=folder, per_device_train_batch_size=size, max_steps=steps, learning_rate=1e-4, bf16=False,
        save_strategy="no", eval_answers=0, check_rows=0, disable_tqdm=True, train_sampling_strategy="sequential",
        lr_scheduler_type="constant", dataloader_drop_last=True,
    )  # fmt: skip
    return VLMSFTTrainer(
        model, args, train_dataset=rows, processing_class=processor, callbacks=[watch] if watch else None
    )


def alternating(bare: Iterator[float], finished: list, options: argparse.Namespace):
    """A callback that times a block of the trainer's steps, then runs a block of the bare loop, and so on."""
    from transformers import TrainerCallback

    class Alternate(TrainerCallback):
        steps = 0  # of a block
        first = 0  # the step that the block began at

        def on_step_end(self, args, state, control, **kwargs):
            now = clock()
            done = state.global_step - self.first
            if not self.steps:
                if done == STEPS["warm_up"] - 1:
                    self.started = now
                if done < STEPS["warm_up"]:
                    return
                one = now[0] - self.started[0]
                self.steps = max(2, round(options.block_seconds / one))
                run(bare, STEPS["warm_up"])
            elif done < self.steps:
                return
            else:
                trainer = elapsed(self.started, now)
                finished.append((trainer, run(bare, self.steps)))
            control.should_training_stop = len(finished) == options.blocks
            self.first, self.started = state.global_step, clock()

    return Alternate()


def clock() -> tuple[float, float]:
    """Wall and processor seconds, once the device has done its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def elapsed(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def run(steps: Iterator[float], count: int) -> tuple[float, float]:
    started = clock()
    for _ in range(count):
        next(steps)
    return elapsed(started, clock())


def check_same_loss(trainer: Any, bare_model: Any, processor: Any, rows: Any, size: int) -> None:
    """The comparison is void where the two do not compute the same number."""
    import torch

    picked = [rows[i] for i in range(size)]
    batch = trainer._prepare_inputs(trainer.data_collator(picked))
    with torch.no_grad():
        ours = trainer.policy.log_probs(trainer.model, batch)
        inputs = {name: value.to(bare_model.device) for name, value in bare_collate(processor)(picked).items()}
        theirs = bare_model(**inputs).loss.item()
    mine = -(ours.logp.sum() / ours.mask.sum()).item()
    assert abs(mine - theirs) < 1e-3 * theirs, f"the losses differ: trainer {mine}, bare loop {theirs}"


def measure(kind: str, vocab: int, size: int, images: int, options: argparse.Namespace) -> dict[str, Any]:
    """One figure of one setting, in this process: `kind` is speed, trainer (memory) or bare (memory)."""
    import psutil
    import torch

    from shared.builtin.models import load_processor
    from shared.runtime.report import peak_memory

    if options.threads:
        torch.set_num_threads(options.threads)
    processor = load_processor("builtin/vlm-small")
    rows = build_rows(min(5 * size, 6000 // images // size * size), images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(vocab).to(device)
    resident = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        sys.stdout, printed = quiet, sys.stdout
        if kind == "bare":
            run(bare_steps(model, processor, rows, size), STEPS["memory"])
        elif kind == "trainer":
            build_trainer(model, processor, rows, size, folder, STEPS["memory"], None).train()
        else:
            other, finished = build_model(vocab).to(device), []
            watch = alternating(bare_steps(other, processor, rows, size), finished, options)
            trainer = build_trainer(model, processor, rows, size, folder, 1_000_000, watch)
            check_same_loss(trainer, other, processor, rows, size)
            if options.threads:
                torch.set_num_threads(options.threads)
            trainer.train()
        sys.stdout = printed
    if kind != "speed":
        peak = peak_memory()
        return {f"{kind}_mib": (peak.get("cuda:0") or peak["process"] - resident) / 2**20}
    steps = watch.steps * size
    return {
        "threads": torch.get_num_threads(),
        "blocks": len(finished),
        "steps_a_block": watch.steps,
        "trainer_samples_per_second": statistics.median(steps / t[0] for t, _ in finished),
        "bare_samples_per_second": statistics.median(steps / b[0] for _, b in finished),
        "speed_ratio": statistics.median(b[0] / t[0] for t, b in finished),
        "processor_time_ratio": statistics.median(t[1] / b[1] for t, b in finished),
        "speed_ratios": [b[0] / t[0] for t, b in finished],
    }


COLUMNS = {
    "vocab": "{:>8,}", "images": "{:>6}", "batch": "{:>5}", "trainer_samples_per_second": "{:>9.1f}",
    "bare_samples_per_second": "{:>9.1f}", "speed_ratio": "{:>7.3f}", "processor_time_ratio": "{:>7.3f}",
    "trainer_mib": "{:>9.0f}", "bare_mib": "{:>9.0f}", "memory_ratio": "{:>6.2f}",
}  # fmt: skip
HEADER = (
    "             rows of  samples a second    ratio of        MiB above model\n"
    "   vocab images batch   trainer      bare   speed cpu time  trainer      bare  ratio"
)


def in_own_process(*what: Any) -> dict[str, Any]:
    """`measure(*what)` in a fork: what one setting leaves behind in memory does not reach the next."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(measure(*what)))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"measuring {what[:4]} failed with status {process.exitcode}")
    return results.get()


def main() -> None:
    options = arguments()
    import datasets  # noqa: F401  (imported once, here, for all the forks)

    import visionalign.sft  # noqa: F401

    print(HEADER, flush=True)
    figures = []
    for vocab in options.vocab:
        for images in options.images:
            for size in options.batch_sizes:
                if size * (20 + 9 * images) * vocab > options.max_logits:
                    continue
                figure: dict[str, Any] = {"vocab": vocab, "images": images, "batch": size}
                figure["load_average"] = os.getloadavg()[0]
                for kind in ("speed", "trainer", "bare"):
                    figure |= in_own_process(kind, vocab, size, images, options)
                figure["memory_ratio"] = figure["trainer_mib"] / figure["bare_mib"]
                figures.append(figure)
                print(" ".join(form.format(figure[name]) for name, form in COLUMNS.items()), flush=True)
    if not figures:
        raise UserError(f"--max_logits {options.max_logits:g} leaves every setting out: raise it.")
    threads, blocks = figures[0]["threads"], figures[0]["blocks"]
    print(f"Medians of {blocks} blocks of each; {threads} thread(s).")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
