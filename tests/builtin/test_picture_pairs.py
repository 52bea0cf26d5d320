"""Questions over several pictures: one right answer each, no picture in both splits, all in their order."""

import collections
import random

import pytest
import torch

from shared import builtin
from shared.builtin import picture_pairs
from shared.builtin.models import load_model, load_processor
from shared.data.images import undecoded
from shared.data.schema import Kind
from visionalign.collators import VLMCollator
from visionalign.families import family_of

NAMES = ("builtin/gemma3-vlm-small", "builtin/smolvlm-small")


@pytest.fixture(scope="module")
def both_splits():
    return {split: undecoded(builtin.load_dataset("builtin/picture-pairs", split)) for split in builtin.SPLITS}


def encoded(dataset):
    return {image["bytes"] for images in dataset["images"] for image in images}


def test_a_row_shows_two_pictures_each_after_its_name(both_splits):
    for dataset in both_splits.values():
        assert {len(images) for images in dataset["images"]} == {2}
        for row in dataset.select(range(30)):
            content = row["messages"][0]["content"]
            assert [part["type"] for part in content] == ["text", "image", "text", "image", "text"]
            assert [content[at]["text"] for at in (0, 2)] == ["Picture 1:", "Picture 2:"]
            assert content[-1]["text"].endswith((".", "?"))


def test_no_picture_of_a_held_out_row_is_learnt_from_here_or_in_shapes(both_splits):
    held_out = encoded(both_splits["test"])
    assert not held_out & encoded(both_splits["train"])
    for name in ("builtin/shapes", "builtin/shapes-simple"):
        assert not held_out & encoded(undecoded(builtin.load_dataset(name, "train")))


def test_rows_ask_one_question_each_so_many_of_each_kind(both_splits):
    for split, rows in (("train", picture_pairs.TRAIN_ROWS), ("test", picture_pairs.TEST_ROWS)):
        assert collections.Counter(both_splits[split]["kind"]) == rows
        assert {len(chat) for chat in both_splits[split]["messages"]} == {2}


def test_every_question_has_exactly_one_right_answer():
    rng = random.Random(5)
    asked = collections.Counter()
    for _ in range(600):
        layouts, kind = picture_pairs.draw_layouts("train", rng), rng.choice(list(picture_pairs.TEST_ROWS))
        pair = picture_pairs.ask(kind, layouts, rng)
        if pair is None:
            continue
        question, answer = pair
        seen = [(shape.form, shape.colour) for (shape,) in layouts]
        if kind == "which":
            wanted = [str(at) for at, (form, _) in enumerate(seen, 1) if form in question]
            assert wanted == [answer]
        elif kind == "both":
            assert {form for form, _ in seen} == {answer}
        elif kind == "in one":
            form, colour = seen[int(question.removesuffix("?").split()[-1]) - 1]
            known, wanted = (form, colour) if question.startswith("What colour") else (colour, form)
            assert known in question and wanted == answer
        else:
            assert answer == "1 {} {} 2 {} {}".format(*seen[0], *seen[1])
        asked[kind] += 1
    assert set(asked) == set(picture_pairs.TEST_ROWS)


def test_two_loads_give_the_same_rows():
    assert picture_pairs.load("test").data == picture_pairs.load("test").data
    assert picture_pairs.load("test", seed=1)["messages"][:] != picture_pairs.load("test")["messages"][:]


@pytest.mark.parametrize("name", NAMES)
def test_models_are_small_and_see_each_picture_in_its_place(name, both_splits):
    model, processor = load_model(name), load_processor(name)
    assert 0.4e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 1.0e6
    family = family_of(model.config)
    collator = VLMCollator(processor, family=family, kind=Kind.MESSAGES)
    ids = collator([both_splits["test"][0]]).completion_ids[0].tolist()
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    image = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    # A number, then its picture's tokens, twice.
    numbers = [at for at, word in enumerate(words) if word == "Picture"]
    assert [words[at + 1][-1] for at in numbers] == ["1", "2"]
    counts = [words[first:last].count(image) for first, last in zip(numbers, [*numbers[1:], None], strict=True)]
    assert counts == [9 if family.name == "gemma3" else 45] * 2
    assert words.index(image) > numbers[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_seen_of_a_picture_stands_where_its_name_is(name, both_splits):
    """Changing the second picture changes what comes from its place on, and nothing of the first."""
    model, processor = load_model(name).eval(), load_processor(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and not parameter.any():  # Gemma 3's projection starts at nothing
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    collator = VLMCollator(processor, family=family_of(model.config), kind=Kind.MESSAGES)
    row, donor = both_splits["test"].select(range(2))
    other = {**row, "images": [row["images"][0], donor["images"][1]]}

    def seen(each):
        batch = collator([each])
        inputs = {"attention_mask": batch.completion_attention, **batch.model_inputs}
        with torch.no_grad():
            return batch.completion_ids[0], model(input_ids=batch.completion_ids, **inputs).logits[0]

    (ids, first), (same, second) = seen(row), seen(other)
    assert torch.equal(ids, same)
    names = (ids == processor.tokenizer.convert_tokens_to_ids("Picture")).nonzero().flatten()
    differs = (first - second).abs().amax(-1) > 1e-5
    assert not differs[: names[1] + 1].any() and differs[names[1] + 2 :].any() and differs[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_question_over_pictures_is_learnt_from_and_generated(name, both_splits):
    model, processor = load_model(name), load_processor(name)
    collator = VLMCollator(processor, family=family_of(model.config), kind=Kind.MESSAGES)
    rows = [both_splits["test"][at] for at in range(2)]
    batch = collator(rows)
    labels = batch.completion_ids.masked_fill(batch.completion_mask == 0, -100)
    inputs = {"attention_mask": batch.completion_attention, **batch.model_inputs}
    model(input_ids=batch.completion_ids, labels=labels, **inputs).loss.backward()
    asked, answers = collator.encode_prompts(rows)
    assert answers == [row["messages"][1]["content"][0]["text"] for row in rows]
    assert model.generate(**asked, max_new_tokens=2, do_sample=False).shape[1] == asked["input_ids"].shape[1] + 2
