"""Which frames of a video a family sees, when they are said to be, and what people see of them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_video_batches import collator
from tiny_clips import FEW, chat, clip, noise
from tiny_videos import write_video
from transformers import AutoProcessor

from shared.data.schema import Kind, to_conversation
from shared.data.videos import Video
from shared.errors import UserError
from visionalign.families import FAMILIES
from visionalign.reading import tower_passes
from visionalign.video import shown_frames, video_reader


def options(**given):
    return SimpleNamespace(**{f"video_{name}": value for name, value in given.items()})


def text_of(collate, row):
    batch = collate([row])
    return collate.processor.tokenizer.decode(batch.completion_ids[0][batch.completion_attention[0].bool()])


def asked(video):
    return {"messages": chat("What moves?", "left"), "video": video}


def test_times_are_those_of_the_file(tiny, tmp_path):
    """A clip of 12 frames, 4 a second: frames 1, 4, 7 and 10; two of them make a grid."""
    path = write_video(str(tmp_path / "a.mp4"), noise(0, 12), fps=4)
    four = options(num_frames=4)
    assert "<0.6 seconds>" in (text := text_of(collator(tiny("qwen3_vl"), four), asked(path)))
    assert "<2.1 seconds>" in text and text.count("seconds>") == 2
    # 4 of 12 frames in 3 seconds: 1.33 a second, and 2 of these to a grid
    times = collator(tiny("qwen2_5_vl"), four)([asked(path)]).model_inputs["second_per_grid_ts"]
    torch.testing.assert_close(times, torch.tensor([1.5]))
    text = text_of(collator(tiny("smolvlm"), four), asked(path))
    assert "series of four frames from a 0:00:03 [H:MM:SS] video" in text
    assert [text.count(f"Frame from 00:0{second}:") for second in range(4)] == [1, 2, 1, 0]


def test_uneven_times_reach_the_model(tiny, monkeypatch):
    frames = noise(0, 4)
    uneven = Video(frames, np.array([0.0, 1.0, 7.0, 9.0]), np.arange(4), fps=2.0, total=20)
    monkeypatch.setattr("visionalign.video.decode_video", lambda raw, **kwargs: uneven)
    text = text_of(collator(tiny("qwen3_vl")), asked("any.mp4"))
    assert "<0.5 seconds>" in text and "<8.0 seconds>" in text


def test_the_template_of_rows_with_videos_is_the_processors(tiny):
    """SmolVLM's processor swaps the template itself where it is asked to render; ours reads as that does."""
    collate = collator(tiny("smolvlm"))
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]
    own = collate.processor.apply_chat_template(messages, tokenize=False)
    assert "<video>" in own
    assert collate.reader.read(asked(clip(0)), 0).text == own
    assert "<video>" not in (collate.processor.chat_template)


@pytest.mark.parametrize(("family", "count"), [("llava", 8), ("llava_next_video", 8), ("llava_onevision", 32)])
def test_how_many_frames_are_seen_where_nothing_is_asked_for(family, count):
    reader = video_reader(FAMILIES[family], None)
    assert len(reader(noise(0, 40), 0).frames) == count
    # a short clip: its frames once, or repeated where all videos of a batch need equally many
    assert len(reader(noise(0, 3), 0).frames) == (count if FAMILIES[family].equal_frames else 3)


def test_repeated_frames_keep_their_order_and_share():
    reader = video_reader(FAMILIES["llava_next_video"], None)
    assert reader(noise(0, 3), 0).indices.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert reader(noise(0, 3), 0).timestamps.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_a_video_that_is_decoded_already_is_taken_as_it_is(tiny):
    """As a reward gets it from a prompt, of frames that another family has chosen."""
    video = Video(noise(0, 3), np.array([0.0, 1.0, 7.0]), np.array([0, 2, 14]), fps=2.0, total=20)
    assert video_reader(FAMILIES["llava"], None)(video, 0) is video
    processor = AutoProcessor.from_pretrained(tiny("qwen2_vl"))
    assert video_reader(FAMILIES["qwen2_vl"], processor)(video, 0).timestamps.tolist() == [0, 1, 7, 7]
    assert len(video_reader(FAMILIES["llava_next_video"], None)(video, 0).frames) == 8


def test_options_of_the_sampling(tiny):
    processor = AutoProcessor.from_pretrained(tiny("qwen2_vl"))
    qwen = FAMILIES["qwen2_vl"]

    def frames(family=qwen, count=40, **given):  # of a clip of 4 frames a second
        return video_reader(family, processor, options(**given))(clip(0, count), 0).frames

    assert len(frames()) == 20  # 2 a second
    assert len(frames(fps=1.0)) == 10
    assert len(frames(max_frames=6)) == 6 and len(frames(max_frames=2)) == 2
    assert len(frames(num_frames=7)) == 8  # pairs make a grid
    large = video_reader(qwen, processor, options(num_frames=2))(np.zeros((2, 900, 1200, 3), np.uint8), 0).frames
    assert 0.99 * 768 * 28**2 < large[0].size // 3 <= 768 * 28**2
    assert frames(max_pixels=300)[0].size // 3 <= 300
    assert frames(total_pixels=6000).size // 3 <= 6000
    assert len(frames(FAMILIES["llava"], max_frames=5)) == 5 and len(frames(FAMILIES["llava"], fps=1.0)) == 10
    with pytest.raises(UserError, match="video_fps: models of the family llava_onevision see equally many frames"):
        frames(FAMILIES["llava_onevision"], fps=1.0)
    with pytest.raises(UserError, match="video_num_frames is 4 and video_fps 1.0: give one"):
        frames(num_frames=4, fps=1.0)
    for family in ("llava", "llava_next_video", "qwen2_vl"):
        with pytest.raises(UserError, match="min_frames is 16, more than max_frames, which is 4"):
            frames(FAMILIES[family], min_frames=16, max_frames=4)


def test_decoded_frames_are_kept_on_disk(tiny, tmp_path):
    path = Path(write_video(str(tmp_path / "a.mp4"), noise(0, 12)))
    kept, state = options(num_frames=2, cache=str(tmp_path / "frames")), path.stat()
    first = collator(tiny("qwen2_vl"), kept)([asked(str(path))]).model_inputs["pixel_values_videos"]
    path.write_bytes(bytes(state.st_size))  # nothing that could be decoded
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = collator(tiny("qwen2_vl"), kept)([asked(str(path))]).model_inputs["pixel_values_videos"]
    assert torch.equal(first, again)


def test_people_see_some_frames(tiny):
    reader = video_reader(FAMILIES["llava"], None)
    video = reader(noise(0, 8, 300, 400), 0)
    shown = shown_frames(video)
    assert len(shown) == 4 and all(max(frame.size) <= 256 for frame in shown)
    assert len(shown_frames(reader(noise(0, 2), 0))) == 2
    row = {**asked(clip(0)), "images": [shown[0]]}
    pictures = collator(tiny("qwen2_vl"), FEW).reader.shown(to_conversation(row, 0, Kind.MESSAGES))
    assert len(pictures) == 3


def test_passes_of_the_tower():
    """What all processes have to run where an engine shards the model."""
    qwen, smol = FAMILIES["qwen2_vl"], FAMILIES["smolvlm"]
    part = {"type": "video", "video": "a.mp4"}
    inline = [{"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "left"}]}]
    assert tower_passes([asked("a.mp4")], Kind.MESSAGES, qwen) == {"video"}
    assert tower_passes([{**asked("a.mp4"), "images": []}], Kind.MESSAGES, qwen) == {"video", "image"}
    assert tower_passes(inline, Kind.MESSAGES, qwen) == {"video"}
    assert tower_passes(inline, Kind.MESSAGES, smol) == {"image"}
    assert tower_passes([{"messages": chat("a", "b")}], Kind.MESSAGES, qwen) == {"image"}
