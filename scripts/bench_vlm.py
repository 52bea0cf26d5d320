"""Measure fine-tuning and DPO of vision-language models and, where it is installed, trl's beside them.

Same weights, pictures, rows, options and fused AdamW on both sides, float32, no data workers. Rows have a prompt and a
completion, so that both learn the same tokens; that their first step has the same loss, gradient and log-probabilities
is checked. Each runs in a process of its own, and they take turns, a block of steps each. Memory is the process's peak
above the loaded model. Needs no network. A ratio above 1 in time and in memory speaks for the trainer here.

    python scripts/bench_vlm.py --trl_python path/to/an/environment/bin/python     # a quarter of an hour on two cores
    python scripts/bench_vlm.py --all --blocks 3 --output bench.json               # all combinations
    python scripts/bench_vlm.py --case dpo --family qwen2_vl --image_tokens 64 256

Cases: sft; sft-frozen (the vision tower is frozen on both sides); sft-cached (that, and the trainer here computes the
tower's features beforehand); dpo; dpo-precomputed (the trainer here takes the reference's log-probabilities
beforehand; trl cannot where there are pictures). What is done beforehand is no part of a step: `setup_cpu_seconds` in
the JSON tells of it.

On a processor trl applies the language-model head to all tokens, on a GPU to the learnt ones alone, as the trainer
here does everywhere. `--trl_learnt_only` has it do so on a processor too: the ratios are those of the rest of a step.

Without `--all`, settings are those that the options name, or, without any, sft, sft-cached and dpo, each with the
middle setting (a LLaVA, 32,000 tokens, 256 tokens a picture) and its neighbours. Language model and vision tower have
4 layers and hidden size 256; for a token of the language model the tower sees one patch (llava), four (qwen2_vl) or
sixteen (idefics3: the shape of SmolVLM). Pictures are JPEG files that are drawn beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

from bench_sides import check_same, figure_of, median, tell, told_of

from shared.errors import UserError
from shared.runtime.command import run_command

WORKER = Path(__file__).with_name("bench_vlm_worker.py")
CASES = ["sft", "sft-frozen", "sft-cached", "dpo", "dpo-precomputed"]
USUAL = ["sft", "sft-cached", "dpo"]
FACTS = ("batch", "rows", "question", "answer", "pixels", "trl_learnt_only")
FACTORS = {"family": ["llava", "qwen2_vl", "idefics3"], "vocab": [512, 32_000], "image_tokens": [64, 256]}
MIDDLE = {"family": "llava", "vocab": 32_000, "image_tokens": 256}
OTHERS = [{"vocab": 512}, {"image_tokens": 64}, {"family": "qwen2_vl"}, {"family": "idefics3", "image_tokens": 64}]
HEADER = (
    "| case | family | vocab | image tokens | by | samples a second | s a step | data | model | CPU s | time ratio "
    "| CPU ratio | MiB | ratio |\n|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
ROW = (
    "| {case} | {family} | {vocab} | {image_tokens} | {by} | {samples_per_second:.2f} | {seconds:.2f} | {data:.2f} "
    "| {model:.2f} | {cpu_seconds:.2f} | {time_ratio:.2f} | {cpu_ratio:.2f} | {mib:.0f} | {memory_ratio:.2f} |"
)
HIDDEN, LAYERS, HEADS = 256, 4, 4
PATCH = 14  # pixels, of a Qwen2-VL tower; four patches make a token
IDEFICS_PATCH = 16  # pixels; sixteen patches make a token
TOWER_SIDE = 336  # pixels, that a LLaVA's tower sees
SPECIAL = {
    "llava": ["<image>"],
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
}
PLACE = {"llava": "<image>", "idefics3": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}
TEMPLATE = """\
{%- for message in messages -%}
    {{- '<' ~ message['role'] ~ '>' -}}
    {%- for part in message['content'] -%}
        {{- PLACE if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
    {{- '<eos>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", help="a Python interpreter that has trl; without it trl is left out")
    parser.add_argument("--trl_learnt_only", action="store_true", help="as on a GPU; see above")
    parser.add_argument("--all", action="store_true", help="all combinations")
    parser.add_argument("--case", nargs="+", choices=CASES, help=f"default: {' '.join(USUAL)}")
    parser.add_argument("--family", nargs="+", choices=FACTORS["family"])
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--image_tokens", type=int, nargs="+", help="of a picture; square numbers")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rows", type=int, default=32, help="of the data set; a multiple of --batch")
    parser.add_argument("--question", type=int, default=24, help="tokens of a question")
    parser.add_argument(
        "--answer", type=int, default=40, help="tokens of an answer on average; half to one and a half"
    )
    parser.add_argument("--pixels", type=int, default=480, help="width and height of the pictures")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each; medians are reported")
    parser.add_argument("--block_steps", type=int, default=1, help="optimizer steps of a block")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--output", help="also write the figures here, as JSON")
    return parser.parse_args()


def settings_of(options: Any) -> list[dict[str, Any]]:
    """The settings that the options ask for.

    Raises:
        UserError: what no picture or batch can be made of.
    """
    for tokens in options.image_tokens or ():
        if math.isqrt(tokens) ** 2 != tokens or TOWER_SIDE % math.isqrt(tokens):
            raise UserError(
                f"--image_tokens {tokens}: must be the square of a divisor of {TOWER_SIDE}, like 64, 144 or 256."
            )
    if options.rows % options.batch or options.rows < 1:
        raise UserError(f"--rows {options.rows}: must be a multiple of --batch {options.batch}.")
    given = {name: values for name in FACTORS if (values := getattr(options, name))}
    if options.all or given:
        one = {name: [value] for name, value in MIDDLE.items()}
        chosen = {**(FACTORS if options.all else one), **given}
        settings = [dict(zip(chosen, values, strict=True)) for values in itertools.product(*chosen.values())]
    else:
        settings = [{**MIDDLE, **changed} for changed in ({}, *OTHERS)]
    return [{"case": case, **setting} for setting in settings for case in options.case or USUAL]


# ---- What is trained ------------------------------------------------------------------------------------------------


def build_tokenizer(family: str, vocab: int):
    """One token a word, `w20`, `w21`, …: texts have exactly as many tokens as they are meant to have."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<user>", "<assistant>", *SPECIAL[family]]
    words = {word: at for at, word in enumerate([*special, "<unk>"])}
    words |= {f"w{at}": at for at in range(len(words), vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    named = {"image_token": "<image>"} if family == "llava" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096,
        extra_special_tokens=named,
    )  # fmt: skip


def text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def llava(tokenizer: Any, image_tokens: int):
    """A CLIP tower whose patches are as large as the number of tokens wants them."""
    import transformers as t

    patch = TOWER_SIDE // math.isqrt(image_tokens)
    tower = {
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": TOWER_SIDE, "patch_size": patch,
    }  # fmt: skip
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**tower),
        text_config=t.LlamaConfig(**text_config(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=image_tokens,
    )
    size = {"height": TOWER_SIDE, "width": TOWER_SIDE}
    images = t.CLIPImageProcessor(size={"shortest_edge": TOWER_SIDE}, crop_size=size)
    processor = t.LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return t.LlavaForConditionalGeneration(config), processor


def qwen2_vl(tokenizer: Any, image_tokens: int):
    """Pictures are made as large as the number of tokens wants them: the tower sees four patches for each."""
    import transformers as t

    names = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 0, "vision_end_token_id": 1}
    ids = {name: tokenizer.convert_tokens_to_ids(SPECIAL["qwen2_vl"][at]) for name, at in names.items()}
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10_000.0}
    tower = {
        "depth": LAYERS, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": HEADS, "mlp_ratio": 2,
        "patch_size": PATCH,
    }  # fmt: skip
    config = t.Qwen2VLConfig(
        vision_config=tower, text_config={**text_config(tokenizer), "rope_parameters": rope}, **ids
    )
    seen = image_tokens * (2 * PATCH) ** 2
    size = {"size": {"shortest_edge": seen, "longest_edge": seen}, "patch_size": PATCH, "merge_size": 2}
    processor = t.Qwen2VLProcessor(t.Qwen2VLImageProcessor(**size), tokenizer, t.Qwen2VLVideoProcessor(**size))
    return t.Qwen2VLForConditionalGeneration(config), processor


def idefics3(tokenizer: Any, image_tokens: int):
    """Pictures are not cut into tiles, and made as large as the number of tokens wants them."""
    import transformers as t

    side = 4 * IDEFICS_PATCH * math.isqrt(image_tokens)
    tower = {
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": side, "patch_size": IDEFICS_PATCH,
    }  # fmt: skip
    config = t.Idefics3Config(
        vision_config=tower,
        text_config={"model_type": "llama", **text_config(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=4,
    )
    size = {"longest_edge": side}
    images = t.Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    processor = t.Idefics3Processor(images, tokenizer, image_seq_len=image_tokens)
    return t.Idefics3ForConditionalGeneration(config), processor


MAKE = {"llava": llava, "qwen2_vl": qwen2_vl, "idefics3": idefics3}


def save_pictures(count: int, side: int, folder: Path) -> list[str]:
    """Blurred colours with a few sharp shapes on them: JPEG files of the size that photographs have."""
    import numpy as np
    from PIL import Image, ImageDraw

    drawn = np.random.default_rng(0)
    paths = []
    for at in range(count):
        colours = drawn.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)
        for x, y, width, height in drawn.integers(side // 12, side // 2, (4, 4)).tolist():
            colour = tuple(drawn.integers(0, 256, 3).tolist())
            ImageDraw.Draw(picture).ellipse((x, y, x + width, y + height), fill=colour)
        paths.append(str(folder / f"{at}.jpg"))
        picture.save(paths[-1], quality=90)
    return paths


def prepare(setting: dict[str, Any], folder: Path, options: Any) -> None:
    """Write into a folder what the workers read: the model with its processor, pictures and rows."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    family = setting["family"]
    tokenizer = build_tokenizer(family, setting["vocab"])
    model, processor = MAKE[family](tokenizer, setting["image_tokens"])
    processor.chat_template = TEMPLATE.replace("PLACE", repr(PLACE[family]))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")

    drawn = random.Random(0)

    def words(count: int) -> dict[str, str]:
        return {"type": "text", "text": " ".join(f"w{drawn.randrange(20, setting['vocab'])}" for _ in range(count))}

    def answer() -> list[dict]:
        spread = options.answer // 2
        count = drawn.randint(options.answer - spread, options.answer + spread)
        return [{"role": "assistant", "content": [words(count)]}]

    answers = ("chosen", "rejected") if setting["case"].startswith("dpo") else ("completion",)
    rows = [
        {
            "images": [path],
            "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, words(options.question)]}],
            **{name: answer() for name in answers},
        }
        for path in save_pictures(options.rows, options.pixels, folder)
    ]
    facts = {name: getattr(options, name) for name in ("batch", "threads", "block_steps", "trl_learnt_only")}
    (folder / "setting.json").write_text(json.dumps({**setting, **facts, "rows": rows}), encoding="utf-8")


# ---- Measuring ------------------------------------------------------------------------------------------------------


def figures_of(setting: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """One record for each side."""
    pythons = {"ours": sys.executable} | ({"trl": options.trl_python} if options.trl_python else {})
    differences: dict[str, float] = {}

    def check(first: dict[str, list[dict[str, float]]]) -> None:
        tolerances = {"loss": 1e-4, "grad_norm": 1e-3}
        if setting["case"].startswith("dpo"):
            tolerances |= {"logps/chosen": 1e-5, "logps/rejected": 1e-5}
        differences.update(check_same(first, tolerances))

    told = told_of(setting, options, WORKER, pythons, prepare, check)
    agreement = {f"{name} differs by": value for name, value in differences.items()}
    return [{**setting, **_figure(by, told, options), **agreement} for by in told]


def _figure(by: str, told: dict[str, list[dict]], options: Any) -> dict[str, Any]:
    figure = figure_of(by, told, options)
    split = {name: median(told[by], name) / options.block_steps for name in ("data", "data_cpu")}
    shares = {"model": figure["seconds"] - split["data"], "model_cpu": figure["cpu_seconds"] - split["data_cpu"]}
    facts = {name: getattr(options, name) for name in FACTS}
    told_once = {"setup_cpu_seconds": told[by][0]["setup_cpu_seconds"]}
    return {**figure, **split, **shares, **facts, **told_once, "samples_per_second": options.batch / figure["seconds"]}


def main() -> None:
    options = arguments()
    tell(settings_of(options), figures_of, options, header=HEADER, row=ROW, each=f"; batches of {options.batch}")


if __name__ == "__main__":
    run_command(main)
