"""Token rows to batches: padding, masks, documents, pairs, labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.data.collators import PairCollator, StepCollator, SupervisedCollator, UnpairedCollator
from shared.data.packing import pack_table
from shared.data.rows import PADDING
from shared.data.tokens import NOTE, TokenTable
from shared.errors import UserError

PAD = 0


def supervised() -> TokenTable:
    return TokenTable.of_records(
        [
            {"input_ids": [1, 2, 3], "learnt": b"\x00\x00\x01"},
            {"input_ids": [4, 5], "learnt": b"\x00\x01"},
        ]
    )


def test_rows_are_right_padded():
    batch = SupervisedCollator(PAD, pad_to_multiple_of=4)(list(supervised()))
    assert batch.prompt_ids.shape == (2, 0) and batch.group_size == 1
    assert batch.completion_ids.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    assert batch.completion_attention.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch.completion_mask.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch.completion_ids.dtype == torch.int64 and not batch.model_inputs
    assert batch.columns["counted"].tolist() == [True, True] and batch.counted_tokens() == 2


def test_padding_free_puts_all_rows_into_one():
    batch = SupervisedCollator(PAD, padding_free=True, pad_to_multiple_of=4)(list(supervised()))
    assert batch.completion_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.completion_attention.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[0, 0, 1, 0, 1, 0, 0, 0]]
    assert batch.model_inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.columns["document"].tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]


@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_rows(padding_free):
    rows = list(pack_table(supervised(), 3, "wrapped"))
    batch = SupervisedCollator(PAD, padding_free=padding_free)(rows)
    if padding_free:
        assert batch.model_inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
        assert batch.columns["document"].tolist() == [[0, 0, 0, 1, 1]]
    else:
        assert batch.model_inputs["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
        assert batch.columns["document"].tolist() == [[0, 0, 0], [0, 0, -1]]
    joined = SupervisedCollator(PAD)(list(pack_table(supervised(), 5, "bfd")))
    assert joined.model_inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert joined.completion_mask.tolist() == [[0, 0, 1, 0, 1]]


def test_no_documents_first_token_is_learnt():
    rows = [{"input_ids": np.array([1, 2]), "learnt": np.array([True, True])}] * 2
    assert SupervisedCollator(PAD, padding_free=True)(rows).completion_mask.tolist() == [[0, 1, 0, 1]]


def test_fill_up_rows_count_nothing_and_notes_travel():
    rows = list(supervised())
    rows[1] |= {PADDING: True, NOTE: "cut"}
    for padding_free in (False, True):
        batch = SupervisedCollator(PAD, padding_free=padding_free)(rows)
        assert batch.counted_tokens() == 1 and batch.notes == {1: "cut"}
    assert SupervisedCollator(PAD)(rows).columns["counted"].tolist() == [True, False]


def pairs() -> list[dict]:
    return list(
        TokenTable.of_records(
            [
                {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "margin": 0.5},
                {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9, 9], "margin": 1.0},
            ]
        )
    )


def test_pairs_share_left_padded_prompts():
    batch = PairCollator(PAD)(pairs())
    assert batch.group_size == 2 and batch.rows == 4
    assert batch.prompt_ids.tolist() == [[0, 1], [5, 6]] and batch.prompt_mask.tolist() == [[0, 1], [1, 1]]
    assert batch.completion_ids.tolist() == [[2, 3, 0], [4, 0, 0], [7, 0, 0], [8, 9, 9]]
    assert batch.completion_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert batch.columns["margin"].tolist() == [0.5, 1.0] and "ref_logp" not in batch.columns
    assert batch.member(1).completion_ids.tolist() == [[4, 0, 0], [8, 9, 9]]


def test_pairs_bring_their_reference_and_padding():
    rows = [{**row, "chosen_ref_logp": -1.0 * row["chosen_ids"], "rejected_ref_logp": -2.0 * row["rejected_ids"]}
            for row in pairs()]  # fmt: skip
    del rows[0]["margin"]
    batch = PairCollator(PAD, pad_to_multiple_of=4)(rows)
    assert batch.columns["ref_logp"].tolist() == [[-2, -3, 0, 0], [-8, 0, 0, 0], [-7, 0, 0, 0], [-16, -18, -18, 0]]
    assert batch.columns["margin"].tolist() == [0.0, 1.0]
    assert batch.prompt_ids.shape == (2, 4) and batch.prompt_ids[1].tolist() == [0, 0, 5, 6]
    assert batch.member(0).columns["ref_logp"].tolist() == [[-2, -3, 0, 0], [-7, 0, 0, 0]]
    rows[1][PADDING] = True
    batch = PairCollator(PAD)(rows)
    assert batch.completion_mask.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert batch.columns["counted"].tolist() == [True, False]


def test_without_a_prompt_the_first_token_does_not_count():
    rows = [{**row, "prompt_ids": row["prompt_ids"][:count]} for row, count in zip(pairs(), (0, 2), strict=True)]
    batch = PairCollator(PAD)(rows)
    assert batch.prompt_mask.tolist() == [[0, 0], [1, 1]]
    assert batch.completion_mask.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]]


def unpaired() -> list[dict]:
    return list(
        TokenTable.of_records(
            [
                {"prompt_ids": [1], "completion_ids": [2, 3], "label": True},
                {"prompt_ids": [5, 6], "completion_ids": [7], "label": False},
                {"prompt_ids": [8], "completion_ids": [9], "label": True},
            ]
        )
    )


def test_unpaired_rows():
    batch = UnpairedCollator(PAD, kl=False)(unpaired())
    assert batch.group_size == 1 and batch.columns["label"].tolist() == [True, False, True]
    assert batch.completion_ids.tolist() == [[2, 3], [7, 0], [9, 0]]


def test_kl_pairs_take_the_next_rows_answer():
    rows = [{**row, "completion_ref_logp": -1.0 * row["completion_ids"]} for row in unpaired()]
    batch = UnpairedCollator(PAD, kl=True)(rows)
    assert batch.group_size == 2 and batch.prompt_ids.tolist() == [[0, 1], [5, 6], [0, 8]]
    assert batch.completion_ids.tolist() == [[2, 3], [7, 0], [7, 0], [9, 0], [9, 0], [2, 3]]
    assert batch.columns["kl_counted"].tolist() == [True] * 3
    assert batch.columns["ref_logp"].tolist() == [[-2, -3], [-7, 0], [-9, 0]]
    assert batch.member(1).completion_mask.tolist() == [[1, 0], [1, 0], [1, 1]]


def test_kl_pairs_skip_rows_that_fill_up():
    rows = unpaired()
    rows[2][PADDING] = True
    batch = UnpairedCollator(PAD, kl=True)(rows)
    assert batch.completion_ids[1].tolist() == [7, 0] and batch.completion_ids[3].tolist() == [2, 3]
    assert batch.completion_mask.tolist() == [[1, 1], [1, 0], [1, 0], [1, 1], [0, 0], [0, 0]]
    assert batch.columns["counted"].tolist() == [True, True, False]


def test_a_lone_row_has_no_kl_pair():
    with pytest.raises(UserError, match="batch size per device to 2 or more"):
        UnpairedCollator(PAD, kl=True)(unpaired()[:1])
    rows = unpaired()[:2]
    rows[1][PADDING] = True
    batch = UnpairedCollator(PAD, kl=True, lone_row="uncounted")(rows)
    assert batch.completion_mask.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert batch.columns["kl_counted"].tolist() == [False, False]
    assert UnpairedCollator(PAD, kl=False)(unpaired()[:1]).rows == 1


def test_steps():
    rows = list(
        TokenTable.of_records(
            [
                {"input_ids": [1, 2, 3, 4], "step_ends": [1, 3], "step_labels": b"\x01\x00"},
                {"input_ids": [5, 6], "step_ends": [1], "step_labels": b"\x01"},
            ]
        )
    )
    batch = StepCollator(PAD)(rows)
    assert batch.columns["step_labels"].tolist() == [[-100, 1, -100, 0], [-100, 1, -100, -100]]
    assert batch.completion_mask.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    rows[1][PADDING] = True
    batch = StepCollator(PAD)(rows)
    assert batch.counted_tokens() == 2 and batch.columns["counted"].tolist() == [True, False]


def test_batches_move_with_their_columns():
    batch = PairCollator(PAD)(pairs()).to("cpu")
    assert batch.columns["margin"].tolist() == [0.5, 1.0]
