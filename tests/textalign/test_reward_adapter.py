"""A reward adapter on the policy's own base: scores as of the whole reward model, and nothing of it is trained."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_online import even, history, make, perturb, questions
from tiny_text import build_causal
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import UserError
from shared.rewards.loading import load_reward
from shared.rewards.models import RewardModel
from shared.trainers.reference_adapter import adapter_tensors
from textalign import RewardConfig, RewardTrainer

WORDS = ("one", "two", "three", "four")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tiny):
    return str(tiny("lm"))


@pytest.fixture(scope="module")
def judge(base, tmp_path_factory):
    """A reward model as an adapter, on other layers than the policy's."""
    folder = tmp_path_factory.mktemp("judge")
    rows = [{"prompt": f"Where is {word} ?", "chosen": " red blue", "rejected": f" {word} green"} for word in WORDS]
    args = RewardConfig(
        output_dir=str(folder),
        learning_rate=3e-2,
        per_device_train_batch_size=4,
        max_steps=12,
        save_strategy="no",
        disable_tqdm=True,
    )
    peft = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    trainer = RewardTrainer(base, args, train_dataset=rows, peft_config=peft)
    trainer.train()
    trainer.save_model()
    return str(folder)


def policy(base, judge, folder, **options):
    options = {"peft_config": LoraConfig(**LORA), **options}
    return make("RLOO", base, folder, reward=f"adapter:{judge}", **options)


def asked(chat):
    said = ["red blue", "one", "", "green green green square circle", "<pad> red", "two <pad>"]
    if not chat:
        return ["What colour is it?"] * 3 + ["Where?"] * 3, [f" {text}" if text else text for text in said]
    user = [[{"role": "user", "content": "What colour is it?"}]] * 6
    return user, [[{"role": "assistant", "content": text}] for text in said]


def scores(trainer, prompts, completions):
    from shared.rewards.base import Sample

    samples = [Sample(*each) for each in zip(prompts, completions, strict=True)]
    return trainer.rewards.rewards[0](samples, {}).tolist()


@pytest.mark.parametrize("chat", [False, True], ids=["strings", "conversations"])
def test_scores_are_those_of_the_whole_reward_model_whatever_the_policy_learns(base, judge, tmp_path, chat):
    trainer = policy(base, judge, tmp_path)
    expected = RewardModel(judge)(*asked(chat))
    assert len(set(expected)) == 6
    assert scores(trainer, *asked(chat)) == pytest.approx(expected, abs=1e-6)
    perturb(trainer.model)
    trainer.model.train()
    assert scores(trainer, *asked(chat)) == pytest.approx(expected, abs=1e-6)
    assert trainer.model.training


def test_the_pad_token_is_the_rewards_own(base, judge, tmp_path):
    """RewardTrainer pads apart from what ends a text, and the policy's tokenizer may pad with that."""
    end = AutoTokenizer.from_pretrained(base).eos_token
    options = {"peft_config": LoraConfig(**LORA), "pad_token": end}
    trainer = make("RLOO", base, tmp_path, reward=f"adapter:{judge}|batch_size=2", **options)
    assert trainer.processing_class.pad_token == end != trainer.rewards.rewards[0].answers.tokenizer.pad_token
    assert scores(trainer, *asked(False)) == pytest.approx(RewardModel(judge, batch_size=2)(*asked(False)), abs=1e-6)


def test_the_policy_learns_from_it_as_from_the_whole_reward_model(base, judge, tmp_path):
    options = {
        "max_steps": 16,
        "learning_rate": 3e-2,
        "rows": questions(2),
        "beta": 0.0,
        "lr_scheduler_type": "constant",
    }
    options |= {"per_device_train_batch_size": 16, "num_generations": 8}
    peft = LoraConfig(r=8, lora_alpha=32, target_modules=["v_proj", "down_proj", "lm_head"])
    trainer = policy(base, judge, tmp_path / "own", peft_config=peft, **options)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(trainer.model, "reward_0").items()}
    trainer.train()
    after = adapter_tensors(trainer.model, "reward_0")
    assert before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in trained}
    assert names and all(".default." in name for name in names)
    rewards = history(trainer, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1, rewards

    whole = make("RLOO", base, tmp_path / "whole", reward=judge, peft_config=peft, **options)
    whole.train()
    assert history(whole, "reward") == pytest.approx(rewards, abs=1e-4)
    for name, tensor in adapter_tensors(whole.model, "default").items():
        torch.testing.assert_close(tensor, adapter_tensors(trainer.model, "default")[name], rtol=1e-3, atol=1e-4)


def test_it_is_not_saved_with_the_policy_and_a_run_goes_on(base, judge, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = policy(base, judge, tmp_path / "a", **options)
    whole.train()
    whole.save_model()
    for folder in (tmp_path / "a", tmp_path / "a" / "checkpoint-2"):
        assert not [path for path in folder.rglob("*") if "reward_0" in path.name]
        saved = load_file(folder / "adapter_model.safetensors")
        assert saved and all(name.split(".")[-3] in ("q_proj", "v_proj") for name in saved)
        assert sorted(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == [
            "q_proj",
            "v_proj",
        ]
    again = policy(base, judge, tmp_path / "a", overwrite_output_dir=True, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, tensor in adapter_tensors(whole.model, "default").items():
        assert torch.equal(tensor, adapter_tensors(again.model, "default")[name])


def test_two_of_them_beside_another_reward(base, judge, tmp_path):
    rewards = [f"adapter:{judge}", even, f"adapter:{judge}|max_length=40"]
    trainer = make("GRPO", base, tmp_path, reward=rewards, peft_config=LoraConfig(**LORA), max_steps=2)
    assert {"reward_0", "reward_1"} <= set(trainer.model.peft_config)
    trainer.train()
    assert trainer.rewards.names[0] != trainer.rewards.names[2]


def test_a_policy_that_cannot_carry_it(base, judge, tmp_path):
    with pytest.raises(UserError, match="the policy has no adapter.*give peft_config"):
        make("RLOO", base, tmp_path, reward=f"adapter:{judge}")
    other = str(build_causal("gpt2", tmp_path / "gpt2"))
    with pytest.raises(UserError, match=r"was trained on .*, and the policy is .*base="):
        make(
            "RLOO", other, tmp_path, reward=f"adapter:{judge}", peft_config=LoraConfig(r=2, target_modules=["c_attn"])
        )
    with pytest.raises(UserError, match="does not fit the policy"):
        make(
            "RLOO",
            other,
            tmp_path,
            reward=f"adapter:{judge}|base={other}",
            peft_config=LoraConfig(r=2, target_modules=["c_attn"]),
        )
    with pytest.raises(UserError, match="cannot write and score at the same time"):
        policy(base, judge, tmp_path, async_reward_computation=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match="trains weights outside of its adapter, .*bias"):
        biased = LoraConfig(**LORA, bias="all")
        torch.nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
        model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
        make("RLOO", base, tmp_path, reward=f"adapter:{judge}", model=model, peft_config=biased)


def test_what_is_no_reward_adapter(base, judge, tmp_path):
    with pytest.raises(UserError, match="expected adapter:PATH"):
        load_reward("adapter:")
    with pytest.raises(UserError, match="no such folder"):
        load_reward("adapter:/not/there")
    with pytest.raises(UserError, match="unexpected keyword argument 'size'"):
        load_reward(f"adapter:{judge}|size=3")
    with pytest.raises(UserError, match="online trainer, and there is none here"):
        load_reward(f"adapter:{judge}")([None], {})
    trainer = make("RLOO", base, tmp_path / "lm", peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"))
    trainer.save_model()
    with pytest.raises(UserError, match="is a Lora for CAUSAL_LM: it has to be a LoRA for SEQ_CLS"):
        load_reward(f"adapter:{tmp_path / 'lm'}")
    with pytest.raises(UserError, match="cannot be loaded|no such folder"):
        load_reward(f"adapter:{base}")
