"""A trained reward model, whole or as an adapter, scores answers as its trainer did."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shared.errors import DataError, UserError
from shared.rewards.models import RewardModel
from textalign.prm import PRMConfig, PRMTrainer
from textalign.reward import RewardConfig, RewardTrainer

ROWS = [
    {"prompt": "What colour is the circle ?" + " red" * at, "chosen": " blue" * (1 + at), "rejected": f" {word} green"}
    for at, word in enumerate(("one", "two", "three", "four"))
]
STEPS = [
    {"prompt": "Describe the image.\n", "completions": ["red square", "two", "blue"], "labels": [True, False, True]},
    {"prompt": "Where is it ?\n", "completions": ["left of the circle", "right"], "labels": [True, True]},
]
OPTIONS = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-3, "save_strategy": "no",
           "disable_tqdm": True}  # fmt: skip


def chat(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
    }


def saved(trainer):
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    return trainer


@pytest.mark.parametrize("rows", [ROWS, [chat(row) for row in ROWS]], ids=["strings", "conversations"])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_scores_are_those_of_training(rows, adapter, tiny, tmp_path, caplog):
    from peft import LoraConfig

    peft = LoraConfig(r=4, target_modules=["q_proj"]) if adapter else None
    args = RewardConfig(output_dir=str(tmp_path), **OPTIONS)
    trainer = saved(RewardTrainer(str(tiny("lm")), args, train_dataset=rows, peft_config=peft))
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    with torch.no_grad():
        expected = trainer.policy.rewards(trainer.model, batch).tolist()

    caplog.clear()
    reward = RewardModel(str(tmp_path), batch_size=3)
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    completions = [row[name] for row in rows for name in ("chosen", "rejected")]
    found = reward(prompts, completions, kind=["colour"] * 8)
    assert found == pytest.approx(expected, abs=1e-5) and all(isinstance(score, float) for score in found)
    assert reward.__name__ == tmp_path.name and "LOAD REPORT" not in caplog.text


def test_a_process_reward_model_says_how_likely_its_steps_are_right(tiny, tmp_path):
    args = PRMConfig(output_dir=str(tmp_path), **OPTIONS)
    trainer = saved(PRMTrainer(str(tiny("lm")), args, train_dataset=STEPS))
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(2)])
    with torch.no_grad():
        chances = trainer.policy.class_scores(trainer.model, batch).softmax(1)[:, 1].tolist()
    prompts = [row["prompt"] for row in STEPS]
    completions = ["\n".join(row["completions"]) for row in STEPS]
    last = RewardModel(str(tmp_path))(prompts, completions)
    assert last == pytest.approx([chances[2], chances[4]], abs=1e-5)
    assert RewardModel(str(tmp_path), steps="min")(prompts, completions) == pytest.approx(
        [min(chances[:3]), min(chances[3:])], abs=1e-5
    )
    model = RewardModel(trainer.model, trainer.processing_class, steps="mean")
    assert model(prompts, completions) == pytest.approx([sum(chances[:3]) / 3, sum(chances[3:]) / 2], abs=1e-5)
    assert 0 < model(prompts[:1], [""])[0] < 1


@pytest.fixture
def plain(tiny):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny("lm"), num_labels=1)
    return model, AutoTokenizer.from_pretrained(tiny("lm"))


def test_an_empty_answer_has_a_score_too(plain):
    model, tokenizer = plain
    reward = RewardModel(model, tokenizer)
    question = "What colour is the circle ?"
    with torch.no_grad():
        ids = torch.tensor([[*tokenizer(question)["input_ids"], tokenizer.eos_token_id]])
        expected = model(input_ids=ids).logits.item()
    assert reward([question, "Describe"], ["", " red"])[0] == pytest.approx(expected, abs=1e-5)
    empty = [{"role": "assistant", "content": ""}]
    assert isinstance(reward([[{"role": "user", "content": question}]], [empty])[0], float)
    assert reward([], []) == []


def test_scores_carry_no_gradient_and_do_not_depend_on_the_batch(plain):
    model, tokenizer = plain
    model.train()
    prompts = [row["prompt"] for row in ROWS]
    answers = [row["chosen"] for row in ROWS]
    together = RewardModel(model, tokenizer)(prompts, answers)
    alone = RewardModel(model, tokenizer, batch_size=1)(prompts, answers)
    assert together == pytest.approx(alone, abs=1e-5) and not model.training


def test_what_gives_no_score_is_refused(plain, tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, tokenizer = plain
    with pytest.raises(UserError, match="LlamaForCausalLM, which gives no score"):
        RewardModel(str(tiny("lm")))
    with pytest.raises(UserError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="tokenizer is missing"):
        RewardModel(model)
    with pytest.raises(UserError, match="steps is 'worst'; allowed: last, min, mean"):
        RewardModel(model, tokenizer, steps="worst")
    three = AutoModelForSequenceClassification.from_pretrained(tiny("lm"), num_labels=3)
    with pytest.raises(UserError, match="with 3 labels is no reward model"):
        RewardModel(three, tokenizer)
    causal = AutoModelForCausalLM.from_pretrained(tiny("lm"))
    adapted = get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="an adapter for CAUSAL_LM, which gives no score"):
        RewardModel(str(tmp_path))
    with pytest.raises(DataError, match="row 0"):
        RewardModel(model, tokenizer)(
            [[{"role": "nobody", "content": "a"}]], [[{"role": "assistant", "content": "b"}]]
        )
