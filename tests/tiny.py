"""Tiny models of every supported family (0.05–0.5 M parameters), made from configuration: no network, no downloads.

`build_vlm("llava", directory)` writes model and processor as `save_pretrained` does; tests load them as a user would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tiny_templates import (
    CHATML_TEMPLATE,
    GEMMA_TEMPLATE,
    IDEFICS_TEMPLATE,
    LLAVA_TEMPLATE,
    MLLAMA_TEMPLATE,
    NEXT_TEMPLATE,
    ONEVISION_TEMPLATE,
)

HIDDEN = 32
WORDS = (
    "What colour is the circle ? square triangle red green blue yellow Describe image image. Where how many shapes "
    "left right top bottom user assistant system USER ASSISTANT model You are a helpful one two three four five"
)


def build_tokenizer(special: list[str], *, bos: str | None, eos: str, pad: str, named: dict[str, str] | None = None):
    """A byte-level tokenizer of some 400 tokens; `special` are its control tokens, `named` become its attributes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    first = list(dict.fromkeys([pad, *([bos] if bos else []), eos, *special]))
    trainer = trainers.BpeTrainer(
        vocab_size=330 + len(first),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([WORDS, *(f" {word}" for word in WORDS.split())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=named or {}
    )


def _text(tokenizer, **changed) -> dict:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": (len(tokenizer) + 7) // 8 * 8,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changed,
    }


def _vision(**changed) -> dict:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        **changed,
    }


def _llava():
    import transformers as t

    tokenizer = build_tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "<image>"})
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_vision()),
        text_config=t.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = t.LlavaProcessor(
        t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return t.LlavaForConditionalGeneration, config, processor


_PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava_next():
    import transformers as t

    tokenizer = build_tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>", named={"image_token": "<image>"})
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**_vision(image_size=16)),
        text_config=t.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
    )
    processor = t.LlavaNextProcessor(
        t.LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NEXT_TEMPLATE,
    )
    return t.LlavaNextForConditionalGeneration, config, processor


_SHOWN = {"image_token": "<image>", "video_token": "<video>"}


def _llava_next_video():
    import transformers as t

    tokenizer = build_tokenizer([*_SHOWN.values()], bos="<s>", eos="</s>", pad="<pad>", named=_SHOWN)
    config = t.LlavaNextVideoConfig(
        vision_config=t.CLIPVisionConfig(**_vision()),
        text_config=t.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        vision_feature_layer=-1,
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = t.LlavaNextVideoProcessor(
        t.LlavaNextVideoVideoProcessor(**size),
        t.LlavaNextImageProcessor(**size, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NEXT_TEMPLATE,
    )
    return t.LlavaNextVideoForConditionalGeneration, config, processor


def _llava_onevision():
    import transformers as t

    tokenizer = build_tokenizer(
        ["<|im_start|>", "<|im_end|>", *_SHOWN.values()], bos=None, eos="<|im_end|>", pad="<|endoftext|>", named=_SHOWN
    )
    config = t.LlavaOnevisionConfig(
        vision_config=t.SiglipVisionConfig(**_vision(image_size=16, vision_use_head=False)),
        text_config=t.Qwen2Config(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
    )
    size = {"size": {"height": 16, "width": 16}}
    processor = t.LlavaOnevisionProcessor(
        t.LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=_PINPOINTS),
        tokenizer,
        t.LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    return t.LlavaOnevisionForConditionalGeneration, config, processor


_IDEFICS_TOKENS = [
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
]


def _idefics_parts(name: str, image_processor_class):
    import transformers as t

    tokenizer = build_tokenizer(_IDEFICS_TOKENS, bos="<|im_start|>", eos="<end_of_utterance>", pad="<pad>")
    config = getattr(t, f"{name}Config")(
        vision_config=_vision(),
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = image_processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return tokenizer, config, images


def _idefics3():
    import transformers as t

    tokenizer, config, images = _idefics_parts("Idefics3", t.Idefics3ImageProcessor)
    processor = t.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    return t.Idefics3ForConditionalGeneration, config, processor


def _smolvlm():
    import transformers as t

    tokenizer, config, images = _idefics_parts("SmolVLM", t.SmolVLMImageProcessor)
    videos = t.SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    processor = t.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    return t.SmolVLMForConditionalGeneration, config, processor


def _gemma3():
    import transformers as t

    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = build_tokenizer(
        ["<start_of_turn>", "<end_of_turn>", *named.values()], bos="<bos>", eos="<eos>", pad="<pad>", named=named
    )
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**_vision()),
        text_config=t.Gemma3TextConfig(**_text(tokenizer, head_dim=8, sliding_window=16)),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
    )
    processor = t.Gemma3Processor(
        t.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=GEMMA_TEMPLATE,
    )
    return t.Gemma3ForConditionalGeneration, config, processor


_QWEN_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def _qwen_parts():
    import transformers as t

    tokenizer = build_tokenizer(_QWEN_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = t.Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=2, size=pixels)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = _text(tokenizer, rope_parameters=rope)
    return tokenizer, ids, images, text, pixels


def _qwen2_vl():
    import transformers as t

    tokenizer, ids, images, text, pixels = _qwen_parts()
    vision = {"depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    config = t.Qwen2VLConfig(vision_config=vision, text_config=text, **ids)
    videos = t.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2, size=pixels)
    processor = t.Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHATML_TEMPLATE)
    return t.Qwen2VLForConditionalGeneration, config, processor


def _qwen2_5_vl():
    import transformers as t

    tokenizer, ids, images, text, pixels = _qwen_parts()
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": 4,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = t.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    videos = t.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2, size=pixels)
    processor = t.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHATML_TEMPLATE)
    return t.Qwen2_5_VLForConditionalGeneration, config, processor


def _qwen3_vl():
    import transformers as t

    tokenizer, ids, images, text, pixels = _qwen_parts()
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": 4,
        "patch_size": 8,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = t.Qwen3VLConfig(vision_config=vision, text_config={**text, "head_dim": 8}, **ids)
    videos = t.Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2, size=pixels)
    processor = t.Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHATML_TEMPLATE)
    return t.Qwen3VLForConditionalGeneration, config, processor


def _mllama():
    import transformers as t

    tokenizer = build_tokenizer(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>", "<|python_tag|>"],
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|pad|>",
    )
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 2 * HIDDEN,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    text = _text(
        tokenizer, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    config = t.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, pad_token_id=tokenizer.pad_token_id
    )
    processor = t.MllamaProcessor(
        t.MllamaImageProcessor(size={"height": 16, "width": 16}, max_image_tiles=2),
        tokenizer,
        chat_template=MLLAMA_TEMPLATE,
    )
    return t.MllamaForConditionalGeneration, config, processor


def _paligemma():
    import transformers as t

    tokenizer = build_tokenizer(["<image>"], bos="<bos>", eos="<eos>", pad="<pad>", named={"image_token": "<image>"})
    images = t.SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = t.PaliGemmaProcessor(images, tokenizer)
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**_vision(image_size=16, projection_dim=HIDDEN)),
        text_config=t.GemmaConfig(**_text(tokenizer, head_dim=8)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
    )
    return t.PaliGemmaForConditionalGeneration, config, processor


_BUILDERS: dict[str, Callable] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "mllama": _mllama,
    "paligemma": _paligemma,
}
FAMILIES = tuple(_BUILDERS)


def build_vlm(family: str, directory: str | Path) -> Path:
    """Write a tiny model of `family` (one of FAMILIES) with its processor to `directory`; the weights are seeded."""
    import torch

    model_class, config, processor = _BUILDERS[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    tokenizer = processor.tokenizer
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = config.get_text_config().eos_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


def build_lm(directory: str | Path) -> Path:
    """Write a tiny text-only Llama with tokenizer and chat template to `directory`."""
    import torch
    import transformers as t

    tokenizer = build_tokenizer(["<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.LlamaForCausalLM(t.LlamaConfig(**_text(tokenizer)))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
