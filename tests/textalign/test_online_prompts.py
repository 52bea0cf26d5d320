"""Prompts of online trainers that are cut or left out, and what rewards are told and say of samples besides values."""

import json
import logging

import pytest
from tiny_online import Recorded, even, make, questions

from shared.errors import DataError


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def first_round(trainer):
    trainer.actor.engine = Recorded()
    trainer.model_wrapped = trainer.model
    trainer.next_micro_batch()
    return trainer.buffer.rollout


def compared(completion_ids, group_size, **_):
    """Needs whole groups."""
    if group_size == 1:
        raise ValueError("nothing to compare with")
    lengths = [len(ids) for ids in completion_ids]
    groups = [lengths[at : at + group_size] for at in range(0, len(lengths), group_size)]
    return [float(own == max(group)) for group in groups for own in group]


def test_rewards_are_told_what_stands_together_and_what_for(model_path, tmp_path):
    calls = []

    def reward(prompts, group_size, mode):
        calls.append((mode, group_size, len(prompts)))
        assert all(len(set(prompts[at : at + group_size])) == 1 for at in range(0, len(prompts), group_size))
        return [0.5] * len(prompts)

    options = {"eval_dataset": questions(4), "eval_answers": 2, "num_generations_eval": 2, "max_steps": 1}
    trainer = make("GRPO", model_path, tmp_path, reward=reward, per_device_eval_batch_size=5, **options)
    trainer.train()
    trainer.evaluate()
    assert calls == [("greedy", 1, 2), ("train", 4, 8), ("greedy", 1, 2), ("eval", 2, 4), ("eval", 2, 4)]


def test_a_group_larger_than_the_batches_of_an_evaluation(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, eval_dataset=questions(3), per_device_eval_batch_size=2)
    assert [len(rows) for rows in trainer.get_eval_dataloader()] == [1, 1, 1]


def test_a_reward_that_fails_on_single_answers_does_not_end_the_run(model_path, tmp_path, caplog):
    options = {"eval_dataset": questions(4), "eval_answers": 3, "max_steps": 1, "per_device_eval_batch_size": 2}
    trainer = make("GRPO", model_path, tmp_path, reward=[even, compared], **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.report.before.keys() == trainer.report.after.keys() == {"reward", "even"}
    told = [record.message for record in caplog.records if "nothing to compare with" in record.message]
    assert len(told) == 1 and "does not apply to the most likely answers, one a prompt" in told[0]
    assert trainer.evaluate()["eval_rewards/compared/mean"] > 0


def test_what_a_reward_notes_of_each_sample_is_shown(model_path, tmp_path, capsys):
    def reward(completion_ids, log_extra, number):
        log_extra("length", [len(ids) for ids in completion_ids])
        if number[0]:
            log_extra("later", list(number))
        return [float(len(ids)) for ids in completion_ids]

    options = {"max_steps": 1, "shuffle_dataset": False, "log_completions": True}
    trainer = make("GRPO", model_path, tmp_path, reward=reward, **options)
    trainer.train()
    table = json.loads((tmp_path / "report" / "report.json").read_text())["rollouts"][0]
    rows = [row for prompt in table["prompts"] for row in prompt["completions"]]
    assert [row["extra"] for row in rows] == [{"length": str(row["tokens"])} for row in rows]
    assert f"    length: {rows[0]['tokens']}\n" in capsys.readouterr().out


def test_notes_of_resampled_rounds_stay_beside_their_samples(model_path, tmp_path):
    def reward(completion_ids, number, log_extra):
        log_extra("number", list(number))
        return [float(at % 2 and n > 1) for at, n in enumerate(number)]

    options = {"dynamic_sampling": True, "shuffle_dataset": False, "max_resampling": 3}
    rollout = first_round(make("GRPO", model_path, tmp_path, reward=reward, **options))
    assert rollout.extras["number"] == [sample.columns["number"] for sample in rollout.samples]
    assert min(rollout.extras["number"]) > 1


def test_no_samples_are_shown_where_none_are_asked_for(model_path, tmp_path, capsys):
    options = {"max_steps": 1, "log_completions": True}
    trainer = make("GRPO", model_path, tmp_path / "none", num_completions_to_print=0, **options)
    trainer.train()
    assert trainer.report.rollouts == [] and "Rollouts at" not in capsys.readouterr().out
    trainer = make("GRPO", model_path, tmp_path / "all", num_completions_to_print=None, **options)
    trainer.train()
    assert len(trainer.report.rollouts[0].rows) == 8


def test_prompts_that_lose_their_beginning_are_noted(model_path, tmp_path):
    rows = questions(4)
    rows[1]["prompt"] = "What colour is " + "the " * 40 + "square?"
    trainer = make("GRPO", model_path, tmp_path, rows=rows, max_prompt_length=20, shuffle_dataset=False, max_steps=2)
    whole = trainer.actor.encoder.run.tokeniser.ask(rows[1]).prompt_ids
    prompt = trainer.actor.encoder.prompts([trainer.train_dataset[1]])[0]
    assert prompt.ids.tolist() == whole[-20:] and len(whole) > 40
    trainer.train()
    note = f"row 1: prompt cut from {len(whole)} tokens to its last 20"
    assert [text for text in trainer.report.notes if note in text]
    assert trainer.row_notes.keys() == {1}


def test_prompts_without_tokens_are_left_out_where_that_is_asked_for(model_path, tmp_path, monkeypatch):
    trainer = make("GRPO", model_path, tmp_path, rows=questions(4), on_bad_row="skip", shuffle_dataset=False)
    plain = trainer.actor.encoder.made

    def made(row):
        if row["number"] == 1:
            raise DataError("row 1: prompt is empty")
        return plain(row)

    monkeypatch.setattr(trainer.actor.encoder, "made", made)
    rollout = first_round(trainer)
    assert [sample.columns["number"] for sample in rollout.samples] == [0] * 4 + [2] * 4
    assert trainer.row_notes == {1: "left out: prompt is empty"}
