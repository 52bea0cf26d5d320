"""The built-in language models and their tokenizer; the shipped weights reach what their card says."""

import re

import pytest
import torch
import yaml
from written import content

from shared import builtin
from shared.builtin import make_lm, reviews, train_lm
from shared.builtin.models import load_config, load_model, load_processor
from shared.errors import UserError

NAMES = make_lm.NAMES
NAME = "builtin/lm-small"


@pytest.fixture(scope="module")
def tokenizer():
    return load_processor(NAME)


@pytest.fixture(scope="module")
def trained():
    return load_model("builtin/lm-small-sft").eval()


@pytest.mark.parametrize("name", NAMES)
def test_size_is_what_a_cpu_trains_in_minutes(name):
    model = load_model(name)
    assert 0.4e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 1.0e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(load_processor(name)) <= 600


def test_weights_follow_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_model(NAME, seed=1)
    assert torch.equal(torch.rand(3), expected)
    key = "model.layers.0.self_attn.q_proj.weight"
    again, other = load_model(NAME, seed=1), load_model(NAME, seed=2)
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_shipped_weights_do_not_follow_the_seed_but_a_new_head_does(trained):
    key = "model.layers.0.self_attn.q_proj.weight"
    first, other = (
        load_model("builtin/lm-small-sft", seed, "sequence-classification", num_labels=1) for seed in (1, 2)
    )
    assert torch.equal(first.state_dict()[key], trained.state_dict()[key])
    assert torch.equal(other.state_dict()[key], trained.state_dict()[key])
    assert first.score.weight.shape == (1, make_lm.WIDTH)
    assert not torch.equal(first.score.weight, other.score.weight)


@pytest.mark.parametrize(
    ("name", "head", "made"),
    [
        (NAME, None, "LlamaForCausalLM"),
        (NAME, "causal-lm", "LlamaForCausalLM"),
        (NAME, "sequence-classification", "LlamaForSequenceClassification"),
        (NAME, "token-classification", "LlamaForTokenClassification"),
        ("builtin/gemma3-small", None, "Gemma3ForCausalLM"),
        ("builtin/gemma3-small", "sequence-classification", "Gemma3TextForSequenceClassification"),
        ("builtin/vlm-small", "image-text-to-text", "LlavaForConditionalGeneration"),
    ],
)
def test_the_head_decides_the_class(name, head, made):
    assert type(load_model(name, head=head)).__name__ == made


def test_fields_of_the_configuration_can_be_given():
    model = load_model(NAME, head="token-classification", num_labels=2, attn_implementation="eager")
    assert (model.config.num_labels, model.config._attn_implementation) == (2, "eager")
    assert load_config(NAME, num_hidden_layers=1).num_hidden_layers == 1


def test_fewer_layers_are_the_first_of_those_that_are_shipped(trained):
    cut = load_model("builtin/lm-small-sft", num_hidden_layers=2)
    assert len(cut.model.layers) == 2 and len(trained.model.layers) == 3
    whole = trained.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in cut.state_dict().items())


def test_a_head_that_there_is_not_is_explained():
    with pytest.raises(UserError, match="no head for image-text-to-text; these have: builtin/vlm-small"):
        load_model(NAME, head="image-text-to-text")
    with pytest.raises(UserError, match="'causal', allowed: image-text-to-text, causal-lm"):
        load_model(NAME, head="causal")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name, tokenizer):
    model = load_model(name)
    ids = tokenizer("What is 2 + 3?", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_each_digit_is_a_token_with_or_without_a_space_before_it(tokenizer):
    tokens = tokenizer.tokenize("12 + 345=6")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("123456")


@pytest.mark.parametrize(
    "text", ["  two  spaces\n\ttab ", "naïve façade 日本語 🎉 \u0000", "def f(x): return x**2 # 3.14", "1\n2\n"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_words_of_the_built_in_texts_are_tokens(tokenizer):
    for word in [*reviews.NAME_ADJECTIVES, *reviews.NAME_NOUNS, *reviews.ASPECTS, *reviews.LEXICON]:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    assert len(tokenizer("\n")["input_ids"]) == 1  # what separates steps


def test_generation_marks_cover_answers_calls_and_their_end(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Sum?"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 3"}]},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, tools=[{"name": "add"}], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = encoded["input_ids"], encoded["assistant_masks"]
    learnt = tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    assert re.fullmatch(r'Call: \[\{.*"add".*\}\]<end>It is 3<end>', learnt)
    text = tokenizer.decode(ids)
    assert text.startswith('<system>Tools: [{"name": "add"}]<end><system>Be brief.<end><user>Sum?<end><assistant>Call')
    assert text.endswith("<tool>3<end><assistant>It is 3<end>")


def test_the_generation_prompt_is_how_an_answer_starts(tokenizer):
    chat = builtin.load_dataset("builtin/reviews", "test")[0]["messages"]
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{prompt}{chat[1]['content']}<end>"


def test_the_template_refuses_what_it_cannot_write(tokenizer):
    with pytest.raises(Exception, match="unknown role narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "Once"}], tokenize=False)
    with pytest.raises(Exception, match="takes text, not image"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)


def on_the_card(what: str) -> float:
    card = (builtin.model_path("builtin/lm-small-sft") / train_lm.CARD).read_text()
    return float(re.search(rf"{what}.*\| ([0-9.]+)%", card).group(1)) / 100


def test_the_shipped_weights_answer_what_their_card_says(trained, tokenizer):
    said = on_the_card("arithmetic")
    assert 0.4 <= said <= 0.6
    assert train_lm.arithmetic_accuracy(trained, tokenizer, rows=150) == pytest.approx(said, abs=0.1)


def test_the_shipped_weights_write_sound_reviews_half_of_them_positive(trained, tokenizer):
    positive, faultless = on_the_card("positive"), on_the_card("without a fault")
    assert 0.35 <= positive <= 0.55 and faultless >= 0.9
    measured = train_lm.review_shares(trained, tokenizer, 80)
    assert measured == (pytest.approx(positive, abs=0.2), pytest.approx(faultless, abs=0.1))


def test_a_step_of_its_training_lowers_the_loss_and_is_the_same_twice(tokenizer, monkeypatch):
    monkeypatch.setattr(train_lm, "STEPS", 6)
    monkeypatch.setattr(train_lm, "WARMUP", 2)
    chats = builtin.load_dataset("builtin/reviews")["messages"][:64]
    monkeypatch.setattr(train_lm, "chats", lambda: chats)
    rows = train_lm.encode(tokenizer, chats)
    ids, mask, learnt = train_lm.pad(rows, tokenizer.pad_token_id)
    labels = ids.masked_fill(~learnt, -100)
    losses = [
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
        for model in (load_model(NAME), *(train_lm.train(load_model(NAME), tokenizer) for _ in range(2)))
    ]
    assert losses[1] == losses[2] < losses[0] - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_make_writes_the_files_that_are_in_the_repository(name, tmp_path):
    make_lm.make_files(name, tmp_path)
    committed = builtin.model_path(name)
    assert {path.name for path in committed.iterdir()} - {path.name for path in tmp_path.iterdir()} <= {
        "model.safetensors",
        "README.md",
    }
    for path in tmp_path.iterdir():
        assert content(path) == content(committed / path.name), path.name


def test_the_longest_answers_fit_the_recipes(tokenizer):
    for recipe, name in (("sft", "builtin/arithmetic"), ("dpo", "builtin/reviews")):
        options = yaml.safe_load((builtin.RECIPES / f"{recipe}.yaml").read_text())
        answers = [f"{chat[1]['content']}<end>" for chat in builtin.load_dataset(name)["messages"]]
        assert max(map(len, tokenizer(answers)["input_ids"])) <= options["max_new_tokens"]


def test_training_takes_all_arithmetic_and_more_negative_reviews():
    chats = train_lm.chats()
    assert len(chats) == len(builtin.load_dataset("builtin/arithmetic")) + train_lm.POSITIVE + train_lm.NEGATIVE
    written = [(prompt["content"], review["content"]) for prompt, review in chats if "film" in prompt["content"]]
    assert sum(reviews.score(*pair) > 0 for pair in written) == train_lm.POSITIVE


def test_shipped_weights_are_small():
    folders = [builtin.model_path(name) for name in builtin.MODELS]
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")]
    assert len(sizes) == 8 and max(sizes) <= 1_500_000 and sum(sizes) < 12e6
