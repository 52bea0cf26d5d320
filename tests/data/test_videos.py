"""Videos: which frames are taken, what files and rows may hold, what the errors say, and the frames kept on disk."""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from tiny_videos import clip, write_sound, write_video

from shared.data import video_decoders
from shared.data.files import load_local
from shared.data.frame_cache import FrameCache
from shared.data.images import iterate_light, undecoded
from shared.data.schema import Kind, check_rows, to_conversation
from shared.data.videos import FrameSampling, decode_video, video_problem, video_size
from shared.errors import DataError, UserError

INSTALLED = [
    name
    for name, module in (("pyav", "av"), ("decord", "decord"), ("torchcodec", "torchcodec.decoders"))
    if video_decoders._can_be_imported(module)
]
ALL = FrameSampling(num_frames=1000)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "good.mp4", clip())
    write_video(folder / "keys.mp4", clip(60), g=7, bf=3)
    write_video(folder / "uneven.mp4", clip(6), times=[0, 0.1, 0.5, 0.6, 2.0, 2.1])
    write_video(folder / "late.mkv", clip(8), times=[3 + i / 8 for i in range(8)])
    write_video(folder / "narrow.mp4", clip(8, width=48))
    whole = write_video(folder / "whole.mp4", clip(60, 120, 160), head_first=True).read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "headless.mp4").write_bytes((folder / "keys.mp4").read_bytes()[:2000])
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 2] = np.random.default_rng(0).bytes(len(whole) // 2 - len(whole) // 3)
    (folder / "damaged.mp4").write_bytes(damaged)
    (folder / "empty.mp4").touch()
    (folder / "junk.mp4").write_bytes(b"junk" * 500)
    write_sound(folder / "sound.mp4")
    write_sound(folder / "frameless.mkv", pictures=True)
    turned = bytearray(write_video(folder / "turned.mp4", clip(8)).read_bytes())
    at = turned.find(b"tkhd") + 44  # the matrix of the track's head: a quarter to the right
    turned[at : at + 36] = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30], ">i4").tobytes()
    (folder / "turned.mp4").write_bytes(turned)
    return folder


# which frames


def test_frames_are_spread_evenly():
    # (i + .5) * 10 / 4 = 1.25, 3.75, 6.25, 8.75
    assert FrameSampling(num_frames=4).indices(10, 25.0).tolist() == [1, 3, 6, 8]
    assert FrameSampling(num_frames=1).indices(9, 25.0).tolist() == [4]
    assert FrameSampling(num_frames=8).indices(8, 25.0).tolist() == list(range(8))


def test_a_shorter_video_gives_each_frame_once():
    assert FrameSampling(num_frames=8).indices(3, 25.0).tolist() == [0, 1, 2]
    assert FrameSampling(fps=30).indices(3, 10.0).tolist() == [0, 1, 2]


def test_frames_a_second():
    # 24 frames at 8 a second are 3 seconds: 2 a second make 6, each in the middle of its 4
    assert FrameSampling().indices(24, 8.0).tolist() == [2, 6, 10, 14, 18, 22]
    assert FrameSampling(fps=2).indices(24, 8.0).tolist() == [2, 6, 10, 14, 18, 22]
    assert len(FrameSampling(fps=0.1).indices(24, 8.0)) == 1
    assert len(FrameSampling(fps=0.1, min_frames=4).indices(24, 8.0)) == 4
    assert len(FrameSampling(max_frames=5).indices(24, 8.0)) == 5
    # 1.5 frames: up, also where a decoder gives the rate with an error in its last digits
    assert len(FrameSampling(fps=0.5).indices(24, 8.0)) == len(FrameSampling(fps=0.5).indices(24, 8.0000001)) == 2


def test_a_multiple():
    assert FrameSampling(num_frames=3, multiple_of=2).indices(9, 1.0).tolist() == [1, 4, 7, 7]
    # 3 frames at 1 a second: rounded to 4 as there are enough, or to 2 where 3 is the limit
    assert FrameSampling(fps=1, multiple_of=2).indices(24, 8.0).tolist() == [3, 9, 15, 21]
    assert FrameSampling(fps=1, multiple_of=2, max_frames=3).indices(24, 8.0).tolist() == [6, 18]
    # no frame of a short video is left out
    assert FrameSampling(multiple_of=2).indices(3, 1.0).tolist() == [0, 1, 2, 2]
    assert FrameSampling(multiple_of=2, max_frames=1).indices(24, 8.0).tolist() == [12, 12]
    assert FrameSampling(multiple_of=4, min_frames=3, max_frames=3).indices(24, 8.0).tolist() == [4, 12, 20, 20]


def test_frames_are_made_smaller_to_fit():
    assert FrameSampling().frame_size(640, 360, 8) == (640, 360)
    assert FrameSampling(max_pixels=640 * 360 // 4).frame_size(640, 360, 8) == (320, 180)
    assert FrameSampling(total_pixels=8 * 640 * 360 // 4).frame_size(640, 360, 8) == (320, 180)
    assert FrameSampling(total_pixels=640 * 360, max_pixels=64 * 36).frame_size(640, 360, 4) == (64, 36)
    assert FrameSampling(total_pixels=1).frame_size(640, 360, 4) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 4, "fps": 1}, "num_frames is 4 and fps 1; give one"),
        ({"num_frames": -1}, "num_frames is -1; allowed: a whole number"),
        ({"max_pixels": 0.5}, "max_pixels is 0.5"),
        ({"multiple_of": 1.5}, "multiple_of is 1.5"),
        ({"fps": -2}, "fps is -2"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"min_frames": 5, "max_frames": 4}, "min_frames is 5, more than max_frames, which is 4"),
        ({"num_frames": 8, "max_frames": 4}, "num_frames is 8, outside of min_frames 1 to max_frames 4"),
    ],
)
def test_sampling_that_cannot_work(options, message):
    with pytest.raises(UserError, match=message):
        FrameSampling(**options)


# files


@pytest.mark.parametrize("decoder", ["auto", *INSTALLED])
def test_decoding(videos, decoder):
    video = decode_video(videos / "good.mp4", row=0, sampling=FrameSampling(num_frames=4), decoder=decoder)
    assert video.frames.shape == (4, 48, 64, 3) and video.frames.dtype == np.uint8
    assert video.indices.tolist() == [3, 9, 15, 21]
    assert video.timestamps.tolist() == [3 / 8, 9 / 8, 15 / 8, 21 / 8]
    assert (video.fps, video.total, video.duration) == (8.0, 24, 3.0)
    assert np.abs(video.frames.astype(int) - clip()[video.indices]).mean() < 4  # the codec's own loss


@pytest.mark.parametrize("name", ["good.mp4", "keys.mp4", "uneven.mp4", "late.mkv", "narrow.mp4", "turned.mp4"])
def test_decoders_agree(videos, name):
    some = FrameSampling(num_frames=5)
    first, *others = (decode_video(videos / name, row=0, sampling=some, decoder=one) for one in INSTALLED)
    for other in others:
        assert np.abs(first.frames.astype(int) - other.frames).max() <= 2
        assert np.allclose(first.timestamps, other.timestamps, atol=1e-4)
        assert first.indices.tolist() == other.indices.tolist() and first.total == other.total


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("groups.mp4", "libx264", {"g": 7, "bf": 3}),
        ("open.mp4", "libx264", {"g": 10, "x264_params": "open-gop=1"}),
        ("stream.ts", "libx264", {"g": 10}),
        ("stream.mpg", "mpeg2video", {"g": 10, "bf": 2}),
        ("plain.avi", "mpeg4", {"g": 10}),
    ],
)
def test_any_frame_is_found_by_number(tmp_path, name, codec, options):
    import av

    path = write_video(tmp_path / name, clip(60), fps=25, codec=codec, **options)
    with av.open(path) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(whole) == 60
    for numbers in ([0, 1, 2], [11, 12, 47], [33], [59], [5, 29, 30, 31, 58]):
        read = list(video_decoders.PyAVClip(str(path)).read(numbers))
        assert [round(seconds * 25) for _, seconds in read] == numbers
        for number, (pixels, _) in zip(numbers, read, strict=True):
            assert (pixels == whole[number]).all()


def test_a_far_frame_is_not_walked_to(videos, monkeypatch):
    decoded = []

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    @contextmanager
    def opened(source, real=video_decoders._opened):
        with real(source) as container:
            yield Counted(container)

    monkeypatch.setattr(video_decoders, "_opened", opened)
    decode_video(videos / "keys.mp4", row=0, sampling=FrameSampling(num_frames=2))  # 15 and 45, a key frame in 7
    assert len(decoded) <= 14


def test_times_are_the_files_own(videos):
    video = decode_video(videos / "uneven.mp4", row=0, sampling=ALL)
    assert video.timestamps.tolist() == [0, 0.1, 0.5, 0.6, 2.0, 2.1]
    assert video.fps == pytest.approx(5 / 2.1, abs=1e-3)
    late = decode_video(videos / "late.mkv", row=0, sampling=ALL)
    assert late.timestamps.tolist() == [i / 8 for i in range(8)]


def test_a_turned_video_is_upright(videos):
    turned = decode_video(videos / "turned.mp4", row=0, sampling=ALL)
    assert turned.frames.shape == (8, 64, 48, 3)
    right = np.rot90(clip(8), -1, (1, 2))
    assert np.abs(turned.frames.astype(int) - right).mean() < 4 < np.abs(np.flip(turned.frames, 1) - right).mean()


@pytest.mark.parametrize("form", ["path", "text", "bytes", "dict of bytes", "dict of path"])
def test_forms_of_a_file(videos, form):
    path = videos / "good.mp4"
    forms = {"path": path, "text": str(path), "bytes": path.read_bytes()}
    forms |= {"dict of bytes": {"bytes": forms["bytes"], "path": "good.mp4"}}
    forms |= {"dict of path": {"bytes": None, "path": str(path)}}
    assert decode_video(forms[form], row=0, sampling=FrameSampling(num_frames=2)).indices.tolist() == [6, 18]
    assert video_size(forms[form], row=0) == (64, 48)


def test_frames_are_resized_one_by_one(videos):
    small = decode_video(videos / "good.mp4", row=0, sampling=FrameSampling(num_frames=4, max_pixels=32 * 24))
    assert small.frames.shape == (4, 24, 32, 3)
    assert small.frames[3, 0, 0, 0] == pytest.approx(200 * 21 / 23, abs=6)
    both = decode_video(videos / "good.mp4", row=0, sampling=FrameSampling(num_frames=4, total_pixels=4 * 32 * 24))
    assert (both.frames == small.frames).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.mp4", "there is no such file"),
        ("empty.mp4", "is empty: 0 bytes"),
        ("junk.mp4", "broken, cut short, or no video file"),
        ("headless.mp4", "broken, cut short, or no video file"),
        ("damaged.mp4", "broken, cut short, or no video file"),
        ("sound.mp4", "there is no video stream in it"),
        (".", "is a folder, expected a file"),
    ],
)
@pytest.mark.parametrize("decoder", INSTALLED)
def test_a_bad_file_is_named_with_its_row(videos, name, message, decoder):
    with pytest.raises(DataError, match=rf"^row 7: video '.*{name}' .*{message}"):
        decode_video(str(videos / name), row=7, sampling=ALL, decoder=decoder)


def test_a_file_that_is_cut_short(videos, tmp_path):
    # 60 frames at 8 a second
    with pytest.raises(DataError, match=r"row 2: .*half.mp4' cannot be read: it is cut short: .* of 7\.5 seconds"):
        decode_video(videos / "half.mp4", row=2, sampling=FrameSampling(num_frames=1))
    whole = write_video(tmp_path / "whole.mkv", clip(60, 120, 160)).read_bytes()
    with pytest.raises(DataError, match=r"it is cut short: .* of 7\.5 seconds"):
        decode_video(whole[: len(whole) // 2], row=2, sampling=FrameSampling(num_frames=1))


def test_a_file_without_frames(videos):
    for read in (decode_video, lambda raw, row, sampling: video_size(raw, row=row)):
        with pytest.raises(DataError, match=r"row 2: .*frameless.mkv' cannot be read: it has no frames"):
            read(videos / "frameless.mkv", row=2, sampling=ALL)


def test_bad_bytes():
    with pytest.raises(DataError, match="row 1: the video is empty: 0 bytes"):
        decode_video(b"", row=1, sampling=ALL)
    with pytest.raises(DataError, match="row 1: the video cannot be read: it is broken"):
        decode_video(b"junk" * 100, row=1, sampling=ALL)


def test_a_video_that_would_fill_the_memory(videos, monkeypatch):
    from shared.data import videos as module

    monkeypatch.setattr(module, "_MOST_BYTES", 20 * 48 * 64 * 3)
    decode_video(videos / "good.mp4", row=0, sampling=FrameSampling(num_frames=20))
    with pytest.raises(DataError, match="row 0: .* gives 24 frames of 64×48, .* max_frames"):
        decode_video(videos / "good.mp4", row=0, sampling=ALL)


def test_an_unknown_decoder(videos):
    with pytest.raises(UserError, match="'ffmpeg'; allowed: auto, pyav, torchcodec, decord"):
        decode_video(videos / "good.mp4", row=0, sampling=ALL, decoder="ffmpeg")


def test_what_to_do_where_no_decoder_is_installed(videos, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    video_decoders._can_be_imported.cache_clear()
    try:
        with pytest.raises(
            UserError, match=r"none of the decoders is installed. Do: pip install av, or pip install tor"
        ):
            decode_video(videos / "good.mp4", row=0, sampling=ALL)
        with pytest.raises(UserError, match=r"the decoder decord is not installed. Do: pip install decord \(Linux"):
            decode_video(videos / "good.mp4", row=0, sampling=ALL, decoder="decord")
    finally:
        monkeypatch.undo()
        video_decoders._can_be_imported.cache_clear()


def test_the_next_decoder_is_taken_where_the_first_is_missing(videos, monkeypatch):
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: real("no_such_module" if name == "av" else name))
    video_decoders._can_be_imported.cache_clear()
    try:
        chosen = video_decoders._chosen("some.mp4", "auto")
    finally:
        monkeypatch.undo()
        video_decoders._can_be_imported.cache_clear()
    assert chosen is (video_decoders.TorchcodecClip if "torchcodec" in INSTALLED else video_decoders.DecordClip)


class FakeDecoder:
    """What torchcodec's decoder looks like: 8 frames, 4 a second, channels first, from second 10 on."""

    class metadata:
        num_frames, average_fps, begin_stream_seconds, end_stream_seconds = 8, 4.0, 10.0, 12.0
        duration_seconds_from_header = 2.0

    def get_frame_at(self, number):
        import torch

        class Frame:
            data = torch.full((3, 6, 10), number, dtype=torch.uint8)
            pts_seconds = 10 + number / 4

        return Frame


def test_a_decoder_of_a_video_column(videos):
    video = decode_video(FakeDecoder(), row=0, sampling=FrameSampling(num_frames=2))
    assert video.frames.shape == (2, 6, 10, 3) and video.frames[:, 0, 0, 0].tolist() == [2, 6]
    assert video.timestamps.tolist() == [0.5, 1.5] and video.fps == 4.0
    ours = FakeDecoder()
    ours._hf_encoded = {"path": str(videos / "good.mp4"), "bytes": None}
    assert decode_video(ours, row=0, sampling=FrameSampling(num_frames=2)).total == 24


# frames as they are


def pictures(count, size=(10, 6)):
    return [Image.new("RGB", size, (20 * number, 0, 0)) for number in range(count)]


def test_a_list_of_frames(tmp_path):
    video = decode_video(pictures(5), row=0, sampling=FrameSampling(num_frames=2))
    assert video.frames.shape == (2, 6, 10, 3) and video.frames[:, 0, 0, 0].tolist() == [20, 60]
    assert video.timestamps.tolist() == [1.0, 3.0] and (video.fps, video.total) == (1.0, 5)
    for number, picture in enumerate(pictures(5)):
        picture.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    timed = decode_video({"frames": paths, "fps": 4.0}, row=0, sampling=FrameSampling(fps=2))
    assert timed.indices.tolist() == [0, 2, 4] and timed.timestamps.tolist() == [0, 0.5, 1.0]
    assert timed.frames[:, 0, 0, 0].tolist() == [0, 40, 80]


def test_an_array_of_frames():
    array = clip(6)
    video = decode_video(array, row=0, sampling=FrameSampling(num_frames=3))
    assert (video.frames == array[[1, 3, 5]]).all()
    assert decode_video({"frames": array, "fps": 3.0}, row=0, sampling=ALL).duration == 2.0


def test_frames_of_different_size_become_the_firsts():
    mixed = [*pictures(2), *pictures(1, (20, 20))]
    assert decode_video(mixed, row=0, sampling=ALL).frames.shape == (3, 6, 10, 3)


def test_a_bad_frame_is_named_with_its_row(tmp_path):
    with pytest.raises(DataError, match="row 4: image '.*none.png' cannot be read: there is no such file"):
        decode_video([str(tmp_path / "none.png")], row=4, sampling=ALL)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ("clip.mp4", None),
        (b"data", None),
        ({"bytes": None, "path": "clip.mp4"}, None),
        (np.zeros((2, 4, 4, 3), np.uint8), None),
        ([np.zeros((4, 4, 3), np.uint8)], None),
        ({"frames": ["a.jpg"], "fps": 2}, None),
        ("", "the video path is empty"),
        ("https://example.org/clip.mp4", "video 'https://example.org/clip.mp4' is a URL"),
        ({"bytes": None, "path": None}, "the video has neither bytes nor a path"),
        ([], "the video is an empty list"),
        (7, "a video is int, expected a path"),
        (["a.jpg", 3], "a frame of the video cannot be used: an image is int"),
        ({"frames": ["a.jpg"], "fps": 0}, "the video's fps is 0, expected"),
        ({"frames": "a.jpg"}, "the video's frames are str, expected"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"shape \(2, 3, 4, 4\) and uint8, expected \(frames, height, width, 3\)"),
        (np.zeros((2, 4, 4, 3), np.float32), "float32, expected"),
        (np.zeros((0, 4, 4, 3), np.uint8), "so it has no pixels"),
    ],
)
def test_what_can_be_a_video(raw, problem):
    found = video_problem(raw)
    assert found is None if problem is None else re.search(problem, found)
    if problem:
        with pytest.raises(DataError, match="row 3: "):
            decode_video(raw, row=3, sampling=ALL)


# rows


def ask(question="Which way?", answer="left"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_places_of_videos():
    row = {"messages": ask("What is in <video>\nand in <image>?"), "videos": ["a.mp4"], "images": ["b.png"]}
    conversation = to_conversation(row, 0, Kind.MESSAGES)
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["text", "video", "text", "image", "text"]
    assert conversation.messages[0]["content"][2]["text"] == "and in "
    assert conversation.videos == ["a.mp4"] and conversation.images == ["b.png"]


def test_a_video_without_a_place_goes_before_the_question():
    conversation = to_conversation({"messages": ask(), "video": "a.mp4"}, 0, Kind.MESSAGES)
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["video", "text"]


def test_a_marker_without_a_video_is_text():
    conversation = to_conversation({"messages": ask("What is <video>?"), "images": ["b.png"]}, 0, Kind.MESSAGES)
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "text"]
    assert conversation.messages[0]["content"][1]["text"] == "What is <video>?"


def test_videos_that_lie_in_their_parts():
    content = [{"type": "video", "video": ["1.jpg", "2.jpg"]}, {"type": "text", "text": "Which way?"}]
    row = {"prompt": [{"role": "user", "content": content}], "completion": "left"}
    assert to_conversation(row, 0, Kind.PROMPT_COMPLETION).videos == [["1.jpg", "2.jpg"]]


def test_a_list_in_the_column_of_one_video():
    def videos_of(value):
        return to_conversation({"messages": ask(), "video": value}, 0, Kind.MESSAGES).videos

    assert videos_of(["1.jpg", {"bytes": None, "path": "2.PNG"}]) == [["1.jpg", {"bytes": None, "path": "2.PNG"}]]
    assert videos_of(["a.mp4", "b.mp4"]) == ["a.mp4", "b.mp4"]
    assert videos_of(["moving.gif"]) == ["moving.gif"]
    assert len(videos_of(pictures(3))) == 1


@pytest.mark.parametrize(
    ("videos_given", "message"),
    [
        ([""], "row 5: the video path is empty"),
        (["https://example.org/a.mp4"], "row 5: video 'https://example.org/a.mp4' is a URL"),
        ([[]], "row 5: the video is an empty list"),
        (["a.mp4", "b.mp4"], "row 5: 2 videos but 1 video place in the messages"),
    ],
)
def test_bad_videos_of_a_row(videos_given, message):
    with pytest.raises(DataError, match=message):
        to_conversation({"messages": ask("<video> Which way?"), "videos": videos_given}, 5, Kind.MESSAGES)


def test_videos_of_the_first_rows_are_opened(videos):
    names = ["good.mp4", "junk.mp4", "narrow.mp4", "missing.mp4", "sound.mp4"]
    rows = [{"messages": ask(), "videos": [str(videos / name)]} for name in names]
    report = check_rows(rows, Kind.MESSAGES, check_images=4, on_bad_row="skip")
    assert sorted(report.bad) == [1, 3] and report.kept == [0, 2, 4]
    assert (report.videos, report.smallest_video, report.largest_video) == (2, (48, 48), (64, 48))
    assert "3 of 5 rows, videos of 48×48 to 64×48; 2 left out:" in report.summary("train")
    with pytest.raises(DataError, match="row 1: video '.*junk.mp4' cannot be read"):
        check_rows(rows, Kind.MESSAGES, check_images=4)


def test_video_columns_are_left_undecoded(videos):
    from datasets import Dataset, List, Video

    data = (videos / "good.mp4").read_bytes()
    rows = Dataset.from_list(
        [{"videos": [{"bytes": data, "path": "a.mp4"}], "video": str(videos / "good.mp4"), "messages": ask()}]
    )
    rows = rows.cast_column("videos", List(Video())).cast_column("video", Video())
    plain = undecoded(rows)
    assert plain[0]["videos"] == [{"bytes": data, "path": "a.mp4"}]
    assert plain[0]["video"] == {"bytes": None, "path": str(videos / "good.mp4")}
    (light,) = iterate_light(plain)
    assert light["videos"] == [{"bytes": data[:12], "path": "a.mp4"}]
    assert check_rows(rows, Kind.MESSAGES, check_images=1).videos == 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_column_of_stored_frames_is_one_video_a_row(form):
    from datasets import Dataset, Image, List

    def stored(image):
        file = io.BytesIO()
        image.save(file, form)
        return {"bytes": file.getvalue(), "path": None}

    frames = [stored(image) for image in pictures(3)]
    row = {"video": frames, "messages": ask("<video> Which way?" if form != "GIF" else "Which way?")}
    rows = Dataset.from_list([row] * 2).cast_column("video", List(Image()))
    count = 3 if form == "GIF" else 1  # each GIF may be a video
    (light, _), plain = iterate_light(undecoded(rows)), undecoded(rows)
    for each in (light, plain[0], row):
        assert len(to_conversation(each, 0, Kind.MESSAGES).videos) == count
    assert check_rows(rows, Kind.MESSAGES, check_images=2).videos == 2 * count


# folders


@pytest.mark.parametrize("column", ["file_name", "file_names", "video", "videos"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_folder_of_videos(videos, tmp_path, column, form):
    from datasets import Dataset

    several = column.endswith("s")
    for split in ("train", "test"):
        (tmp_path / split / "clips").mkdir(parents=True)
        (tmp_path / split / "clips" / "a.MP4").write_bytes((videos / "good.mp4").read_bytes())
        name = os.path.join("clips", "a.MP4")
        row = {column: [name] if several else name, "messages": ask()}
        if form == "jsonl":
            (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        else:
            Dataset.from_list([row]).to_parquet(tmp_path / split / "metadata.parquet")
    splits = load_local(tmp_path)
    assert set(splits) == {"train", "test"}
    for split, rows in splits.items():
        path = str(tmp_path / split / "clips" / "a.MP4")
        found = to_conversation(rows[0], 0, Kind.MESSAGES).videos
        assert found == [{"bytes": None, "path": path}]
        assert check_rows(rows, Kind.MESSAGES, check_images=1).videos == 1


def test_a_folder_of_frames(tmp_path):
    for number, picture in enumerate(pictures(3)):
        picture.save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(3)]
    rows = [{"videos": [names], "messages": ask()}, {"videos": [names[1:]], "messages": ask()}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = load_local(tmp_path / "rows.jsonl")["train"]
    found = [to_conversation(row, at, Kind.MESSAGES).videos for at, row in enumerate(train)]
    assert [decode_video(raw, row=0, sampling=ALL).total for (raw,) in found] == [3, 2]


# frames kept on disk


def test_kept_frames_are_not_decoded_again(videos, tmp_path, monkeypatch):
    cache, some = FrameCache(tmp_path / "frames"), FrameSampling(num_frames=4)
    made = decode_video(videos / "uneven.mp4", row=0, sampling=some, cache=cache)
    monkeypatch.setattr(video_decoders, "open_clip", lambda *given: pytest.fail("decoded again"))
    kept = decode_video(str(videos / "uneven.mp4"), row=0, sampling=some, cache=FrameCache(tmp_path / "frames"))
    assert (kept.frames == made.frames).all() and kept.frames.dtype == np.uint8
    assert kept.timestamps.tolist() == made.timestamps.tolist() and kept.indices.tolist() == made.indices.tolist()
    assert (kept.fps, kept.total) == (made.fps, made.total)


def test_what_decides_an_entry(videos, tmp_path):
    cache, path = FrameCache(tmp_path / "frames"), tmp_path / "clip.mp4"
    data = (videos / "good.mp4").read_bytes()
    path.write_bytes(data)
    keys = [
        cache.key(str(path), FrameSampling(), "auto"),
        cache.key(str(path), FrameSampling(max_pixels=100), "auto"),
        cache.key(str(path), FrameSampling(), "decord"),
        cache.key(data, FrameSampling(), "auto"),
        cache.key(data + b"\0", FrameSampling(), "auto"),
    ]
    os.utime(path, ns=(0, 10**18))  # another file of the same size
    keys.append(cache.key(str(path), FrameSampling(), "auto"))
    path.write_bytes((videos / "narrow.mp4").read_bytes())
    os.utime(path, ns=(0, 10**18))
    keys.append(cache.key(str(path), FrameSampling(), "auto"))
    assert len(set(keys)) == len(keys)
    assert cache.key(data, FrameSampling(), "auto") == keys[3]


@pytest.mark.parametrize("damage", ["empty", "cut", "bits", "head", "other"])
def test_a_damaged_entry_is_made_again(videos, tmp_path, damage):
    cache, some = FrameCache(tmp_path), FrameSampling(num_frames=4)
    made = decode_video(videos / "good.mp4", row=0, sampling=some, cache=cache)
    (entry,) = tmp_path.rglob("*.npz")
    data = bytearray(entry.read_bytes())
    middle = len(data) // 2
    if damage == "other":
        np.savez(entry, frames=np.zeros((2, 2)))
    else:
        broken = {"empty": b"", "cut": data[:middle], "bits": data[:middle] + b"xxxx" + data[middle + 4 :]}
        broken["head"] = data.replace(b"}", b"(", 1)  # of an array: numpy reads it as Python
        entry.write_bytes(broken[damage])
    again = decode_video(videos / "good.mp4", row=0, sampling=some, cache=cache)
    assert (again.frames == made.frames).all()
    assert cache.load(entry.stem) is not None


def test_a_disk_that_is_full_ends_nothing(videos, tmp_path, monkeypatch, caplog):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    cache = FrameCache(tmp_path)
    monkeypatch.setattr(np, "savez", full)
    for _ in range(2):
        assert decode_video(videos / "good.mp4", row=0, sampling=FrameSampling(), cache=cache).total == 24
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="folder of decoded frames .* cannot be made"):
        FrameCache(tmp_path / "file" / "frames")


def _decode_into(folder, path):
    cache = FrameCache(folder)
    sums = []
    for number in range(1, 9):
        video = decode_video(path, row=0, sampling=FrameSampling(num_frames=number), cache=cache)
        sums.append(int(video.frames.sum()))
    return sums


def test_several_processes_fill_one_folder(videos, tmp_path):
    expected = _decode_into(tmp_path / "alone", str(videos / "good.mp4"))
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(_decode_into, tmp_path / "shared", str(videos / "good.mp4")) for _ in range(6)]
        assert all(future.result(timeout=60) == expected for future in futures)
    files = [file for file in (tmp_path / "shared").rglob("*") if file.is_file()]
    assert len(files) == 8 and all(file.suffix == ".npz" for file in files)


# workers and memory


class Decoding:
    def __init__(self, path, decoder):
        self.path, self.decoder = path, decoder

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return decode_video(self.path, row=index, sampling=FrameSampling(num_frames=4), decoder=self.decoder).frames


@pytest.mark.parametrize("decoder", INSTALLED)
def test_forked_workers_decode_after_their_parent_did(videos, decoder):
    from torch.utils.data import DataLoader

    path = str(videos / "keys.mp4")
    expected = Decoding(path, decoder)[0]
    loader = DataLoader(
        Decoding(path, decoder), num_workers=2, batch_size=None, multiprocessing_context="fork", timeout=60
    )
    frames = [np.asarray(frames) for frames in loader]
    assert len(frames) == 12 and all((one == expected).all() for one in frames)


MEMORY = """
import resource, sys
from shared.data.videos import FrameSampling, decode_video
some = FrameSampling(num_frames=8, max_pixels=64 * 48)
decode_video(sys.argv[1], row=0, sampling=some, decoder=sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
video = decode_video(sys.argv[2], row=0, sampling=some, decoder=sys.argv[3])
assert video.total == 400 and video.frames.shape == (8, 48, 64, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_video_takes_little_memory(videos, tmp_path):
    still = np.zeros((480, 640, 3), np.uint8)
    long = write_video(tmp_path / "long.mp4", np.broadcast_to(still, (400, *still.shape)), codec="mpeg4")
    for decoder in INSTALLED:
        command = [sys.executable, "-c", MEMORY, str(videos / "good.mp4"), str(long), decoder]
        grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert grown < 60_000, decoder  # kB; all its frames are 360,000


def test_importing_videos_is_light():
    code = (
        "import sys, shared.data.videos; print([m for m in ('numpy','av','decord','torch','PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
