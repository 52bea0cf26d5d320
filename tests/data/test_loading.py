"""Finding, reading and mixing data sets, all in temporary folders; nothing here needs a network."""

from __future__ import annotations

import csv
import json
import os
import time
from collections import Counter

import pytest
from PIL import Image

from shared.data.loading import load_datasets
from shared.data.schema import Kind, check_rows, decode_image, detect_kind, to_conversation
from shared.errors import DataError, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def save_images(folder, count=4, size=(8, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def pairs(count, **columns):
    return [{"prompt": f"q{i}", "completion": f"a{i}"} | columns for i in range(count)]


def chat(question, answer="red"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check(dataset, **options):
    kind = detect_kind(dataset.column_names, dataset[0])
    return check_rows(dataset, kind, check_images=len(dataset), **options)


# built in


def test_builtin():
    data = load_datasets("builtin/shapes", max_train_rows=20, max_eval_rows=10)
    assert (len(data.train), len(data.test)) == (20, 10)
    assert isinstance(data.train[0]["images"][0], dict), "images must stay encoded until they are used"
    assert check(data.train).images == 20
    source = data.sources[0]
    assert (source.where, source.test_split) == ("builtin", "test") and source.train_rows > 20


def test_builtin_streams():
    data = load_datasets("builtin/shapes", streaming=True, max_train_rows=3)
    assert len(list(data.train)) == 3


# files


def test_jsonl_with_image_paths_beside_the_file(tmp_path):
    save_images(tmp_path / "pics")
    path = write_jsonl(tmp_path / "d.jsonl", [row | {"image": "pics/1.png"} for row in pairs(3)])
    data = load_datasets(path)
    conversation = to_conversation(data.train[2], 2, Kind.PROMPT_COMPLETION)
    assert decode_image(conversation.images[0], row=2).getpixel((0, 0)) == (1, 0, 0)
    assert check(data.train).images == 3
    assert data.test is None


def test_jsonl_with_several_images_and_paths_in_parts(tmp_path):
    save_images(tmp_path)
    content = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "Same?"}, {"type": "image"}]
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": chat(content), "images": ["1.png"]}])
    assert check(load_datasets(path).train).images == 2


def test_jsonl_with_contents_of_both_forms(tmp_path):
    rows = [{"messages": chat("plain")}, {"messages": chat([{"type": "text", "text": "typed"}])}]
    rows.append({"messages": chat(7)})
    train = load_datasets(write_jsonl(tmp_path / "d.jsonl", rows)).train
    texts = [to_conversation(train[i], i, Kind.MESSAGES).messages[0]["content"][0]["text"] for i in range(2)]
    assert texts == ["plain", "typed"]
    report = check(train, on_bad_row="skip")
    assert report.kept == [0, 1]
    assert report.bad == {2: "messages[0].content is int, expected a string or a list of parts"}


def test_columns_that_only_later_rows_have_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.data.files._CHUNK", 2)
    rows = [*pairs(2), *pairs(2, image="a.png", id=1), *pairs(1, id="x")]
    train = load_datasets(write_jsonl(tmp_path / "d.jsonl", rows)).train
    assert train["id"][:] == [None, None, 1, 1, "x"]
    assert train[3]["image"]["path"] == str(tmp_path / "a.png")


def test_broken_json_names_file_and_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"d\.jsonl line 3 is not JSON"):
        load_datasets(str(path))
    path.write_text('["a"]\n')
    with pytest.raises(DataError, match="line 1 is a list, expected an object"):
        load_datasets(str(path))
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        load_datasets(str(path))


@pytest.mark.parametrize("form", ["list", "wrapped", "lines"])
def test_json(tmp_path, form):
    path = tmp_path / "d.json"
    if form == "lines":
        write_jsonl(path, pairs(3))
    else:
        path.write_text(json.dumps(pairs(3) if form == "list" else {"data": pairs(3)}))
    assert load_datasets(str(path)).train["completion"][:] == ["a0", "a1", "a2"]


def test_csv_values_stay_text(tmp_path):
    save_images(tmp_path)
    rows = [
        {"prompt": "How many?", "completion": "7", "image": "0.png", "label": "true"},
        {"prompt": "Which, then?", "completion": "None", "image": "", "label": "0"},
    ]
    train = load_datasets(write_csv(tmp_path / "d.csv", rows)).train
    assert train["completion"][:] == ["7", "None"]
    assert train["label"][:] == [True, False]
    assert train[1]["image"] is None
    assert check(train).images == 1


def test_csv_with_a_ragged_line(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(DataError, match="line 3: expected 2 values"):
        load_datasets(str(path))


def test_parquet_with_image_bytes_and_with_paths(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    save_images(tmp_path)
    images = [[{"bytes": (tmp_path / "2.png").read_bytes(), "path": None}]] * 3
    features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(ImageFeature())})
    table = Dataset.from_dict({"prompt": ["?"] * 3, "completion": ["!"] * 3, "images": images}, features=features)
    table.to_parquet(str(tmp_path / "bytes" / "d.parquet"))
    train = load_datasets(str(tmp_path / "bytes")).train
    assert isinstance(train[0]["images"][0], dict) and check(train).images == 3

    Dataset.from_list(pairs(2, image="1.png")).to_parquet(str(tmp_path / "paths.parquet"))
    train = load_datasets(str(tmp_path / "paths.parquet")).train
    assert train[0]["image"] == {"bytes": None, "path": str(tmp_path / "1.png")}
    assert check(train).images == 2


def test_a_changed_parquet_file_is_seen(tmp_path):
    from datasets import Dataset

    path = str(tmp_path / "d.parquet")
    for answer in ("old", "new"):
        Dataset.from_list([{"prompt": "p", "completion": answer}]).to_parquet(path)
        assert load_datasets(path).train["completion"][:] == [answer]


def test_broken_parquet_and_unknown_types(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"d\.parquet cannot be read as parquet"):
        load_datasets(str(tmp_path / "d.parquet"))
    (tmp_path / "d.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"d\.xlsx.*Supported: \.jsonl, \.json, \.csv, \.tsv, \.parquet"):
        load_datasets(str(tmp_path / "d.xlsx"))


# folders


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_image_folder_with_metadata(tmp_path, suffix):
    from datasets import Dataset

    for split, count in (("train", 4), ("test", 2)):
        save_images(tmp_path / split, count)
        rows = [row | {"file_name": f"{i}.png"} for i, row in enumerate(pairs(count))]
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(str(tmp_path / split / "metadata.parquet"))
        else:
            write = write_csv if suffix == "csv" else write_jsonl
            write(tmp_path / split / f"metadata.{suffix}", rows)
    data = load_datasets(str(tmp_path))
    assert "file_name" not in data.train.column_names
    assert check(data.train).images == 4 and check(data.test).images == 2
    image = decode_image(data.train[3]["image"], row=3)
    assert image.getpixel((0, 0)) == (3, 0, 0)


def test_broken_and_missing_images_are_named_by_row(tmp_path):
    save_images(tmp_path)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    (tmp_path / "3.png").unlink()
    write_csv(tmp_path / "metadata.csv", [row | {"file_name": f"{i}.png"} for i, row in enumerate(pairs(4))])
    train = load_datasets(str(tmp_path)).train
    with pytest.raises(DataError) as error:
        check(train)
    assert "2 of 4 rows" in str(error.value)
    assert "2.png' cannot be read" in str(error.value)
    assert "3.png' cannot be read: there is no such file" in str(error.value)
    assert check(train, on_bad_row="skip").kept == [0, 1]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train/part1.jsonl", "test/part1.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("my_train_rows.jsonl", "dev.jsonl"),
        ("rows.jsonl", "validation.jsonl"),
    ],
)
def test_split_names_in_a_folder(tmp_path, names):
    for name, count in zip(names, (5, 2), strict=True):
        write_jsonl(tmp_path / name, pairs(count))
    data = load_datasets(str(tmp_path))
    assert (len(data.train), len(data.test)) == (5, 2)


def test_folders_without_data_or_with_too_many_kinds(tmp_path):
    save_images(tmp_path)
    with pytest.raises(UserError, match="holds no data: .*metadata.csv"):
        load_datasets(str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", pairs(1))
    write_csv(tmp_path / "b.csv", pairs(1))
    with pytest.raises(UserError, match=r"\.csv and \.jsonl files"):
        load_datasets(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_to_disk(tmp_path, streaming):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(pairs(3)).save_to_disk(str(tmp_path / "one"))
    saved = DatasetDict({"train": Dataset.from_list(pairs(3)), "test": Dataset.from_list(pairs(1))})
    saved.save_to_disk(str(tmp_path / "two"))
    one = load_datasets(str(tmp_path / "one"), streaming=streaming)
    two = load_datasets(str(tmp_path / "two"), streaming=streaming)
    assert (len(list(one.train)), one.test) == (3, None)
    assert (len(list(two.train)), len(list(two.test))) == (3, 1)


# names that cannot be found


def test_unknown_split_lists_the_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pairs(2))
    with pytest.raises(UserError, match="no split 'training'; its splits are: train"):
        load_datasets(str(tmp_path), train_split="training")
    with pytest.raises(UserError, match="No data set has a split 'exam'"):
        load_datasets(str(tmp_path), test_split="exam")


@pytest.mark.parametrize("name", ["no-such/data-set-anywhere", "./gone.jsonl"])
def test_unknown_names_fail_quickly(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"(?s)data set .*Built-in data sets: .*builtin/shapes"):
        load_datasets(name)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("error", [ConnectionError("no route"), FileNotFoundError("none"), ValueError("config")])
def test_what_the_hub_says_becomes_one_user_error(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("shared.hub.require_available", lambda *args, **kwargs: None)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=f"'owner/name' is no local path, and the hub did not give it: {error}"):
        load_datasets("owner/name")


def test_builtin_names_are_checked():
    with pytest.raises(UserError, match="builtin/shapes"):
        load_datasets("builtin/shape")


def test_options_are_checked(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", pairs(2))
    for options, message in (
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"eval_fraction": 0.1, "streaming": True}, "cannot hold rows out of a stream"),
        ({"weights": [1.0, 2.0]}, "for 1 data sets"),
        ({"weights": [0.0]}, "positive"),
        ({"max_train_rows": 0}, "max_train_rows is 0"),
    ):
        with pytest.raises(UserError, match=message):
            load_datasets(path, **options)
    with pytest.raises(UserError, match="No data set was given"):
        load_datasets([])


# evaluation rows


def test_held_out_rows_are_disjoint_and_the_same_every_time(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", pairs(50))
    data = load_datasets(path, eval_fraction=0.2, seed=3)
    train, test = data.train["prompt"][:], data.test["prompt"][:]
    assert (len(train), len(test)) == (40, 10)
    assert sorted([*train, *test]) == sorted(row["prompt"] for row in pairs(50))
    assert load_datasets(path, eval_fraction=0.2, seed=3).test["prompt"][:] == test
    assert load_datasets(path, eval_fraction=0.2, seed=4).test["prompt"][:] != test
    assert data.sources[0].test_split == "held out"


def test_a_test_split_goes_before_held_out_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pairs(10))
    write_jsonl(tmp_path / "test.jsonl", pairs(3))
    data = load_datasets(str(tmp_path), eval_fraction=0.5)
    assert (len(data.train), len(data.test)) == (10, 3)


def test_one_row_cannot_be_held_out(tmp_path):
    with pytest.raises(UserError, match="none can be held out"):
        load_datasets(write_jsonl(tmp_path / "d.jsonl", pairs(1)), eval_fraction=0.1)


# mixtures


def test_concatenation_fills_missing_columns(tmp_path):
    save_images(tmp_path)
    first = write_jsonl(tmp_path / "a.jsonl", pairs(2, image="0.png", id=4))
    second = write_jsonl(tmp_path / "b.jsonl", pairs(3, images=["1.png", "2.png"], id="five"))
    data = load_datasets([first, second])
    assert len(data.train) == 5
    assert data.train[0]["images"] is None and data.train[4]["image"] is None
    assert data.train["id"][:] == [4, 4, "five", "five", "five"]
    assert check(data.train).images == 2 + 6
    assert [source.train_rows for source in data.sources] == [2, 3]


def test_builtin_and_local_messages_mix(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("no image")}] * 3)
    data = load_datasets(["builtin/shapes", path], max_train_rows=100)
    assert len(data.train) == 100
    assert check(data.train).bad == {}
    whole = load_datasets(["builtin/shapes", path])
    assert to_conversation(whole.train[-1], 0, Kind.MESSAGES).messages[0]["content"][0]["text"] == "no image"


def test_weights_draw_by_share_until_every_row_was_used(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(300)])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(20)])
    data = load_datasets([first, second], weights=[3, 1], seed=1)
    counts = Counter(text[0] for text in data.train["text"])
    assert len(set(data.train["text"])) == 320
    assert counts["a"] / len(data.train) == pytest.approx(0.75, abs=0.06)
    assert [source.weight for source in data.sources] == [0.75, 0.25]
    again = load_datasets([first, second], weights=[3, 1], seed=1)
    assert again.train["text"][:] == data.train["text"][:]


def test_a_limit_takes_from_every_source_of_a_mixture(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(30)])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(30)])
    assert load_datasets(first, max_train_rows=3).train["text"][:] == ["a0", "a1", "a2"]
    assert load_datasets([first, second], max_train_rows=4).train["text"][:] == ["a0", "a15", "b0", "b15"]


def test_no_repeated_row_is_held_out_from_a_weighted_mixture(tmp_path):
    names = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(20)]) for n in "ab"]
    data = load_datasets(names, weights=[9, 1], eval_fraction=0.1)
    assert len(data.test) == 4
    assert not set(data.train["text"]) & set(data.test["text"])


# streaming


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_streaming_local_files(tmp_path, suffix):
    from datasets import Dataset

    save_images(tmp_path)
    rows = pairs(5, image="1.png")
    path = tmp_path / f"d.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        (write_csv if suffix == "csv" else write_jsonl)(path, rows)
    data = load_datasets(str(path), streaming=True, max_train_rows=4)
    assert not hasattr(data.train, "__len__")
    rows = list(data.train)
    assert len(rows) == 4
    assert decode_image(to_conversation(rows[3], 3, Kind.PROMPT_COMPLETION).images[0], row=3).size == (8, 6)
    assert check_rows(data.train, Kind.PROMPT_COMPLETION, check_images=4).images == 4


def test_streaming_mixture(tmp_path):
    names = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": n, n: 1}] * 20) for n in "ab"]
    assert Counter(row["text"] for row in load_datasets(names, streaming=True).train) == {"a": 20, "b": 20}
    weighted = load_datasets(names, streaming=True, weights=[1, 1], max_train_rows=20)
    assert {row["text"] for row in weighted.train} == {"a", "b"}


def test_loading_is_quiet(tmp_path, capfd):
    from datasets import Dataset, are_progress_bars_disabled

    before = are_progress_bars_disabled()
    Dataset.from_list(pairs(5)).to_parquet(str(tmp_path / "d.parquet"))
    capfd.readouterr()
    load_datasets([str(tmp_path / "d.parquet"), write_jsonl(tmp_path / "d.jsonl", pairs(5))], eval_fraction=0.2)
    assert capfd.readouterr() == ("", "")
    assert are_progress_bars_disabled() is before


def test_paths_are_taken_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "d.jsonl", pairs(1))
    assert len(load_datasets(os.path.join("~", "d.jsonl")).train) == 1


def test_a_path_of_the_wrong_type_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.data.files._CHUNK", 2)
    save_images(tmp_path)
    rows = [*pairs(3, image="0.png"), *pairs(1, image=5)]
    train = load_datasets(write_jsonl(tmp_path / "d.jsonl", rows)).train
    report = check(train, on_bad_row="skip")
    assert (report.kept, report.images) == ([0, 1, 2], 3)
    assert "an image is int" in report.bad[3]
