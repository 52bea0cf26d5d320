"""A score head on a model that sees: its trunk is that of the checkpoint, and what is saved is loaded bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import FAMILIES
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma3Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
)

from shared.errors import UserError
from shared.runtime.models import load_model
from shared.runtime.scorers import register_scorer

ROOT = Path(__file__).resolve().parents[2]


def scorer(path, seed=0):
    torch.manual_seed(seed)
    return load_model(str(path), head="sequence-classification", num_labels=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_is_loaded_as_it_is_and_saved_weights_too(family, tiny, tmp_path):
    model = scorer(tiny(family))
    weights = model.state_dict()
    answering = AutoModelForImageTextToText.from_pretrained(tiny(family), dtype=torch.float32).state_dict()
    assert set(weights) == set(answering) - {"lm_head.weight"} | {"score.weight"}
    assert all(torch.equal(value, answering[name]) for name, value in weights.items() if name != "score.weight")
    assert weights["score.weight"].shape == (1, model.config.get_text_config().hidden_size)
    assert torch.equal(scorer(tiny(family)).score.weight, weights["score.weight"])
    assert not torch.equal(scorer(tiny(family), seed=1).score.weight, weights["score.weight"])

    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(model) and type(model).__name__.endswith("ForSequenceClassification")
    assert again.config.num_labels == 1 and again.config.architectures == [type(model).__name__]
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert again.get_input_embeddings() is not None


def test_the_names_of_older_checkpoints_are_translated(tiny):
    with safe_open(tiny("llava") / "model.safetensors", "pt") as file:
        assert "language_model.model.embed_tokens.weight" in file.keys()  # noqa: SIM118
    with safe_open(tiny("qwen2_vl") / "model.safetensors", "pt") as file:
        assert "visual.patch_embed.proj.weight" in file.keys()  # noqa: SIM118


def test_tied_embeddings_stay_whole(tiny, tmp_path):
    answering = AutoModelForImageTextToText.from_pretrained(tiny("llava"), tie_word_embeddings=True)
    answering.save_pretrained(tmp_path)
    table = scorer(tmp_path).get_input_embeddings().weight
    assert torch.equal(table, answering.get_input_embeddings().weight)


def test_models_that_transformers_has_a_class_for_keep_it():
    for config_class in (LlamaConfig, LlavaConfig, LlavaConfig, Gemma3Config):
        register_scorer(config_class)
    mapping = AutoModelForSequenceClassification._model_mapping
    assert mapping[LlamaConfig] is LlamaForSequenceClassification
    assert mapping[Gemma3Config].__module__.startswith("transformers.")
    assert mapping[LlavaConfig].__name__ == "LlavaForSequenceClassification"


def test_a_built_in_model_gets_a_head_drawn_from_the_seed():
    first, second, other = (
        load_model("builtin/vlm-small-sft", head="sequence-classification", num_labels=1, seed=seed)
        for seed in (1, 1, 2)
    )
    trunk = load_model("builtin/vlm-small-sft", head="image-text-to-text").model.state_dict()
    assert all(torch.equal(value, trunk[name]) for name, value in first.model.state_dict().items())
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match="missing"):
        load_model(str(tmp_path / "missing"), head="sequence-classification")


@pytest.mark.slow
def test_a_new_process_loads_what_was_saved(tiny, tmp_path):
    scorer(tiny("qwen2_vl")).save_pretrained(tmp_path)
    code = (
        "import visionalign.rewards; from transformers import AutoModelForSequenceClassification as Auto; "
        f"print(type(Auto.from_pretrained({str(tmp_path)!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1:] == ["Qwen2VLForSequenceClassification"], done.stderr
