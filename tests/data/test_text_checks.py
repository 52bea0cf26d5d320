"""What is found wrong with rows of text before a model loads, and what is odd about them together."""

from __future__ import annotations

import pytest

from shared.data.schema import Kind, check_rows, detect_kind
from shared.errors import DataError


def user(content):
    return {"role": "user", "content": content}


def says(content):
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
STEPS = {"prompt": "p", "completions": ["a"], "labels": [True]}
CHATS = {"prompt": [user("p")], "chosen": [says("a")], "rejected": [says("b")]}


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (PAIR | {"rejected": "a"}, Kind.PREFERENCE, "row 0: chosen and rejected are the same"),
        (CHATS | {"rejected": [says("a")]}, Kind.PREFERENCE, "chosen and rejected are the same"),
        (
            PAIR | {"rejected": [says("b")]},
            Kind.PREFERENCE,
            "chosen is str and rejected is list, expected two strings",
        ),
        (PAIR | {"margin": "wide"}, Kind.PREFERENCE, "margin is 'wide', expected a finite number"),
        (PAIR | {"margin": float("nan")}, Kind.PREFERENCE, "margin is nan"),
        (PAIR | {"margin": True}, Kind.PREFERENCE, "margin is True"),
        (PAIR | {"margin": None}, Kind.PREFERENCE, None),
        (CHATS | {"rejected": []}, Kind.PREFERENCE, "rejected is an empty list"),
        (CHATS | {"chosen": [user("p"), says("a")], "rejected": [user("p"), says("b")]}, Kind.PREFERENCE, None),
        (
            CHATS | {"chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]},
            Kind.PREFERENCE,
            "chosen begins with a message of 'user'.*the prompt is not how both begin",
        ),
        (CHATS | {"chosen": [user("p"), says("a")]}, Kind.PREFERENCE, "the prompt is not how both begin"),
        (
            {"prompt": "q", "chosen": [user("p"), says("a")], "rejected": [user("p"), says("b")]},
            Kind.PREFERENCE,
            "the prompt is not how both begin",
        ),
        (
            {"chosen": [user("p"), says("a")], "rejected": [user("q"), says("b")]},
            Kind.PREFERENCE,
            "has no prompt, and chosen and rejected begin with no message alike",
        ),
        ({"prompt": "p", "completion": " ", "label": True}, Kind.UNPAIRED, "completion has no assistant turn"),
        ({"prompt": "p", "completion": "c", "label": None}, Kind.UNPAIRED, "label is None, expected true or false"),
        (STEPS | {"labels": ["good"]}, Kind.STEPWISE, r"labels\[0\] is 'good', expected true or false"),
        (STEPS | {"completions": [" "]}, Kind.STEPWISE, r"completions\[0\] is empty"),
        (STEPS | {"completions": [4]}, Kind.STEPWISE, r"completions\[0\] is int"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, Kind.TOKENS, None),
        ({"input_ids": []}, Kind.TOKENS, "input_ids is empty"),
        ({"input_ids": "12"}, Kind.TOKENS, "input_ids is str"),
        ({"input_ids": [1, -2]}, Kind.TOKENS, "no token number"),
        ({"input_ids": [1, 2**31]}, Kind.TOKENS, "input_ids holds 2147483648, but the tokenizer's numbers end at"),
        ({"input_ids": [1, 2], "labels": 5}, Kind.TOKENS, "labels is int, expected a list"),
        ({"input_ids": [1, 2], "completion_mask": "01"}, Kind.TOKENS, "completion_mask is str, expected a list"),
        ({"input_ids": [[1], [2]]}, Kind.TOKENS, "no token number"),
        ({"input_ids": [1, 2], "labels": [1]}, Kind.TOKENS, "labels has 1 values, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, Kind.TOKENS, "not shifted"),
    ],
)
def test_rows(row, kind, message):
    if message is None:
        assert check_rows([row], kind).bad == {}
    else:
        with pytest.raises(DataError, match=message):
            check_rows([row], kind)


def test_copies_are_counted_but_no_error():
    rows = [PAIR | {"id": at} for at in range(3)] + [PAIR | {"chosen": "c"}]
    report = check_rows(rows, Kind.PREFERENCE)
    assert report.warnings == ["2 rows (50.0%) are exact copies of rows before them"]
    assert report.summary("train") == "train: 4 rows\n  note: 2 rows (50.0%) are exact copies of rows before them"
    chats = [{"messages": [user("p"), says("a")]}] * 2
    assert "1 rows (50.0%)" in check_rows(chats, Kind.MESSAGES).summary("train")


def test_rows_with_pictures_are_not_compared():
    rows = [{"messages": [user("p"), says("a")], "images": [name]} for name in ("a.png", "b.png")]
    assert check_rows(rows, Kind.MESSAGES).warnings == []


@pytest.mark.parametrize(("labels", "found"), [([True, True], "true"), ([0, 0], "false"), ([True, False], None)])
def test_labels_that_are_all_alike(labels, found):
    rows = [{"prompt": str(at), "completion": "c", "label": label} for at, label in enumerate(labels)]
    expected = [f"all labels are {found}: there is nothing to tell good answers from bad ones by"] if found else []
    assert check_rows(rows, Kind.UNPAIRED).warnings == expected


def test_bad_rows_are_skipped_and_counted():
    rows = [PAIR, PAIR | {"rejected": "a"}, PAIR | {"chosen": ""}]
    report = check_rows(rows, Kind.PREFERENCE, on_bad_row="skip")
    assert report.kept == [0] and "1 of 3 rows; 2 left out" in report.summary("train")


def test_the_column_of_plain_text_is_the_users_choice():
    assert detect_kind(["story", "prompt"], text_field="story") is Kind.LANGUAGE_MODELING
    assert detect_kind(["messages"], text_field="story") is Kind.MESSAGES
    assert check_rows([{"story": "x"}], Kind.LANGUAGE_MODELING, text_field="story").bad == {}
    with pytest.raises(DataError, match="story is missing"):
        check_rows([{"text": "x"}], Kind.LANGUAGE_MODELING, text_field="story")


def test_tokenised_rows_are_known_by_their_column():
    assert detect_kind(["text", "input_ids", "attention_mask"]) is Kind.TOKENS
    assert detect_kind(["text", "input_ids"], allowed=[Kind.LANGUAGE_MODELING]) is Kind.LANGUAGE_MODELING
