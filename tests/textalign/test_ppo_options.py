"""What PPO is given: the arguments and options of two versions of trl, critics by name, and what is refused."""

from pathlib import Path

import pytest
import torch
from tiny_online import even, history, make, questions

from shared.builtin import load_dataset
from shared.errors import UserError
from shared.policies.critic import critic_of
from shared.rewards.base import Sample
from shared.trainers.critics import CRITIC_FILE, load_critic
from textalign import PPOConfig, PPOTrainer


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def scorer(tmp_path, model_path, **config):
    import transformers

    folder = tmp_path / "scorer"
    torch.manual_seed(3)
    made = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.from_pretrained(model_path, num_labels=1, **config)
    )
    made.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return made, str(folder)


def test_the_keywords_of_trl(model_path, tmp_path):
    """PPOTrainer(args=…, processing_class=…, model=…, ref_model=…, reward_model=…, value_model=…, train_dataset=…)."""
    import transformers

    judge, folder = scorer(tmp_path, model_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(model_path) for _ in range(2))
    value = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    args = PPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_mini_batches=2, num_ppo_epochs=2, total_episodes=32, response_length=5, kl_coef=0.1, kl_estimator="k3",
        cliprange=0.1, stop_token="eos", logging_steps=1, eval_answers=0,
    )  # fmt: skip
    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in questions(6)]
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=judge,
        value_model=value, train_dataset=rows, eval_dataset=rows[:2],
    )  # fmt: skip
    assert trainer.critic_kind == "separate" and critic_of(trainer.model).model is value
    assert not critic_of(trainer.reference.model) and trainer.reference.model is reference
    trainer.train()
    assert trainer.state.global_step == 8 and len(history(trainer, "reward")) == 2
    assert trainer.evaluate()["eval_reward"] == pytest.approx(history(trainer, "reward")[-1], abs=1.0)


def test_a_critic_begins_as_the_reward_model_or_as_the_policy(model_path, tmp_path):
    judge, folder = scorer(tmp_path, model_path)
    args = {"num_generations": 1, "reward": None}
    named = make("PPO", model_path, tmp_path / "a", reward_model_path=folder, **args)
    assert named.rewards.names == ["scorer"] and named.critic_kind == "separate"
    for name, own in critic_of(named.model).model.named_parameters():
        assert torch.equal(own, judge.get_parameter(name))
    from_policy = make(
        "PPO", None, tmp_path / "b", model=named.model, num_generations=1, value_model="separate"
    )  # fmt: skip
    body = critic_of(from_policy.model).body
    assert torch.equal(body.layers[0].mlp.up_proj.weight, from_policy.model.model.layers[0].mlp.up_proj.weight)
    assert body.layers[0].mlp.up_proj.weight is not from_policy.model.model.layers[0].mlp.up_proj.weight
    rewards = PPOConfig(output_dir=str(tmp_path / "c"), reward_funcs=["accuracy_reward"], reward_model_path=folder)
    assert PPOConfig(**rewards.chosen()).reward_funcs == ["accuracy_reward", folder]


def test_a_reward_in_a_folder_beside_is_a_model_and_never_trained(model_path, tmp_path, monkeypatch):
    judge, folder = scorer(tmp_path, model_path)
    monkeypatch.chdir(Path(folder).parent)
    args = PPOConfig(output_dir="a", per_device_train_batch_size=2, max_completion_length=2, reward_funcs=[])
    named = PPOTrainer(model_path, None, args, train_dataset=questions(2), reward_model=Path(folder).name)
    assert named.critic_kind == "separate"
    args = PPOConfig(output_dir="b", per_device_train_batch_size=2, max_completion_length=2)
    both = PPOTrainer(model_path, [judge], args, train_dataset=questions(2), value_model=judge,
                      reward_processing_classes=[named.run.tokenizer])  # fmt: skip
    assert critic_of(both.model).model is not judge


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"ppo_epochs": 3, "init_kl_coef": 0.3}, {"num_iterations": 3, "beta": 0.3}),
        ({"batch_size": 24, "mini_batch_size": 8}, {"per_device_train_batch_size": 8, "steps_per_generation": 3}),
        ({"batch_size": 24}, {"per_device_train_batch_size": 24, "steps_per_generation": 1}),
        ({"early_stopping": True}, {"target_kl": 1.0}),
        ({"early_stopping": False, "target_kl": 0.1}, {"target_kl": None}),
        ({"gradient_accumulation_steps": 2, "num_mini_batches": 3}, {"steps_per_generation": 6}),
        ({"total_episodes": 100, "per_device_train_batch_size": 8, "num_ppo_epochs": 2}, {"max_steps": 25}),
    ],
)
def test_options_by_the_names_of_trl(given, options, tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), **given)
    assert {name: getattr(args, name) for name in options} == options


def test_the_command_line_takes_other_names_too(tmp_path, monkeypatch):
    from shared.runtime.run import read_options

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model_name_or_path: a/b\ndataset_name: c/d\ncliprange: 0.3\n")
    options, _ = read_options("ppo", ["--config", "run.yaml", "--num_ppo_epochs", "3", "--kl_coef", "0.2"])
    assert options.values["num_iterations"] == 3 and options.values["beta"] == 0.2
    assert options.values["epsilon"] == 0.3
    with pytest.raises(UserError, match="given twice"):
        read_options("ppo", ["--config", "run.yaml", "--kl_coef", "0.2", "--beta", "0.2"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_coef": 0.1, "beta": 0.2}, "beta: another name of beta|kl_coef: another name of beta"),
        ({"sft_model_path": "x"}, "sft_model_path is not an option.*as the model"),
        ({"stop_token": "pad"}, "stop_token: completions end"),
        ({"num_mini_batches": 3, "steps_per_generation": 2}, "num_mini_batches 3 asks for 3"),
        ({"num_mini_batches": 0}, "num_mini_batches 0"),
        ({"total_episodes": 64, "max_steps": 3}, "total_episodes says how long"),
        ({"batch_size": 10, "mini_batch_size": 4}, "batch_size 10: must be a multiple of mini_batch_size 4"),
    ],
)
def test_configurations_that_are_refused(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        PPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": 1.5}, "gamma 1.5"),
        ({"score_clip": -1.0}, "score_clip -1.0: must be above 0"),
        ({"vf_coef": -0.1}, "vf_coef -0.1"),
        ({"use_score_norm": True}, "use_score_norm is a part of use_score_scaling"),
        ({"adap_kl_ctrl": True, "beta": 0.0}, "adap_kl_ctrl moves beta, which is 0"),
        ({"adap_kl_ctrl": True, "target": 0.0}, "target must be a positive number"),
        ({"dynamic_sampling": True}, "dynamic_sampling looks at groups"),
        ({"value_model": "adapter"}, "the whole model is trained. Give peft_config"),
        ({"value_model": "shared", "value_model_name_or_path": "a/b"}, "Leave the value model out"),
        ({"value_model_name_or_path": "no/such-model"}, "no/such-model"),
        ({"value_model": "adapter", "peft_config": lora, "gradient_checkpointing": True}, "run again in the backward"),
    ],
)
def test_trainers_that_are_refused(options, said, model_path, tmp_path):
    options = {name: value() if value is lora else value for name, value in options.items()}
    with pytest.raises(UserError, match=said):
        make("PPO", model_path, tmp_path, num_generations=1, **options)


def test_models_that_are_refused(model_path, tmp_path):
    with pytest.raises(UserError, match="model is missing"):
        PPOTrainer(reward_funcs=even)
    with pytest.raises(UserError, match="takes no argument config. It is called args"):
        PPOTrainer(model_path, config=PPOConfig())
    trainer = make("PPO", model_path, tmp_path / "a", num_generations=1, max_steps=1)
    trainer.train()
    (tmp_path / "a" / "kept").mkdir()
    trainer.save_model(str(tmp_path / "a" / "kept"))
    (tmp_path / "a" / "kept" / CRITIC_FILE).rename(tmp_path / "a" / "elsewhere")
    with pytest.raises(UserError, match="holds no critic.safetensors"):
        load_critic(trainer.model, tmp_path / "a" / "kept")


def test_three_adapters_on_one_base(tmp_path):
    """The built-in reward adapter, on the policy's base; what is saved is the policy's adapter, and the critic."""
    pairs = load_dataset("builtin/reviews-preference", "test").select(range(4)).to_list()
    rows = [{"prompt": pair["prompt"]} for pair in pairs]
    args = PPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, max_completion_length=8, max_steps=2,
        value_model="adapter", num_iterations=1, logging_steps=1, eval_answers=0, learning_rate=1e-2,
    )  # fmt: skip
    trainer = PPOTrainer(
        "builtin/lm-small-sft", "adapter:builtin/rm-reviews-adapter", args, train_dataset=rows, peft_config=lora()
    )
    assert set(trainer.model.peft_config) == {"default", "reward_0", "critic"}
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "reward_0" in name)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(frozen[name], p) for name, p in trainer.model.named_parameters() if name in frozen)
    good, bad = (
        trainer.rewards([Sample(pair["prompt"], pair[name], {}) for pair in pairs]).values
        for name in ("chosen", "rejected")
    )
    assert (good > bad + 1).all(), "the reward is what it was, whatever the policy has learnt"
    trainer.save_model(str(tmp_path / "model"))
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"adapter_model.safetensors", CRITIC_FILE}
    assert not any(path.is_dir() for path in (tmp_path / "model").iterdir())
