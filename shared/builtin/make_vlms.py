"""Make the built-in vision-language models of further families again: `python -m shared.builtin.make_vlms`.

Writes `gemma3_vlm_small/`, `smolvlm_small/` and `qwen2_vl_small/`: configuration, tokenizer, chat template and image
processor, no weights. Control tokens and templates are those of the real models, so that what works here works there;
sizes are not.
Running it twice gives the same files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.builtin import MODELS, moving_shapes
from shared.builtin.make import CHAT_TEMPLATE, END, PAD, WIDTH, built_in_texts, make_tokenizer
from shared.builtin.rows import IMAGE_SIZE
from shared.builtin.shapes import COLOURS, FORMS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

PATCH = 16  # pixels: one cell of a picture
LAYERS = 3
HEADS = 4
SEEN = 9  # tokens of a picture, or of a tile of one
# Black is next to nothing: as the usual -1 it would give the many black patches a strong content, and drown where they
# are. Not 0: SmolVLM takes a tile of zeros for one that is not there.
BLACK = [0.05] * 3
SPREAD = 0.06  # of the weights: larger than the usual 0.02, see make.py

GEMMA_TEMPLATE = """\
{{- bos_token -}}
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {{- '<start_of_image>' if part['type'] == 'image' else part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(first='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.first = body(message['content']) ~ '\\n\\n' -%}
    {%- else -%}
        {{- '<start_of_turn>' ~ ('model' if message['role'] == 'assistant' else message['role']) ~ '\\n' -}}
        {{- ns.first ~ body(message['content']) ~ '<end_of_turn>\\n' -}}
        {%- set ns.first = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
SMOL_TEMPLATE = """\
{{- '<|im_start|>' -}}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if content is string -%}
        {{- message['role'] | capitalize ~ ': ' ~ content -}}
    {%- else -%}
        {{- message['role'] | capitalize ~ (':' if content[0]['type'] == 'image' else ': ') -}}
        {%- for part in content -%}
            {{- '<image>' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""
QWEN_TEMPLATE = CHAT_TEMPLATE.replace(
    """\
            {%- if part['type'] == 'image' -%}
                {{- '<image>' -}}
""",
    """\
            {%- if part['type'] in ('image', 'video') -%}
                {{- '<|vision_start|><|' ~ part['type'] ~ '_pad|><|vision_end|>' -}}
""",
).replace("text and images, not", "text, images and videos, not")
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def main() -> None:
    for name, make in MADE.items():
        save(MODELS[name], *make())


def save(directory: Path, config: PretrainedConfig, processor: ProcessorMixin) -> None:
    """Write a model's configuration, the one for generation, and its processor."""
    from transformers import GenerationConfig

    text = config.get_text_config()
    config.save_pretrained(directory)
    GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id).save_pretrained(directory)
    processor.save_pretrained(directory)


def gemma3() -> tuple[PretrainedConfig, ProcessorMixin]:
    """Gemma 3: SigLIP tower, images that see themselves from both sides."""
    from transformers import (
        Gemma3Config,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    special = ("<pad>", "<end_of_turn>", "<bos>", "<start_of_turn>", *named.values())
    texts = [*_texts(), *["user", "model", "\n", "\n\n"] * 4]
    tokenizer = make_tokenizer(special, texts, end="<end_of_turn>", bos_token="<bos>", **named)
    ids = dict(zip(named.values(), tokenizer.convert_tokens_to_ids(list(named.values())), strict=True))
    text = Gemma3TextConfig(
        **_text(tokenizer),
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        query_pre_attn_scalar=WIDTH // HEADS,
        sliding_window=128,
        layer_types=["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**_vision(), vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=SEEN,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=SPREAD,
        architectures=["Gemma3ForConditionalGeneration"],
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = Gemma3ImageProcessor(size=size, image_mean=BLACK, image_std=[1.0] * 3)
    return config, Gemma3Processor(images, tokenizer, image_seq_length=SEEN, chat_template=GEMMA_TEMPLATE)


def smolvlm() -> tuple[PretrainedConfig, ProcessorMixin]:
    """SmolVLM: pictures are enlarged to four tiles and seen tile by tile and as a whole."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = ("<pad>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<image>", "<global-img>")
    texts = [*_texts(" "), *["User", "Assistant", "\n", "\n\n", ":"] * 4]
    tokenizer = make_tokenizer((*special, *TILES), texts, end="<end_of_utterance>", bos_token="<|im_start|>")
    # Not tied: at this size, and with no norm after the embeddings, what is seen is then learnt in half the steps.
    config = SmolVLMConfig(
        vision_config=_vision(),
        text_config={"model_type": "llama", "num_key_value_heads": HEADS, **_text(tokenizer, tied=False)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        scale_factor=1,
        initializer_range=SPREAD,
        architectures=["SmolVLMForConditionalGeneration"],
    )
    tile = {"longest_edge": IMAGE_SIZE}
    shown = {"max_image_size": tile, "image_mean": BLACK, "image_std": [0.5] * 3}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 2 * IMAGE_SIZE}, **shown),
        tokenizer,
        SmolVLMVideoProcessor(size=tile, max_image_size=tile),
        image_seq_len=SEEN,
        chat_template=SMOL_TEMPLATE,
    )
    return config, processor


def qwen2_vl() -> tuple[PretrainedConfig, ProcessorMixin]:
    """Qwen2-VL: two frames and 2 x 2 patches make a token, which knows its time and place."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    shown = {kind: f"<|{kind}_pad|>" for kind in ("image", "video")}
    special = (PAD, END, "<|vision_start|>", "<|vision_end|>", *shown.values(), "<system>", "<user>", "<assistant>")
    tokenizer = make_tokenizer(special, [*built_in_texts(), *_motions()])
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(special[2:6]))
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [WIDTH // HEADS // 6] * 3}
    patches = {"patch_size": PATCH // 2, "temporal_patch_size": 2}
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "mlp_ratio": 2,
            "spatial_merge_size": 2,
            "initializer_range": SPREAD,
            **patches,
        },
        text_config={"num_key_value_heads": HEADS, "rope_parameters": rope, **_text(tokenizer)},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
        initializer_range=SPREAD,
        architectures=["Qwen2VLForConditionalGeneration"],
    )
    seen = {"size": {"shortest_edge": PATCH**2, "longest_edge": IMAGE_SIZE**2}, "merge_size": 2, **patches}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**seen), tokenizer, Qwen2VLVideoProcessor(**seen), chat_template=QWEN_TEMPLATE
    )
    return config, processor


MADE = {"builtin/gemma3-vlm-small": gemma3, "builtin/smolvlm-small": smolvlm, "builtin/video-small": qwen2_vl}


def _motions() -> list[str]:
    """The questions and answers about what moves."""
    texts = ["What moves?", *moving_shapes.STEPS, "nothing"] * 3
    return texts + [f"Which way does the {form} move?" for form in FORMS]


def _text(tokenizer: PreTrainedTokenizerFast, *, tied: bool = True) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 1024,
        "initializer_range": SPREAD,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision() -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "initializer_range": SPREAD,
    }


def _texts(before_answers: str = "") -> list[str]:
    """The built-in questions and answers, those over several pictures too; some templates put a space before one."""
    texts = built_in_texts()
    texts += [f"{text.removesuffix('?')} in picture 1?" for text in texts if text.startswith("What")]
    for form in FORMS:
        texts += [f"Which picture shows the {form}?", f"{before_answers}{form}"]
        texts += [f"{before_answers}1 {form} {colour} 2 {form} {colour}" for colour in COLOURS]
    for number in (1, 2):
        texts += [f"Picture {number}:"] * 3
    return texts + ["What is in both?", "Describe the pictures."] * 3


if __name__ == "__main__":
    main()
