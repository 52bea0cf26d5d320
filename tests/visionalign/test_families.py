"""The table of families against the models and processors it describes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import FAMILIES as BUILT
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaConfig

from shared.data.schema import Kind
from shared.errors import UserError
from visionalign.collators import VLMCollator
from visionalign.families import FAMILIES, PARTS, family_of, modules, parameters, placeholder_ids


def test_all_rows_are_built_and_tested():
    assert set(FAMILIES) == set(BUILT)


@pytest.mark.parametrize("family", BUILT)
def test_parts_share_nothing_and_leave_nothing_out(tiny, family):
    model = AutoModelForImageTextToText.from_pretrained(tiny(family))
    assert family_of(model.config) is FAMILIES[family]
    parts = {part: parameters(model, part) for part in PARTS}
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert any(p is model.get_input_embeddings().weight for p in parts["language_model"].values())
    for module in modules(model, "vision_tower"):
        module.requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(parts["vision_tower"])  # the projector goes on learning


@pytest.mark.parametrize("family", BUILT)
def test_tensors_are_indexed_as_the_table_says(tiny, family):
    directory = tiny(family)
    processor, config = AutoProcessor.from_pretrained(directory), AutoConfig.from_pretrained(directory)
    collate = VLMCollator(processor, family=family_of(config), kind=Kind.MESSAGES)
    chat = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}]
    pictures = [Image.new("RGB", (32, 32))] * 3
    batch = collate([{"messages": chat, "images": pictures[:1]}, {"messages": chat, "images": pictures[1:]}])
    grids = batch.model_inputs.get("image_grid_thw")
    sizes = {
        "sample": 2,
        "seeing": 2,
        "image": 3,
        "token": 2,
        "patch": int(grids.prod(1).sum()) if grids is not None else None,
    }
    assert set(batch.model_inputs) <= set(family_of(config).index)
    for name, tensor in batch.model_inputs.items():
        index = family_of(config).index[name]
        assert tensor.shape[0] == sizes[index], name
        if index == "token":
            assert tensor.shape[:2] == batch.completion_ids.shape, name


@pytest.mark.parametrize("family", BUILT)
def test_placeholders_are_the_tokens_that_images_become(tiny, family):
    processor, config = AutoProcessor.from_pretrained(tiny(family)), AutoConfig.from_pretrained(tiny(family))
    ids = placeholder_ids(processor, config)
    image = getattr(config, "image_token_id", None) or config.image_token_index
    assert image in ids and max(ids) < len(processor.tokenizer)
    ordinary = set(processor.tokenizer("What colour? red.")["input_ids"])
    special = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
    assert not ids & (ordinary | special)


def test_a_peft_model_is_seen_through(tiny):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageTextToText.from_pretrained(tiny("llava"))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert modules(wrapped, "projector") == [model.model.multi_modal_projector]
    assert all(name.startswith("base_model.model.model.vision_tower") for name in parameters(wrapped, "vision_tower"))


def test_text_only_model_is_refused(tiny):
    with pytest.raises(UserError, match="text-only .*'llama'.*textalign"):
        family_of(AutoConfig.from_pretrained(tiny("lm")))


def test_unknown_family_is_guessed_with_a_warning(caplog):
    config = LlavaConfig()
    config.model_type = "brand_new"
    with caplog.at_level("WARNING"):
        family = family_of(config)
    assert "brand_new" in caplog.text and not family.known

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config
            self.model = torch.nn.Module()
            self.model.vision_tower = torch.nn.Linear(2, 2)
            self.lm_head = torch.nn.Linear(2, 2)

    model = Model()
    assert list(parameters(model, "vision_tower")) == ["model.vision_tower.weight", "model.vision_tower.bias"]
    with pytest.raises(UserError, match="projector of a Model is not where"):
        parameters(model, "projector")


def test_unknown_part(tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny("llava"))
    with pytest.raises(UserError, match="no part 'head'; its parts are vision_tower, projector, language_model"):
        modules(model, "head")
