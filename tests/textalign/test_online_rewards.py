"""Rewards in a round of an online trainer: what they are given, what they mean, and what happens where one fails."""

import asyncio

import pytest
import torch
from tiny_online import Recorded, even, history, make, questions

from shared.errors import UserError


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def first_round(trainer, engine=None):
    trainer.actor.engine = engine or Recorded()
    trainer.model_wrapped = trainer.model
    trainer.next_micro_batch()
    return trainer.buffer.rollout


def test_rewards_get_the_rows_columns_and_what_the_trainer_knows(model_path, tmp_path):
    seen = {}

    def watch(prompts, completions, number, solution, completion_ids, trainer_state, log_metric, **rest):
        seen.update(locals())
        log_metric("tokens", sum(map(len, completion_ids)))
        return [float(len(ids)) for ids in completion_ids]

    rows = [{**row, "solution": f"s{row['number']}"} for row in questions(2, chat=True)]
    trainer = make("GRPO", model_path, tmp_path, reward=watch, rows=rows, shuffle_dataset=False)
    rollout = first_round(trainer)
    assert seen["number"] == [0] * 4 + [1] * 4 and seen["solution"] == ["s0"] * 4 + ["s1"] * 4
    assert seen["prompts"][5] == rows[1]["prompt"]
    assert seen["completions"][0][0]["role"] == "assistant"
    assert seen["completion_ids"] == [ids.tolist() for ids in rollout.actions.ids]
    assert seen["trainer_state"] is trainer.state
    assert trainer._noted["tokens"] == [float(rollout.lengths.sum())]
    assert not {name for name in seen["rest"] if name.startswith("__")}


def test_rows_and_groups_that_have_no_reward(model_path, tmp_path):
    def some(number, completion_ids, **_):
        values = [float(len(ids)) for ids in completion_ids]
        return [None if n == 1 or at == 2 else float("nan") if at == 3 else values[at] for at, n in enumerate(number)]

    trainer = make("GRPO", model_path, tmp_path, reward=some, rows=questions(2), shuffle_dataset=False)
    rollout = first_round(trainer)
    assert rollout.total.isnan().tolist() == [False] * 2 + [True] * 6
    assert (rollout.advantages[2:] == 0).all()
    assert rollout.advantages[:2].sum().item() == pytest.approx(0, abs=1e-5)
    assert trainer._noted["frac_reward_zero_std"] == [0.5]
    trainer = make("RLOO", model_path, tmp_path, reward=some, rows=questions(2), shuffle_dataset=False)
    rollout = first_round(trainer)
    assert (rollout.advantages[2:] == 0).all() and not rollout.advantages.isnan().any()


def test_a_run_in_which_no_reward_applies_goes_on(model_path, tmp_path):
    trainer = make(
        "GRPO", model_path, tmp_path, reward=lambda prompts, **_: [None] * len(prompts), eval_dataset=questions(2)
    )
    trainer.train()
    assert trainer.state.global_step == 4 and history(trainer, "reward") == []
    trainer.evaluate()


def test_a_reward_of_weight_zero_is_only_measured(model_path, tmp_path):
    def lengths(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    options = {"rows": questions(2), "shuffle_dataset": False}
    both = first_round(
        make("GRPO", model_path, tmp_path / "a", reward=[even, lengths], reward_weights=[2.0, 0.0], **options)
    )
    alone = first_round(make("GRPO", model_path, tmp_path / "b", reward=even, **options))
    assert both.rewards.shape == (8, 2) and both.rewards[:, 1].tolist() == both.lengths.tolist()
    torch.testing.assert_close(both.total, 2 * alone.total)
    torch.testing.assert_close(both.advantages, alone.advantages, rtol=1e-3, atol=1e-3)


def test_several_rewards_each_by_itself(model_path, tmp_path):
    def large(completion_ids, **_):
        return [100.0 * len(ids) for ids in completion_ids]

    options = {"reward": [even, large], "multi_objective_aggregation": "normalize_then_sum"}
    rollout = first_round(make("GRPO", model_path, tmp_path, **options))
    parts = [rollout.rewards[:, at].view(2, 4) for at in range(2)]
    own = sum((part - part.mean(1, keepdim=True)) / (part.std(1, keepdim=True) + 1e-4) for part in parts).flatten()
    torch.testing.assert_close(rollout.advantages, (own - own.mean()) / (own.std() + 1e-4), rtol=1e-4, atol=1e-4)


def test_an_async_reward(model_path, tmp_path):
    async def later(completion_ids, **_):
        await asyncio.sleep(0.001)
        return even(completion_ids)

    rollout = first_round(make("GRPO", model_path, tmp_path, reward=[later, even]))
    torch.testing.assert_close(rollout.rewards[:, 0], rollout.rewards[:, 1])


def broken(number, completion_ids, **_):
    """Fails on the rows of prompt 1."""
    if 1 in number:
        raise KeyError("no answer")
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize(("done", "values"), [("zero", 0.0), ("skip", float("nan"))])
def test_a_reward_that_fails(done, values, model_path, tmp_path):
    options = {"reward": [broken, even], "rows": questions(2), "shuffle_dataset": False}
    with pytest.raises(UserError, match=r"Reward broken failed on row 1 \(.*KeyError: 'no answer'"):
        make("GRPO", model_path, tmp_path / "a", **options).train()
    trainer = make("GRPO", model_path, tmp_path / "b", on_reward_error=done, **options)
    rollout = first_round(trainer)
    torch.testing.assert_close(rollout.rewards[4:, 0], torch.full((4,), values), equal_nan=True)
    assert (rollout.rewards[:4, 0] == rollout.lengths[:4]).all() and not rollout.total.isnan().any()
    assert trainer._noted["rewards/broken/error_ratio"] == [0.5] and trainer._noted["rewards/even/error_ratio"] == [0]
    trainer.train()


def test_a_reward_that_counts_wrongly(model_path, tmp_path):
    with pytest.raises(UserError, match="Reward short failed .* 1 values for 8 rows"):
        make("GRPO", model_path, tmp_path, reward=short).train()


def short(prompts, **_):
    return [1.0]
