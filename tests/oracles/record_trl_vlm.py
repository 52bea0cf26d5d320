"""Records what trl's DPO trainer makes of pairs about images, for tests/visionalign/test_vlm_oracle.py.

    pip install trl==1.16.0 torch torchvision transformers datasets
    PYTHONPATH=tests python tests/oracles/record_trl_vlm.py        # writes trl-vlm-1.16.0.json

Tiny models of tests/tiny.py with weights from `weights.fill` see a few rows with one image each. Their templates are
changed, so that an answer ends where the turn does. With a template as it is trl differs: it counts the line break
behind ChatML's end of turn, and LLaVA's answers, whose template closes no turn, have no end at all. Of the other
families it cannot take Mllama and PaliGemma.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from weights import fill

sys.path.append(str(Path(__file__).parent.parent))  # last: its folders bear the packages' names

from tiny import build_vlm
from vlm_rows import POLICY, REFERENCE, TEMPLATES, rows

LOSSES = (["sigmoid"], ["ipo"], ["sigmoid", "bco_pair", "sft"])


def loaded(folder, weights):
    return fill(AutoModelForImageTextToText.from_pretrained(folder), **weights)


def cases(family, folder):
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = TEMPLATES[family]
    for losses in LOSSES:
        weights = [0.8, 0.2, 1.0] if len(losses) == 3 else None
        args = trl.DPOConfig(
            output_dir=str(folder / "out"),
            beta=0.2,
            loss_type=losses,
            loss_weights=weights,
            per_device_train_batch_size=len(rows()),
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        policy, reference = loaded(folder, POLICY), loaded(folder, REFERENCE)
        trainer = trl.DPOTrainer(
            policy, reference, args, train_dataset=Dataset.from_list(rows()), processing_class=processor
        )
        batch = DataCollatorForVisionPreference(processor)(rows())
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        told = {name: values[-1] for mode in trainer._metrics.values() for name, values in mode.items()}
        completions = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        yield {
            "loss_type": losses,
            "loss_weights": weights,
            "loss": float(f"{loss.item():.9g}"),
            "metrics": {
                name: float(f"{told[name]:.9g}") for name in sorted(told) if name.startswith(("rew", "logps"))
            },
            "completions": completions,
        }


def main():
    record = {}
    for family in TEMPLATES:
        with tempfile.TemporaryDirectory() as folder:
            record[family] = list(cases(family, build_vlm(family, folder)))
    path = Path(__file__).parent / f"trl-vlm-{trl.__version__}.json"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
