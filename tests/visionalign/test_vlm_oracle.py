"""VLM DPO against what trl's trainer gave; tests/oracles/record_trl_vlm.py recorded it."""

import json
from pathlib import Path

import pytest
from oracles.vlm_rows import POLICY, REFERENCE, TEMPLATES, rows
from oracles.weights import fill
from transformers import AutoModelForImageTextToText, AutoProcessor

from visionalign import VLMDPOConfig, VLMDPOTrainer

RECORD = json.loads((Path(__file__).parent.parent / "oracles" / "trl-vlm-1.16.0.json").read_text(encoding="utf-8"))
CASES = [pytest.param(name, case, id=f"{name}-{case['loss_type']}") for name in RECORD for case in RECORD[name]]


def loaded(path, weights):
    return fill(AutoModelForImageTextToText.from_pretrained(path), **weights)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_loss_rewards_and_tokens_are_trls(family, case, tiny, tmp_path):
    path = tiny(family)
    processor = AutoProcessor.from_pretrained(path)
    processor.chat_template = TEMPLATES[family]
    args = VLMDPOConfig(
        output_dir=str(tmp_path),
        beta=0.2,
        loss_type=case["loss_type"],
        loss_weights=case["loss_weights"],
        per_device_eval_batch_size=3,
        max_steps=1,
        eval_answers=0,
    )
    trainer = VLMDPOTrainer(
        loaded(path, POLICY),
        loaded(path, REFERENCE),
        args,
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=processor,
    )
    batch = trainer.data_collator(rows())
    answers = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)
    ]
    assert answers[0::2] + answers[1::2] == case["completions"]  # trl's rows: all chosen ones, then all rejected ones

    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(case["loss"], rel=1e-4)
    assert case["metrics"]
    for name, value in case["metrics"].items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-4), name
