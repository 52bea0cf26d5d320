"""Groups of an online round that teach nothing: skipped where nothing else needs them, or replaced by others."""

import pytest
import torch
from tiny_online import Recorded, make, perturb, questions, same, steps


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def some_equal(prompts, completion_ids, **_):
    """Groups of every other prompt all get the same reward."""
    return [
        0.5 if int(prompt.rstrip("?").split()[-1]) % 2 else float(len(ids))
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def rows_run(trainer):
    """Counts the rows that the policy runs."""
    counted = []
    plain = trainer.actor.batch

    def batch(rollout, rows, group_size, **kwargs):
        counted.append(len(rows))
        return plain(rollout, rows, group_size, **kwargs)

    trainer.actor.batch = batch
    return counted


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("cut", [(16, 1, 1), (4, 4, 4)])
def test_idle_groups_are_skipped_and_the_gradient_is_the_same(loss, cut, model_path, tmp_path, monkeypatch):
    results, counts = [], []
    for skips in (True, False):
        size, window, serves = cut
        trainer = make(
            "GRPO",
            model_path,
            tmp_path / str(skips),
            reward=some_equal,
            rows=questions(8),
            loss_type=loss,
            shuffle_dataset=False,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=window,
            steps_per_generation=serves,
            num_iterations=2,
        )
        trainer.actor.engine = Recorded()
        if not skips:
            monkeypatch.setattr(type(trainer), "skips_idle", False)
        counts.append(rows_run(trainer))
        results.append(steps(trainer, 3))
    same(*results)
    if cut[0] == 16:
        assert (set(counts[0]), set(counts[1])) == ({8}, {16})
    else:  # one row of a micro-batch that teaches nothing
        assert (set(counts[0]), set(counts[1])) == ({1, 4}, {4})


def test_a_reference_or_a_bonus_needs_idle_groups(model_path, tmp_path):
    for at, options in enumerate(({"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5})):
        trainer = make(
            "GRPO", model_path, tmp_path / str(at), reward=lambda prompts, **_: [1.0] * len(prompts), **options
        )
        trainer.actor.engine = Recorded()
        perturb(trainer.model)
        counted = rows_run(trainer)
        trainer.model_wrapped = trainer.model
        batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
        loss = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=items)
        loss.backward()
        assert set(counted) == {8}
        gradient = sum(p.grad.abs().sum() for p in trainer.model.parameters())
        assert (gradient > 1e-3) == (at < 2)


def test_a_step_in_which_nothing_counts(model_path, tmp_path):
    """All completions are cut and masked: the step is taken, and moves nothing."""
    trainer = make("GRPO", model_path, tmp_path, mask_truncated_completions=True, max_completion_length=2)
    engine = trainer.actor.engine = Recorded()
    plain = engine.generate

    def cut(*args, **kwargs):
        done = plain(*args, **kwargs)
        done.finished = [False] * len(done.ids)
        return done

    engine.generate = cut
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(entry["loss"] == 0 for entry in trainer.state.log_history if "loss" in entry)


# ---- Dynamic sampling ----------------------------------------------------------------------------------------------


def filled(model_path, folder, reward, **options):
    trainer = make(
        "GRPO",
        model_path,
        folder,
        reward=reward,
        rows=questions(16),
        shuffle_dataset=False,
        per_device_train_batch_size=16,
        dynamic_sampling=True,
        **options,
    )
    trainer.actor.engine = Recorded()
    trainer.model_wrapped = trainer.model
    trainer.next_micro_batch()
    return trainer, trainer.buffer.rollout


def test_groups_without_spread_are_replaced_by_other_prompts(model_path, tmp_path):
    trainer, rollout = filled(model_path, tmp_path, some_equal)
    numbers = [sample.columns["number"] for sample in rollout.samples]
    assert numbers == [at for at in (0, 2, 4, 6) for _ in range(4)]
    assert trainer.prompts.cursor == 4 + 2 + 1, "as many are drawn as are missing"
    expected = some_equal([s.prompt for s in rollout.samples], [s.columns["completion_ids"] for s in rollout.samples])
    assert rollout.total.tolist() == expected and rollout.rewards[:, 0].tolist() == expected
    assert [len(ids) for ids in rollout.actions.ids] == rollout.lengths.tolist()
    for sample, ids in zip(rollout.samples, rollout.actions.ids, strict=True):
        assert sample.columns["completion_ids"] == ids.tolist()
    assert trainer._noted["frac_reward_zero_std"] == [0.0]


def test_resampling_is_bounded_and_a_run_without_spread_goes_on(model_path, tmp_path):
    calls = []

    def equal(prompts, **_):
        calls.append(len(prompts))
        return [1.0] * len(prompts)

    trainer, rollout = filled(model_path, tmp_path / "a", equal, max_resampling=2)
    assert calls == [16, 16, 16] and rollout.rows == 16
    assert [sample.columns["number"] for sample in rollout.samples] == [at // 4 for at in range(16)]
    assert trainer._noted["dynamic_sampling/rounds"] == [2]
    trainer = make("GRPO", model_path, tmp_path / "b", reward=equal, dynamic_sampling=True, max_steps=2)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_nothing_is_drawn_where_all_groups_have_spread(model_path, tmp_path):
    trainer, rollout = filled(
        model_path, tmp_path, lambda completion_ids, **_: [float(sum(i)) for i in completion_ids]
    )
    assert trainer.prompts.cursor == 4 and trainer._noted["dynamic_sampling/rounds"] == [0]
