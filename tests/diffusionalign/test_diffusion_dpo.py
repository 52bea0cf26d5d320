"""Diffusion-DPO: rows, batches, the loss of a step by hand, and what a run must not depend on."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tiny_pipelines import tiny_pipeline

from diffusionalign import DiffusionDPOConfig, DiffusionDPOTrainer
from diffusionalign.noising import drawn_levels, seeded
from diffusionalign.preference_batches import PicturePairCollator
from diffusionalign.preference_rows import checked_pairs
from diffusionalign.schedules import training_schedule
from shared.data.files import load_local
from shared.errors import DataError, UserError
from shared.trainers.reference import AdapterOff, FrozenCopy, NoReference


def picture(low, high, size=(20, 24), seed=0):
    noise = np.random.default_rng(seed).integers(low, high, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pairs(count=4):
    """Bright pictures preferred to dark ones, of unlike sizes."""
    return [
        {
            "prompt": "picture " + "ab"[at % 2] * (at + 1),
            "chosen": picture(150, 255, (20, 20 + at), at),
            "rejected": picture(0, 100, (24, 20), at + 100),
        }
        for at in range(count)
    ]


def dpo(pipeline, folder, rows=None, peft_config="lora", **options):
    """A trainer on four pairs."""
    given = {name: options.pop(name) for name in ("eval_dataset", "ref_model", "reward_funcs") if name in options}
    if type(pipeline).__name__ == "FluxPipeline":
        options = {"height": 16, "width": 16, **options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "beta": 500,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_answers": 0,
        "sample_every": 0,
        "disable_tqdm": True,
        **options,
    }
    args = DiffusionDPOConfig(**config)
    rows = pairs() if rows is None else rows
    return DiffusionDPOTrainer(pipeline, args=args, train_dataset=rows, peft_config=peft_config, **given)


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=0, atol=tolerance), name


class Args:
    on_bad_row, check_rows, should_log, eval_strategy, max_steps, dataloader_drop_last = (
        "error",
        None,
        True,
        "no",
        1,
        False,
    )
    per_device_train_batch_size = world_size = 1


# ---- Rows -----------------------------------------------------------------------------------------------------------


def test_pick_a_pic_columns_and_its_ties(capsys):
    data = {"caption": ["a", "b", "c"], "label_0": [1.0, 0.5, 0.0]}
    images = [[picture(0, 9 + at, seed=at + 10 * side) for at in range(3)] for side in (0, 1)]
    rows, _ = checked_pairs(Dataset.from_dict(data | {"jpg_0": images[0], "jpg_1": images[1]}), None, Args)
    assert "train: 2 rows" in (said := capsys.readouterr().out) and "1 more are ties" in said
    batch = PicturePairCollator((20, 24))([rows[0], rows[1]])
    assert batch.prompts == ["a", "c"] and batch.columns["row"].tolist() == [0, 2]
    expected = [images[0][0], images[1][0], images[1][2], images[0][2]]  # the preferred one first
    assert torch.equal(batch.pixels, torch.stack([torch.from_numpy(np.array(e)).permute(2, 0, 1) for e in expected]))


def test_paths_start_from_the_folder_of_their_file(tmp_path):
    picture(0, 9).save(tmp_path / "a.png")
    picture(9, 20).save(tmp_path / "b.PNG")
    said = [["a cat", "a.png", "b.PNG", "0"], ["a dog", "b.PNG", "a.png", "1.0"]]
    (tmp_path / "rows.csv").write_text(
        "\n".join(",".join(row) for row in [["caption", "jpg_0", "jpg_1", "label_0"], *said])
    )
    rows, _ = checked_pairs(load_local(tmp_path / "rows.csv")["train"], None, Args)
    assert [row["chosen"] for row in rows] == [str(tmp_path / "b.PNG")] * 2
    assert len(PicturePairCollator((16, 16))([rows[0], rows[1]]).prompts) == 2


def test_bad_rows_are_told_before_a_pipeline_is_looked_for(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [*pairs(2), {**pairs(1)[0], "rejected": str(tmp_path / "broken.png")}, {**pairs(1)[0], "prompt": " "}]
    with pytest.raises(DataError, match=r"(?s)2 of 4 rows of the train data.*row 2: .*broken.*row 3: prompt is empty"):
        dpo("no/such-pipeline", tmp_path, bad)
    with pytest.raises(DataError, match="columns prompt, image. Pairs have prompt, chosen and rejected"):
        dpo("no/such-pipeline", tmp_path, [{"prompt": "a", "image": picture(0, 9)}])
    rows, _ = checked_pairs(bad, None, type("Skips", (Args,), {"on_bad_row": "skip"}))
    assert [row["__row__"] for row in rows] == [0, 1]


def test_a_row_that_turns_out_bad_counts_nothing_where_rows_may_be_left_out():
    rows = [{**row, "__row__": at} for at, row in enumerate(pairs(2))]
    rows[1]["chosen"] = "gone.png"
    with pytest.raises(DataError, match="row 1: .*gone.png"):
        PicturePairCollator((16, 16))(rows)
    batch = PicturePairCollator((16, 16), "skip")(rows)
    assert batch.prompts == [rows[0]["prompt"]] and "gone.png" in batch.notes[1]
    alone = PicturePairCollator((16, 16), "skip")(rows[1:])
    assert alone.counted_tokens() == 0 and alone.pixels.shape == (2, 3, 16, 16)


def test_pictures_cover_the_size_and_lose_their_margins():
    wide = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2))
    row = {"prompt": "a", "chosen": wide, "rejected": wide.resize((64, 64))}
    batch = PicturePairCollator((16, 16))([row])
    assert batch.pixels[0, 0, 0].tolist() == list(range(8, 24))  # the middle, not squeezed
    assert batch.sizes.tolist() == [[16, 32, 0, 8], [64, 64, 0, 0]]


# ---- Noise ----------------------------------------------------------------------------------------------------------


def test_training_levels_are_those_that_diffusers_adds_noise_at():
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for kind in ("sd", "sd3"):
        scheduler = tiny_pipeline(kind).scheduler
        levels, at = training_schedule(scheduler), torch.tensor([3, 700])
        assert levels.steps == 1000 and levels.alphas[-1] == 1 and levels.sigmas[-1] == 0
        told = levels.timesteps[at]
        if kind == "sd":
            expected = scheduler.add_noise(clean, noise, told)
        else:
            assert torch.equal(told, scheduler.timesteps[at])
            expected = scheduler.scale_noise(clean, told, noise)
        assert torch.allclose(levels.noised(clean, at, noise), expected, atol=1e-5), kind


def test_levels_are_spread_evenly_or_lie_in_the_middle():
    assert drawn_levels(10, 10, random=seeded(0)).tolist() == list(range(10))
    every = drawn_levels(5, 1000, random=seeded(1))
    assert [int(level) // 200 for level in every] == list(range(5))
    middle = drawn_levels(1000, 1000, random=seeded(2), middle=True).float()
    inside = ((middle > 250) & (middle < 750)).float().mean()
    assert inside.item() == pytest.approx(0.728, abs=0.01)  # P(|N(0, 1)| < log 3)


# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl", "sd3", "flux"])
def test_the_loss_of_a_batch_by_hand(kind, tmp_path):
    trainer = dpo(tiny_pipeline(kind), tmp_path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    trainer.step = {"pairs": torch.tensor(2), "chosen_tokens": torch.tensor(2)}
    batch = trainer._prepare_inputs(trainer.data_collator(pairs(2)))
    loss = trainer.compute_loss(trainer.model, batch)

    levels, adapter = trainer.policy.levels, trainer.adapter
    alpha, sigma = (level[batch.at[:, 0]].view(2, 1, 1, 1) for level in (levels.alphas, levels.sigmas))
    expected = 0
    for pair in range(2):
        errors = {}
        for at, name in ((2 * pair, "chosen"), (2 * pair + 1, "rejected")):
            x0, noise = batch.latents[at : at + 1], batch.noise[pair, :1]
            told = adapter.encode_prompts([batch.prompts[pair]])
            if kind == "sdxl":
                told["time_ids"] = torch.cat([batch.sizes[at], torch.tensor([16, 16])])[None]
            noisy = alpha[pair] * x0 + sigma[pair] * noise
            if kind in ("sd", "sdxl"):
                target = noise
            else:
                target = alpha[pair] * noise - sigma[pair] * x0 if kind == "sd-v" else noise - x0
            time = levels.timesteps[batch.at[pair]]
            for who in ("policy", "reference"):
                with torch.no_grad(), trainer.model.disable_adapter() if who == "reference" else torch.no_grad():
                    given = adapter.predict(
                        trainer.model, noisy, time, told, guidance_scale=1.0 if adapter.guided else 5.0
                    )
                errors[name, who] = F.mse_loss(given, target)
        inside = errors["chosen", "policy"] - errors["chosen", "reference"]
        inside = inside - errors["rejected", "policy"] + errors["rejected", "reference"]
        expected = expected - F.logsigmoid(-0.5 * 500 * inside) / 2
    assert abs(expected.item() - 0.6931) > 0.001
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_pairs_are_learnt(tmp_path):
    trainer = dpo(tiny_pipeline("sd3"), tmp_path, per_device_train_batch_size=4, max_steps=6)
    before = trainer.evaluate(trainer.train_dataset)
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-4) and before["eval_rewards/accuracies"] == 0.5
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)
    assert after["eval_loss"] < 0.5 and after["eval_rewards/accuracies"] == 1 and after["eval_rewards/margins"] > 0.3


# ---- What a run must not depend on ----------------------------------------------------------------------------------


def test_a_step_does_not_depend_on_its_cutting_nor_on_latents_made_beforehand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "cache"))
    options = {"prompt_dropout": 0.3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    whole = dpo(tiny_pipeline("sd"), tmp_path / "a", per_device_train_batch_size=4, **options)
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "precompute_latents": True}
    cut = dpo(tiny_pipeline("sd"), tmp_path / "b", **options)
    again = dpo(tiny_pipeline("sd"), tmp_path / "c", **options)
    assert "kept in" in (said := capsys.readouterr().out) and "from cache:" in said
    assert again.data_collator([again.train_dataset[1]]).pixels is None
    start = trained(again)
    for trainer in (whole, cut):
        trainer.train()
    assert_equal(trained(whole), trained(cut), tolerance=1e-6)
    assert max(float((value - start[name]).abs().max()) for name, value in trained(whole).items()) > 1e-4


def test_a_run_goes_on_bit_for_bit(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 2}
    straight = dpo(tiny_pipeline("sd"), tmp_path, max_steps=3, **options)
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-3")
    second = dpo(tiny_pipeline("sd"), tmp_path, max_steps=3, **options)
    second.train(resume_from_checkpoint=True)
    assert_equal(trained(straight), trained(second))
    assert (tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors").is_file()


def test_held_out_pairs_get_the_same_noise_whatever_their_batch(tmp_path):
    trainer = dpo(tiny_pipeline("sd"), tmp_path, eval_dataset=pairs(3), per_device_eval_batch_size=3)
    together = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 1
    alone = trainer.evaluate()
    for name in ("eval_loss", "eval_logps/chosen", "eval_logps/rejected"):
        assert together[name] == pytest.approx(alone[name], abs=1e-6)
    trainer.model.eval()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.eval_dataset[1]]))
    assert batch.at.shape == (1, 4) and batch.noise.shape == (1, 4, 4, 8, 8)


# ---- References, options, pictures ----------------------------------------------------------------------------------


def test_the_reference_is_the_adapter_off_a_copy_a_given_one_or_none(tmp_path):
    pipeline = tiny_pipeline("sd")
    assert isinstance(dpo(pipeline, tmp_path / "a").reference, AdapterOff)
    assert isinstance(dpo(tiny_pipeline("sd"), tmp_path / "b", peft_config=None).reference, FrozenCopy)
    given = tiny_pipeline("sd", seed=3).unet
    trainer = dpo(tiny_pipeline("sd"), tmp_path / "c", ref_model=given)
    assert trainer.reference.model is given
    free = dpo(tiny_pipeline("sd"), tmp_path / "d", reference_free=True)
    assert isinstance(free.reference, NoReference) and free.evaluate(free.train_dataset)["eval_loss"] > 0
    with pytest.raises(UserError, match="SD3Transformer2DModel, the model's denoiser a UNet2DConditionModel"):
        dpo(tiny_pipeline("sd"), tmp_path / "e", ref_model=tiny_pipeline("sd3").transformer)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": ["sigmod"]}, "Did you mean 'sigmoid'"),
        ({"loss_type": ["sigmoid_norm"]}, "a picture has no length. Give sigmoid"),
        ({"use_weighting": True}, "WPO weighs pairs by the chances of tokens"),
        ({"eval_noise_draws": 0}, "eval_noise_draws 0: must be at least 1"),
        ({"height": 0}, "height 0: must be at least 1"),
        ({"pass_reward": 0.5}, "pass_reward 0.5 is not supported"),
        ({"prompt_dropout": 1.0}, "prompt_dropout 1.0"),
        ({"reference_free": True, "sync_ref_model": True}, "reference_free"),
        ({"height": 17}, "height=17"),
        ({"ref_model": "no/such-reference"}, "no/such-reference"),
    ],
)
def test_options_that_cannot_be_followed(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        dpo(tiny_pipeline("sd"), tmp_path, **options)


def brightness(images, prompts):
    return [float(image.mean()) for image in images]


def test_pictures_are_drawn_and_judged_before_and_after(tmp_path):
    options = {"num_inference_steps": 2, "eval_answers": 2, "sample_every": 1, "per_device_eval_batch_size": 2}
    trainer = dpo(
        tiny_pipeline("sd3"), tmp_path, max_steps=1, reward_funcs=brightness, eval_dataset=pairs(2), **options
    )
    trainer.train()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"brightness", "preference_accuracy"} <= set(report["before"]) & set(report["after"])
    assert report["before"]["brightness"] != report["after"]["brightness"]
    assert (tmp_path / "report" / "pictures.png").is_file()
    assert "images_per_second" in report["throughput"] and "tokens_per_second" not in report["throughput"]
