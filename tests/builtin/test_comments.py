"""Comments: their words are as rude as is said, the rules judge by hand, and the models are as their cards say."""

import random
import re

import pytest
import torch

from shared import builtin
from shared.builtin import comments, train_comments
from shared.builtin.models import load_model, load_processor
from shared.rewards.loading import load_reward


@pytest.fixture(scope="module")
def rows():
    return {split: builtin.load_dataset("builtin/comments", split) for split in builtin.SPLITS}


def test_comments_are_as_they_are_said_to_be(rows):
    for dataset in rows.values():
        for row in dataset.select(range(200)):
            assert comments.is_rude(row["completion"]) == (row["kind"] == comments.TOXIC)
            assert comments.is_sound(row["completion"])
        share = dataset["kind"][:].count(comments.TOXIC) / len(dataset)
        assert share == pytest.approx(comments.RUDE, abs=0.08)


def test_persons_and_things_of_held_out_openings_are_in_no_training_row(rows):
    subjects = {split: set(comments.subjects(split)) for split in builtin.SPLITS}
    assert not subjects["train"] & subjects["test"] and len(subjects["test"]) >= 12
    prompts = {split: set(builtin.load_dataset("builtin/comments-prompts", split)["prompt"]) for split in subjects}
    for split, asked in prompts.items():
        assert len(asked) == len(comments.OPENINGS) * len(subjects[split])
    assert set(rows["train"]["prompt"]) <= prompts["train"] and set(rows["test"]["prompt"]) <= prompts["test"]


@pytest.mark.parametrize(
    ("text", "rude", "sound"),
    [
        (" The hat is charming. I loved it.", False, True),
        (" My boss is a fool.", True, True),
        (" It is not rotten at all.", True, True),  # a rude word is one under a negation too
        (" I loved it. I loved it.", False, False),
        (" I loved it. The hat is", False, False),
        (" it ugly a is hat.", True, False),
        (" I loved it. I enjoyed it. I liked it. The hat is solid.", False, False),
        ("", False, False),
    ],
)
def test_the_rules_by_hand(text, rude, sound):
    assert comments.is_rude(text) is rude and comments.is_sound(text) is sound
    assert comments.rude_reward([text]) == [float(rude)] and comments.sound_reward([text]) == [float(sound)]


def test_the_classifier_tells_rude_texts_whole_or_spoilt():
    assert float(train_comments.measure_classifier()["texts told rightly, whole and spoilt"].rstrip("%")) >= 98
    reward = load_reward("text-classification:builtin/toxicity:neutral").function
    polite, rude = reward(["My son showed me the hat."] * 2, [" I loved it. It is a superb hat.", " I loathed it."])
    assert polite > 0.9 and rude < 0.1


def test_the_writer_is_mostly_rude_and_writes_whole_sentences():
    card = (builtin.model_path(train_comments.WRITER) / "README.md").read_text()
    for what, share in train_comments.measure_writer().items():
        said = float(re.search(rf"\| {what} \| ([0-9.]+)%", card)[1])
        assert float(share.rstrip("%")) == pytest.approx(said, abs=8) and said >= 60


def test_they_are_small_and_of_the_tokenizer_of_the_start():
    for name in (train_comments.WRITER, train_comments.NAME):
        folder = builtin.model_path(name)
        assert (folder / "model.safetensors").stat().st_size < 200_000
        start = builtin.model_path(train_comments.START) / "tokenizer.json"
        assert (folder / "tokenizer.json").read_bytes() == start.read_bytes()
        assert {p.dtype for p in load_model(name).parameters()} == {torch.float32}


def test_spoilt_texts_are_drawn_too():
    drawn = [train_comments.drawn("test", random.Random(at)) for at in range(100)]
    sound = [comments.is_sound(text.partition(".")[2]) for text in drawn]
    assert 0.6 <= sum(sound) / 100 <= 0.9
    assert load_processor(train_comments.NAME)(drawn[0])["input_ids"]
