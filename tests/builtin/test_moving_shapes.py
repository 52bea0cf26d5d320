"""The built-in video data: real files, one right answer to every question, no motion in both splits."""

import collections
import json
import random
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import shared.builtin as builtin
from shared.builtin import moving_shapes, shapes
from shared.data.loading import load_datasets
from shared.data.schema import Kind, check_rows, to_conversation
from shared.data.videos import FrameSampling, decode_video
from shared.errors import UserError

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "make_moving_shapes.py"
FEW = {"train": 40, "test": 10}
ALL = FrameSampling(num_frames=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    moving_shapes.write(folder, clips=FEW)
    return folder


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def seen_in(frames):
    """Work out from the frames alone which way the bright pixels go, and their colour."""
    lit = frames.max(-1) > 90
    first, last = (np.argwhere(frame).mean(0) for frame in (lit[0], lit[-1]))
    down, right = last - first
    if max(abs(down), abs(right)) < 2:
        direction = "nowhere"
    elif abs(down) > abs(right):
        direction = "down" if down > 0 else "up"
    else:
        direction = "right" if right > 0 else "left"
    mean = np.median(frames[lit], 0)
    return direction, min(shapes.COLOURS, key=lambda name: np.abs(mean - shapes.COLOURS[name]).sum())


def test_answers_are_what_the_videos_show(folder):
    known = collections.defaultdict(dict)
    for row in rows_of(folder, "train"):
        video = decode_video(folder / "train" / row["videos"][0], row=0, sampling=ALL)
        assert video.frames.shape[1:] == (48, 48, 3) and 8 <= len(video.frames) <= 12 and video.fps == 8
        direction, colour = seen_in(video.frames)
        question, answer = (turn["content"] for turn in row["messages"])
        if row["kind"] == "direction":
            assert question.startswith("Which way does the ") and answer == direction
        elif row["kind"] == "colour":
            assert question.startswith("What colour is the ") and answer == colour
        else:
            assert row["kind"] == "what" and question == "What moves?"
            assert answer == "nothing" if direction == "nowhere" else answer.endswith(f" {colour}")
        known[row["videos"][0]][row["kind"]] = question, answer
    forms = [
        (kinds["direction"][0].split()[-2], kinds["what"][1].split()[0]) for kinds in known.values() if "what" in kinds
    ]
    assert len(forms) == 20 and all(named in (form, "nothing") for form, named in forms)


def test_a_moving_shape_stays_in_the_picture_and_moves_far_enough_to_be_seen():
    rng = random.Random(0)
    for _ in range(300):
        motion = moving_shapes.draw_motion("train", rng)
        frames = moving_shapes.paint(motion, rng)
        lit = frames.max(-1) > 0
        assert len({int(frame.sum()) for frame in lit}) == 1  # nothing of it was cut off
        first, last = (np.argwhere(frame).mean(0) for frame in (lit[0], lit[-1]))
        assert (first // 16).astype(int).tolist() == list(divmod(motion.start, 3))
        way = round(np.abs(last - first).max(), 6)
        assert way == 0 if motion.direction == "nowhere" else way >= 14


def test_no_motion_is_in_both_splits():
    rng = random.Random(0)
    motions = {split: {moving_shapes.draw_motion(split, rng) for _ in range(400)} for split in builtin.SPLITS}
    assert motions["train"] and not motions["train"] & motions["test"]
    share = len(motions["test"]) / (len(motions["train"]) + len(motions["test"]))
    assert 0.05 < share < 0.35


def test_every_direction_comes_about_as_often():
    rng = random.Random(0)
    counted = collections.Counter(moving_shapes.draw_motion("train", rng).direction for _ in range(1000))
    assert set(counted) == set(moving_shapes.STEPS) and min(counted.values()) > 150


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    for seed in (0, 1):
        moving_shapes.write(tmp_path / str(seed), seed, clips={"test": 4})
    same = [(folder / "test" / f"{n:04d}.mp4").read_bytes() for n in range(4)]
    assert [(tmp_path / "0" / "test" / f"{n:04d}.mp4").read_bytes() for n in range(4)] == same
    assert [(tmp_path / "1" / "test" / f"{n:04d}.mp4").read_bytes() for n in range(4)] != same


def test_the_files_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(moving_shapes, "CLIPS", FEW)
    data = load_datasets("builtin/moving-shapes")
    assert len(data.train) == 80 and len(data.test) == 20
    monkeypatch.setattr(moving_shapes, "write", lambda *given: pytest.fail("written again"))
    rows = builtin.load_dataset("builtin/moving-shapes")
    assert set(rows.column_names) == {"videos", "messages", "kind"}
    assert collections.Counter(rows["kind"]) == {"direction": 40, "what": 20, "colour": 20}
    path = to_conversation(rows[0], 0, Kind.MESSAGES).videos[0]["path"]
    with av.open(path) as container:
        assert "mp4" in container.format.name and container.streams.video[0].width == 48
    assert check_rows(data.train, Kind.MESSAGES, check_images=8).videos == 8
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_cache_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write its video files to .* Set TRIALIGN_CACHE"):
        builtin.load_dataset("builtin/moving-shapes")


def test_the_folder_is_a_data_set(folder):
    data = load_datasets(str(folder))
    assert (len(data.train), len(data.test), data.sources[0].test_split) == (80, 20, "test")
    assert check_rows(data.train, Kind.MESSAGES, check_images=80).videos == 80


def test_the_script_writes_a_folder(tmp_path):
    code = (
        f"import sys, runpy; sys.argv = ['make_moving_shapes.py', {str(tmp_path / 'new')!r}, '--seed', '3'];"
        "from shared.builtin import moving_shapes; moving_shapes.CLIPS = {'train': 3, 'test': 2};"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent.parent)
    assert done.returncode == 0, done.stderr
    assert "train: 3 clips" in done.stdout and len(list((tmp_path / "new" / "test").glob("*.mp4"))) == 2
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent.parent)
    assert again.returncode == 1 and "is not empty" in again.stderr
