"""The built-in model and its processor work as any from the hub would."""

import pytest
import torch
import yaml

from shared import builtin
from shared.builtin import make
from shared.builtin.models import load_model, load_processor

NAME = "builtin/vlm-small"


@pytest.fixture(scope="module")
def processor():
    return load_processor(NAME)


@pytest.fixture(scope="module")
def row():
    return builtin.load_dataset("builtin/digits", "test")[0]


def test_size_is_what_a_cpu_trains_in_minutes():
    parameters = sum(parameter.numel() for parameter in load_model(NAME).parameters())
    assert 0.6e6 <= parameters <= 1.5e6


def test_weights_follow_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_model(NAME, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = load_model(NAME, seed=1), load_model(NAME, seed=2)
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_a_training_step_and_generation_with_a_picture(processor, row):
    model = load_model(NAME)
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    inputs = processor(text=[text], images=row["images"], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # LLaVA reads the tower before its last norm, which therefore never learns.
    assert without == ["model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"]
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_generation_marks_cover_answers_and_their_end(processor, row):
    image = row["images"][0]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "image", "image": image}]},
        {"role": "assistant", "content": "Two digits."},
        {"role": "user", "content": [{"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A 3"}]},
    ]
    encoded = processor.apply_chat_template(
        [messages],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={},
    )
    ids = encoded["input_ids"][0]
    trained = [token for token, mark in zip(ids, encoded["assistant_masks"][0], strict=True) if mark]
    assert processor.tokenizer.decode(trained) == "Two digits.<end>A 3<end>"
    assert processor.tokenizer.decode(ids).replace("<image>" * 18, "<image><image>") == (
        "<system>Be brief.<end><user><image><image><end><assistant>Two digits.<end>"
        "<user>Which?<end><assistant>A 3<end>"
    )


def test_the_generation_prompt_is_how_an_answer_starts(processor, row):
    prompt = processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    whole = processor.apply_chat_template(row["messages"], tokenize=False)
    answer = row["messages"][1]["content"][0]["text"]
    assert whole == f"{prompt}{answer}<end>"


@pytest.mark.parametrize(
    "text",
    [
        "What colour is the circle?",
        "  two  spaces\n\ttab ",
        "naïve façade 日本語 🎉 \u0000",
        "def f(x): return x**2",
    ],
)
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


def test_the_longest_answer_fits_the_recipe(processor):
    options = yaml.safe_load((builtin.RECIPES / "sft_vlm.yaml").read_text())
    answers = [row[1]["content"][0]["text"] for row in builtin.load_dataset("builtin/shapes", "train")["messages"]]
    longest = max(len(ids) for ids in processor.tokenizer([f"{answer}<end>" for answer in answers])["input_ids"])
    assert longest <= options["max_new_tokens"]


def test_the_words_of_the_built_in_questions_are_short(processor):
    for text in make.built_in_texts():
        assert len(processor.tokenizer(text)["input_ids"]) <= len(text.split()) + 2, text


def test_make_writes_the_files_that_are_in_the_repository(tmp_path):
    make.make_vlm(tmp_path)
    committed = builtin.model_path(NAME)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in committed.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (committed / name).read_text()
