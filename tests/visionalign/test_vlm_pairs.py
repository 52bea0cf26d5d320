"""Pairs about images in batches: the tokens that fine-tuning learns, the figures of whole rows, each image once."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import FAMILIES
from tiny_clips import VIDEO, clip
from tiny_pairs import pair_collator, pairs_about
from tiny_pictures import SEVERAL, TEXT_ONLY, loud, picture, seen_by
from transformers import AutoModelForImageTextToText

from shared.data.pairs import split_pair
from shared.data.rows import PADDING, ROW
from shared.data.schema import Kind
from shared.errors import DataError, UserError
from shared.policies.token import TokenPolicy
from visionalign.collators import VLMCollator
from visionalign.corruption import CORRUPTIONS, Corruption

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tiny):
    path = tiny(request.param)
    model = loud(AutoModelForImageTextToText.from_pretrained(path).eval())
    return request.param, pair_collator(path), model


@pytest.fixture
def llava(tiny):
    return tiny("llava")


def counted(values, mask):
    return [row[keep.bool()] for row, keep in zip(values, mask, strict=True)]


def log_probs(policy, model, batch):
    with torch.no_grad():
        out = policy.log_probs(model, batch)
    return counted(out.logp, out.mask)


def alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def answers(batch):
    return [row.tolist() for row in counted(batch.completion_ids, batch.completion_mask)]


def test_tokens_and_figures_are_those_of_fine_tuning_on_the_whole_conversation(family):
    name, collator, model = family
    rows = pairs_about(name)
    assert {len(row["images"]) for row in rows} >= ({1, 2} if name in SEVERAL else {1})
    if name in TEXT_ONLY:
        assert [] in [row["images"] for row in rows]
    batch, policy = collator(rows), TokenPolicy(model)
    figures = log_probs(policy, model, batch)
    assert policy.sharing._possible and batch.group_size == 2 and len(batch.prompt_ids) == len(rows)
    for member, answer in enumerate(("chosen", "rejected")):
        whole = VLMCollator(
            collator.collator.processor,
            family=collator.family,
            kind=Kind.PROMPT_COMPLETION,
            loss_on="completion",
        )([{**row, "completion": row[answer]} for row in rows])
        assert answers(batch)[member::2] == answers(whole)
        alike(figures[member::2], log_probs(policy, model, whole))


def test_where_a_template_asks_otherwise_than_it_writes_an_answer_stands_behind_what_is_asked(llava):
    collator, rows = pair_collator(llava), pairs_about("llava", 1)
    collator.collator.processor.chat_template = (
        "{% for message in messages %}{{ '<s>' + message['role'] + ' ' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    batch, tokenizer = collator(rows), collator.tokenizer
    assert answers(batch) == [tokenizer(f"{rows[0][answer]}</s>")["input_ids"] for answer in ("chosen", "rejected")]
    assert tokenizer.decode(batch.prompt_ids[0]).endswith("assistant\n")


def test_whole_rows_give_the_same_figures(family):
    """Where prompts cannot be shared: not at all, and while layers are run again in the backward pass."""
    name, collator, model = family
    batch = collator(pairs_about(name))
    expected = log_probs(TokenPolicy(model), model, batch)
    alike(log_probs(TokenPolicy(model, share_prefix=False), model, batch), expected)
    sent = pickle.loads(pickle.dumps(batch))  # as by a data worker
    alike(log_probs(TokenPolicy(model, share_prefix=False), model, sent), expected)
    model.train().activation_checkpointing_enable()
    found = TokenPolicy(model).log_probs(model, batch)
    model.eval().activation_checkpointing_disable()
    assert found.logp.requires_grad
    alike([row.detach() for row in counted(found.logp, found.mask)], expected)


@pytest.mark.parametrize("name", VIDEO)
def test_videos_and_images_side_by_side(name, tiny):
    path = tiny(name)
    model, collator = loud(AutoModelForImageTextToText.from_pretrained(path).eval()), pair_collator(path)
    rows = [
        {"prompt": "What moves?", "videos": [clip(0)], "chosen": "left", "rejected": "the right one"},
        {"prompt": "What colour?", "images": [picture(1)], "chosen": "red and blue", "rejected": "green"},
        {
            "prompt": "See <image> and <video> now",
            "video": clip(4, 9),
            "image": picture(5),
            "chosen": "a",
            "rejected": "b",
        },
    ]
    batch, policy = collator(rows), TokenPolicy(model)
    figures = log_probs(policy, model, batch)
    assert policy.sharing._possible
    alike(log_probs(TokenPolicy(model, share_prefix=False), model, batch), figures)
    for at, row in enumerate(rows):
        alike(log_probs(policy, model, collator([row])), figures[2 * at : 2 * at + 2])
    still = log_probs(policy, model, collator([{**rows[0], "videos": [clip(1)]}, *rows[1:]]))
    apart = [(one - other).abs().max().item() for one, other in zip(still, figures, strict=True)]
    assert min(apart[:2]) > 1e-4 and max(apart[2:]) < 2e-5


def test_an_image_is_processed_once_and_seen_once(family, monkeypatch):
    name, collator, model = family
    rows, policy = pairs_about(name, 2), TokenPolicy(model)
    processor, images = collator.collator.processor, []
    plain = type(processor.image_processor).__call__

    def count(self, given, *args, **kwargs):
        images.append(given)
        return plain(self, given, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "__call__", count)
    batch = collator(rows)
    assert len(images) == len(rows)
    log_probs(policy, model, batch)  # the first use of a model compares its ways of being run
    with seen_by(model) as together:
        log_probs(policy, model, batch)
    with seen_by(model) as once, torch.no_grad():
        model(input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask, **batch.model_inputs)
    assert len(once) > 0 and together == once


def test_corrupted_images_stand_in_the_same_places(family):
    name, collator, model = family
    collator = pair_collator(model.config._name_or_path, corrupt=Corruption("crop", seed=5))
    rows = pairs_about(name)
    batch = collator(rows)
    worse = batch.corrupted
    assert torch.equal(worse.prompt_ids, batch.prompt_ids)
    assert torch.equal(worse.completion_ids, batch.completion_ids[0::2])
    assert worse.columns["counted"].tolist() == [bool(row["images"]) for row in rows]
    policy = TokenPolicy(model)
    good, bad = log_probs(policy, model, batch)[0::2], log_probs(policy, model, worse)
    for row, one, other in zip(rows, good, bad, strict=True):
        assert ((one - other).abs().max() > 1e-4) == bool(row["images"])
    moved = replace(batch).to("cpu")  # a copy of the record keeps what belongs to it
    assert torch.equal(moved.corrupted.prompt_ids, worse.prompt_ids)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_depends_on_seed_row_and_place_alone(kind):
    image = picture(1, 40, 24)
    found = Corruption(kind, seed=1)(image, 3, 0)
    assert found.size == image.size and found.tobytes() != image.tobytes()
    assert found.tobytes() == Corruption(kind, seed=1)(image.copy(), 3, 0).tobytes()
    for other in (Corruption(kind, seed=2)(image, 3, 0), Corruption(kind, seed=1)(image, 4, 0),
                  Corruption(kind, seed=1)(image, 3, 1)):  # fmt: skip
        assert (other.tobytes() == found.tobytes()) == (kind == "blank")


def test_rows_however_they_are_written(llava):
    """Strings, chats, whole conversations with or without the prompt apart, images in their places: one batch."""
    collator, image = pair_collator(llava), picture(1)
    asked = [{"role": "user", "content": "What colour is the circle?"}]
    said = [[{"role": "assistant", "content": text}] for text in ("red", "blue")]
    placed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the circle?"}]}]
    written = [
        {"prompt": asked[0]["content"], "chosen": "red", "rejected": "blue", "images": [image]},
        {"prompt": asked, "chosen": said[0], "rejected": said[1], "image": image},
        {"prompt": asked, "chosen": "red", "rejected": "blue", "image": image},
        {"chosen": asked + said[0], "rejected": asked + said[1], "images": [image]},
        {"prompt": placed, "chosen": placed + said[0], "rejected": placed + said[1], "images": [image]},
        {"prompt": "<image>What colour is the circle?", "chosen": "red", "rejected": "blue", "images": [image]},
    ]
    first, *others = (collator([row]) for row in written)
    for batch in others:
        assert torch.equal(batch.prompt_ids, first.prompt_ids)
        assert torch.equal(batch.completion_ids, first.completion_ids)
        assert torch.equal(batch.model_inputs["pixel_values"], first.model_inputs["pixel_values"])


def test_a_prompt_that_shows_frames_is_found_in_whole_conversations():
    def asked(value, shape=(2, 8, 8, 3)):
        video = {"type": "video", "video": np.full(shape, value, np.uint8)}
        return [{"role": "user", "content": [video, {"type": "text", "text": "What moves?", "unset": None}]}]

    said = [[{"role": "assistant", "content": text}] for text in ("left", "right")]
    row = {"chosen": asked(1) + said[0], "rejected": asked(1) + said[1]}
    assert [len(part) for part in split_pair(row, 0)] == [1, 1, 1]
    assert split_pair({**row, "prompt": asked(1)}, 0)[1:] == (said[0], said[1])
    for other in (asked(2), asked(1, (1, 8, 8, 3))):
        with pytest.raises(DataError, match="no message alike"):
            split_pair({**row, "rejected": other + said[1]}, 0)


def test_what_a_batch_holds_beside_the_tokens(llava):
    rows = pairs_about("llava", 3)
    rows[0] |= {ROW: 7, "margin": 0.5}
    rows[2] |= {PADDING: True}
    batch = pair_collator(llava, max_completion_length=2, pad_to_multiple_of=4)(rows)
    assert batch.columns["row"].tolist() == [7, 1, 2] and batch.columns["margin"].tolist() == [0.5, 0.0, 0.0]
    assert batch.columns["counted"].tolist() == [True, True, False]
    assert batch.completion_ids.shape == (6, 4) and batch.completion_attention.sum(1).max() == 2
    assert batch.completion_mask.sum(1).tolist() == [2, 2, 2, 2, 0, 0]
    assert "cut" in batch.notes[1]


def test_questions_are_asked_without_their_answers(llava):
    collator = pair_collator(llava)
    inputs, recorded = collator.encode_prompts(pairs_about("llava", 2))
    batch = collator(pairs_about("llava", 2))
    assert torch.equal(inputs["input_ids"], batch.prompt_ids) and recorded == ["red", "red and blue"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": None, "question": "What?"}, "row 0: has no prompt; its column question"),
        ({"chosen": "red", "rejected": "red"}, "row 0: chosen and rejected are the same"),
        ({"rejected": "a <image> here"}, "row 0: rejected shows an image"),
        ({"images": [], "rejected": "a <image> here"}, "row 0: rejected holds <image>"),
        ({"images": ["nowhere.png"]}, "row 0: image 'nowhere.png' cannot be read"),
        ({"chosen": []}, "row 0: chosen is list and rejected is str"),
    ],
)
def test_bad_rows_are_named(changed, message, llava):
    with pytest.raises(DataError, match=message):
        pair_collator(llava)([{**pairs_about("llava", 1)[0], **changed}])


def test_prompts_that_are_too_long_are_named(llava):
    with pytest.raises(DataError, match="row 0: its prompt has .* max_prompt_length is 5"):
        pair_collator(llava, max_prompt_length=5)(pairs_about("llava", 1))


def test_answers_that_are_alike_where_they_are_cut(llava):
    row = {**pairs_about("llava", 1)[0], "chosen": "red square", "rejected": "red circle"}
    with pytest.raises(DataError, match="the same in their first 1 tokens"):
        pair_collator(llava, max_completion_length=1)([row])


def test_bad_rows_can_be_left_out(llava):
    good, bad = pairs_about("llava", 2)
    bad = {**bad, "images": ["nowhere.png"]}
    collator = pair_collator(llava, on_bad_row="skip")
    batch = collator([bad, good])
    assert batch.columns["row"].tolist() == [1] and "nowhere.png" in batch.notes[0] and 0 in collator.skipped
    nothing = collator([bad])
    assert not nothing.columns["counted"].any() and not nothing.completion_mask.any()


def test_a_batch_of_which_nothing_is_left_shows_what_an_engine_that_shards_needs(tiny):
    good = {"prompt": "What moves?", "videos": [clip(0)], "chosen": "left", "rejected": "the right one"}
    collator = pair_collator(tiny("qwen2_vl"), on_bad_row="skip", needs_image=True)
    shown = set(collator([good]).model_inputs)
    nothing = collator([{**good, "chosen": good["rejected"]}])
    assert set(nothing.model_inputs) == shown >= {"pixel_values_videos"} and not nothing.columns["counted"].any()


def test_an_engine_that_shards_needs_images_and_another_kind_of_collator_is_refused(llava):
    rows = pairs_about("llava")
    with pytest.raises(DataError, match="row 3: has no image; with an engine"):
        pair_collator(llava, needs_image=True)(rows)
    collator = pair_collator(llava).collator
    wrong = VLMCollator(collator.processor, family=collator.family, kind=Kind.MESSAGES)
    with pytest.raises(UserError, match="prompt-only"):
        type(pair_collator(llava))(wrong)
