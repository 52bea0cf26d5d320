"""Batches of every family: what is learnt reads exactly as the assistant's words and the end of the turn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from tiny import FAMILIES
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from shared.data.rows import PADDING
from shared.data.schema import Kind
from shared.errors import DataError, UserError
from visionalign.collators import VLMCollator
from visionalign.families import family_of, placeholder_ids

CHATS = tuple(name for name in FAMILIES if name != "paligemma")
ENDS = {
    "llava": "",  # only the last turn gets an end
    "llava_next": "</s>",
    "llava_next_video": "</s>",
    "llava_onevision": "<|im_end|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "gemma3": "<end_of_turn>",
    "qwen2_vl": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "mllama": "<|eot_id|>",
    "paligemma": "<eos>",
}
LEADS = dict.fromkeys(("llava", "llava_next", "llava_next_video", "idefics3", "smolvlm"), " ")


def picture(width=48, height=40, colour=(200, 30, 30)):
    return Image.new("RGB", (width, height), colour)


def turns(*said):
    roles = ("user", "assistant") * len(said)
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def expected(family, *said):
    texts = [LEADS.get(family, "") + text + ENDS[family] for text in said]
    return "".join(texts) + ("</s>" if family == "llava" else "")


@pytest.fixture(scope="session")
def collator(tiny):
    def build(family, kind=Kind.MESSAGES, **options):
        directory = tiny(family)
        config = AutoConfig.from_pretrained(directory)
        processor = AutoProcessor.from_pretrained(directory)
        return VLMCollator(processor, family=family_of(config), kind=kind, **options)

    return build


def learnt(collator, batch):
    """The learnt tokens of each row as text."""
    decode = collator.processor.tokenizer.decode
    return [decode(ids[mask.bool()]) for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)]


ONE = {"messages": turns("What colour is the circle?", "deep red"), "image": picture()}
TWO_TURNS = {"messages": turns("What colour?", "red", "And the shape?", "a square"), "image": picture()}
SEVERAL = {
    "messages": [
        {"role": "user", "content": "First <image> then <image>, what differs?"},
        {"role": "assistant", "content": "the colour"},
    ],
    "images": [picture(), picture(30, 70, (0, 0, 255))],
}
TEXT_ONLY = {"messages": turns("How many shapes?", "one two three, I think")}


@pytest.mark.parametrize("family", FAMILIES)
def test_learnt_is_what_the_assistant_says(collator, family):
    collate = collator(family)
    batch = collate([ONE, SEVERAL])
    assert learnt(collate, batch) == [expected(family, "deep red"), expected(family, "the colour")]
    placeholders = torch.tensor(sorted(placeholder_ids(collate.processor, family=collate.family)))
    assert torch.isin(batch.completion_ids, placeholders).any()
    assert not torch.isin(batch.completion_ids[batch.completion_mask.bool()], placeholders).any()
    # right-padded, and nothing learnt in the padding
    lengths = batch.completion_attention.sum(1)
    assert lengths.max() == batch.completion_ids.shape[1] and lengths.min() < lengths.max()
    positions = torch.arange(batch.completion_ids.shape[1])
    assert torch.equal(batch.completion_attention, (positions < lengths[:, None]).long())
    assert not (batch.completion_mask > batch.completion_attention).any()
    assert batch.prompt_ids.shape == (2, 0)


@pytest.mark.parametrize("family", CHATS)
def test_turns_and_rows_without_images(collator, family):
    collate = collator(family)
    rows = [TEXT_ONLY, TWO_TURNS, ONE, TEXT_ONLY]
    batch = collate(rows)
    said = [("one two three, I think",), ("red", "a square"), ("deep red",), ("one two three, I think",)]
    assert learnt(collate, batch) == [expected(family, *turn) for turn in said]
    assert learnt(collate, collate([TEXT_ONLY])) == [expected(family, "one two three, I think")]
    # each row is read as it would be alone
    for at, row in enumerate(rows):
        alone = collate([row]).completion_ids[0]
        assert torch.equal(batch.completion_ids[at, : len(alone)], alone)


@torch.no_grad()
def rouse(model):
    """Large weights, and none that is zero: fresh gates and projections would hide the images."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
        elif parameter.ndim > 1:
            parameter.mul_(4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_takes_the_batch_and_generates(collator, tiny, family):
    collate = collator(family)
    model = AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    rouse(model)
    rows = [ONE, SEVERAL] if family == "paligemma" else [TEXT_ONLY, ONE, SEVERAL]

    def row_losses(batch):
        inputs = {"input_ids": batch.completion_ids, "attention_mask": batch.completion_attention}
        with torch.no_grad():
            logits = model(**inputs, **batch.model_inputs).logits[:, :-1].log_softmax(-1)
        mask = batch.completion_mask[:, 1:]
        targets = batch.completion_ids[:, 1:] * mask
        return -(logits.gather(2, targets[..., None]).squeeze(2) * mask).sum(1)

    together = row_losses(collate(rows))
    alone = torch.cat([row_losses(collate([row])) for row in rows])
    # Mllama looks at a blank image in a row without one, where other rows of the batch have images.
    seen = slice(1, None) if family == "mllama" else slice(None)
    torch.testing.assert_close(together[seen], alone[seen], rtol=1e-4, atol=1e-4)  # images reach their own rows
    noise = Image.effect_noise((48, 40), 90).convert("RGB")
    other = row_losses(collate([{**row, "image": noise} if row is ONE else row for row in rows]))
    assert [bool(changed) for changed in (other - together).abs() > 1e-4] == [row is ONE for row in rows]

    inputs, answers = collate.encode_prompts(rows)
    assert answers == [row["messages"][-1]["content"] for row in rows]
    assert inputs["attention_mask"][:, -1].all()  # left-padded
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape[0] == len(rows) and out.shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion(collator, family):
    row = {"prompt": "What colour?", "completion": "red", "image": picture()}
    collate = collator(family, Kind.PROMPT_COMPLETION, loss_on="completion")
    assert learnt(collate, collate([row])) == [expected(family, "red")]
    assert collate.encode_prompts([row])[1] == ["red"]
    # what is asked, and what is learnt after it, make up the row
    asked = collate.encode_prompts([row])[0]["input_ids"][0]
    whole = collate([row])
    count = int(whole.completion_mask[0].argmax())
    assert torch.equal(whole.completion_ids[0, :count], asked)


@pytest.mark.parametrize("family", CHATS)
def test_all_but_images(collator, family):
    collate = collator(family, loss_on="all")
    batch = collate([SEVERAL])
    (text,) = learnt(collate, batch)
    for part in ("First", "then", ", what differs?", "the colour"):
        assert part in text
    decode = collate.processor.tokenizer.decode
    left_out = [decode([token]) for token in batch.completion_ids[0, 1:][batch.completion_mask[0, 1:] == 0]]
    assert set(left_out) <= {*collate.family.structure, "\n", "\n\n"}


def test_shapes_by_token_are_cut_and_padded_alike(collator):
    for family, name in (("qwen2_vl", "mm_token_type_ids"), ("mllama", "cross_attention_mask")):
        collate = collator(family, pad_to_multiple_of=32)
        batch = collate([ONE, SEVERAL])
        assert batch.completion_ids.shape[1] % 32 == 0
        assert batch.model_inputs[name].shape[:2] == batch.completion_ids.shape
        length = int(collate([ONE]).completion_attention.sum()) - 1
        cut = collator(family, max_length=length)([ONE])
        assert cut.completion_ids.shape == (1, length) == cut.model_inputs[name].shape[:2]


def test_truncation(collator):
    whole = collator("qwen2_vl")([TWO_TURNS])
    length = int(whole.completion_attention.sum())
    collate = collator("qwen2_vl", max_length=length - 3)
    row = {**TWO_TURNS, "__row__": 41}
    (text,) = learnt(collate, collate([row]))
    assert expected("qwen2_vl", "red", "a square").startswith(text) and text.startswith("red<|im_end|>")
    assert collate.truncated == {41: length}

    with pytest.raises(DataError, match=rf"row 41: has {length} tokens and its last image ends at .* is 30"):
        collator("qwen2_vl", max_length=30)([row])
    first = int(whole.completion_mask[0].argmax())
    with pytest.raises(DataError, match=f"row 41: has no token to learn within max_length {first}"):
        collator("qwen2_vl", max_length=first)([row])


def test_bad_rows_are_named_or_skipped(collator):
    broken = [  # the processor itself refuses the last
        {"messages": turns("<image> and <image>", "red"), "image": picture(), "__row__": 3},
        {"messages": turns("What?", "red"), "image": b"not an image", "__row__": 4},
        {"messages": turns("What?"), "image": picture(), "__row__": 5},
        {"messages": 17, "__row__": 6},
        {"messages": turns("a literal <|image_pad|>", "red"), "__row__": 8},
        {"messages": turns("What?", "red"), "image": picture(900, 4), "__row__": 9},
    ]
    reasons = ("1 image .*2 image places", "image", "assistant", "int", "0 images but 1 image place", "aspect ratio")
    collate = collator("qwen2_vl", on_bad_row="skip")
    good = {**ONE, "__row__": 7}
    for row, reason in zip(broken, reasons, strict=True):
        with pytest.raises(DataError, match=f"row {row['__row__']}: .*{reason}"):
            collator("qwen2_vl")([good, row])
    batch = collate([broken[0], broken[5], good, *broken[1:5]])
    assert learnt(collate, batch) == [expected("qwen2_vl", "deep red")]
    assert batch.model_inputs["image_grid_thw"].shape[0] == 1
    assert sorted(collate.skipped) == [3, 4, 5, 6, 8, 9]
    # nothing is left: the step goes on with a blank of which nothing is learnt
    batch = collate([broken[0]])
    assert batch.counted_tokens() == 0 and batch.notes[3].startswith("left out: 1 image")
    with pytest.raises(DataError, match="No row of a batch can be used: row 3"):
        collator("paligemma", on_bad_row="skip")([broken[0]])


def test_rows_found_bad_after_encoding_are_skipped_with_their_images(collator):
    collate = collator("qwen2_vl", on_bad_row="skip", max_length=60)
    big = {"messages": turns("What?", "red"), "images": [picture(64, 64)] * 6, "__row__": 1}
    batch = collate([big, {**ONE, "__row__": 2}])
    assert batch.rows == 1 and batch.model_inputs["image_grid_thw"].shape[0] == 1
    assert list(collate.skipped) == [1] and "cut into it" in collate.skipped[1]


def test_images_are_made_smaller(collator):
    small = collator("qwen2_vl", max_pixels=24 * 24)([ONE]).model_inputs["image_grid_thw"]
    assert small.prod() < collator("qwen2_vl")([ONE]).model_inputs["image_grid_thw"].prod()


@pytest.mark.parametrize("family", CHATS)
def test_always_image(collator, family):
    collate = collator(family, always_image=True)
    batch = collate([TEXT_ONLY])
    assert batch.rows == 2 and "pixel_values" in batch.model_inputs
    assert learnt(collate, batch) == [expected(family, "one two three, I think"), ""]
    assert collate([ONE, TEXT_ONLY]).rows == 2
    with pytest.raises(UserError, match="max_length is 10; all processes have to see an image"):
        collator(family, always_image=True, max_length=10)([TEXT_ONLY])


def test_rows_that_fill_up_an_evaluation_are_not_learnt(collator):
    collate = collator("llava")
    batch = collate([ONE, {**ONE, PADDING: True}])
    assert batch.completion_mask[0].any() and not batch.completion_mask[1].any()


def test_no_double_bos(collator):
    for family in ("gemma3", "mllama", "paligemma"):
        collate = collator(family)
        bos = collate.processor.tokenizer.bos_token_id
        assert ((collate([ONE]).completion_ids == bos).sum(1) == 1).all()


def test_a_processor_that_changes_the_text_unsaid_is_refused(collator):
    collate = collator("llava")
    collate.family = collate.process.family = dataclasses.replace(collate.family, expands_text=False)
    with pytest.raises(UserError, match="LlavaProcessor changes the text without telling where"):
        collate([ONE])


def test_video_is_refused_where_there_is_one_image(collator):
    row = {"messages": turns("What?", "red"), "video": "clip.mp4", "__row__": 2}
    with pytest.raises(DataError, match="row 2: .*paligemma take no video"):
        collator("paligemma")([row])


def test_paligemma_takes_one_question_with_an_image(collator):
    with pytest.raises(DataError, match="has no image, but models of the family paligemma need one"):
        collator("paligemma")([TEXT_ONLY])
    with pytest.raises(DataError, match="user, assistant, user, assistant, but a model of this family takes one"):
        collator("paligemma")([TWO_TURNS])
    with pytest.raises(UserError, match="loss_on='all' cannot be used with paligemma"):
        collator("paligemma", loss_on="all")


def test_options_are_checked(collator, tiny):
    with pytest.raises(UserError, match="loss_on='completion' needs the columns"):
        collator("llava", loss_on="completion")
    with pytest.raises(UserError, match="on_bad_row is 'ignore', allowed: error, skip"):
        collator("llava", on_bad_row="ignore")
    processor = AutoProcessor.from_pretrained(tiny("llava"))
    processor.chat_template = None
    family = family_of(AutoConfig.from_pretrained(tiny("llava")))
    with pytest.raises(UserError, match="LlavaProcessor has no chat template.*instruction-tuned"):
        VLMCollator(processor, family=family, kind=Kind.MESSAGES)
