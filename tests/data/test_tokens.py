"""Flat token tables: rows, selections, more columns, shares of processes, and what comes back from disk."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import numpy as np
import pytest

from shared.cache import cache_folder, locked
from shared.data.rows import PADDING, ROW, Rows
from shared.data.sampler import length_grouped_order
from shared.data.token_cache import data_fingerprint, load_table, save_table
from shared.data.tokens import Ragged, TokenTable


def table() -> TokenTable:
    records = [
        {"input_ids": [1, 2, 3], "learnt": b"\x00\x01\x01", "label": True},
        {"input_ids": [4], "learnt": b"\x00", "label": False},
        {"input_ids": [5, 6], "learnt": b"\x00\x01", "label": True},
    ]
    return TokenTable.of_records(records, rows=[0, 7, 9])


def test_rows_are_arrays_with_their_number():
    row = table()[2]
    assert row[ROW] == 9 and row["input_ids"].dtype == np.int32 and row["learnt"].dtype == bool
    assert row["input_ids"].tolist() == [5, 6] and row["learnt"].tolist() == [False, True] and row["label"]
    assert table().lengths.tolist() == [3, 1, 2]
    with pytest.raises(IndexError):
        table()[3]


def test_select_keeps_numbers_and_shares_tokens():
    some = table().select([2, 0])
    assert [row[ROW] for row in some.__getitems__([0, 1])] == [9, 0]
    assert some[1]["input_ids"].tolist() == [1, 2, 3]
    assert some.columns["input_ids"].compact().values.tolist() == [5, 6, 1, 2, 3]


def test_with_column_after_select():
    some = table().select([2, 0]).with_column("margin", np.array([0.5, 1.0], np.float32))
    some = some.with_column("chosen_ref_logp", [np.array([-1.0, -2.0]), np.array([-3.0])])
    assert some[0]["margin"] == 0.5 and some[1]["chosen_ref_logp"].tolist() == [-3.0]
    assert some.lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="different lengths"):
        table().with_column("margin", [1.0])


def test_join():
    joined = TokenTable.join([table().select([1]), TokenTable({}), table()])
    assert joined.rows.tolist() == [7, 0, 7, 9] and joined[0]["input_ids"].tolist() == [4]
    assert len(TokenTable.join([])) == 0


def test_shares_of_processes_are_equally_long():
    shares = [table().share(rank, 2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    assert [row[ROW] for row in (shares[0][0], shares[0][1], shares[1][0])] == [0, 9, 7]
    assert shares[1][1][PADDING] and shares[1][1][ROW] == 9


def test_a_table_comes_back_mapped_and_pickles_by_its_files(tmp_path):
    path = tmp_path / "key"
    assert load_table(path) is None
    save_table(path, table().select([2, 0]), {"note": 1})
    back, notes = load_table(path)
    assert notes == {"note": 1} and back.rows.tolist() == [9, 0]
    assert back[1]["input_ids"].tolist() == [1, 2, 3] and back[1]["learnt"].tolist() == [False, True, True]
    assert isinstance(back.columns["input_ids"].values, np.memmap)
    again = pickle.loads(pickle.dumps(back.select([1])))
    assert isinstance(again.columns["input_ids"].values, np.memmap) and again[0]["input_ids"].tolist() == [1, 2, 3]
    assert pickle.loads(pickle.dumps(table()))[0]["input_ids"].tolist() == [1, 2, 3]


def test_saving_twice_is_no_error_and_leaves_no_rest(tmp_path):
    for _ in range(2):
        save_table(tmp_path / "key", table(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def _work(path, made):
    with locked(path):
        if load_table(path) is None:
            with made.get_lock():
                made.value += 1
            save_table(path, table(), {})


def test_one_process_makes_what_the_others_read(tmp_path):
    context = multiprocessing.get_context("fork")
    made = context.Value("i", 0)
    workers = [context.Process(target=_work, args=(tmp_path / "key", made)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert made.value == 1 and len(load_table(tmp_path / "key")[0]) == 3


def test_fingerprints_follow_the_content():
    from datasets import Dataset

    def of(texts, kept=None):
        return data_fingerprint(Rows(Dataset.from_dict({"text": texts}), kept))

    assert of(["a", "b"]) == of(["a", "b"]) != of(["a", "c"])
    assert of(["a", "b"], [0]) != of(["a", "b"]) != of(["a", "b"], [1])
    whole = Dataset.from_dict({"text": ["x", "a", "b", "y"]})
    assert data_fingerprint(Rows(whole.select([1, 2]))) == of(["a", "b"])
    assert data_fingerprint(Rows([{"text": "a"}])) == data_fingerprint(Rows([{"text": "a"}]))


def test_a_data_set_in_files_is_known_by_its_own_fingerprint(tmp_path):
    from datasets import Dataset, load_from_disk

    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path)
    first, second = (load_from_disk(str(tmp_path)) for _ in range(2))
    assert data_fingerprint(Rows(first)) == data_fingerprint(Rows(second))
    assert data_fingerprint(Rows(first.filter(lambda row: row["text"] == "a"))) != data_fingerprint(Rows(first))


def test_ragged_rows_may_be_empty():
    column = Ragged.of_lengths(np.array([1, 2]), [0, 2, 0])
    assert [column[at].tolist() for at in range(3)] == [[], [1, 2], []] and len(
        Ragged.of_lengths(np.array([]), [])
    ) == 0
    assert column.select(np.array([1, 0])).compact().lengths.tolist() == [2, 0]


# length-grouped order


def test_batches_hold_like_lengths_in_a_random_order():
    lengths = np.random.default_rng(1).integers(1, 1000, 1003)
    order = length_grouped_order(lengths, 8, seed=3)
    assert sorted(order) == list(range(1003))
    batches = lengths[order[:1000]].reshape(-1, 8)
    spread = (batches.max(1) - batches.min(1)).mean()
    assert spread < 40 < (lengths[:1000].reshape(-1, 8).max(1) - lengths[:1000].reshape(-1, 8).min(1)).mean()
    assert batches[0].max() == batches.max()
    assert np.corrcoef(np.arange(1, len(batches)), batches[1:].mean(1))[0, 1] < 0.3  # not sorted by length
    assert (order == length_grouped_order(lengths, 8, seed=3)).all()
    assert (order != length_grouped_order(lengths, 8, seed=4)).any()


def test_fewer_rows_than_a_batch():
    assert sorted(length_grouped_order(np.array([3, 1]), 8, seed=0)) == [0, 1]
    assert len(length_grouped_order(np.array([], np.int64), 8, seed=0)) == 0


# what is found again


def test_rows_that_differ_anywhere_have_other_fingerprints():
    def of(row):
        return data_fingerprint(Rows([row]))

    long = np.arange(3000)
    other = long.copy()
    other[1500] = 0
    assert of({"input_ids": long}) == of({"input_ids": long.copy()}) != of({"input_ids": other})
    assert of({"input_ids": long}) != of({"input_ids": long.astype(np.int32)})
    assert of({"input_ids": long}) != of({"input_ids": long.reshape(2, -1)})
    assert of({"tools": [{"a": 1, "b": 2}]}) != of({"tools": [{"b": 2, "a": 1}]})  # as a template writes them
    assert of({"a": {1: "x", "y": 2}}) is not None
    assert of({"a": object()}) is None
    assert data_fingerprint(Rows([{"a": 1, "b": object()}]), ("a",)) is not None


def test_a_data_set_is_known_by_its_rows_as_they_are_read():
    from datasets import Dataset

    plain = Dataset.from_dict({"text": ["a", "b"], "id": [1, 2]})
    loud = plain.with_transform(lambda rows: {"text": [text + "!" for text in rows["text"]]})
    louder = plain.with_transform(lambda rows: {"text": [text + "!!" for text in rows["text"]]})
    found = [data_fingerprint(Rows(rows)) for rows in (plain, loud, louder, plain.with_format(columns=["text"]))]
    assert len(set(found)) == 4
    assert data_fingerprint(Rows(plain.with_format("numpy"))) is not None


@pytest.mark.parametrize("broken", ["table.json", "input_ids.npy", "label.npy", "rows.npy", "input_ids.lengths.npy"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_a_damaged_table_is_none_and_is_replaced(tmp_path, broken, how):
    path = tmp_path / "key"
    save_table(path, table(), {})
    file = path / broken
    whole = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(whole[: len(whole) // 2 if how == "cut" else 0])
    assert load_table(path) is None
    save_table(path, table(), {})
    assert len(load_table(path)[0]) == 3 and [each.name for each in tmp_path.iterdir()] == ["key"]


def test_a_table_is_readable_for_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        save_table(tmp_path / "key", table(), {})
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o755


def test_a_user_without_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("TRIALIGN_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder() == tmp_path / f"trialign-{os.getuid()}" / "tokens"
