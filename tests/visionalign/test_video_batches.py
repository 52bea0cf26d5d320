"""Batches with videos, family by family: what is learnt, whose frames are whose, and that the model agrees."""

from __future__ import annotations

import pytest
import torch
from test_collators import expected, learnt
from tiny_clips import FEW, NATIVE, SAID, VIDEO, chat, clip, mixed
from tiny_pictures import loud
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from shared.data.schema import Kind
from shared.errors import DataError, UserError
from shared.objectives.supervised import nll
from shared.policies.token import TokenPolicy
from visionalign.collators import VLMCollator
from visionalign.families import family_of, placeholder_ids
from visionalign.video import video_reader


def collator(path, options=FEW, kind=Kind.MESSAGES, **more):
    processor, family = AutoProcessor.from_pretrained(path), family_of(AutoConfig.from_pretrained(path))
    return VLMCollator(
        processor, family=family, kind=kind, videos=video_reader(family, processor, options), **more
    )  # fmt: skip


def row_losses(model, batch):
    with torch.no_grad():
        inputs = {"input_ids": batch.completion_ids, "attention_mask": batch.completion_attention}
        logp = model(**inputs, **batch.model_inputs).logits[:, :-1].log_softmax(-1)
    mask = batch.completion_mask[:, 1:]
    return -(logp.gather(2, (batch.completion_ids[:, 1:] * mask)[..., None]).squeeze(2) * mask).sum(1)


@pytest.mark.parametrize("family", VIDEO)
def test_a_mixed_batch(family, tiny):
    collate, model = collator(tiny(family)), loud(AutoModelForImageTextToText.from_pretrained(tiny(family)).eval())
    rows = mixed()
    batch = collate(rows)
    assert learnt(collate, batch) == [expected(family, said) for said in SAID]
    placeholders = torch.tensor(sorted(placeholder_ids(collate.processor, family=collate.family)))
    shown = torch.isin(batch.completion_ids, placeholders)
    assert (
        shown.any(1).tolist() == [True, True, False, True, True] and not (shown & batch.completion_mask.bool()).any()
    )

    together = row_losses(model, batch)
    for at, row in enumerate(rows):
        alone = collate([row])
        length = int(alone.completion_attention.sum())
        assert torch.equal(batch.completion_ids[at, :length], alone.completion_ids[0, :length])
        if family != "mllama" or at != 2:  # beside images it looks at a blank one
            torch.testing.assert_close(together[at : at + 1], row_losses(model, alone), rtol=1e-4, atol=1e-4)
    other = [*rows[:3], {**rows[3], "video": [rows[3]["video"][0], clip(9, 9, 24, 24)]}, rows[4]]
    assert ((row_losses(model, collate(other)) - together).abs() > 1e-4).tolist() == [False] * 3 + [True, False]

    labels = batch.completion_ids.masked_fill(batch.completion_mask == 0, -100)
    inputs = {"input_ids": batch.completion_ids, "attention_mask": batch.completion_attention, "labels": labels}
    policy, count = TokenPolicy(model), batch.completion_mask.sum()
    with torch.no_grad():
        own = model(**inputs, **batch.model_inputs).loss
        ours, _ = policy.action_objective(model, batch, lambda logp, at: nll(logp) / count)
    assert policy.fused and ours.item() == pytest.approx(own.item(), rel=1e-5)

    inputs, answers = collate.encode_prompts(rows)
    assert answers == list(SAID)
    tokens = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert tokens.shape == (5, inputs["input_ids"].shape[1] + 1)


@pytest.mark.parametrize("family", NATIVE)
def test_tensors_are_indexed_as_the_table_says(family, tiny):
    collate = collator(tiny(family))
    rows = mixed()
    batch = collate(rows)
    grids = {name: batch.model_inputs.get(f"{name}_grid_thw") for name in ("image", "video")}
    patches = {name: None if grid is None else int(grid.prod(1).sum()) for name, grid in grids.items()}
    sizes = {"sample": 5, "seeing": 2, "image": 2, "video": 4, "token": 5}
    for name, tensor in batch.model_inputs.items():
        index = collate.family.index[name]
        size = patches["video" if "video" in name else "image"] if index == "patch" else sizes[index]
        assert tensor.shape[0] == size, name


@pytest.mark.parametrize("family", VIDEO)
def test_of_everything_nothing_around_frames_is_learnt(family, tiny):
    """Neither places nor the words and times that a family writes around frames."""
    collate = collator(tiny(family), loss_on="all")
    (text,) = learnt(collate, collate([{"messages": chat("Then <video> what?", "top"), "video": clip(1)}]))
    assert "Then" in text and "what?" in text and "top" in text
    assert not any(word in text for word in ("seconds", "frame", "Frame", "00:", "image", "video"))


def test_a_cut_through_a_video_is_an_error(tiny):
    row = {"messages": chat("What moves?", "left"), "video": clip(0), "__row__": 41}
    length = int(collator(tiny("qwen2_vl"))([row]).completion_attention.sum())
    collate = collator(tiny("qwen2_vl"), max_length=length - 2)
    assert learnt(collate, collate([row])) == ["left"] and collate.truncated == {41: length}
    message = r"row 41: has \d+ tokens and its last image or video ends at token .*fewer frames with video_num_frames"
    with pytest.raises(DataError, match=message):
        collator(tiny("qwen2_vl"), max_length=25)([row])


def test_broken_videos_are_named_or_skipped(tiny, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    broken = [
        {"messages": chat("What?", "red"), "video": str(tmp_path / "empty.mp4"), "__row__": 3},
        {"messages": chat("What?", "red"), "video": str(tmp_path / "text.mp4"), "__row__": 4},
        {"messages": chat("What?", "red"), "video": str(tmp_path / "none.mp4"), "__row__": 5},
        {"messages": chat("<video> and <video>", "red"), "video": clip(0), "__row__": 6},
        {"messages": chat("a literal <|video_pad|>", "red"), "__row__": 7},
    ]
    reasons = ("empty.mp4", "text.mp4", "no such file", "1 video but 2 video places", "0 videos but 1 video place")
    for row, reason in zip(broken, reasons, strict=True):
        with pytest.raises(DataError, match=f"row {row['__row__']}: .*{reason}"):
            collator(tiny("qwen2_vl"))([row])
    collate = collator(tiny("qwen2_vl"), on_bad_row="skip")
    good = {"messages": chat("What moves?", "left"), "video": clip(0), "__row__": 8}
    batch = collate([*broken[:3], good, *broken[3:]])
    assert learnt(collate, batch) == ["left<|im_end|>"] and len(batch.model_inputs["video_grid_thw"]) == 1
    assert sorted(collate.skipped) == [3, 4, 5, 6, 7]
    assert collate(broken[:1]).counted_tokens() == 0


def test_each_batch_shows_all_kinds_where_asked(tiny):
    """Where an engine shards the tower: it runs once for images and once for videos, whatever a batch holds."""
    rows = mixed()
    collate = collator(tiny("qwen2_vl"), always_image=True, always_video=True)
    for chosen, added in (([rows[0]], 1), ([rows[1]], 1), ([rows[2]], 1), (rows[:2], 0), ([rows[4]], 0)):
        batch = collate(chosen)
        assert batch.rows == len(chosen) + added
        assert {"pixel_values", "pixel_values_videos"} <= set(batch.model_inputs)
        assert not batch.completion_mask[len(chosen) :].any()
    assert collator(tiny("qwen2_vl"), always_video=True)([rows[0]]).rows == 1
    # of these the tower sees frames and images in one pass
    for family in ("smolvlm", "llava"):
        assert collator(tiny(family), always_image=True, always_video=True)([rows[0]]).rows == 1
    with pytest.raises(UserError, match="A row with an image and a video takes .* max_length is 12"):
        collator(tiny("qwen2_vl"), always_image=True, always_video=True, max_length=12)([rows[2]])
