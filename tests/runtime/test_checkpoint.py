"""Which checkpoints count, what is deleted, whose folder it is, and what a signal does."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.runtime import checkpoint as checkpoints


def made(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    if complete:
        checkpoints.mark_complete(path, step=step, processes=2)
    return path


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints.checkpoints(folder)]


def test_checkpoints_are_listed_by_step_not_by_name(tmp_path):
    for step in (100, 20, 3):
        made(tmp_path, step)
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert steps(tmp_path) == [3, 20, 100]


def test_the_mark_says_what_is_complete(tmp_path):
    path = made(tmp_path, 3)
    assert checkpoints.is_complete(path)
    assert json.loads((path / checkpoints.MARK).read_text()) == {"step": 3, "processes": 2}
    checkpoints.discard(path)
    assert not path.exists()
    checkpoints.discard(path)  # nothing there: nothing to do


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "run.yaml"
    checkpoints.write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_rotation_counts_complete_ones_alone(tmp_path):
    for step, complete in ((1, False), (2, True), (3, True), (4, False), (5, True)):
        made(tmp_path, step, complete=complete)
    checkpoints.rotate(tmp_path, keep=2)
    assert steps(tmp_path) == [3, 5]


def test_rotation_spares_the_best_and_the_one_just_written(tmp_path):
    for step in (2, 4, 6, 8):
        made(tmp_path, step)
    checkpoints.rotate(tmp_path, keep=1, spared=[tmp_path / "checkpoint-2", str(tmp_path / "checkpoint-4")])
    assert steps(tmp_path) == [2, 4, 8]


@pytest.mark.parametrize("keep", [None, 0, -1])
def test_no_limit_keeps_every_complete_one(tmp_path, keep):
    for step, complete in ((1, False), (2, True), (3, True)):
        made(tmp_path, step, complete=complete)
    checkpoints.rotate(tmp_path, keep=keep)
    assert steps(tmp_path) == [2, 3]


def test_rotation_without_a_complete_one_deletes_nothing(tmp_path):
    made(tmp_path, 1, complete=False)
    made(tmp_path, 2, complete=False)
    checkpoints.rotate(tmp_path, keep=1)
    assert steps(tmp_path) == [1, 2]


def test_resume_takes_the_newest_complete_one(tmp_path):
    made(tmp_path, 2)
    newest = made(tmp_path, 10)
    made(tmp_path, 12, complete=False)
    for word in (True, "true", "last"):
        assert checkpoints.resume_path(word, tmp_path) == newest
    for word in (None, False, "false", ""):
        assert checkpoints.resume_path(word, tmp_path) is None


def test_resume_with_nothing_to_go_on_from_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint in .*: none"):
        checkpoints.resume_path(True, tmp_path)
    made(tmp_path, 4, complete=False)
    with pytest.raises(UserError, match=r"only incomplete ones \(checkpoint-4\)"):
        checkpoints.resume_path(True, tmp_path)


def test_a_named_checkpoint_must_be_complete(tmp_path):
    good, broken = made(tmp_path, 2), made(tmp_path, 4, complete=False)
    assert checkpoints.resume_path(str(good), "elsewhere") == good
    for wrong in (broken, tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="not a complete checkpoint.*Complete ones: .*checkpoint-2"):
            checkpoints.resume_path(str(wrong), "elsewhere")


def test_a_run_without_a_folder_gets_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoints.default_output_dir("runs/sft", None) == "runs/sft"
    assert checkpoints.default_output_dir("runs/sft", True) == "runs/sft"  # refused later: nothing to resume
    made(tmp_path / "runs" / "sft", 2)
    made(tmp_path / "runs" / "sft-2", 2)
    assert checkpoints.default_output_dir("runs/sft", None) == "runs/sft-3"
    assert checkpoints.default_output_dir("runs/sft", True) == "runs/sft-2"
    assert checkpoints.default_output_dir("runs/sft", "runs/sft/checkpoint-2") == "runs/sft"


def test_a_folder_with_another_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.check_output_dir(tmp_path, resuming=False, overwrite=False)
    made(tmp_path, 2)
    (tmp_path / "run.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=r"holds another run \(run.yaml, checkpoint-2\)"):
        checkpoints.check_output_dir(tmp_path, resuming=False, overwrite=False)
    checkpoints.check_output_dir(tmp_path, resuming=True, overwrite=False)
    checkpoints.check_output_dir(tmp_path, resuming=False, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        checkpoints.check_output_dir(tmp_path / "notes.txt", resuming=False, overwrite=True)


def test_starting_anew_touches_nothing_of_the_users(tmp_path):
    made(tmp_path, 2)
    (tmp_path / "report").mkdir()
    (tmp_path / "run.yaml").write_text("seed: 1")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.clear_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    interruption = checkpoints.Interruption()
    with interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_stops_at_once_unless_it_is_the_same_one(monkeypatch):
    now = 100.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    with checkpoints.Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher passes on what the terminal has sent already
        assert interruption.received == signal.SIGINT
        now = 102.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def use():
        with checkpoints.Interruption() as interruption:
            seen.append(interruption.received)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None] and signal.getsignal(signal.SIGTERM) == before
