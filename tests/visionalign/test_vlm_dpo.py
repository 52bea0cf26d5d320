"""VLM DPO: each family learns pairs, whatever the reference is made of; mDPO's terms; what is refused, and why."""

import math

import pytest
import torch
from peft import LoraConfig
from tiny import FAMILIES
from tiny_pairs import dpo, history, pair_collator, pairs_about
from tiny_pictures import loud, picture, seen_by
from transformers import AutoModelForImageTextToText

from shared.data.rows import ROW, Rows
from shared.errors import DataError, UserError
from shared.objectives.pair_losses import PAIRED
from shared.trainers.preference import dpo_objective
from shared.trainers.reference import AdapterOff, Cached, FrozenCopy
from visionalign import VLMDPOConfig, VLMDPOTrainer, pairs, preference
from visionalign.corruption import Corruption
from visionalign.referenced import content_of

MDPO = {"image_loss_weight": 1.0, "anchor_loss_weight": 1.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def llava(tiny):
    return tiny("llava")


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def batch_of(trainer, count=4):
    return trainer.data_collator([trainer.train_dataset[at] for at in range(count)])


def reference_figures(trainer):
    return trainer.reference.log_probs(trainer.model, batch_of(trainer)).clone()


def rounded(logs):
    return [round(value, 4) for value in logs]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_learns_and_sees_each_image_once(name, tiny, tmp_path):
    trainer = dpo(tiny(name), tmp_path, family=name, per_device_train_batch_size=4, max_steps=3, **MDPO)
    trainer.train()
    first, *_, last = [log for log in trainer.state.log_history if "loss/sigmoid" in log]
    assert first["loss/sigmoid"] == pytest.approx(math.log(2), abs=1e-4) and abs(first["rewards/chosen"]) < 1e-4
    assert last["loss/sigmoid"] < first["loss/sigmoid"] and last["rewards/margins"] > 0
    assert last["loss/anchor"] < math.log(2), "the chosen answers became likelier"

    batch = batch_of(trainer)
    with seen_by(trainer.model) as together, torch.no_grad():
        trainer.pairs(trainer.model, batch)
    with seen_by(trainer.model) as once, torch.no_grad():
        inputs = {"input_ids": batch.prompt_ids, "attention_mask": batch.prompt_mask, **batch.model_inputs}
        trainer.model(**inputs)
    assert len(once) > 0 and together == once * 2, "the right images and the corrupted ones, for both answers at once"


def test_the_reference_in_all_its_forms(tiny, tmp_path):
    """A frozen copy, an adapter that is off, a model by its name, and figures computed beforehand: one run."""
    path = tiny("qwen2_vl")
    copied = dpo(path, tmp_path / "copied", family="qwen2_vl")
    named = dpo(path, tmp_path / "named", family="qwen2_vl", ref_model=str(path))
    known = dpo(path, tmp_path / "known", family="qwen2_vl", precompute_ref_log_probs=True)
    adapted = dpo(path, tmp_path / "adapted", family="qwen2_vl", peft_config=lora(), learning_rate=1e-2)
    forms = (FrozenCopy, FrozenCopy, Cached, AdapterOff)
    before = []
    for trainer, form in zip((copied, named, known, adapted), forms, strict=True):
        assert isinstance(trainer.reference, form)
        before.append(reference_figures(trainer))
        torch.testing.assert_close(before[-1], before[0], rtol=1e-4, atol=1e-5)
        trainer.train()
        assert torch.equal(reference_figures(trainer), before[-1]), "training does not move it"
    losses = rounded(history(copied, "loss"))
    assert rounded(history(named, "loss")) == rounded(history(known, "loss")) == losses
    assert history(adapted, "rewards/margins")[-1] > 0 and losses[-1] < losses[0]


def test_figures_that_are_kept_are_found_again_and_depend_on_what_is_shown(llava, tmp_path, capsys):
    rows = pairs_about("llava")
    options = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 3, **MDPO}
    live = dpo(llava, tmp_path / "live", rows, **MDPO, per_device_train_batch_size=3)
    first = dpo(llava, tmp_path / "first", rows, eval_dataset={"a": rows[:2], "b": rows[2:]}, **options)
    assert capsys.readouterr().out.count("kept in") == 3
    batch, expected = batch_of(first), batch_of(live)
    figures = live.reference.log_probs(live.model, expected)
    torch.testing.assert_close(first.reference.log_probs(None, batch), figures, rtol=1e-4, atol=1e-5)
    figures = live.reference.log_probs(live.model, expected.corrupted)
    torch.testing.assert_close(first.reference.log_probs(None, batch.corrupted), figures, rtol=1e-4, atol=1e-5)

    def runs(rows, **changed):
        dpo(llava, tmp_path / "again", rows, **{**options, **changed})
        return "from cache" not in capsys.readouterr().out

    assert not runs([dict(row) for row in rows], beta=0.5, learning_rate=1e-5, per_device_train_batch_size=2)
    changed = [{**row, "images": [image.copy() for image in row["images"]]} for row in rows]
    assert not runs(changed)
    changed[2]["images"][0].putpixel((0, 0), (1, 2, 3))
    assert runs(changed)
    assert runs([{**rows[0], "chosen": "blue"}, *rows[1:]])
    assert runs(rows, image_corruption="blank")
    assert runs(rows, max_pixels=400)


def test_files_count_as_they_are_now(llava, tmp_path, capsys):
    file = tmp_path / "picture.png"
    picture(1).save(file)
    rows = [{**row, "images": [str(file)]} for row in pairs_about("llava", 2)]
    options = {"precompute_ref_log_probs": True}
    dpo(llava, tmp_path / "first", rows, **options)
    picture(2, 48, 48).save(file)
    dpo(llava, tmp_path / "second", rows, **options)
    assert capsys.readouterr().out.count("kept in") == 2


def test_rows_that_are_left_out_are_left_out_of_what_is_kept(llava, tmp_path):
    rows = pairs_about("llava")
    rows[1] = {**rows[1], "prompt": [{"role": "user", "content": "What? " * 90}]}
    options = {"precompute_ref_log_probs": True, "on_bad_row": "skip", "max_prompt_length": 100}
    trainer = dpo(llava, tmp_path, rows, max_steps=2, **options)
    assert len(trainer.train_dataset[1]["chosen_ref_logp"]) == 0 < len(trainer.train_dataset[2]["chosen_ref_logp"])
    trainer.train()
    assert all(math.isfinite(loss) for loss in history(trainer, "loss"))
    assert "left out" in trainer.row_notes[1]


def test_rows_that_cannot_be_read_are_left_out_of_what_is_kept(llava, tmp_path):
    rows = [
        *pairs_about("llava", 2),
        {"prompt": "What?", "images": [picture(5)], "chosen": "<image>", "rejected": "b"},
    ]
    with pytest.raises(DataError, match="row 2: chosen shows an image"):
        dpo(llava, tmp_path / "error", rows, precompute_ref_log_probs=True)
    trainer = dpo(llava, tmp_path / "skip", rows, precompute_ref_log_probs=True, on_bad_row="skip", max_steps=2)
    trainer.train()
    assert len(trainer.train_dataset[2]["chosen_ref_logp"]) == 0 and "left out" in trainer.row_notes[2]


def test_what_is_kept_depends_on_which_rows_are_left_out_and_on_a_function_of_ones_own(llava):
    rows = Rows(pairs_about("llava"))

    def key(**options):
        return content_of(rows, pair_collator(llava, "skip", **options))

    assert key() == key() and key(needs_image=True) != key()
    assert key(corrupt=Corruption("crop", 1)) == key(corrupt=Corruption("crop", 1)) != key(corrupt=Corruption("crop"))

    def corrupt(image, row, place):
        return image

    assert key(corrupt=corrupt) != key(corrupt=corrupt), "what it does is not known"


def test_all_losses_of_the_family_and_mpo(llava, tmp_path):
    trainer = dpo(llava, tmp_path, per_device_train_batch_size=4)
    loud(trainer.model)
    batch, seen = batch_of(trainer), {}
    found, _ = trainer.pairs(trainer.model, batch)
    for name in PAIRED:
        smoothing = 0.1 if name == "exo_pair" else 0.0
        args = VLMDPOConfig(output_dir=str(tmp_path), loss_type=[name], label_smoothing=smoothing)
        losses = dpo_objective(args)(found)
        seen[name] = losses.total(pairs=4, tokens=found.chosen_tokens.sum()).item()
        assert math.isfinite(seen[name])
    assert len(set(rounded(seen.values()))) > len(PAIRED) - 4
    mpo = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    mixed = dpo_objective(VLMDPOConfig(output_dir=str(tmp_path), **mpo))(found)
    expected = 0.8 * seen["sigmoid"] + 0.2 * seen["bco_pair"] + seen["sft"]
    assert mixed.total(pairs=4, tokens=found.chosen_tokens.sum()).item() == pytest.approx(expected, rel=1e-5)
    trained = dpo(llava, tmp_path, **mpo)
    trained.train()
    assert history(trained, "loss")[-1] < history(trained, "loss")[0] and history(trained, "loss/sft")


def test_a_step_does_not_depend_on_how_it_is_cut(llava, tmp_path):
    gradients = []
    for size, pieces in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": pieces, "max_steps": 1, **MDPO}
        trainer = dpo(llava, tmp_path / str(size), train_sampling_strategy="sequential", **options)
        trainer.train()
        gradients.append(history(trainer, "grad_norm")[0])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_the_image_term_teaches_to_look(llava, tmp_path):
    """Trained on it alone, the chosen answer becomes likelier beside its own image than beside the corrupted one."""
    rows = pairs_about("llava", 2)
    options = {"image_loss_weight": 1.0, "loss_weights": [0.0], "image_corruption": "noise", "max_steps": 8}
    trainer = dpo(loud(AutoModelForImageTextToText.from_pretrained(llava)), tmp_path, rows, **options)

    @torch.no_grad()
    def ahead():
        found, _ = trainer.pairs(trainer.model, batch_of(trainer, 2))
        return (found.u - found.w).mean().item()

    assert ahead() == pytest.approx(0.0, abs=1e-4)
    trainer.train()
    assert ahead() > 0.05 and history(trainer, "loss/image")[-1] < history(trainer, "loss/image")[0]


def test_checkpointing_gives_the_same_run(llava, tmp_path):
    losses = []
    for on in (False, True):
        trainer = dpo(llava, tmp_path / str(on), activation_checkpointing=on)
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_what_is_told_before_and_after(llava, tmp_path):
    rows = [{**row, "shapes": ["circle"] * at} for at, row in enumerate(pairs_about("llava"))]

    def absent(prompt, answer, shapes):
        assert prompt.startswith("What colour is")
        return len(shapes) / 4

    absent.figure, absent.lower_is_better = "absent", True

    def length(prompt, answer):
        return len(answer)

    options = {"eval_answers": 4, "max_new_tokens": 3, "eval_dataset": rows, "judge": [absent, length]}
    trainer = dpo(llava, tmp_path, rows, max_steps=6, learning_rate=5e-3, **options)
    trainer.train()
    before, after = trainer.report.before, trainer.report.after
    assert before["preference_accuracy"] == before["win_rate"] == 0.5 < after["preference_accuracy"]
    assert before["absent"] == 0.375 and "judge_score" in after and after["logps/chosen"] != before["logps/chosen"]
    sample = trainer.report.samples[0]
    assert sample.columns["absent"] == "0.00" and sample.question.startswith("What colour is") and sample.images


def test_a_column_that_a_judge_lacks_is_told_before_anything_is_run(llava, tmp_path):
    def judge(prompt, answer, shapes):
        return 0

    rows = pairs_about("llava")
    with pytest.raises(UserError, match="judge takes shapes, which"):
        dpo(llava, tmp_path, rows, eval_dataset=rows, judge=judge, eval_answers=2)
    assert dpo(llava, tmp_path, rows, judge=judge).judges == [judge], "no rows to judge by"


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut(llava, tmp_path):
    whole = dpo(llava, tmp_path / "whole", max_steps=4)
    whole.train()
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    dpo(llava, tmp_path / "cut", **steps).train()
    second = dpo(llava, tmp_path / "cut", **steps)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_parts_can_be_left_as_they_are(llava, tmp_path):
    trainer = dpo(llava, tmp_path, freeze_vision_tower=True)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and not any("vision_tower" in name for name in moved)


def test_an_engine_that_shards_needs_an_image_in_each_row(llava, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "shards_the_model", lambda: True)
    with pytest.raises(DataError, match="row 1: has no image; with an engine"):
        dpo(llava, tmp_path, [{**row, "images": []} if at else row for at, row in enumerate(pairs_about("llava", 2))])


def test_what_is_wrong_is_said_before_a_model_is_loaded(llava, tmp_path, tiny, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(preference, "load_vlm", never)
    rows = pairs_about("llava")
    asked = [{**row, "question": "What?", "prompt": None} for row in rows if isinstance(row["chosen"], str)]
    cases = [
        (asked, {}, DataError, "its column question looks like one"),
        ([{"messages": []}], {}, DataError, "`chosen`, `rejected`"),
        ([*rows[:3], {**rows[3], "images": ["nowhere.png"]}], {"check_rows": 4}, DataError, "row 3: image"),
        (rows, {"max_prompt_length": 3}, DataError, "row 0: its prompt has"),
        (rows, {"loss_type": ["sigmiod"]}, UserError, "sigmoid"),
        (rows, {"image_loss_weight": -1.0}, UserError, "image_loss_weight"),
        (rows, {"image_loss_weight": 1.0, "ld_alpha": 0.5}, UserError, "ld_alpha and image_loss_weight"),
        (rows, {"anchor": 0.5}, UserError, "anchor_loss_weight"),
        (rows, {"max_length": 512}, UserError, "max_completion_length"),
        (rows, {**MDPO, "data_collator": pair_collator(llava)}, UserError, "corrupts no image"),
        (rows, {"precompute_ref_log_probs": True, "sync_ref_model": True}, UserError, "exclude"),
        (rows, {"ref_model_name_or_path": str(tmp_path / "none")}, UserError, "none"),
        (rows, {"judge": "math.nothing"}, UserError, "no such function"),
        (rows, {"eval_strategy": "epoch"}, UserError, "held-out rows"),
        (rows, {"data_collator": list}, UserError, "VLMPairCollator"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            dpo(llava, tmp_path, given, **options)
    with pytest.raises(UserError, match="text-only"):
        dpo(tiny("lm"), tmp_path, rows)
    with pytest.raises(UserError, match="reference model is of the family qwen2_vl .* the model of llava"):
        dpo(llava, tmp_path, rows, ref_model=str(tiny("qwen2_vl")))
    with pytest.raises(UserError, match="ref_model is a int"):
        dpo(llava, tmp_path, rows, ref_model=5)
    with pytest.raises(UserError, match="compute_metrics"):
        VLMDPOTrainer(str(llava), args=VLMDPOConfig(str(tmp_path)), train_dataset=rows, compute_metrics=len)


def test_a_collator_of_ones_own(llava, tmp_path):
    collator = pair_collator(llava, pad_to_multiple_of=64)
    trainer = dpo(llava, tmp_path, data_collator=collator, max_steps=1)
    trainer.train()
    assert batch_of(trainer).completion_ids.shape[1] == 64 and trainer.train_dataset[0][ROW] == 0
