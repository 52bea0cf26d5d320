"""PRMTrainer on a tiny model: labels stand at the ends of steps, it learns them, and what it saves loads elsewhere."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from shared.errors import DataError, UserError
from textalign.prm import PRMConfig, PRMTrainer

COLOURS = ("red", "green", "blue", "yellow")


def solution(number):
    """Steps that name a square are right, those that name a triangle are wrong; two to four of them."""
    labels = [(number >> at) % 2 == 0 for at in range(2 + number % 3)]
    steps = [f"{COLOURS[(number + at) % 4]} {'square' if right else 'triangle'}" for at, right in enumerate(labels)]
    return {"prompt": "Describe the image.\n", "completions": steps, "labels": labels}


ROWS = [solution(number) for number in range(24)]


@pytest.fixture(scope="module")
def lm(tiny):
    return str(tiny("lm"))


def config(folder, **changed):
    options = {
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1, "save_steps": 2,
        "eval_answers": 0, "disable_tqdm": True, **changed,
    }  # fmt: skip
    return PRMConfig(output_dir=str(folder), **options)


def trained(lm, args, rows=ROWS, resume=None, **kwargs):
    trainer = PRMTrainer(lm, args, train_dataset=rows, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_labels_stand_at_the_last_token_of_each_separator(lm, tmp_path):
    row = {"prompt": "Describe the image.", "completions": ["red square", "two"], "labels": [True, False]}
    trainer = PRMTrainer(lm, config(tmp_path, step_separator=" ##\n"), train_dataset=[row])
    batch = trainer.data_collator([trainer.train_dataset[0]])
    tokenizer = trainer.processing_class
    ids, labels = batch.completion_ids[0].tolist(), batch.columns["step_labels"][0].tolist()
    assert tokenizer.decode(ids) == "Describe the image.red square ##\ntwo ##\n"
    newline = tokenizer("\n")["input_ids"]
    assert len(newline) == 1
    ends = [at for at, token in enumerate(ids) if token == newline[0]]
    assert len(ends) == 2 and ends[1] == len(ids) - 1
    assert [(at, label) for at, label in enumerate(labels) if label != -100] == [(ends[0], 1), (ends[1], 0)]
    assert batch.completion_mask[0].nonzero().squeeze(1).tolist() == ends


def test_step_accuracy_rises_and_the_report_says_so(lm, tmp_path):
    args = config(tmp_path, max_steps=30, eval_strategy="steps", eval_steps=15, eval_answers=3, save_strategy="no")
    trained(lm, args, eval_dataset=ROWS[:11])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["before"]["accuracy"] < 0.9 < 0.99 < report["after"]["accuracy"]
    assert report["after"]["last_step_accuracy"] == report["after"]["error_f1"] == 1.0
    assert {"accuracy", "last_step_accuracy", "eval_accuracy", "eval_error_f1"} <= set(report["curves"])
    sample = report["samples"][0]
    assert len(sample["after"].split()) == len(sample["before"].split()) == 2 and "right right" in str(sample)


def expected_steps(trainer, rows):
    """Loss, rightness and label of every step, each row run alone."""
    for row in rows:
        pieces, ends = trainer.processing_class(row["prompt"])["input_ids"], []
        for step in row["completions"]:
            pieces = pieces + trainer.processing_class(step)["input_ids"] + trainer.processing_class("\n")["input_ids"]
            ends.append(len(pieces) - 1)
        logits = trainer.model(input_ids=torch.tensor([pieces])).logits[0, ends]
        labels = torch.tensor(row["labels"]).long()
        yield torch.nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(1), labels


@pytest.mark.parametrize("size", [2, 16])
def test_evaluation_is_exact_whatever_the_batches(size, lm, tmp_path):
    rows = ROWS[:7]
    trainer = PRMTrainer(lm, config(tmp_path, per_device_eval_batch_size=size), train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        trainer.model.score.weight.mul_(30)  # answers that are not all alike
        trainer.model.eval()
        steps = list(expected_steps(trainer, rows))
    losses, said, labels = (torch.cat(each) for each in zip(*steps, strict=True))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert found["eval_accuracy"] == pytest.approx((said == labels).float().mean().item())
    last = [(said[-1] == labels[-1]).item() for _, said, labels in steps]
    assert found["eval_last_step_accuracy"] == pytest.approx(sum(last) / 7)
    caught = ((said == 0) & (labels == 0)).sum()
    assert found["eval_error_f1"] == pytest.approx((2 * caught / ((said == 0).sum() + (labels == 0).sum())).item())


@pytest.mark.parametrize("last_only", [False, True])
def test_the_loss_is_the_mean_over_the_learnt_steps_of_a_whole_step(last_only, lm, tmp_path):
    options = {"max_steps": 1, "train_on_last_step_only": last_only, "save_strategy": "no"}
    start = PRMTrainer(lm, config(tmp_path / "0", **options), train_dataset=ROWS[:8])
    start.model.eval()
    with torch.no_grad():
        steps = [loss[-1:] if last_only else loss for loss, _, _ in expected_steps(start, ROWS[:8])]
    whole = trained(lm, config(tmp_path / "1", **options), ROWS[:8])
    cut = config(tmp_path / "2", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    cut = trained(lm, cut, ROWS[:8])
    for trainer in (whole, cut):
        assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.cat(steps).mean().item(), rel=1e-4)
    assert whole.state.log_history[0]["grad_norm"] == pytest.approx(cut.state.log_history[0]["grad_norm"], rel=1e-4)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-3, atol=2e-5)


def test_an_evaluation_looks_at_all_steps_even_where_the_last_one_is_learnt(lm, tmp_path):
    found = []
    for last_only in (False, True):
        args = config(tmp_path, train_on_last_step_only=last_only)
        found.append(PRMTrainer(lm, args, train_dataset=ROWS, eval_dataset=ROWS[:5]).evaluate()["eval_loss"])
    assert found[0] == found[1]


def test_rows_that_are_too_long_keep_the_steps_that_fit(lm, tmp_path, capsys):
    trainer = PRMTrainer(lm, config(tmp_path, max_completion_length=12), train_dataset=ROWS[2:3])
    row = trainer.train_dataset[0]
    assert len(ROWS[2]["labels"]) == 4 and 0 < len(row["step_ends"]) < 4
    assert trainer.describe(row)[0].startswith("Describe the image.\nblue square\n")


def test_what_is_saved_gives_the_same_logits_in_plain_transformers(lm, tmp_path):
    trainer = trained(lm, config(tmp_path, save_strategy="no"))
    trainer.save_model()
    model = AutoModelForTokenClassification.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(5)])
    plain = model(input_ids=batch.completion_ids, attention_mask=batch.completion_attention).logits
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.policy.class_scores(trainer.model, batch)
    torch.testing.assert_close(ours, plain[batch.completion_mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_is_loaded_by_peft_with_its_score(targets, lm, tmp_path):
    from peft import AutoPeftModelForTokenClassification, LoraConfig

    trainer = trained(lm, config(tmp_path, save_strategy="no"), peft_config=LoraConfig(r=4, target_modules=targets))
    trainer.save_model()
    head = trainer.model.get_base_model().score
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    model = AutoPeftModelForTokenClassification.from_pretrained(tmp_path, num_labels=2).eval()
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"].tolist()])
    trainer.model.eval()
    torch.testing.assert_close(model(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_a_resumed_run_equals_one_that_was_not_interrupted(lm, tmp_path):
    options = {"disable_dropout": False}
    whole = trained(lm, config(tmp_path, **options))
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = trained(lm, config(tmp_path, **options), resume=True)
    assert again.state.global_step == 4
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(again).items())


def test_mistakes_are_said_before_the_model_is_loaded(lm, tmp_path, monkeypatch):
    reward = AutoModelForSequenceClassification.from_pretrained(lm, num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    monkeypatch.setattr("textalign.scoring.load_text_model", None)
    with pytest.raises(DataError, match="row 1: completions has 2 and labels 1"):
        rows = [ROWS[0], {"prompt": "a", "completions": ["b", "c"], "labels": [True]}]
        PRMTrainer(lm, config(tmp_path), train_dataset=rows)
    for model in (reward, str(tmp_path / "reward")):
        with pytest.raises(UserError, match="LlamaForSequenceClassification with 1 labels, but this trainer needs"):
            PRMTrainer(model, config(tmp_path), train_dataset=ROWS)
    with pytest.raises(UserError, match="step_separator is empty"):
        config(tmp_path, step_separator="")
    with pytest.raises(UserError, match="max_prompt_length 0"):
        config(tmp_path, max_prompt_length=0)
