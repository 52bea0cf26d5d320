"""A fifth of the default run of scripts/detoxification.py makes comments less rude, and leaves them sentences."""

import pytest
import yaml

from shared.builtin import RECIPES, load_dataset
from textalign import PPOConfig, PPOTrainer


@pytest.mark.slow
def test_comments_get_less_rude_and_stay_sound(tmp_path):
    recipe = yaml.safe_load((RECIPES / "detoxification.yaml").read_text())
    model, data = recipe.pop("model_name_or_path"), recipe.pop("dataset_name")
    options = {**recipe, "max_steps": 32, "eval_strategy": "no", "eval_on_start": False, "eval_answers": 0}
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **options)
    rows = {split: load_dataset(data, split) for split in ("train", "test")}
    trainer = PPOTrainer(model, args=args, train_dataset=rows["train"], eval_dataset=rows["test"])
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("toxicity:toxic", "rude_reward"):
        first, last = (figures[f"eval_rewards/{name}/mean"] for figures in (before, after))
        assert first > 0.75 and last < first - 0.2, (name, first, last)
    assert after["eval_rewards/sound_reward/mean"] > before["eval_rewards/sound_reward/mean"] - 0.15
