"""RewardTrainer on a tiny model: it learns, its loss is the formula's, and what it saves scores alike elsewhere."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shared.errors import DataError, UserError
from textalign.reward import RewardConfig, RewardTrainer

COLOURS = ("red", "green", "blue", "yellow")
NUMBERS = ("one", "two", "three", "four", "five")


def pair(number, **more):
    """Numbers are preferred to colours; prompts and answers differ in length."""
    colour, word = COLOURS[number % 4], NUMBERS[number // 4 % 5]
    return {
        "prompt": "What colour is the circle ?" + f" {COLOURS[number // 3 % 4]}" * (1 + number % 3),
        "chosen": " the" + f" {word}" * (1 + number % 2),
        "rejected": f" the {colour}",
        **more,
    }


def chat(number):
    row = pair(number)
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


ROWS = [pair(number) for number in range(24)]


@pytest.fixture(scope="module")
def lm(tiny):
    return str(tiny("lm"))


def config(folder, **changed):
    options = {
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1, "save_steps": 2,
        "eval_answers": 0, "disable_tqdm": True, **changed,
    }  # fmt: skip
    return RewardConfig(output_dir=str(folder), **options)


def trained(lm, args, rows=ROWS, resume=None, **kwargs):
    trainer = RewardTrainer(lm, args, train_dataset=rows, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def alone(model, tokenizer, text):
    """The score of one row without padding."""
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    return model(input_ids=ids).logits.item()


@pytest.mark.parametrize("row", [pair, chat])
def test_pair_accuracy_rises_and_the_report_says_so(row, lm, tmp_path):
    args = config(tmp_path, max_steps=16, eval_strategy="steps", eval_steps=8, eval_answers=3, save_strategy="no")
    trained(lm, args, [row(at) for at in range(24)], eval_dataset=[row(at) for at in range(24, 35)])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["before"]["accuracy"] < 0.5 < report["after"]["accuracy"] == 1.0
    assert report["after"]["margin"] > report["before"]["margin"] + 1
    assert report["curves"]["loss"]["value"][-1] < 0.5 < 0.6 < report["curves"]["loss"]["value"][0]
    names = {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    assert names | {f"eval_{name}" for name in names} <= set(report["curves"])
    assert len(report["samples"]) == 3
    sample = report["samples"][0]
    assert (
        "right: chosen +" in sample["after"]
        and "chosen" in sample["before"]
        and sample["columns"]["chosen"] == " the two"
    )


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_is_that_of_the_formula(share, lm, tmp_path):
    rows = [pair(0, margin=0.5), pair(1, margin=0.0), pair(2, margin=2.0)]
    args = config(tmp_path, center_rewards_coefficient=0.1, share_prefix=share, per_device_eval_batch_size=2)
    trainer = RewardTrainer(lm, args, train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        trainer.model.score.weight.mul_(20)  # rewards that are not near zero
        scores = [
            [alone(trainer.model, trainer.processing_class, row["prompt"] + row[name]) for row in rows]
            for name in ("chosen", "rejected")
        ]
    better, worse = scores
    apart = [w - r for w, r in zip(better, worse, strict=True)]
    losses = [
        math.log1p(math.exp(-(gap - row["margin"]))) + 0.1 * (w + r) ** 2
        for gap, row, w, r in zip(apart, rows, better, worse, strict=True)
    ]
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert found["eval_accuracy"] == pytest.approx(sum(gap > 0 for gap in apart) / 3)
    assert found["eval_margin"] == pytest.approx(sum(apart) / 3, abs=1e-5)
    everything = scores[0] + scores[1]
    assert found["eval_mean_reward"] == pytest.approx(sum(everything) / 6, abs=1e-5)
    assert found["eval_min_reward"] == pytest.approx(min(everything), abs=1e-5)
    assert found["eval_max_reward"] == pytest.approx(max(everything), abs=1e-5)


def test_accumulation_gives_the_gradient_of_one_big_batch(lm, tmp_path):
    rows = [pair(at, margin=at / 10) for at in range(16)]
    centred = {"center_rewards_coefficient": 0.05, "max_steps": 2, "save_strategy": "no"}
    whole = trained(lm, config(tmp_path / "1", **centred), rows)
    cut = config(tmp_path / "2", per_device_train_batch_size=1, gradient_accumulation_steps=8, **centred)
    cut = trained(lm, cut, rows)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-3, atol=2e-5)
    logged = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, cut)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    norms = [t.state.log_history[0]["grad_norm"] for t in (whole, cut)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_evaluation_does_not_depend_on_the_batch_size(lm, tmp_path):
    found = []
    for size in (3, 16):
        args = config(tmp_path, per_device_eval_batch_size=size)
        trainer = RewardTrainer(lm, args, train_dataset=ROWS, eval_dataset=ROWS[:10])
        metrics = trainer.evaluate()
        found.append(
            {name: value for name, value in metrics.items() if "per_second" not in name and "time" not in name}
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_what_is_saved_scores_alike_in_plain_transformers(lm, tmp_path):
    trainer = trained(lm, config(tmp_path, save_strategy="no"))
    trainer.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.num_labels == 1 and not list(tmp_path.glob("*.bin"))
    texts = [row["prompt"] + row["chosen"] + tokenizer.eos_token for row in ROWS[:5]]
    tokenizer.padding_side = "right"
    plain = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(5)])
    with torch.no_grad():
        ours = trainer.policy.rewards(trainer.model, batch)[0::2]
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_an_end_that_is_also_the_padding_is_scored_all_the_same(lm, tmp_path, tiny):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trained(lm, config(tmp_path, max_steps=1, save_strategy="no"), processing_class=tokenizer)
    assert trainer.processing_class.pad_token == "<|endoftext|>"
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.pad_token_id == model.config.pad_token_id != saved.eos_token_id
    given = RewardTrainer(lm, config(tmp_path / "2", pad_token="<|im_end|>"), train_dataset=ROWS)
    assert given.model.config.pad_token_id == given.processing_class.eos_token_id  # asked for: taken


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_equals_one_that_was_not_interrupted(adapter, lm, tmp_path):
    from peft import LoraConfig

    def peft():
        return LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]) if adapter else None

    options = {"disable_dropout": False}
    whole = trained(lm, config(tmp_path, **options), peft_config=peft())
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = trained(lm, config(tmp_path, **options), resume=True, peft_config=peft())
    assert again.state.global_step == 4
    assert_same(weights(whole), weights(again))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_is_loaded_by_peft_with_its_score(targets, lm, tmp_path, capsys):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig

    given = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    trainer = trained(lm, config(tmp_path, save_strategy="no"), peft_config=given)
    assert "The adapter's task is SEQ_CLS, not CAUSAL_LM" in capsys.readouterr().out
    assert given.task_type == "CAUSAL_LM" and given.modules_to_save is None  # the caller's own stays as it was
    trainer.save_model()
    head = trainer.model.get_base_model().score
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    text = ROWS[0]["prompt"] + ROWS[0]["chosen"]
    trainer.model.eval()
    tokenizer = trainer.processing_class
    assert alone(model, tokenizer, text) == pytest.approx(alone(trainer.model, tokenizer, text), abs=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_saved_can_be_trained_further(adapter, lm, tmp_path):
    from peft import LoraConfig

    held_out = {"eval_dataset": ROWS[:8]}
    peft = {"peft_config": LoraConfig(r=4)} if adapter else {}
    first = trained(lm, config(tmp_path / "1", save_strategy="no"), **peft, **held_out)
    first.save_model()
    model, peft = (lm, {"peft_config": str(tmp_path / "1")}) if adapter else (str(tmp_path / "1"), {})
    more = RewardTrainer(model, config(tmp_path / "2", save_strategy="no"), train_dataset=ROWS, **peft, **held_out)
    assert more.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], rel=1e-5)
    before = weights(more)
    more.train()
    assert any("score" in name and not torch.equal(value, before[name]) for name, value in weights(more).items())


def test_a_start_is_seeded_and_without_warnings(lm, tmp_path, caplog, recwarn, capsys):
    heads = []
    for at, seed in enumerate((1, 1, 2)):
        torch.manual_seed(at)  # whatever was drawn before
        trainer = RewardTrainer(lm, config(tmp_path, seed=seed), train_dataset=ROWS)
        heads.append(trainer.model.score.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    said = capsys.readouterr()
    assert "one is drawn (seed 2)" in said.out and "LOAD REPORT" not in said.err + caplog.text
    assert not [w for w in recwarn if "score" in str(w.message)]


def test_rows_without_a_prompt_share_what_they_begin_with(lm, tmp_path):
    rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in ROWS]
    trainer = trained(lm, config(tmp_path, save_strategy="no"), rows)
    prompt, chosen, rejected = trainer.describe(trainer.train_dataset[0])
    assert prompt.startswith("What colour is the circle") and chosen == " one" and rejected == " red"


def test_models_that_give_no_single_score_are_refused_before_they_are_loaded(lm, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    classifier = AutoModelForSequenceClassification.from_pretrained(lm, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    causal = AutoModelForCausalLM.from_pretrained(lm)
    adapted = get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "causal")
    frozen = AutoModelForSequenceClassification.from_pretrained(lm, num_labels=1)
    frozen = get_peft_model(frozen, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="does not train the score head"):
        RewardTrainer(frozen, config(tmp_path), train_dataset=ROWS, processing_class=AutoTokenizer.from_pretrained(lm))

    monkeypatch.setattr("textalign.scoring.load_text_model", None)
    with pytest.raises(UserError, match="is one for CAUSAL_LM, this trainer's is SEQ_CLS. Merge"):
        RewardTrainer(lm, config(tmp_path), train_dataset=ROWS, peft_config=str(tmp_path / "causal"))
    for model, said in (
        (str(tmp_path / "classifier"), "with 3 labels, but this trainer needs .* 1 label"),
        (classifier, "The model is a LlamaForSequenceClassification with 3 labels"),
        (causal, "LlamaForCausalLM, but .* num_labels=1"),
    ):
        with pytest.raises(UserError, match=said):
            RewardTrainer(model, config(tmp_path), train_dataset=ROWS)


def test_mistakes_in_data_and_options_are_said_before_the_model_is_loaded(lm, tmp_path, monkeypatch):
    monkeypatch.setattr("textalign.scoring.load_text_model", None)
    bad = [*ROWS[:3], {**ROWS[3], "margin": "much"}]
    with pytest.raises(DataError, match="row 3: margin is 'much', expected a finite number"):
        RewardTrainer(lm, config(tmp_path), train_dataset=bad)
    with pytest.raises(DataError, match="Allowed: preference"):
        RewardTrainer(lm, config(tmp_path), train_dataset=[{"text": "a"}])
    with pytest.raises(UserError, match="center_rewards_coefficient -1"):
        config(tmp_path, center_rewards_coefficient=-1)
    from textalign import DPOConfig

    with pytest.raises(UserError, match="give a RewardConfig"):
        RewardTrainer(lm, DPOConfig(output_dir=str(tmp_path)), train_dataset=ROWS)
