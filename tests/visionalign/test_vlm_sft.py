"""VLMSFTTrainer on the built-in model: it learns, resumes bit for bit, saves what transformers loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from shared.builtin import load_dataset
from shared.errors import UserError
from visionalign import VLMSFTConfig, VLMSFTTrainer


@pytest.fixture(scope="module")
def rows():
    return load_dataset("builtin/digits", "train").select(range(48))


@pytest.fixture(scope="module")
def held_out():
    return load_dataset("builtin/digits", "test").select(range(16))


def config(folder, **changed):
    options = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-3, "max_steps": 6, "logging_steps": 2, "save_steps": 3,
        "eval_answers": 0, "max_new_tokens": 4, "disable_tqdm": True, **changed,
    }  # fmt: skip
    return VLMSFTConfig(output_dir=str(folder), **options)


def trained(args, rows, resume=None, **kwargs):
    trainer = VLMSFTTrainer("builtin/vlm-small", args, train_dataset=rows, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_loss_falls_and_the_report_says_so(rows, held_out, tmp_path):
    args = config(
        tmp_path,
        max_steps=20,
        learning_rate=4e-3,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=10,
        eval_answers=6,
    )
    trainer = trained(args, rows, eval_dataset=held_out)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    losses = report["curves"]["loss"]["value"]
    assert losses[-1] < losses[0] / 2
    assert {"eval_loss", "mean_token_accuracy", "entropy", "grad_norm"} <= set(report["curves"])
    assert report["status"] == "finished" and len(report["samples"]) == 6
    assert "accuracy/digit" in report["before"] and "accuracy/digit" in report["after"]
    assert report["throughput"]["samples_per_second"] > 0
    assert trainer.state.log_history[-1]["step"] == 20


def test_what_is_saved_loads_without_the_suite(rows, tmp_path):
    trainer = trained(config(tmp_path, max_steps=2), rows)
    trainer.save_model()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)
    assert_same(weights(trainer), model.state_dict())
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_equals_one_that_was_not_interrupted(adapter, rows, tmp_path):
    from peft import LoraConfig

    def peft():
        return LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]) if adapter else None

    whole = trained(config(tmp_path / "whole"), rows, peft_config=peft())
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    again = trained(config(tmp_path / "whole"), rows, resume=True, peft_config=peft())
    assert again.state.global_step == 6
    assert_same(weights(whole), weights(again))


def test_an_incomplete_checkpoint_is_passed_over(rows, tmp_path):
    whole = trained(config(tmp_path), rows)
    (tmp_path / "checkpoint-6" / "complete.json").unlink()
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"cut off")
    again = trained(config(tmp_path), rows, resume=True)
    assert_same(weights(whole), weights(again))


def test_accumulation_gives_the_gradient_of_one_big_batch(rows, tmp_path):
    # answers of different lengths: a mean of means would weigh short rows more
    mixed = load_dataset("builtin/shapes", "train").select(range(32))
    whole = trained(config(tmp_path / "1", max_steps=2, per_device_train_batch_size=8), mixed)
    cut = trained(
        config(tmp_path / "2", max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4), mixed
    )
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-3, atol=2e-5)
    logged = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, cut)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_evaluation_does_not_depend_on_the_batch_size(rows, held_out, tmp_path):
    losses = []
    for size in (3, 16):
        args = config(tmp_path, per_device_eval_batch_size=size)
        trainer = VLMSFTTrainer("builtin/vlm-small", args, train_dataset=rows, eval_dataset=held_out)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_same_seed_gives_the_same_run(rows, tmp_path):
    first = trained(config(tmp_path / "1", max_steps=3), rows)
    second = trained(config(tmp_path / "2", max_steps=3), rows)
    other = trained(config(tmp_path / "3", max_steps=3, seed=7), rows)
    assert_same(weights(first), weights(second))
    assert any(not torch.equal(weights(first)[n], weights(other)[n]) for n in weights(first))


def test_a_folder_that_holds_another_run_is_refused(rows, tmp_path):
    trained(config(tmp_path, max_steps=3), rows)
    with pytest.raises(UserError, match="holds another run .*resume_from_checkpoint.*overwrite_output_dir"):
        config(tmp_path).check_output_dir()
    with pytest.raises(UserError, match="holds another run"):
        trained(config(tmp_path), rows)
    trained(config(tmp_path, max_steps=1, overwrite_output_dir=True), rows)
    assert not (tmp_path / "checkpoint-3").exists()


def test_frozen_parts_stay_and_others_move(rows, tmp_path):
    args = config(tmp_path, max_steps=2, freeze_vision_tower=True, freeze_language_model=True)
    trainer = VLMSFTTrainer("builtin/vlm-small", args, train_dataset=rows)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and all("projector" in name for name in moved)


def test_parts_have_learning_rates_of_their_own(rows, tmp_path):
    args = config(tmp_path, max_steps=1, vision_learning_rate=0.0, projector_learning_rate=5e-3, warmup_steps=0)
    trainer = VLMSFTTrainer("builtin/vlm-small", args, train_dataset=rows)
    before = weights(trainer)
    trainer.train()
    step = {name: (value - before[name]).abs().max().item() for name, value in weights(trainer).items()}
    assert all(size == 0 for name, size in step.items() if "vision" in name)
    assert max(s for n, s in step.items() if "projector" in n) == pytest.approx(5e-3, rel=0.05)  # Adam's first step
    assert max(s for n, s in step.items() if "language" in n) == pytest.approx(1e-3, rel=0.05)


def test_a_signal_finishes_the_step_saves_and_resumes(rows, tmp_path, capsys):
    import os
    import signal

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = trained(config(tmp_path / "whole", save_steps=100), rows)
    with pytest.raises(SystemExit) as stopped:
        trained(config(tmp_path / "cut", save_steps=100), rows, callbacks=[Press()])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "Stopped at step 2, saved" in capsys.readouterr().out
    assert json.loads((tmp_path / "cut" / "report" / "report.json").read_text())["status"] == "interrupted"
    again = trained(config(tmp_path / "cut", save_steps=100), rows, resume=True)
    assert_same(weights(whole), weights(again))


def test_saved_checkpoints_are_safetensors(rows, tmp_path):
    trained(config(tmp_path, max_steps=3), rows)
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors")


def test_several_held_out_sets_are_evaluated_by_name(rows, held_out, tmp_path):
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_answers=2)
    sets = {"first": held_out.select(range(4)), "second": held_out.select(range(4, 8))}
    trainer = trained(args, rows, eval_dataset=sets)
    logged = set().union(*trainer.state.log_history)
    assert {"eval_first_loss", "eval_second_loss"} <= logged and trainer.report.after


def test_what_trl_scripts_pass_is_taken_or_refused_clearly(rows, held_out, tmp_path):
    from datasets import DatasetDict
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, TrainingArguments

    from shared.builtin.models import load_model

    def build(**changed):
        given = {"model": "builtin/vlm-small", "args": config(tmp_path, max_steps=1), "train_dataset": rows, **changed}
        return VLMSFTTrainer(**given)

    build(args=config(tmp_path, max_steps=1, model_init_kwargs={"torch_dtype": torch.bfloat16})).train()
    kept = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    args = config(tmp_path, max_steps=1, overwrite_output_dir=True, model_init_kwargs=kept)
    build(args=args).train()
    with pytest.raises(UserError, match="VLMSFTConfig"):
        build(args=TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(UserError, match="splits train"):
        build(train_dataset=DatasetDict(train=rows))
    with pytest.raises(UserError, match="Leave it out"):
        build(data_collator=lambda rows: {"labels": 0})
    adapted = get_peft_model(load_model("builtin/vlm-small"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="has an adapter already"):
        build(
            model=adapted,
            processing_class=build().processing_class,
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )


def test_perplexity_is_that_of_the_data_whatever_the_objective(rows, held_out, tmp_path):
    found = []
    for loss in ("nll", "dft"):
        args = config(tmp_path, loss_type=loss)
        trainer = VLMSFTTrainer("builtin/vlm-small", args, train_dataset=rows, eval_dataset=held_out)
        found.append(trainer.evaluate()["eval_perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_training_twice_with_one_trainer_starts_anew(rows, tmp_path):
    trainer = trained(config(tmp_path, max_steps=2), rows)
    assert trainer.train().global_step == 2


def test_the_best_checkpoint_is_loaded_at_the_end(rows, held_out, tmp_path):
    args = config(
        tmp_path, max_steps=4, learning_rate=0.5, eval_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = trained(args, rows, eval_dataset=held_out)
    best = AutoModelForImageTextToText.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(weights(trainer), best.state_dict())
