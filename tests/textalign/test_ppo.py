"""PPO with each kind of critic: it learns, however a step is cut, and goes on as if it had not stopped."""

import math
import warnings

import pytest
import torch
from test_online_resume import resumed_is_whole
from tiny_online import Recorded, history, make, perturb, questions, same, steps

from shared.errors import UserError
from shared.policies.critic import critic_of
from shared.trainers.critics import critic_tensors
from shared.trainers.rollout import Rollout

KINDS = ("shared", "separate", "adapter")


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def ppo(model_path, folder, kind="shared", **options):
    """A trainer with that critic, which has moved from where it was made."""
    options = {"num_generations": 1, "value_model": kind, "vf_coef": 0.5, **options}
    if kind == "adapter":
        options.setdefault("peft_config", lora())
    return make("PPO", model_path, folder, **options)


# ---- Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "separate", pytest.param("adapter", marks=pytest.mark.slow)])
def test_rewards_rise_and_values_come_near(kind, model_path, tmp_path):
    options = {"peft_config": lora(modules_to_save=["lm_head"])} if kind == "adapter" else {}
    trainer = ppo(
        model_path, tmp_path, kind, per_device_train_batch_size=32, num_mini_batches=2, num_ppo_epochs=2, max_steps=32,
        learning_rate=2e-2, lr_scheduler_type="constant", kl_coef=0.01, cliprange_value=None, **options,
    )  # fmt: skip
    trainer.train()
    rewards, errors = history(trainer, "reward"), history(trainer, "value/error")
    assert len(rewards) == 8, "a round is of four steps"
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.2
    assert sum(errors[-8:]) < 0.7 * sum(errors[:8])
    named = ["objective/kl", "objective/kl_coef", "objective/scores", "objective/rlhf_reward", "policy_kl", "entropy"]
    named += ["objective/non_score_reward", "value/explained_variance", "approx_kl", "completions/eos_ratio"]
    named += ["clip_ratio/region_mean", "ratio/mean", "loss/policy", "loss/value", "value/clip_ratio"]
    for name in named:
        assert all(map(math.isfinite, history(trainer, name))) and history(trainer, name), name


# rows of a micro-batch, micro-batches of a step, micro-batches of a round: steps of 8 rows, rounds of 16
CUTS = [(8, 1, 2), (4, 2, 4), (2, 4, 8)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("shared", {"whiten_rewards": True, "missing_eos_penalty": 0.5, "use_score_scaling": True}),
        ("shared", {"num_generations": 2, "kl_penalty": "full"}),
        ("separate", {"num_generations": 2, "kl_penalty": "k3", "use_score_scaling": True, "use_score_norm": True}),
        ("adapter", {"num_generations": 2, "kl_penalty": "abs", "adap_kl_ctrl": True, "horizon": 50}),
        pytest.param(
            "adapter",
            {"whiten_advantages": False, "kl_coef": 0.0, "score_clip": 0.5, "gamma": 0.9},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_does_not_depend_on_its_cut(kind, options, model_path, tmp_path):
    found = []
    for at, (size, window, serves) in enumerate(CUTS):
        trainer = ppo(
            model_path, tmp_path / str(at), kind, rows=questions(12), per_device_train_batch_size=size,
            gradient_accumulation_steps=window, steps_per_generation=serves, num_iterations=2, epsilon=0.05, **options,
        )  # fmt: skip
        trainer.actor.engine = Recorded()
        perturb(trainer.model)
        found.append(steps(trainer, 5, rate=0.1))
    gradients = found[0][0][1]
    assert any("critic" in name for name in gradients) and any("critic" not in name for name in gradients)
    for other in found[1:]:
        same(found[0], other)


def test_a_round_by_hand(model_path, tmp_path):
    """Samples of two tokens and of one: -β (logp - ref) at each, the score at the last; then errors and returns."""
    options = {"kl_coef": 0.1, "gamma": 0.5, "lam": 0.5, "whiten_advantages": False, "missing_eos_penalty": 1.0}
    trainer = ppo(model_path, tmp_path, **options)
    own = {"old": [[-1.0, -2.0], [-3.0]], "ref": [[-1.5, -1.0], [-1.0]], "values": [[0.5, 0.25], [1.0]]}
    trainer._look = lambda rollout: (
        [setattr(rollout, name, [torch.tensor(row) for row in own[name]]) for name in ("old", "ref")]
        + [rollout.columns.update(values=[torch.tensor(row) for row in own["values"]])]
    )
    rollout = Rollout([None] * 2, 1, None, torch.tensor([2, 1]), torch.tensor([False, True]))
    rollout.total = torch.tensor([2.0, 3.0])
    rollout.rewards = rollout.total[:, None]
    figures = trainer.finish_round(rollout)
    # rewards: [-0.1 * 0.5, -0.1 * -1 + 2] and [-0.1 * -2 + 3 - 1]
    last = 2.1 - 0.25
    first = -0.05 + 0.5 * 0.25 - 0.5 + 0.25 * last
    assert rollout.columns["advantages"][0].tolist() == pytest.approx([first, last])
    assert rollout.columns["advantages"][1].tolist() == pytest.approx([2.2 - 1.0])
    assert rollout.columns["returns"][0].tolist() == pytest.approx([first + 0.5, 2.1])
    assert rollout.columns["returns"][1].tolist() == pytest.approx([2.2])
    assert figures["objective/kl"] == pytest.approx((0.5 - 1 - 2) / 2)
    assert figures["objective/scores"] == pytest.approx((2 + 2) / 2)
    assert figures["objective/non_score_reward"] == pytest.approx((0.05 + 0.2) / 2)
    assert figures["reward"] == 2.5 and figures["completions/eos_ratio"] == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_read_where_a_token_is_chosen(kind, model_path, tmp_path):
    """The critic's own forward, on whole rows, says the same as the shared call, with shared prompts and without."""
    trainer = ppo(model_path, tmp_path, kind, num_generations=4)
    trainer.actor.engine = Recorded()
    perturb(trainer.model)
    rollout = trainer.sampled([0, 1], 4)
    batch = trainer.actor.batch(rollout, list(range(8)), 4)
    model, critic = trainer.model.eval(), critic_of(trainer.model)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    head = critic.head if kind != "separate" else critic.model.score
    with torch.no_grad():
        found = trainer.policy.values(model, batch)
        beside = trainer.policy.log_probs(model, batch, values=True)
        torch.testing.assert_close(beside.values, found, rtol=1e-4, atol=1e-5)
        for row, ids in enumerate(rollout.actions.ids):
            prompt = rollout.actions.prompts[row // 4].ids
            whole = torch.cat([prompt, ids])[None]
            if kind == "adapter":
                with critic.running():
                    states = inner.model(input_ids=whole)[0]
                assert not torch.allclose(states, inner.model(input_ids=whole)[0], atol=1e-3)
            else:
                states = (critic.body if kind == "separate" else inner.model)(input_ids=whole)[0]
            expected = head(states[0, len(prompt) - 1 : -1]).squeeze(1)
            torch.testing.assert_close(found[row, : len(ids)], expected, rtol=1e-4, atol=1e-5)
            assert not found[row, len(ids) :].any()


# ---- Going on, saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "at", "accumulation"), [("shared", 3, 2), ("separate", 5, 1), ("adapter", 3, 1)])
def test_a_run_goes_on_in_the_middle_of_a_round(kind, at, accumulation, model_path, tmp_path):
    state, whole, after = resumed_is_whole(
        "PPO", model_path, tmp_path, at, value_model=kind, gradient_accumulation_steps=accumulation, num_generations=2,
        peft_config=lora() if kind == "adapter" else None, adap_kl_ctrl=True, horizon=100, use_score_scaling=True,
        value_learning_rate=2e-2, max_steps=7, num_iterations=2, target_kl=0.02,
    )  # fmt: skip
    assert 0 < state["buffer"]["cursor"] < 8 and set(state["buffer"]["columns"]) == {"values", "returns", "advantages"}
    own, other = critic_tensors(whole.model), critic_tensors(after.model)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert own["head.weight" if kind != "separate" else "model.score.weight"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_the_policy_and_beside_it_the_critic(kind, model_path, tmp_path, caplog):
    import transformers
    from safetensors.torch import load_file

    trainer = ppo(model_path, tmp_path / "run", kind, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    trainer.model.save_pretrained(tmp_path / "by hand")
    for name in ("model", "by hand"):
        file = "adapter_model" if kind == "adapter" else "model"
        assert not [key for key in load_file(tmp_path / name / f"{file}.safetensors") if "critic" in key]
    assert not any(path.is_dir() for path in (tmp_path / "model").iterdir()), "no second adapter is written"
    caplog.clear()  # of what was said while training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not caplog.records
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)

    folder = str(tmp_path / "model")
    again = {"model": model_path, "peft_config": folder} if kind == "adapter" else {"model": folder}
    went_on = make("PPO", None, tmp_path / "next", num_generations=1, max_steps=2, **again)
    own, other = critic_tensors(trainer.model), critic_tensors(went_on.model)
    assert went_on.critic_kind == kind and own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    went_on.train()
    changed = "adapter" if kind == "shared" else "shared"
    if changed == "shared":  # another kind is asked for: a new one
        fresh = make("PPO", None, tmp_path / "fresh", num_generations=1, value_model="shared", **again)
        assert not critic_tensors(fresh.model)["head.weight"].any()


def test_a_reference_is_made_without_the_critic(model_path, tmp_path):
    trainer = ppo(model_path, tmp_path / "one")
    assert critic_of(trainer.reference.model) is None and critic_of(trainer.model) is not None
    second = make("PPO", None, tmp_path / "two", model=trainer.model, num_generations=1)
    assert critic_of(second.reference.model) is None
    assert sum("critic" in name for name, _ in second.model.named_parameters()) == 2


# ---- Controls -------------------------------------------------------------------------------------------------------


def test_the_adaptive_coefficient_moves(model_path, tmp_path):
    options = {"num_iterations": 4, "max_steps": 12, "init_kl_coef": 0.2, "target": 0.1, "horizon": 100}
    trainer = ppo(model_path, tmp_path, adap_kl_ctrl=True, **options)
    trainer.train()
    expected = 0.2
    for coefficient, kl in zip(history(trainer, "objective/kl_coef"), history(trainer, "objective/kl"), strict=True):
        assert coefficient == pytest.approx(expected)
        expected *= 1 + min(max(kl / 0.1 - 1, -0.2), 0.2) * 8 / 100
    assert trainer.kl_control.coefficient == pytest.approx(expected) and len(history(trainer, "objective/kl")) == 3


def test_a_step_that_goes_too_far_ends_its_round(model_path, tmp_path):
    plain = ppo(model_path, tmp_path / "plain", num_iterations=8, max_steps=8)
    plain.train()
    assert len(history(plain, "reward")) == 1
    stopped = ppo(model_path, tmp_path / "stopped", num_iterations=8, max_steps=8, target_kl=1e-6, learning_rate=0.05)
    stopped.train()
    assert len(history(stopped, "reward")) > 2 and max(history(stopped, "update/stopped_early")) == 1


def test_a_step_whose_ratio_is_too_high_teaches_nothing(model_path, tmp_path):
    options = {"num_iterations": 2, "max_steps": 4, "weight_decay": 0.0, "optim": "sgd"}
    trainer = ppo(model_path, tmp_path, ratio_threshold=0.5, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert history(trainer, "update/skipped") == [1.0] * 4
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_the_critic_has_a_learning_rate_of_its_own(model_path, tmp_path):
    trainer = ppo(model_path, tmp_path, "separate", value_learning_rate=0.0, max_steps=2)
    before = {name: p.clone() for name, p in critic_tensors(trainer.model).items()}
    policy = trainer.model.model.layers[0].mlp.up_proj.weight.clone()
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in critic_tensors(trainer.model).items())
    assert not torch.equal(policy, trainer.model.model.layers[0].mlp.up_proj.weight)


def test_a_model_with_a_critic_s_adapter_is_trained_again(model_path, tmp_path):
    """By a new adapter, or by a critic of another kind, which leaves nothing of the first behind."""
    model = ppo(model_path, tmp_path / "a", "adapter").model
    again = ppo(model_path, tmp_path / "b", "adapter", model=model, peft_config=None, max_steps=1)
    again.train()
    assert all(each.requires_grad for each in critic_tensors(again.model).values())
    other = ppo(model_path, tmp_path / "c", "shared", model=model, max_steps=1)
    assert "critic" not in other.model.peft_config
    assert any("lora" in name for name, each in other.model.named_parameters() if each.requires_grad)
    other.train()


def test_answers_that_are_all_empty_teach_nothing(model_path, tmp_path):
    class Silent(Recorded):
        def generate(self, *args, **kwargs):
            done = super().generate(*args, **kwargs)
            done.ids = [ids[:0] for ids in done.ids]
            return done

    trainer = ppo(
        model_path, tmp_path, reward=lambda completions, **_: [1.0] * len(completions), max_steps=1,
    )  # fmt: skip
    trainer.actor.engine = Silent()
    trainer.train()
    assert history(trainer, "loss") == [0.0]


def test_checkpointing_that_was_switched_on_before_goes_with_no_adapter_critic(model_path, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="value_model adapter: layers that are run again"):
        ppo(model_path, tmp_path, "adapter", model=model)
