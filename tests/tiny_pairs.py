"""Preference rows about noise, and VLM DPO trainers on the tiny models."""

from __future__ import annotations

from tiny_clips import FEW
from tiny_pictures import pictures
from transformers import AutoProcessor

from shared.data.schema import Kind
from visionalign import VLMDPOConfig, VLMDPOTrainer
from visionalign.collators import VLMCollator
from visionalign.families import family_of
from visionalign.pairs import VLMPairCollator
from visionalign.video import video_reader


def pairs_about(family, count=4):
    """Pairs of unlike length: strings and chats, with one image, several and, where the family allows it, none."""
    rows = []
    for at in range(count):
        row = {
            "prompt": f"What colour is {'the ' * (at % 3)}circle?",
            "chosen": "red and blue" if at % 2 else "red",
            "rejected": "the square is green" if at % 3 else "no circle",
            "images": pictures(at, family),
        }
        if family != "paligemma" and at % 3 == 1:
            row |= {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
        rows.append(row)
    return rows


def pair_collator(path, on_bad_row="error", **options):
    from transformers import AutoConfig

    processor, family = AutoProcessor.from_pretrained(path), family_of(AutoConfig.from_pretrained(path))
    videos = video_reader(family, processor, FEW)
    collator = VLMCollator(processor, family=family, kind=Kind.PROMPT_ONLY, on_bad_row=on_bad_row, videos=videos)
    return VLMPairCollator(collator, **options)


def dpo(model, folder, rows=None, *, family="llava", ref_model=None, peft_config=None, **options):
    """A trainer of three steps on four pairs."""
    rest = {key: options.pop(key) for key in ("eval_dataset", "judge", "data_collator") if key in options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "eval_answers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    rows = pairs_about(family) if rows is None else rows
    model = model if hasattr(model, "forward") else str(model)
    args = VLMDPOConfig(**config)
    return VLMDPOTrainer(model, ref_model, args, train_dataset=rows, peft_config=peft_config, **rest)


def history(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]
