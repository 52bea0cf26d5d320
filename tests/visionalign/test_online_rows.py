"""Rows with images that an online run cannot use, and dropout while it trains."""

import pytest
import torch
from tiny_pictures import asks, make, picture
from torch import nn

from shared.errors import DataError


def few_and_many(tiny_path, folder):
    """Rows of which one has many images, and how many tokens the others have at most."""
    rows = asks("llava", 4)
    few = make(tiny_path, folder, rows=rows).actor.encoder.prompts(rows)
    long = {"prompt": "What colours?", "images": [picture(at) for at in range(6)], "number": 9}
    return [*rows[:3], long, rows[3]], max(len(prompt.ids) for prompt in few)


def test_a_prompt_that_is_too_long_is_replaced_where_bad_rows_are_skipped(tiny, tmp_path, caplog):
    rows, longest = few_and_many(tiny("llava"), tmp_path / "first")
    seen = []

    def reward(number, mode, **_):
        seen.extend(number if mode == "train" else [])
        return torch.rand(len(number)).tolist()

    options = {"max_prompt_length": longest, "shuffle_dataset": False, "max_steps": 2, "eval_answers": 5}
    held_out = {"eval_dataset": rows, "per_device_eval_batch_size": 8}
    trainer = make(tiny("llava"), tmp_path, reward=reward, rows=rows, on_bad_row="skip", **options, **held_out)
    trainer.train()
    assert seen == [number for number in (0, 1, 2, 3) for _ in range(4)]  # 3 is the row behind the long one
    assert list(trainer.row_notes) == [3] and "max_prompt_length" in trainer.row_notes[3]
    assert trainer.report.before.keys() == {"reward"}
    assert "A held-out row is left out: row 3" in caplog.text
    caplog.clear()
    trainer.evaluate()
    assert caplog.text.count("A held-out row is left out: row 3") == 1

    trainer = make(tiny("llava"), tmp_path / "error", reward=reward, rows=rows, **{**options, "eval_answers": 0})
    with pytest.raises(DataError, match="row 3: its prompt has"):
        trainer.train()


def test_held_out_rows_that_are_left_out_do_not_count(tiny, tmp_path):
    rows, longest = few_and_many(tiny("llava"), tmp_path / "first")

    def reward(number, **_):
        return [float(at) for at in number]

    options = {"max_prompt_length": longest, "on_bad_row": "skip", "eval_dataset": rows}
    trainer = make(tiny("llava"), tmp_path, reward=reward, rows=rows, **options)
    assert trainer.evaluate()["eval_reward"] == pytest.approx((0 + 1 + 2 + 3) / 4)


def test_a_checked_prompt_is_processed_once(tiny, tmp_path):
    trainer = make(tiny("llava"), tmp_path, max_steps=2, shuffle_dataset=False)
    encoder = trainer.actor.encoder
    calls, plain = [], encoder.collator.encode_prompts
    encoder.collator.encode_prompts = lambda rows: calls.append(len(rows)) or plain(rows)
    trainer.train()
    assert calls == [1] * 4 and encoder._checked == {}


def test_an_adapters_dropout_is_off_unless_it_is_asked_for(tiny, tmp_path):
    from peft import LoraConfig

    for disabled, expected in ((True, {0.0}), (False, {0.0, 0.5})):
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=r".*language_model.*v_proj", task_type="CAUSAL_LM")
        trainer = make(tiny("llava"), tmp_path, peft_config=lora, disable_dropout=disabled)
        rates = {module.p for module in trainer.model.modules() if isinstance(module, nn.Dropout)}
        assert rates | {0.0} == expected and rates
