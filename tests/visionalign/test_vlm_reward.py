"""VLMRewardTrainer on tiny models: what it learns, what its loss is, and what is trained and saved."""

import json
import math

import pytest
import torch
from PIL import Image
from tiny_pairs import pairs_about
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

from shared.errors import DataError, UserError
from visionalign import VLMRewardConfig, VLMRewardTrainer
from visionalign.rewards import VLMRewardModel

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def coloured(number, **more):
    """Which answer is right can be told by the image alone."""
    right, wrong = list(COLOURS)[:: 1 if number % 2 else -1]
    image = Image.new("RGB", (32, 32), COLOURS[right])
    return {"images": [image], "prompt": "What colour ?", "chosen": f"the {right}", "rejected": f"the {wrong}", **more}


def trainer(path, folder, rows=None, *, family="llava", eval_dataset=None, peft_config=None, **options):
    config = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_answers": 0,
        "disable_tqdm": True,
        **options,
    }
    rows = pairs_about(family) if rows is None else rows
    args = VLMRewardConfig(**config)
    model = path if hasattr(path, "forward") else str(path)
    return VLMRewardTrainer(model, args, train_dataset=rows, eval_dataset=eval_dataset, peft_config=peft_config)


def weights(made):
    return {name: value.clone() for name, value in made.model.state_dict().items()}


def rewards(made, rows):
    made.model.eval()
    with torch.no_grad():
        return made.policy.rewards(made.model, made.data_collator(rows))


def test_it_learns_to_look_and_the_report_shows_it(tiny, tmp_path, caplog, capsys):
    rows = [coloured(at) for at in range(12)]
    options = {"max_steps": 28, "per_device_train_batch_size": 6, "eval_answers": 3}
    made = trainer(tiny("llava"), tmp_path, rows, eval_dataset=[coloured(at) for at in range(12, 16)], **options)
    said = capsys.readouterr().out
    assert "no score head yet: one is drawn (seed 42)" in said and "LOAD REPORT" not in caplog.text
    made.train()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["before"]["accuracy"] < 1.0 == report["after"]["accuracy"]
    assert report["after"]["margin"] > report["before"]["margin"] + 0.5
    assert {"accuracy", "margin", "mean_reward"} <= set(report["curves"])
    sample = report["samples"][0]
    assert len(report["samples"]) == 3 and sample["images"] == 1 and sample["question"] == "What colour ?"
    assert sample["after"].startswith("right: chosen ")
    assert sample["columns"] == {"chosen": "the blue", "rejected": "the red"}

    made.save_model()
    reward = VLMRewardModel(str(tmp_path))
    pictures = [Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()]
    red, blue = (reward(["What colour ?"] * 2, ["the red", "the blue"], images=[[each]] * 2) for each in pictures)
    assert red[0] > red[1] and blue[1] > blue[0]


@pytest.mark.parametrize("family", ["qwen2_vl", "paligemma"])
def test_the_loss_is_that_of_the_formula(family, tiny, tmp_path):
    rows = [{**row, "margin": 0.5 * at} for at, row in enumerate(pairs_about(family, 3))]
    options = {"center_rewards_coefficient": 0.1, "per_device_eval_batch_size": 2, "family": family}
    made = trainer(tiny(family), tmp_path, rows, eval_dataset=rows, **options)
    with torch.no_grad():
        made.model.score.weight.mul_(20)  # rewards that are not near zero
    pairs = [rewards(made, [made.train_dataset[at]]).tolist() for at in range(3)]
    losses = [
        math.log1p(math.exp(-(w - r - row["margin"]))) + 0.1 * (w + r) ** 2
        for (w, r), row in zip(pairs, rows, strict=True)
    ]
    found = made.evaluate()
    assert found["eval_loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert found["eval_accuracy"] == pytest.approx(sum(w > r for w, r in pairs) / 3)
    assert found["eval_margin"] == pytest.approx(sum(w - r for w, r in pairs) / 3, abs=1e-5)


def test_an_adapter_is_saved_with_its_score(tiny, tmp_path):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig

    peft = LoraConfig(r=2, target_modules=".*language_model.*(q_proj|v_proj)")
    made = trainer(tiny("llava"), tmp_path, peft_config=peft, learning_rate=1e-2)
    made.train()
    made.save_model()
    head = made.model.get_base_model().score
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    rows = [made.train_dataset[at] for at in range(3)]
    expected = rewards(made, rows)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(loaded.get_base_model()).__name__ == "LlavaForSequenceClassification"
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[name] for row in rows for name in ("chosen", "rejected")]
    images = [row["images"] for row in rows for _ in range(2)]
    assert VLMRewardModel(str(tmp_path))(prompts, answers, images=images) == pytest.approx(expected.tolist(), abs=1e-5)
    more = trainer(tiny("llava"), tmp_path / "more", peft_config=str(tmp_path))
    torch.testing.assert_close(rewards(more, rows), expected, rtol=1e-4, atol=1e-5)


def test_frozen_parts_stay_and_the_head_is_trained(tiny, tmp_path):
    frozen = {f"freeze_{part}": True for part in ("vision_tower", "projector", "language_model")}
    made = trainer(tiny("gemma3"), tmp_path, family="gemma3", **frozen)
    before = weights(made)
    made.train()
    changed = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert changed == {"score.weight"}


def test_what_is_saved_can_be_trained_further_and_loaded_by_transformers(tiny, tmp_path):
    made = trainer(tiny("idefics3"), tmp_path, family="idefics3")
    made.train()
    made.save_model()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, weights(made)[name]) for name, value in plain.state_dict().items())
    more = trainer(tmp_path, tmp_path / "more", family="idefics3", max_steps=1)
    assert torch.equal(more.model.score.weight, made.model.score.weight)
    more.train()
    assert not torch.equal(more.model.score.weight, made.model.score.weight)


def test_the_padding_is_neither_an_end_nor_an_images_place(tiny, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny("qwen2_vl"))
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    made = VLMRewardTrainer(
        str(tiny("qwen2_vl")),
        VLMRewardConfig(output_dir=str(tmp_path)),
        train_dataset=pairs_about("qwen2_vl"),
        processing_class=processor,
    )
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert made.model.config.get_text_config().pad_token_id == processor.tokenizer.pad_token_id == made.policy.pad


def test_bad_rows_can_be_left_out(tiny, tmp_path):
    rows = [*pairs_about("llava", 3), {**pairs_about("llava", 1)[0], "images": [b"no picture"]}]
    with pytest.raises(DataError, match="row 3"):
        trainer(tiny("llava"), tmp_path, rows)
    options = {"on_bad_row": "skip", "check_rows": 1, "eval_answers": 4, "per_device_eval_batch_size": 2}
    made = trainer(tiny("llava"), tmp_path, rows, eval_dataset=rows, **options)
    made.train()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert len(report["samples"]) == 3 and made.row_notes[3].startswith("left out: ")


def test_what_cannot_be_trained_is_named(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match="compute_metrics is not taken"):
        VLMRewardTrainer(str(tiny("llava")), compute_metrics=len, train_dataset=pairs_about("llava"))
    with pytest.raises(UserError, match="text-only"):
        trainer(tiny("lm"), tmp_path)
    answering = AutoModelForImageTextToText.from_pretrained(tiny("llava"))
    with pytest.raises(UserError, match="is a LlavaForConditionalGeneration, but this trainer needs"):
        trainer(answering, tmp_path)
    three = AutoModelForSequenceClassification.from_pretrained(tiny("llava"), num_labels=3)
    with pytest.raises(UserError, match="with 3 labels"):
        trainer(three, tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tiny("llava"), num_labels=1)
    adapted = get_peft_model(scorer, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="does not train the score head"):
        trainer(adapted, tmp_path)
    with pytest.raises(UserError, match="center_rewards_coefficient -1"):
        VLMRewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=-1.0)
    with pytest.raises(DataError, match="chosen"):
        trainer(tiny("llava"), tmp_path, [{"prompt": "a", "completion": "b"}])
