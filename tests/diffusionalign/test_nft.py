"""DiffusionNFT: the loss of a step by hand, the model that draws, and what a run must not depend on."""

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from diffusionalign import DiffusionNFTConfig, DiffusionNFTTrainer
from diffusionalign.nft import OLD_ADAPTER
from shared.errors import UserError
from shared.trainers.reference import FrozenCopy
from shared.trainers.reference_adapter import adapter_in_use, adapter_tensors
from shared.trainers.rollout import Buffer


def brightness(images, prompts):
    return [float(image.mean()) for image in images]


def nft(kind, folder, peft_config="lora", **options):
    config = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 2,
        "num_inference_steps": 3,
        "noise_levels": 2,
        "eval_num_inference_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_answers": 0,
        "sample_every": 0,
        "disable_tqdm": True,
        **options,
    }
    args = DiffusionNFTConfig(**config)
    rows = {"train_dataset": ["a", "b c", "dd"], "eval_dataset": ["e", "f"]}
    return DiffusionNFTTrainer(tiny_pipeline(kind), brightness, args, peft_config=peft_config, **rows)


def moved(trainer, scale=0.1):
    """The trainer with its trained weights changed at random."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=random)
    return trainer


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def gap(left, right):
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).detach().abs().max().item() for name in left)


@pytest.mark.parametrize("kind", ["sd3", "sd"])
def test_the_loss_of_a_round_by_hand(kind, tmp_path):
    trainer = moved(nft(kind, tmp_path, beta=0.3, nft_beta=0.5, advantage_clip=2.0))
    rollout = trainer._round()
    buffer = Buffer(rollout, [[0, 1, 2, 3]], 1, born=0)
    micro = trainer.micro_batch(buffer, [0, 1, 2, 3])
    batch, schedule, adapter = micro.batch, trainer.actor.schedule, trainer.adapter
    assert micro.counts == (4, 8) and batch.at.shape == (4, 2) and torch.equal(batch.clean, rollout.actions.final)
    trainer.step_sums = {"rows": torch.tensor(4.0), "actions": torch.tensor(8.0)}
    micros = [replace(micro, batch=part) for part in batch.parts(3)]
    parts = [trainer.compute_loss(trainer.model, each).item() for each in micros]

    expected = 0.0
    for row in range(4):
        good = min(max(rollout.advantages[row].item() / 4 + 0.5, 0), 1)
        told = adapter.encode_prompts([rollout.samples[row].prompt])
        for draw in range(2):
            level = int(batch.at[row, draw])
            alpha, sigma = float(schedule.alphas[level]), float(schedule.sigmas[level])
            x0, noise = batch.clean[row : row + 1], batch.noise[row, draw : draw + 1]
            x = alpha * x0 + sigma * noise
            given = {}
            for who, name in (("now", "default"), ("old", OLD_ADAPTER), ("reference", None)):
                with torch.no_grad(), adapter_in_use(trainer.model, name):
                    given[who] = adapter.predict(trainer.model, x, schedule.timesteps[level : level + 1], told)
            v = {"plus": 0.5 * given["now"] + 0.5 * given["old"], "minus": 1.5 * given["old"] - 0.5 * given["now"]}
            loss = 0.0
            for name, share in (("plus", good), ("minus", 1 - good)):
                clean = x - sigma * v[name] if kind == "sd3" else (x - sigma * v[name]) / alpha
                loss += share * ((clean - x0).square().mean() / (clean - x0).abs().mean()).item()
            expected += 2.0 / 0.5 * loss + 0.3 * (given["now"] - given["reference"]).square().mean().item()
    assert sum(parts) == pytest.approx(expected / 8, rel=1e-4)


def test_the_old_model_draws_and_follows(tmp_path):
    trainer = nft("sd3", tmp_path, old_decay_rate=0.25, old_decay_max=0.5)
    start = trainer._round()
    pictures = torch.stack([sample.output for sample in start.samples])
    old = {name: tensor.clone() for name, tensor in adapter_tensors(trainer.model, OLD_ADAPTER).items()}
    moved(trainer, scale=1.0)
    trainer.prompts.cursor = 0
    again = trainer._round()  # before any step nothing follows: the same prompts and noise give the same pictures
    assert torch.equal(torch.stack([sample.output for sample in again.samples]), pictures)
    new = adapter_tensors(trainer.model, "default")
    for step, kept in ((1, 0.25), (8, 0.5)):
        trainer.state.global_step, trainer.prompts.cursor = step, 0
        later = trainer._round()
        old = {name: kept * tensor + (1 - kept) * new[name] for name, tensor in old.items()}
        found = adapter_tensors(trainer.model, OLD_ADAPTER)
        assert all(torch.allclose(found[name], old[name], atol=1e-6) for name in old)
        assert not any(tensor.requires_grad for tensor in found.values())
    assert not torch.equal(torch.stack([sample.output for sample in later.samples]), pictures)


def test_a_whole_model_draws_with_a_copy(tmp_path):
    trainer = nft("sd3", tmp_path, peft_config=None)
    assert isinstance(trainer.old, FrozenCopy) and isinstance(trainer.reference, FrozenCopy)
    assert trainer.old.model is not trainer.reference.model
    with trainer.acting() as model:
        assert model is trainer.old.model
    before = trained(trainer)
    trainer.train()
    assert gap(before, trained(trainer)) > 0
    assert gap(dict(trainer.reference.model.named_parameters()), before) == 0


def test_any_way_of_drawing_will_do_and_no_reference_is_needed(tmp_path):
    trainer = nft("sd3", tmp_path, sampler="cps", max_steps=1, beta=0.0)
    trainer.train()
    history = trainer.state.log_history[0]
    assert history["reward"] > 0 and history["old_distance"] < 1e-9 and "reference_distance" not in history


def test_a_step_does_not_depend_on_its_cutting(tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "num_iterations": 2}
    options |= {"num_inference_steps": 2}
    whole = nft("sd3", tmp_path / "a", **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "pairs_at_once": 3}
    cut = nft("sd3", tmp_path / "b", **options)
    start = trained(cut)
    for trainer in (whole, cut):
        trainer.train()
    assert gap(trained(whole), trained(cut)) < 1e-6 < gap(trained(whole), start)


def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_round(tmp_path):
    options = {"max_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 2, "save_steps": 3}
    options |= {"old_decay_rate": 0.1, "num_generations": 2, "num_inference_steps": 2, "noise_levels": 1}
    straight = nft("sd3", tmp_path, save_strategy="steps", **options)
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = nft("sd3", tmp_path, save_strategy="steps", **options)
    second.train(resume_from_checkpoint=True)
    assert gap(trained(straight), trained(second)) == 0
    left, right = (adapter_tensors(trainer.model, OLD_ADAPTER) for trainer in (straight, second))
    assert gap(left, right) == 0 and gap(left, adapter_tensors(straight.model, "default")) > 0


def test_rewards_rise(tmp_path):
    options = {"per_device_train_batch_size": 16, "num_generations": 16, "noise_levels": 3, "num_generations_eval": 8}
    trainer = nft("sd3", tmp_path, None, max_steps=6, learning_rate=1e-2, per_device_eval_batch_size=16, **options)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    spread = trainer.state.log_history[1]["reward_std"]
    assert after - before > spread


@pytest.mark.parametrize(
    "options, message",
    [
        ({"noise_levels": 4}, "noise_levels 4: must be at least 1, and at most the 3 steps"),
        ({"old_decay_max": 1.0}, "old_decay_max 1.0"),
        ({"nft_beta": 0.0}, "nft_beta 0.0"),
        ({"advantage_clip": None}, "advantage_clip"),
        ({"epsilon": 0.1}, "there is no ratio to be clipped"),
        ({"guidance_scale": 4.0}, "without guidance"),
    ],
)
def test_options_that_cannot_be_followed(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        nft("sd3", tmp_path, **options)
