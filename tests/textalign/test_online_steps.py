"""An optimizer step of the online trainers: its gradient does not depend on how it is computed."""

import pytest
import torch
from tiny_online import Recorded, even, make, perturb, questions, same, steps

import textalign
from shared.errors import UserError
from shared.objectives.policy_gradient import PolicyGradient
from shared.objectives.policy_losses import LOSSES

# rows of a micro-batch, micro-batches of a step, micro-batches of a round: steps of 16 rows, rounds of 32
CUTS = [(16, 1, 2), (8, 2, 4), (2, 8, 16)]


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def taken(name, model_path, folder, cut, count=4, engine=None, perturbed=True, **options):
    """The first steps over recorded completions, cut in one way."""
    size, window, serves = cut
    shape = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": window,
        "steps_per_generation": serves,
    }
    trainer = make(name, model_path, folder, rows=questions(12), **shape, **options)
    trainer.actor.engine = engine or Recorded()
    if perturbed:  # away from the reference
        perturb(trainer.model)
    return trainer, steps(trainer, count)


def compare(name, model_path, tmp_path, cuts=CUTS, **options):
    whole, *others = [taken(name, model_path, tmp_path / str(at), cut, **options)[1] for at, cut in enumerate(cuts)]
    for other in others:
        same(whole, other)


LEVELS = [
    (loss, level) for loss in LOSSES for level in ("token", "sequence") if (loss, level) != ("vespo", "sequence")
]


@pytest.mark.parametrize(("loss", "level"), LEVELS)
def test_a_step_does_not_depend_on_its_cut(loss, level, model_path, tmp_path):
    compare(
        "GRPO",
        model_path,
        tmp_path,
        loss_type=loss,
        importance_sampling_level=level,
        num_iterations=2,
        epsilon=0.05,
        epsilon_high=1.5 if loss == "cispo" else 0.05,
        beta=0.1,
        entropy_coef=0.01,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"top_entropy_quantile": 0.4},
        {"top_entropy_quantile": 0.4, "importance_sampling_level": "sequence", "entropy_coef": 0.02},
        {"mask_truncated_completions": True},
        {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.1, "top_entropy_quantile": 0.5},
        {"loss_type": "dr_grpo", "mask_truncated_completions": True, "scale_rewards": "none"},
        {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 9.0, "loss_type": "grpo"},
        {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False, "importance_sampling_level": "sequence"},
        {"delta": 1.5, "num_iterations": 1},
        {"share_prefix": False, "loss_type": "luspo", "importance_sampling_level": "sequence"},
    ],
)
def test_nor_does_one_with_masks_and_bonuses(options, model_path, tmp_path):
    compare("GRPO", model_path, tmp_path, **{"num_iterations": 2, "epsilon": 0.05, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        {"num_iterations": 2, "beta": 0.0, "entropy_coef": 0.02, "mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5, "normalize_advantages": True, "reward_clip_range": [0.2, 0.8]},
    ],
)
def test_nor_does_rloos(options, model_path, tmp_path):
    compare("RLOO", model_path, tmp_path, epsilon=0.05, **options)


def test_rounds_that_end_within_a_step(model_path, tmp_path):
    """Rounds of 24 rows serve steps of 16: every other round begins in the middle of a step."""
    cuts = [(8, 2, 3), (4, 4, 6), (2, 8, 12)]
    for name, iterations in (("GRPO", 1), ("GRPO", 3), ("RLOO", 1)):
        options = {"num_iterations": iterations, "beta": 0.1, "epsilon": 0.05}
        compare(name, model_path, tmp_path / f"{name}{iterations}", cuts, count=6, **options)


def test_a_round_of_one_step_may_have_fewer_rows_than_the_step(model_path, tmp_path):
    """Two rounds a step, twice each: their old log-probabilities must not be mixed up."""
    cuts = [(8, 3, 1), (4, 6, 2)]
    compare("GRPO", model_path, tmp_path, cuts, num_iterations=2, epsilon=0.05, count=5)


@pytest.mark.parametrize(("accumulation", "serves", "iterations"), [(1, 2, 2), (3, 1, 2), (2, 3, 1), (2, 3, 3)])
def test_old_log_probabilities_are_those_at_sampling(accumulation, serves, iterations, model_path, tmp_path):
    """Whatever is trained on later is compared with the policy that sampled it."""
    trainer = make(
        "GRPO",
        model_path,
        tmp_path,
        rows=questions(12),
        num_iterations=iterations,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=serves,
    )
    trainer.actor.engine = Recorded()
    rounds, seen = [], []
    finish, compute = trainer.finish_round, trainer.compute_loss

    def finished(rollout):
        figures = finish(rollout)
        rows = list(range(rollout.rows))
        with torch.no_grad():
            batch = trainer.actor.batch(rollout, rows, 4)
            rounds.append((rollout, trainer.policy.log_probs(trainer.model.eval(), batch).logp))
        trainer.model.train()
        return figures

    trainer.finish_round = finished

    def watched(model, inputs, **kwargs):
        old = inputs.batch.columns.get("old")
        expected = next(logp for rollout, logp in rounds if rollout is inputs.rollout)[inputs.rows]
        mask = inputs.batch.action_mask.bool()
        width = mask.shape[1]
        if old is not None:
            torch.testing.assert_close(old[mask], expected[:, :width][mask], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            now = trainer.policy.log_probs(model.eval(), inputs.batch).logp
        model.train()
        moved = (now - expected[:, :width])[mask].abs().max()
        seen.append((old is not None, bool(moved > 1e-3)))
        return compute(model, inputs, **kwargs)

    trainer.compute_loss = watched
    steps(trainer, 6)
    assert {moved for known, moved in seen if not known} == {False}
    assert {moved for known, moved in seen if known} == {True}, "later steps are off-policy"
    assert sum(known for known, _ in seen) > 2


def test_the_samplers_log_probabilities_are_the_policys(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, temperature=0.7, top_k=20, steps_per_generation=2)
    perturb(trainer.model)
    trainer.model_wrapped = trainer.model
    assert trainer.samplers_count
    trainer.fill = None  # nothing is run again
    first = trainer.next_micro_batch()
    rollout = trainer.buffer.rollout
    batch = trainer.actor.batch(rollout, list(range(rollout.rows)), 4)
    with torch.no_grad():
        logp = trainer.policy.log_probs(trainer.model.eval(), batch).logp
    for row, (sampled, old) in enumerate(zip(rollout.logp, rollout.old, strict=True)):
        torch.testing.assert_close(logp[row, : len(sampled)], sampled, rtol=1e-4, atol=1e-5)
        assert torch.equal(old, sampled)
    assert first.on_policy and "old" not in first.batch.columns


def test_a_sampler_of_other_numerics_is_corrected(model_path, tmp_path):
    """The weights are ratios of the policy's log-probabilities to the sampler's, capped."""

    def flat(prompt, ids):
        return torch.full((len(ids),), -5.0)

    engine = Recorded(exact=False, logp=flat)
    (trainer, whole), (_, cut) = (
        taken("GRPO", model_path, tmp_path / str(cut[0]), cut, count=2, engine=engine) for cut in CUTS[:2]
    )
    same(whole, cut)
    rollout = trainer.buffer.rollout
    for old, weight in zip(rollout.old, rollout.correction, strict=True):
        torch.testing.assert_close(weight, (old + 5.0).exp().clamp(max=3.0), rtol=1e-5, atol=1e-6)
    assert len({round(float(weight), 3) for row in rollout.correction for weight in row}) > 10
    *_, plain = taken("GRPO", model_path, tmp_path / "plain", CUTS[0], count=2, engine=Recorded())
    with pytest.raises(AssertionError):
        same(whole, plain)


def test_advantages_by_hand(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path)
    rewards = torch.tensor([[1.0], [0.0], [0.0], [1.0], [float("nan")], [2.0], [4.0], [float("nan")]])
    got = trainer.advantages(rewards, torch.zeros(8))
    half = 0.5 / ((1 / 3) ** 0.5 + 1e-4)
    pair = 1.0 / (2**0.5 + 1e-4)
    assert got.tolist() == pytest.approx([half, -half, -half, half, 0, -pair, pair, 0])
    leave = make("RLOO", model_path, tmp_path, num_generations=4)
    penalty = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    got = leave.advantages(rewards, penalty)
    assert got[:4].tolist() == pytest.approx([1 - 0.7 / 3, -1.7 / 3, -1.7 / 3, 0.7 - 1 / 3])
    assert got[4:].tolist() == [0, -2, 2, 0]


def test_another_rule_for_advantages(model_path, tmp_path):
    class Own(textalign.GRPOTrainer):
        def advantages(self, rewards_BK, penalty_B):
            assert rewards_BK.shape == (8, 1)
            return torch.arange(8.0)

    trainer = make("GRPO", model_path, tmp_path, trainer=Own)
    trainer.actor.engine = Recorded()
    trainer.model_wrapped = trainer.model
    micro = trainer.next_micro_batch()
    assert trainer.buffer.rollout.advantages.tolist() == list(range(8))
    assert sorted(micro.batch.columns["advantages"].tolist()) == list(range(8))


def test_the_loss_of_a_step_by_hand(model_path, tmp_path):
    """dapo on-policy: −Σ A over the tokens, divided by the step's tokens; the gradient that of −Σ A logp."""
    trainer, found = taken("GRPO", model_path, tmp_path, (16, 1, 1), count=1, loss_type="dapo")
    rollout = trainer.buffer.rollout
    fresh = make("GRPO", model_path, tmp_path / "fresh")
    perturb(fresh.model)
    batch = fresh.actor.batch(rollout, list(range(16)), 4)
    logp = fresh.policy.log_probs(fresh.model.eval(), batch).logp
    weights = rollout.advantages / rollout.lengths.sum()
    expected = -(weights * rollout.lengths).sum().item()
    (-(logp * weights[:, None]).sum()).backward()
    gradients = {n: p.grad for n, p in fresh.model.named_parameters() if p.grad is not None}
    same(found, [(expected, gradients)])
    assert even([rollout.actions.ids[0].tolist()])[0] == pytest.approx(float(rollout.total[0]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GRPO", {"loss_type": "grpo", "entropy_coef": 0.02, "beta": 0.1}),
        ("GRPO", {"importance_sampling_level": "sequence", "loss_type": "luspo"}),
        ("GRPO", {"importance_sampling_level": "sequence", "loss_type": "grpo", "top_entropy_quantile": 0.5}),
        ("RLOO", {"entropy_coef": 0.02}),
        ("RLOO", {"top_entropy_quantile": 0.5}),
    ],
)
def test_an_action_at_a_time_has_the_gradient_of_whole_rows(name, options, model_path, tmp_path, monkeypatch):
    """The loss is taken apart where it can be; its value is then another one, its gradient is not."""
    *_, apart = taken(name, model_path, tmp_path / "apart", CUTS[0], count=1, **options)
    monkeypatch.setattr(PolicyGradient, "separable", lambda self, on_policy: False)
    *_, whole = taken(name, model_path, tmp_path / "whole", CUTS[0], count=1, **options)
    same([(0.0, apart[0][1])], [(0.0, whole[0][1])])


def test_rloo_takes_the_divergence_off_the_reward(model_path, tmp_path):
    trainer = make("RLOO", model_path, tmp_path, num_generations=4, beta=0.2)
    perturb(trainer.model)
    trainer.actor.engine = Recorded()
    trainer.model_wrapped = trainer.model
    trainer.next_micro_batch()
    rollout = trainer.buffer.rollout
    batch = trainer.actor.batch(rollout, list(range(8)), 4)
    with torch.no_grad():
        own = trainer.policy.log_probs(trainer.model.eval(), batch).logp
        ref = trainer.reference.log_probs(trainer.model, batch)
    reward = rollout.total - 0.2 * (own - ref).sum(1)
    grouped = reward.view(2, 4)
    expected = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    torch.testing.assert_close(rollout.advantages, expected.flatten(), rtol=1e-4, atol=1e-5)
    assert isinstance(trainer.objective, PolicyGradient) and trainer.objective.importance == "sequence_sum"


@pytest.mark.parametrize(
    "name, options", [("RLOO", {"beta": 0.0}), ("GRPO", {"importance_sampling_level": "sequence"})]
)
def test_the_loss_of_untouched_weights_is_that_of_the_first_pass(name, options, model_path, tmp_path):
    options = {"num_generations": 4, "num_iterations": 2, **options}
    trainer, _ = taken(name, model_path, tmp_path, (16, 1, 1), count=0, **options)
    first, again = steps(trainer, 2, rate=0.0)
    assert first[0] == pytest.approx(again[0], abs=1e-5), "one is on-policy, the other by the old log-probabilities"


def test_an_entropy_bonus_does_not_depend_on_what_the_loss_is_divided_by(model_path, tmp_path):
    bonuses = []
    for loss in ("grpo", "dapo", "dr_grpo", "luspo"):
        level = {"importance_sampling_level": "sequence"} if loss == "luspo" else {}
        losses = []
        for coef in (0.0, 1.0):
            folder = tmp_path / f"{loss}{coef}"
            _, ((value, _), *_) = taken(
                "GRPO", model_path, folder, (16, 1, 1), count=1, loss_type=loss, entropy_coef=coef, **level
            )
            losses.append(value)
        bonuses.append(losses[0] - losses[1])
    assert bonuses == pytest.approx([bonuses[0]] * 4, rel=1e-4) and bonuses[0] > 1


@pytest.mark.parametrize("given", [torch.full((16,), torch.nan), torch.zeros(3)])
def test_what_the_hook_for_advantages_gives_is_checked(given, model_path, tmp_path):
    class Own(textalign.GRPOTrainer):
        def advantages(self, rewards_BK, penalty_B):
            return given

    args = textalign.GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=16, max_steps=1, eval_answers=0)
    trainer = Own(model_path, "think_format_reward", args=args, train_dataset=questions(4))
    trainer.actor.engine = Recorded()
    with pytest.raises(UserError, match="Own.advantages gave .* 16 finite numbers"):
        trainer.train()


def test_options_stay_as_they_were_given(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, rows=questions(8), max_steps=-1, num_train_epochs=1.0)
    trainer.actor.engine = Recorded()
    trainer.train()
    assert trainer.args.max_steps == -1
    assert trainer.state.global_step == trainer.state.max_steps > 0
