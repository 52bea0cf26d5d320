"""Measure a whole step of GRPO, generation and update, against the bare floor and, where it is installed, against trl.

Same weights, prompts, reward, options and fused AdamW in all, float32; the first step is on the same completions, and
that all have the same loss and gradient there is checked. Each runs in a process of its own, and they take turns, a
block of steps each. The floor is what a step cannot do without: `generate` of all rows, and a plain forward and
backward of whole rows. Memory is the process's peak above the loaded model. Needs no network. A ratio above 1 in
time and in memory speaks for the trainer here.

    python scripts/bench_online.py --trl_python path/to/an/environment/bin/python       # some minutes on two cores
    python scripts/bench_online.py --all --blocks 3 --output bench.json                 # all 48 settings
    python scripts/bench_online.py --prompt 64 --group 4 16 --vocab 151936 --lengths skewed

Without `--all`, settings are those that the options name, or, without any, the middle one (prompt 512, completion 64,
8 completions of each prompt, 32,000 tokens, equal lengths) and those that differ from it in one of these. The model is
a Llama of 4 layers and hidden size 256. Lengths are equal (no completion ends before it is cut) or skewed (geometric,
two fifths of the longest on average).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_sides import check_same, figure_of, median, tell, told_of

from shared.errors import UserError
from shared.runtime.command import run_command

WORKER = Path(__file__).with_name("bench_online_worker.py")
FACTORS = {"prompt": [64, 512], "completion": [64, 256], "group": [4, 8, 16], "vocab": [32_000, 151_936]}
MIDDLE = {"prompt": 512, "completion": 64, "group": 8, "vocab": 32_000, "lengths": "equal"}
LENGTHS = ["equal", "skewed"]
HEADER = (
    "| prompt | completion | G | vocab | lengths | by | s a step | generation | update | time ratio | MiB | ratio |\n"
    "|---:|---:|---:|---:|---|---|---:|---:|---:|---:|---:|---:|"
)
ROW = (
    "| {prompt} | {completion} | {group} | {vocab} | {lengths} | {by} | {seconds:.2f} | {generation:.2f} "
    "| {update:.2f} | {time_ratio:.2f} | {mib:.0f} | {memory_ratio:.2f} |"
)
HIDDEN, LAYERS, EOS = 256, 4, 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="a Python interpreter that has trl; without it trl is left out")
    parser.add_argument("--all", action="store_true", help="all combinations")
    for name in FACTORS:
        parser.add_argument(f"--{name}", type=int, nargs="+")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS)
    parser.add_argument("--rows", type=int, default=16, help="completions of a step")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each; medians are reported")
    parser.add_argument("--block_steps", type=int, default=1, help="optimizer steps of a block")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


def settings_of(options: Any) -> list[dict[str, Any]]:
    """The settings that the options ask for."""
    choices = {**FACTORS, "lengths": LENGTHS}
    given = {name: values for name in choices if (values := getattr(options, name))}
    if options.all or given:
        one = {name: [value] for name, value in MIDDLE.items()}
        chosen = {**(choices if options.all else one), **given}
        return [dict(zip(chosen, values, strict=True)) for values in itertools.product(*chosen.values())]
    others = [{**MIDDLE, name: value} for name, values in choices.items() for value in values]
    return [MIDDLE, *(each for each in others if each != MIDDLE)]


# ---- What is trained ------------------------------------------------------------------------------------------------


def save_tokenizer(vocab: int, folder: Path) -> None:
    """One token a word, `w3`, `w4`, …: prompts have exactly as many tokens as they are meant to have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": EOS, "<unk>": 2} | {f"w{at}": at for at in range(3, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    ).save_pretrained(folder)


def save_model(vocab: int, chance: float, folder: Path) -> None:
    """A Llama that ends its completion at each token with a `chance`, whatever came before.

    One channel of its residual stream is the same constant in all places; the end-of-sequence token's logit is read
    off that channel alone, and no other token's is.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=EOS,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[EOS] = 0
        hidden = model.model(torch.randint(3, vocab, (4, 64))).last_hidden_state
        others = model.lm_head(hidden).logsumexp(-1).mean()
        model.lm_head.weight[EOS, 0] = (others + math.log(chance / (1 - chance))) / hidden[..., 0].mean()
    model.save_pretrained(folder)


def prepare(setting: dict[str, Any], folder: Path, options: Any) -> None:
    """Write into a folder what the workers read: the model, prompts, and completions of the first step."""
    if options.rows % setting["group"]:
        raise UserError(f"--rows {options.rows}: must be a multiple of --group {setting['group']}.")
    longest, drawn = setting["completion"], random.Random(0)
    save_tokenizer(setting["vocab"], folder / "model")
    save_model(setting["vocab"], 2 / longest if setting["lengths"] == "skewed" else 1e-20, folder / "model")

    def ids(count: int) -> list[int]:
        return [drawn.randrange(3, setting["vocab"]) for _ in range(count)]

    prompts = [" ".join(f"w{token}" for token in ids(setting["prompt"])) for _ in range(64)]
    lengths = [drawn.randint(1, longest) for _ in range(options.rows)]
    lengths[0] = longest
    given = [ids(length) if length == longest else [*ids(length - 1), EOS] for length in lengths]
    facts = {"rows": options.rows, "threads": options.threads, "block_steps": options.block_steps}
    text = json.dumps({**setting, **facts, "prompts": prompts, "given": given})
    (folder / "setting.json").write_text(text, encoding="utf-8")


# ---- Measuring ------------------------------------------------------------------------------------------------------


def figures_of(setting: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """One record for each of those that train."""
    pythons = {"ours": sys.executable} | ({"trl": options.trl_python} if options.trl_python else {})
    pythons["floor"] = sys.executable

    def check(first: dict[str, list[dict[str, float]]]) -> None:
        check_same(first, {"loss": 5e-3, "grad_norm": 5e-3})

    told = told_of(setting, options, WORKER, pythons, prepare, check)
    return [_figure(setting, by, told, options) for by in told]


def _figure(setting: dict, by: str, told: dict[str, list[dict]], options: Any) -> dict[str, Any]:
    generation, tokens = (median(told[by], name) / options.block_steps for name in ("generation", "tokens"))
    updates = [block["seconds"] - block["generation"] for block in told[by]]
    update = statistics.median(updates) / options.block_steps
    figure = figure_of(by, told, options)
    return {**setting, **figure, "generation": generation, "update": update, "tokens": tokens, "rows": options.rows}


def main() -> None:
    options = arguments()
    tell(settings_of(options), figures_of, options, header=HEADER, row=ROW, each=f"; {options.rows} rows")


if __name__ == "__main__":
    run_command(main)
