"""Measure the text trainers against a bare PyTorch loop and, where it is installed, against trl.

Same weights, rows, fused AdamW and gradient clipping in all, float32; that they compute the same losses is checked.
They take turns within one process, a block of steps each: the trainer is halted at the end of a step while the others
run. Memory above the loaded model is measured with each alone in a process of its own. Needs no network.
A ratio above 1 in speed, and one below 1 in memory, speaks for the trainer.

    python scripts/bench_text.py                                   # all cases, some minutes on two cores
    python scripts/bench_text.py --cases sft-short dpo --vocab 32000 --blocks 9 --output bench.json
    python scripts/bench_text.py --cases tokens --rows 100000      # rows to packed tokens, rows a second

The model is a Llama of 4 layers and hidden size 256 with `--vocab` tokens. Cases: sft-short (rows of 16 to 96 tokens),
sft-long (512), dpo (prompts of 256 tokens, answers of 127), tokens (a trainer built with packing, nothing trained).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.runtime.command import run_command

CASES = ("sft-short", "sft-long", "dpo", "tokens")
HEADER = "case         vocab  by         a second   speed ratio   MiB above the model  ratio"
ROW = "{case:<11} {vocab:>6}  {by:<8} {rate:>10.1f} {speed_ratio:>13.2f} {mib:>21.0f} {memory_ratio:>6.2f}"
LR, BETA = 1e-4, 0.1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--vocab", type=int, nargs="+", default=[512, 32_000, 151_936])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each; medians are reported")
    parser.add_argument("--block_steps", type=int, default=2, help="optimizer steps of a block")
    parser.add_argument("--rows", type=int, default=10_000, help="of the case tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--no_trl", action="store_true", help="leave trl out")
    parser.add_argument("--no_memory", action="store_true", help="leave memory out")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


# ---- What is trained ------------------------------------------------------------------------------------------------


def build_tokenizer(vocab: int):
    """One token a word, `w3`, `w4`, …: rows of text have exactly as many tokens as they are meant to have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{at}": at for at in range(3, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    )


def build_rows(case: str, vocab: int, count: int) -> list[dict[str, str]]:
    drawn = random.Random(0)

    def words(length: int) -> str:
        return " ".join(f"w{drawn.randrange(3, vocab)}" for _ in range(length))

    if case == "dpo":  # the end-of-sequence token makes 127
        return [{"prompt": words(256) + " ", "chosen": words(126), "rejected": words(126)} for _ in range(count)]
    lengths = (15, 95) if case == "sft-short" else (511, 511)
    return [{"text": words(drawn.randint(*lengths))} for _ in range(count)]


def build_model(vocab: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


# ---- Those that train: each gives an iterator that makes a step and yields its loss ---------------------------------


def bare_steps(case: str, model: Any, tokenizer: Any, rows: list[dict], size: int) -> Iterator[float]:
    """The bare loop: logits of whole padded rows, as a tutorial writes it."""
    import torch

    reference = copy.deepcopy(model).eval() if case == "dpo" else None
    batches = [bare_batch(case, tokenizer, rows[at : at + size], model.device) for at in range(0, len(rows), size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    model.train()
    for batch in itertools.cycle(batches):
        loss = bare_dpo_loss(model, reference, batch) if reference else model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def bare_batch(case: str, tokenizer: Any, rows: list[dict], device: Any) -> dict[str, Any]:
    names = ("chosen", "rejected") if case == "dpo" else ("text",)
    texts = [row.get("prompt", "") + row[name] + " <eos>" for name in names for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if case == "dpo":
        labels[:, :256] = -100
    return {name: value.to(device) for name, value in {**batch, "labels": labels}.items()}


def bare_dpo_loss(model: Any, reference: Any, batch: dict[str, Any]):
    import torch

    def log_probs(network: Any):
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        of_labels = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        return (of_labels * (labels != -100)).sum(1)

    with torch.no_grad():
        fixed = log_probs(reference)
    chosen, rejected = (log_probs(model) - fixed).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def build_trainer(case: str, by: str, model: Any, tokenizer: Any, rows: Any, folder: str, **changed: Any):
    """The trainer here (`trainer`) or trl's, with default options but for those that would make it another task."""
    from datasets import Dataset

    options = {
        "output_dir": os.path.join(folder, by), "learning_rate": LR, "lr_scheduler_type": "constant", "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "report_to": [],
        "max_length": 1024, "seed": 0,
    }  # fmt: skip
    if case == "dpo":
        options["beta"] = BETA
    if by == "trl":
        import trl

        config, trainer = (trl.DPOConfig, trl.DPOTrainer) if case == "dpo" else (trl.SFTConfig, trl.SFTTrainer)
        options |= {"gradient_checkpointing": False, "use_cpu": model.device.type == "cpu"}
    else:
        from textalign.dpo import DPOConfig, DPOTrainer
        from textalign.sft import SFTConfig, SFTTrainer

        config, trainer = (DPOConfig, DPOTrainer) if case == "dpo" else (SFTConfig, SFTTrainer)
        options |= {"eval_answers": 0}
    args = config(**{**options, **changed})
    data = rows if hasattr(rows, "column_names") else Dataset.from_list(rows)
    reference = {"ref_model": copy.deepcopy(model)} if case == "dpo" else {}
    return trainer(model, args=args, train_dataset=data, processing_class=tokenizer, **reference)


class Halted:
    """A trainer of another library in a thread of its own that stands still between the steps it is told to make."""

    def __init__(self, trainer: Any):
        self.go, self.done, self.trainer = threading.Semaphore(0), threading.Semaphore(0), trainer
        trainer.add_callback(self._callback())
        self.thread = threading.Thread(target=trainer.train, daemon=True)

    def _callback(self):
        from transformers import TrainerCallback

        class Wait(TrainerCallback):
            def on_step_begin(_, args, state, control, **kwargs):
                self.go.acquire()

            def on_step_end(_, args, state, control, **kwargs):
                self.done.release()

        return Wait()

    def __iter__(self) -> Iterator[float]:
        self.thread.start()
        while True:
            self.go.release()
            self.done.acquire()
            yield float("nan")


# ---- Measuring ------------------------------------------------------------------------------------------------------


def clock() -> float:
    """Seconds, once the device has done its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(trainer: Any, others: dict[str, Iterator[float]], options: Any) -> tuple[dict[str, list[float]], dict]:
    """Seconds of the blocks of each but the first, which is warm-up, and the losses of the other loops."""
    from transformers import TrainerCallback

    seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *others)}
    losses: dict[str, list[float]] = {name: [] for name in others}

    class TakeTurns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.started = clock()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % options.block_steps:
                return
            seconds["trainer"].append(clock() - self.started)
            for name, steps in others.items():
                started = clock()
                losses[name] += [next(steps) for _ in range(options.block_steps)]
                seconds[name].append(clock() - started)
            control.should_training_stop = len(seconds["trainer"]) > options.blocks
            self.started = clock()

    trainer.add_callback(TakeTurns())
    trainer.train()
    return {name: blocks[1:] for name, blocks in seconds.items()}, losses


def speed(case: str, vocab: int, folder: str, options: Any) -> dict[str, Any]:
    """Seconds of each, by turns; the losses of all must be the same."""
    import torch

    size, steps = options.batch_size, options.block_steps
    tokenizer, rows, model = build_tokenizer(vocab), build_rows(case, vocab, 4 * size), build_model(vocab)
    run = {"max_steps": 1_000_000, "logging_steps": steps, "per_device_train_batch_size": size}
    trainers = {
        by: build_trainer(case, by, copy.deepcopy(model), tokenizer, rows, folder, **run) for by in libraries(options)
    }
    torch.set_num_threads(options.threads)  # the trainer's configuration takes all cores
    others: dict[str, Iterator[float]] = {"bare": bare_steps(case, copy.deepcopy(model), tokenizer, rows, size)}
    if "trl" in trainers:
        others["trl"] = iter(Halted(trainers["trl"]))
    seconds, losses = in_turns(trainers["trainer"], others, options)
    expected = [statistics.mean(losses["bare"][at : at + steps]) for at in range(0, steps * options.blocks, steps)]
    for by, trainer in trainers.items():
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for ours, theirs in zip(logged, expected, strict=False):
            assert abs(ours - theirs) < 2e-3 * theirs, f"the losses differ: {by} {ours}, bare loop {theirs}"
    return {"rows": steps * size, "seconds": seconds}


def libraries(options: Any) -> list[str]:
    return ["trainer"] + ["trl"] * (not options.no_trl and importlib.util.find_spec("trl") is not None)


def memory(case: str, by: str, vocab: int, folder: str, options: Any) -> float:
    """Peak memory above the loaded model in MiB, after three steps by one of them alone in this process."""
    import psutil
    import torch

    from shared.runtime.report import peak_memory

    size = options.batch_size
    tokenizer, rows, model = build_tokenizer(vocab), build_rows(case, vocab, 4 * size), build_model(vocab)
    torch.set_num_threads(options.threads)
    resident = psutil.Process().memory_info().rss
    if by == "bare":
        list(itertools.islice(bare_steps(case, model, tokenizer, rows, size), 3))
    else:
        run = {"max_steps": 3, "per_device_train_batch_size": size}
        build_trainer(case, by, model, tokenizer, rows, folder, **run).train()
    peak = peak_memory()
    return (peak.get("cuda:0") or peak["process"] - resident) / 2**20


def token_speed(vocab: int, folder: str, options: Any) -> dict[str, Any]:
    """Seconds from rows of text to a trainer with packed rows, by turns, nothing kept from one turn for the next."""
    from datasets import Dataset

    from shared.builtin import load_dataset
    from shared.builtin.models import load_model, load_processor

    texts = [row["text"] for row in load_dataset("builtin/docstrings", "train")]
    rows = [{"text": f"{at} {texts[at % len(texts)]}"} for at in range(options.rows)]
    data, tokenizer, model = (
        Dataset.from_list(rows),
        load_processor("builtin/lm-small"),
        load_model("builtin/lm-small"),
    )
    seconds: dict[str, list[float]] = {by: [] for by in (*libraries(options), "bare")}
    for turn in range(options.blocks + 1):
        for by in seconds:
            os.environ["TRIALIGN_CACHE"] = os.path.join(folder, f"cache-{turn}")
            started = time.perf_counter()
            if by == "bare":
                bare_packing(data, tokenizer, 1024)
            else:
                build_trainer("sft", by, model, tokenizer, data, folder, packing=True, max_steps=1)
            seconds[by].append(time.perf_counter() - started)
    return {"rows": len(rows), "seconds": {by: each[1:] for by, each in seconds.items()}}


def bare_packing(rows: Any, tokenizer: Any, length: int) -> Any:
    """Batches through the tokenizer, and one text after the other, cut every so many tokens."""
    import numpy as np

    parts = []
    for at in range(0, len(rows), 1000):
        for ids in tokenizer(rows[at : at + 1000]["text"], add_special_tokens=False)["input_ids"]:
            parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
    tokens = np.concatenate(parts)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


# ---- Running --------------------------------------------------------------------------------------------------------


def quietly(work: Callable, *what: Any) -> Any:
    """In this process, in a folder that is gone afterwards, with nothing said."""
    import datasets

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # trl's, about its own default
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.environ["TRIALIGN_CACHE"] = os.path.join(folder, "cache")
        return work(*what[:-1], folder, what[-1])


def in_own_process(work: Callable, *what: Any) -> Any:
    """`work` in a fork: what one case leaves behind in memory does not reach the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(quietly, work, *what).result()


def figures_of(case: str, vocab: int, options: Any) -> list[dict[str, Any]]:
    """One record for each that was measured."""
    found = in_own_process(*((token_speed,) if case == "tokens" else (speed, case)), vocab, options)
    seconds, mib = found["seconds"], {by: float("nan") for by in found["seconds"]}
    if case != "tokens" and not options.no_memory:
        mib = {by: in_own_process(memory, case, by, vocab, options) for by in seconds}
    ours = seconds["trainer"]
    return [
        {
            "case": case, "vocab": vocab, "by": by, "rate": statistics.median(found["rows"] / s for s in blocks),
            "speed_ratio": statistics.median(other / own for own, other in zip(ours, blocks, strict=True)),
            "speed_ratios": [other / own for own, other in zip(ours, blocks, strict=True)],
            "mib": mib[by], "memory_ratio": mib["trainer"] / mib[by], "load_average": os.getloadavg()[0],
            "blocks": options.blocks, "threads": options.threads, "batch": options.batch_size,
        }
        for by, blocks in seconds.items()
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    if options.blocks < 1 or options.block_steps < 1:
        raise UserError("nothing to measure: give --blocks and --block_steps of 1 or more.")
    import datasets  # noqa: F401  (imported once, here, for all the forks)

    import textalign.dpo
    import textalign.sft  # noqa: F401

    if "trl" in libraries(options):
        import trl  # noqa: F401
    print(HEADER, flush=True)
    figures: list[dict[str, Any]] = []
    for case in options.cases:
        for vocab in options.vocab[: 1 if case == "tokens" else None]:
            figures += figures_of(case, vocab, options)
            for figure in figures[-len(libraries(options)) - 1 :]:
                print(ROW.format(**figure), flush=True)
    print(
        f"Medians of {options.blocks} blocks; {options.threads} of {os.cpu_count()} cores. A second: rows, or pairs."
    )
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
