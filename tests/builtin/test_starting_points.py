"""The models that online trainers start from: they load, are small, and reach what their cards say."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from written import content

from shared import builtin
from shared.builtin import graded, measure, train_lm
from shared.builtin.models import load_processor
from shared.runtime.models import load_config, load_model
from visionalign.rewards import VLMRewardModel

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_builtin_models.py"
HEADS = {
    "builtin/rm-reviews": ("sequence-classification", "LlamaForSequenceClassification", "builtin/lm-small-sft"),
    "builtin/vlm-small-sft": ("image-text-to-text", "LlavaForConditionalGeneration", "builtin/vlm-small"),
    "builtin/vlm-small-draft": ("image-text-to-text", "LlavaForConditionalGeneration", "builtin/vlm-small-sft"),
    "builtin/rm-shapes": ("sequence-classification", "LlavaForSequenceClassification", "builtin/vlm-small-sft"),
    "builtin/lm-tldr-sft": ("causal-lm", "LlamaForCausalLM", "builtin/lm-small-sft"),
}


@pytest.fixture(scope="module")
def loaded():
    return {name: load_model(name, head=head).eval() for name, (head, _, _) in HEADS.items()}


@pytest.fixture(scope="module")
def processors():
    return {name: load_processor(name) for name in HEADS}


@pytest.fixture(scope="module")
def seeing(loaded, processors):
    return VLMRewardModel(loaded["builtin/rm-shapes"], processors["builtin/rm-shapes"], batch_size=100)


def on_the_card(name: str, what: str) -> float:
    card = (builtin.model_path(name) / train_lm.CARD).read_text()
    number, percent = re.search(rf"\| {re.escape(what)} \| ([0-9.]+)(%?)", card).groups()
    return float(number) / (100 if percent else 1)


@pytest.mark.parametrize("name", HEADS)
def test_they_load_in_full_precision_whatever_the_seed(loaded, name):
    head, made, _ = HEADS[name]
    again = load_model(name, head=head, seed=7)
    assert type(again).__name__ == made and {p.dtype for p in again.parameters()} == {torch.float32}
    for (key, first), (_, second) in zip(loaded[name].named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(first, second), key
    assert load_config(name).architectures == [made]


def test_the_reward_model_is_read_by_transformers_too(loaded):
    folder = builtin.model_path("builtin/rm-reviews")
    read = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    ids = torch.tensor([[4, 300, 301, 302, 1]])
    assert read.config.num_labels == 1 and read.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, loaded["builtin/rm-reviews"](input_ids=ids).logits)


@pytest.mark.parametrize("name", HEADS)
def test_their_processor_is_that_of_the_start(name):
    folder, start = builtin.model_path(name), builtin.model_path(HEADS[name][2])
    files = {path.name for path in folder.iterdir()} - {"config.json", train_lm.CARD, "model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert all((folder / file).read_bytes() == (start / file).read_bytes() for file in files)


def test_the_reward_model_orders_pairs_as_its_card_says(loaded, processors):
    model, tokenizer = loaded["builtin/rm-reviews"], processors["builtin/rm-reviews"]
    assert measure.pairs_in_order(model, tokenizer, "preference") >= 0.98
    in_order = measure.pairs_in_order(model, tokenizer, "graded")
    said = on_the_card("builtin/rm-reviews", "pairs of `builtin/reviews-graded` in order")
    assert in_order == pytest.approx(said, abs=0.03) and in_order >= 0.9


@pytest.mark.parametrize("way", graded.WAYS, ids=lambda way: way.__name__)
def test_the_reward_model_puts_spoilt_reviews_below_sound_ones(loaded, processors, way):
    model, tokenizer = loaded["builtin/rm-reviews"], processors["builtin/rm-reviews"]
    assert measure.spoilt_below(model, tokenizer, 60, [way]) >= 0.85


def test_the_reward_model_ranks_sampled_reviews_as_the_judge_does(loaded, processors):
    found = measure.agreement(loaded["builtin/rm-reviews"], processors["builtin/rm-reviews"], 150)
    assert found >= 0.75


def test_ranks_correlate_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert measure.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert measure.rank_correlation(a, -a) == pytest.approx(-1)
    # ranks 1 2 3 4 and 1.5 1.5 3 4: covariance 4.5, variances 5 and 4.5
    assert measure.rank_correlation(a, torch.tensor([0.0, 0.0, 5.0, 9.0])) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)


@pytest.mark.parametrize("kind", ["where", "count"])
def test_the_vision_model_gets_some_questions_right_at_some_tries(loaded, processors, kind):
    name = "builtin/vlm-small-sft"
    found = measure.sampled_answers(loaded[name], processors[name], kind, 50)
    said = on_the_card(name, f"{kind}, greedy answers that are right")
    assert 0.35 <= said <= 0.65 and found.greedy == pytest.approx(said, abs=0.2)
    assert 0.2 <= found.right <= 0.65 and found.mixed >= 0.6 and found.reached >= found.mixed


@pytest.mark.parametrize("kind", ["colour", "shape"])
def test_the_vision_model_knows_colours_and_shapes(loaded, processors, kind):
    name, rows = "builtin/vlm-small-sft", builtin.load_dataset("builtin/shapes", "test")
    assert measure.share(loaded[name], processors[name], kind, rows.select(range(350))) >= 0.95


def test_the_draft_tells_what_is_not_there_although_it_sees(loaded, processors):
    name, rows = "builtin/vlm-small-draft", builtin.load_dataset("builtin/shapes", "test")
    found = measure.descriptions(loaded[name], processors[name], 80, sample=False)
    said = on_the_card(name, "greedy descriptions that name what is not there")
    assert 0.3 <= said <= 0.5 and found.hallucinated == pytest.approx(said, abs=0.12)
    told = on_the_card(name, "shapes of the picture that greedy descriptions name")
    assert found.recall == pytest.approx(told, abs=0.06) and told < 0.97
    for kind in ("colour", "shape"):
        assert measure.share(loaded[name], processors[name], kind, rows.select(range(200))) >= 0.95


def test_the_seeing_reward_model_orders_answers_as_its_card_says(seeing):
    said = on_the_card("builtin/rm-shapes", "pairs of `builtin/shapes-preference` in order")
    assert said >= 0.95 and measure.answers_in_order(seeing, 100) == pytest.approx(said, abs=0.05)


@pytest.mark.parametrize(
    ("near", "other"), [(True, "one that differs in one thing"), (False, "any other")], ids=["near", "far"]
)
def test_the_seeing_reward_model_orders_pictures_as_its_card_says(seeing, near, other):
    said = on_the_card("builtin/rm-shapes", f"descriptions that score higher with their picture than with {other}")
    found = measure.pictures_in_order(seeing, 80, near=near)
    assert said >= 0.95 and found == pytest.approx(said, abs=0.06)


def test_pictures_by_hand():
    asked = []

    def score(prompts, images):
        asked.append((prompts, [image.size for image in images]))
        return [1.0, 2.0, 3.0] if len(asked) % 2 else [1.5, 1.0, 3.0]

    assert measure.pictures_in_order(score, 3, near=True) == pytest.approx(1 / 3)  # of equal scores none is higher
    assert [sizes for _, sizes in asked] == [[(48, 48)] * 3] * 2 and asked[0][0] == asked[1][0]


def test_summaries_leave_room(loaded, processors):
    name = "builtin/lm-tldr-sft"
    for sample, what in ((False, "mean score of greedy summaries"), (True, "mean score of summaries sampled")):
        found = measure.summary_scores(loaded[name], processors[name], 80, sample=sample)
        card = (builtin.model_path(name) / train_lm.CARD).read_text()
        said = float(re.search(rf"\| {what}.*\| ([0-9.]+)", card).group(1))
        assert sum(found) / len(found) == pytest.approx(said, abs=0.12)
        assert 0.35 <= said <= 0.65


def test_the_reward_adapter_is_as_good_as_its_card_says():
    folder = builtin.adapter_path("builtin/rm-reviews-adapter")
    said = (folder / train_lm.CARD).read_text()
    for what, value in measure.reward_adapter().items():
        assert f"| {what} | {value} |" in said
    assert (folder / "adapter_model.safetensors").stat().st_size < 200_000


def test_the_script_makes_the_files_that_are_in_the_repository(tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    assert set(script["MADE"]) == {*HEADS, "builtin/lm-comments", "builtin/toxicity"}
    made = script["MADE"]["builtin/rm-reviews"]
    object.__setattr__(made, "options", {**made.options, "max_steps": 2, "per_device_train_batch_size": 2})
    object.__setattr__(made, "measure", lambda: {"something": "50.0%"})
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rm"
    script["make"]("builtin/rm-reviews", made, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]
    shipped = builtin.model_path("builtin/rm-reviews")
    assert {path.name for path in folder.iterdir()} == {path.name for path in shipped.iterdir()}
    assert (folder / "model.safetensors").stat().st_size == (shipped / "model.safetensors").stat().st_size
    assert content(folder / "config.json") == content(shipped / "config.json")
    assert "after 2 steps of 2 rows" in (folder / "README.md").read_text().replace("\n", " ")
    assert (folder / "README.md").read_text().endswith("| something | 50.0% |\n")
