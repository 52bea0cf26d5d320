"""Pictures of the same prompts during a run: when they are sampled, where they go, and what an evaluation says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from shared.data.rows import ROW, Rows
from shared.rewards.base import Sample
from shared.rewards.combine import RewardSet
from shared.runtime.options import option
from shared.trainers.config import AlignConfig
from shared.trainers.online import OnlineTrainer
from shared.trainers.online_config import OnlineConfig
from shared.trainers.online_options import RolloutOptions
from shared.trainers.rewarding import check_best_metric
from shared.trainers.rollout import MicroBatch, Rollout

PROMPTS = [f"prompt {at}" for at in range(8)]


@dataclass
class PaintOptions(RolloutOptions):
    pass_reward: float | None = option(None, "None: no pass@k.")


@dataclass
class PaintConfig(OnlineConfig, PaintOptions, AlignConfig):
    run_name_stem: ClassVar[str] = "paint"


class Brush(nn.Module):
    """Paints pictures of one grey, which is its only weight."""

    def __init__(self):
        super().__init__()
        self.grey = nn.Parameter(torch.tensor(0.25))

    dtype = torch.float32


class Painter:
    """An actor whose pictures are the brush's grey and noise that follows from the row and its copy."""

    exact, unit, makes_images = True, "step", True

    def __init__(self):
        self.seen: list[tuple[str, list[int]]] = []

    def act(self, model, rows, group_size, *, random=None, mode="train"):
        self.seen.append((mode, [row[ROW] for row in rows]))
        samples = []
        for row in rows:
            for copy in range(group_size):
                noise = torch.Generator().manual_seed(1000 * row[ROW] + copy)
                picture = model.grey.detach() + 0.1 * torch.rand(3, 4, 4, generator=noise)
                samples.append(Sample(row["prompt"], picture.clamp(0, 1), row))
        count = len(samples)
        return Rollout(samples, group_size, None, torch.full((count,), 5), torch.zeros(count, dtype=torch.bool))

    def check(self, row):
        return None

    def refresh(self, trainer):
        pass

    def question(self, row):
        return [], row["prompt"]

    def shown(self, sample):
        return [], sample.prompt, ""


class Painting(OnlineTrainer):
    """Makes the brush brighter at every step."""

    def finish_round(self, rollout):
        return {"reward": float(rollout.total.mean())}

    def micro_batch(self, buffer, rows):
        batch = SimpleNamespace(to=lambda device: batch)
        return MicroBatch(batch, buffer.rollout, rows, (len(rows), 5 * len(rows)), True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return -model.grey


def brightness(completions, **_):
    return [float(picture.mean()) for picture in completions]


def make(folder, *, rows=None, callbacks=None, reward: Any = brightness, **given):
    options = {"output_dir": str(folder), "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 5}
    options |= {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1}
    options |= {"eval_answers": 4, "sample_every": 2, "save_strategy": "no", "disable_tqdm": True}
    held_out = given.pop("eval_dataset", Rows([{"prompt": prompt} for prompt in PROMPTS]))
    args = PaintConfig(**{**options, **given})
    return Painting(
        Brush(),
        args,
        policy=None,
        actor=Painter(),
        rewards=RewardSet(reward),
        train_dataset=rows or Rows([{"prompt": f"train {at}"} for at in range(4)]),
        eval_dataset=held_out,
        callbacks=callbacks,
    )


def greys(trainer):
    """The mean grey of the first prompt's pictures, column by column."""
    firsts = [column.pictures[0].image() for column in trainer.report.grid.columns]
    return [float(np.asarray(image).mean()) / 255 for image in firsts]


def test_the_same_prompts_are_painted_before_every_so_many_steps_and_last(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    grid = trainer.report.grid
    assert [column.step for column in grid.columns] == [0, 2, 4, 5]
    assert grid.prompts == [PROMPTS[at * 8 // 6] for at in range(6)]
    found = greys(trainer)
    for grey, column in zip(found, grid.columns, strict=True):
        assert grey == pytest.approx(found[0] + 0.1 * column.step, abs=0.005)  # the noise is the same
        assert column.rewards[0] == pytest.approx(grey, abs=0.005)
    assert (tmp_path / "report" / "pictures.png").is_file()


def test_a_run_with_pictures_is_the_run_without_but_for_the_clock(tmp_path):
    logs = []
    for every in (2, 0):
        trainer = make(tmp_path / str(every), sample_every=every, eval_answers=0)
        trainer.train()
        logs.append([entry["reward"] for entry in trainer.state.log_history if "reward" in entry])
        assert bool(trainer.report.grid.columns) == bool(every)
        assert trainer.report.rollouts[0].rows[0].output_images if every else trainer.report.rollouts == []
    assert logs[0] == logs[1] and len(logs[0]) == 5


def test_without_held_out_rows_prompts_of_the_training_are_painted(tmp_path):
    trainer = make(tmp_path, eval_dataset=None, max_steps=1)
    trainer.train()
    assert trainer.report.grid.prompts == [f"train {at}" for at in range(4)]


def test_a_resumed_run_keeps_the_columns_that_it_had(tmp_path):
    make(tmp_path, max_steps=5, save_strategy="steps", save_steps=3).train()
    resumed = make(tmp_path, max_steps=7, save_strategy="no")
    resumed.actor.state = lambda rollout: {}
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [column.step for column in resumed.report.grid.columns] == [0, 2, 4, 6, 7]
    before = json.loads((tmp_path / "report" / "report.json").read_text())["grid"]["columns"]
    assert before[0]["rewards"][0] == pytest.approx(greys(resumed)[0], abs=0.005)
    assert all(sample.before_images and sample.after_images for sample in resumed.report.samples)


def test_where_the_best_checkpoint_is_kept_the_last_pictures_are_its(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "greater_is_better": False, "metric_for_best_model": "reward"}
    trainer = make(tmp_path, max_steps=3, **steps, **best)
    trainer.train()
    assert [column.heading for column in trainer.report.grid.columns] == ["before", "step 2", "kept: step 1"]
    found = greys(trainer)
    assert found[-1] == pytest.approx(found[0] + 0.1, abs=0.005)


def test_answers_are_pictures_and_figures_have_no_words_of_tokens(tmp_path, capsys):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=5, log_completions=True)
    trainer.train()
    samples = trainer.report.samples
    assert [sample.question for sample in samples] == PROMPTS[::2]
    assert all(sample.before_images and sample.after_images and not sample.answer for sample in samples)
    assert samples[0].before.startswith("brightness 0.") and samples[0].before != samples[0].after
    assert trainer.report.after["brightness"] == pytest.approx(trainer.report.before["brightness"] + 0.5, abs=0.01)
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"images_per_second/generation", "images_per_second/update", "eval_reward"} <= names
    assert not [name for name in names if "completions" in name or "token" in name or "pass@" in name]
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "samples_per_second" in figures["throughput"] and "tokens_per_second" not in figures["throughput"]
    printed = capsys.readouterr().out
    assert "Rollouts at step 1" in printed and "tensor(" not in printed and "[[" not in printed


def test_passes_are_counted_where_a_reward_says_what_passes(tmp_path):
    trainer = make(tmp_path, pass_reward=0.29)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_pass@1"] < metrics["eval_pass@2"] <= 1


def test_the_best_metric_is_one_that_an_evaluation_of_pictures_has(tmp_path):
    trainer = make(tmp_path)
    args = SimpleNamespace(**{**vars(trainer.args), "eval_strategy": "steps"})
    for name, good in (("eval_reward", True), ("rewards/brightness/mean", True), ("completions/mean_length", False)):
        args.metric_for_best_model = name
        if good:
            check_best_metric(trainer, args, ["brightness"], None, unit="step")
        else:
            with pytest.raises(ValueError, match="no such metric; there are: reward, rewards/brightness/mean"):
                check_best_metric(trainer, args, ["brightness"], None, unit="step")


def test_a_trainer_without_rewards_has_pictures_alone(tmp_path):
    trainer = make(tmp_path, max_steps=1, eval_answers=0)
    trainer.train()
    del trainer.rewards
    picture = next(each for each in trainer.callback_handler.callbacks if type(each).__name__ == "Pictures")
    picture._sample()
    assert trainer.report.grid.columns[-1].rewards == [None] * 6 and len(trainer.report.grid.prompts) == 6


class Tracker:
    """What a tracker's library is asked for."""

    run = "a run"

    def __init__(self):
        self.logged: list[dict[str, Any]] = []

    def Image(self, image, caption):  # noqa: N802
        return image, caption

    def log(self, given):
        self.logged.append(given)


class Writer:
    def __init__(self):
        self.images, self.texts = [], []

    def add_images(self, tag, images, step, dataformats):
        self.images.append((tag, images.shape, step, dataformats))

    def add_text(self, tag, text, step=None):
        self.texts.append((tag, text, step))


def tracker(kind, **attributes):
    """transformers' callback of a tracker without its library; it takes no part in the run."""
    made = type(f"Fake{kind.__name__}", (kind,), {"__init__": lambda self: None})()
    for name in ("on_train_begin", "on_log", "on_train_end", "on_save"):
        setattr(made, name, lambda *args, **kwargs: None)
    vars(made).update(attributes)
    return made


def test_trackers_get_the_pictures_and_the_rollouts(tmp_path):
    wandb, trackio, writer = Tracker(), Tracker(), Writer()
    callbacks = [
        tracker(TensorBoardCallback, tb_writer=writer),
        tracker(WandbCallback, _wandb=wandb),
        tracker(TrackioCallback, _trackio=trackio, _initialized=True),
    ]
    make(tmp_path, max_steps=2, callbacks=callbacks).train()
    assert [(tag, shape, step) for tag, shape, step, _ in writer.images] == [
        ("pictures", (6, 144, 144, 3), 0),
        ("rollouts", (4, 144, 144, 3), 0),
        ("pictures", (6, 144, 144, 3), 2),
    ]
    assert {layout for *_, layout in writer.images} == {"NHWC"}
    assert writer.texts[0][0] == "pictures/captions" and writer.texts[0][1].startswith("1. prompt 0 (0.")
    assert [entry["train/global_step"] for entry in wandb.logged] == [0, 0, 2]
    image, caption = wandb.logged[0]["pictures"][0]
    assert (
        isinstance(image, Image.Image) and caption.startswith("prompt 0 (0.") and len(wandb.logged[1]["rollouts"]) == 4
    )
    assert [sorted(entry)[:2] for entry in trackio.logged[::2]] == [["pictures/1", "pictures/2"]] * 2


def test_trackers_that_do_not_run_get_nothing(tmp_path):
    wandb, trackio = Tracker(), Tracker()
    wandb.run = None
    callbacks = [
        tracker(TensorBoardCallback, tb_writer=None),
        tracker(WandbCallback, _wandb=wandb),
        tracker(TrackioCallback, _trackio=trackio, _initialized=False),
    ]
    make(tmp_path, max_steps=1, callbacks=callbacks).train()
    assert wandb.logged == [] and trackio.logged == []
