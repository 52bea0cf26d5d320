"""AlignPropTrainer on tiny pipelines: gradients, how a step is cut, resuming, learning, collapse, bad input."""

import json

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from diffusionalign import AlignPropConfig, AlignPropTrainer
from shared.errors import UserError

PROMPTS = [
    {"prompt": f"a {colour} circle", "sign": 1.0 - 2 * (i % 2)} for i, colour in enumerate(("red", "blue", "pink"))
]


def bright(images, **_):
    """In thousandths: the pipeline's weights are drawn, and move its pictures little."""
    return 1000 * images.mean((1, 2, 3))


def make(folder, reward=bright, pipeline=None, rows=PROMPTS, peft_config="lora", **options):
    """A trainer of four images a step, of four denoising steps."""
    held_out = options.pop("eval_dataset", None)
    config = {
        "output_dir": str(folder),
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 4,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "max_steps": 4,
        "eval_answers": 0,
        "sample_every": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **options,
    }
    pipeline, args = pipeline or tiny_pipeline("sd"), AlignPropConfig(**config)
    return AlignPropTrainer(pipeline, reward, args, rows, eval_dataset=held_out, peft_config=peft_config)


def perturb(model):
    """Move what is trained, so that both halves of a new adapter have a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def step(trainer, backward=True):
    """Loss and gradients of one optimizer step."""
    model = trainer.model_wrapped = trainer.model
    model.zero_grad()
    stream = iter(trainer.get_train_dataloader())
    batches, count = trainer.get_batch_samples(stream, trainer.args.gradient_accumulation_steps, "cpu")
    total = 0.0
    for batch in batches:
        with torch.set_grad_enabled(True), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=count)
        if backward:
            loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_gradient_is_that_of_finite_differences(tmp_path):
    """Of the whole chain and the VAE, along the gradient itself."""
    trainer = make(tmp_path, backprop_strategy="full", num_inference_steps=2)
    perturb(trainer.model)
    _, gradients = step(trainer)
    norm = torch.cat([value.flatten() for value in gradients.values()]).norm()
    losses = []
    for move in (0.02, -0.04):
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in gradients:
                    parameter.add_(move * gradients[name] / norm)
        trainer.buffer, trainer.prompts.cursor = None, 0
        losses.append(step(trainer, backward=False)[0])
    assert norm > 1 and (losses[0] - losses[1]) / 0.04 == pytest.approx(float(norm), rel=0.03)


@pytest.mark.parametrize("strategy", ["gaussian", "draft_lv"])
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(tmp_path, strategy):
    found = []
    for at, (rows, parts) in enumerate(((4, 1), (2, 2), (1, 4))):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        trainer = make(tmp_path / str(at), backprop_strategy=strategy, beta=10.0, sampler="ddim", **options)
        perturb(trainer.model)
        found.append(step(trainer))
    (loss, gradients), *others = found
    assert len(gradients) > 4 and sum(value.abs().sum() for value in gradients.values()) > 1
    for other, theirs in others:
        assert other == pytest.approx(loss, rel=1e-5)
        for name, value in gradients.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_what_is_computed_again_gives_the_same_gradient(tmp_path):
    found = []
    for at, on in enumerate((False, True)):
        options = {"checkpoint_steps": on, "activation_checkpointing": on, "backprop_strategy": "full"}
        trainer = make(tmp_path / str(at), **options)
        perturb(trainer.model)
        if on:
            trainer.adapter.denoiser.activation_checkpointing_enable()
        trainer.model.train()
        found.append(step(trainer))
    (loss, gradients), (other, theirs) = found
    assert other == pytest.approx(loss, rel=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_truncation_is_drawn_once_for_all_images_of_a_step(tmp_path):
    trainer = make(
        tmp_path,
        backprop_strategy="uniform",
        num_inference_steps=6,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=8,
    )
    seen = []

    def spy(model, latents, first, random, **told):
        seen.append(first)
        return latents + sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)

    object.__setattr__(trainer.chain, "truncated", spy)
    trainer.train()
    steps = [seen[at : at + 3] for at in range(0, 24, 3)]
    assert all(len(set(step)) == 1 for step in steps) and len({step[0] for step in steps}) > 2
    assert history(trainer, "backprop/first_step") == [step[0] for step in steps]


def test_saturated_pixels_keep_their_gradient(tmp_path):
    pipeline = tiny_pipeline("sd")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 20
    seen = []

    def dark(images, **_):
        seen.append(images)
        return -1000 * images.mean((1, 2, 3))

    trainer = make(tmp_path, dark, pipeline, rows=["a circle"], eval_dataset=["a square"])
    _, gradients = step(trainer)
    assert seen[-1].min() > 1, "all pixels are beyond white"
    assert sum(value.abs().sum() for value in gradients.values()) > 1e-3
    trainer.evaluate()
    assert seen[-1].max() == 1, "what is only looked at is what can be shown"


def test_rewards_are_added_by_weight_where_they_apply(tmp_path):
    """`signed` is not of the second prompt; nothing is of the third."""

    def signed(images, sign, prompts, **_):
        value = images[:, 0].mean((1, 2)) * torch.tensor(sign)
        return torch.where(
            torch.tensor(["blue" in prompt or "pink" in prompt for prompt in prompts]), torch.nan, value
        )

    def plain(images, prompts, **_):
        return torch.where(torch.tensor(["pink" in prompt for prompt in prompts]), torch.nan, images.mean((1, 2, 3)))

    made = {"per_device_train_batch_size": 3, "shuffle_dataset": False}
    trainer = make(tmp_path, [signed, plain], reward_weights=[200.0, 100.0], **made)
    perturb(trainer.model)
    loss, gradients = step(trainer)
    rewards = trainer.buffer.rollout.rewards
    assert rewards.isnan().tolist() == [[False, False], [True, False], [True, True]]
    expected = 200 * rewards[0, 0] + 100 * (rewards[0, 1] + rewards[1, 1])
    assert loss == pytest.approx(-float(expected) / 3, rel=1e-5)
    assert all(value.isfinite().all() for value in gradients.values())
    assert list(trainer.row_notes.values()) == ["no reward applies to an image of its prompt"]
    alone = make(tmp_path, [signed, plain], reward_weights=[200.0, 100.0], rows=PROMPTS[:2] * 2, **made)
    perturb(alone.model)
    assert alone.prompts.rows[0]["prompt"] == PROMPTS[0]["prompt"]


def test_images_above_the_threshold_teach_nothing(tmp_path):
    made = {"backprop_strategy": "refl", "num_inference_steps": 2}
    trainer = make(tmp_path, reward_threshold=2000.0, **made)
    loss, gradients = step(trainer)
    total = trainer.buffer.rollout.total
    assert loss == pytest.approx(float((2000 - total).mean()), rel=1e-5)
    assert sum(value.abs().sum() for value in gradients.values()) > 1e-3
    loss, gradients = step(make(tmp_path, reward_threshold=float(total.min()) - 50, **made))
    assert loss == 0 and all((value == 0).all() for value in gradients.values())


def test_beta_pulls_towards_the_model_without_its_adapter(tmp_path):
    trainer = make(tmp_path, lambda images, **_: 0 * images.sum((1, 2, 3)), beta=1.0)
    loss, _ = step(trainer)
    assert loss == pytest.approx(0, abs=1e-9), "a new adapter changes nothing"
    perturb(trainer.model)
    rate, found = 0.5, []
    for _ in range(3):
        trainer.buffer, trainer.prompts.cursor = None, 0
        loss, gradients = step(trainer)
        found.append(loss)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in gradients:
                    parameter -= rate * gradients[name]
    assert found[0] > 1e-4 and found[2] < found[1] < found[0]


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = {
        "backprop_strategy": "uniform",
        "sampler": "ddim",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(tmp_path / "whole", **options)
    whole.train()
    again = make(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    one, other = dict(whole.model.named_parameters()), dict(again.model.named_parameters())
    assert any(not torch.equal(one[name], value) for name, value in make(tmp_path / "new").model.named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in ("loss", "reward", "reward_queries", "sample_diversity", "backprop/first_step"):
        assert history(whole, name) == history(again, name), name
    assert history(again, "reward_queries") == [4, 8, 12, 16]


def test_it_learns_to_draw_brighter_and_shows_it(tmp_path):
    trainer = make(
        tmp_path,
        backprop_strategy="full",
        max_steps=10,
        num_inference_steps=3,
        eval_dataset=["a green circle", "a white circle"],
        eval_answers=2,
        sample_every=5,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="best",
        load_best_model_at_end=True,
    )
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 5
    assert trainer.report.after["bright"] > trainer.report.before["bright"] + 5
    assert trainer.state.best_metric == max(history(trainer, "eval_reward"))
    assert (tmp_path / "report" / "pictures.png").stat().st_size > 0
    assert history(trainer, "reward_queries")[-1] == 40


def test_too_many_steps_are_told_as_a_collapse(tmp_path, capsys):
    def alike(images, **_):
        """More the nearer an image is to the mean of all: at best they are one."""
        return -1000 * (images - images.mean(0).detach()).square().mean((1, 2, 3))

    trainer = make(
        tmp_path,
        alike,
        peft_config=None,
        backprop_strategy="full",
        max_steps=10,
        learning_rate=6e-2,
        per_device_train_batch_size=3,
        num_inference_steps=2,
    )
    trainer.train()
    assert history(trainer, "sample_diversity")[-1] < 0.2
    (collapse,) = (note for note in trainer.report.notes if "collapse: samples differ" in note)
    assert "as much as at the start, while the reward rose" in collapse
    assert collapse in capsys.readouterr().out


def untouched(images, **_):
    return [0.5] * len(images)


def detached(images, **_):
    return images.detach().mean((1, 2, 3))


def whole(images, **_):
    return images.mean()


def sized(images, **_):
    return images.mean((2, 3))


def nothing(images, **_):
    return images.mean((1, 2, 3)) * torch.nan


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("jpeg_compressibility_reward", "jpeg_compressibility_reward has none"),
        (untouched, "untouched returned numbers without one"),
        (detached, "detached returned numbers without one"),
        (whole, "whole failed: it returned a tensor of shape \\(\\)"),
        (sized, "sized failed: it returned a tensor of shape \\(3, 3\\)"),
        (nothing, "nothing gave NaN for all"),
    ],
)
def test_rewards_that_cannot_be_followed_back(tmp_path, monkeypatch, reward, told):
    monkeypatch.setattr("diffusionalign.alignprop.prepare_denoiser", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=told):
        make(tmp_path, reward)


def test_what_breaks_down_in_training_names_the_prompt(tmp_path):
    def breaks(images, trainer_state, **_):
        value = images.mean((1, 2, 3))
        return value if trainer_state is None else (0 * value).sqrt()

    trainer = make(tmp_path, breaks, rows=["a red circle"])
    with pytest.raises(UserError, match="gradient of the reward of an image for the prompt 'a red circle' is not fin"):
        step(trainer)
    trainer.args.on_reward_error = "skip"
    trainer.buffer = None
    _, gradients = step(trainer)
    assert all((value == 0).all() for value in gradients.values())
    trainer.buffer = None
    decode = trainer.adapter.decode
    trainer.adapter.decode = lambda latents, **_: (
        decode(latents) * torch.tensor([1, torch.nan, 1, 1])[:, None, None, None]
    )
    with pytest.raises(
        UserError, match="An image for the prompt 'a red circle' is not finite. Lower the learning rate"
    ):
        step(trainer)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"truncated_backprop_timestep": 4}, "truncated_backprop_timestep 4: must be a step of the chain, 0 to 3"),
        ({"truncated_rand_backprop_minmax": [1, 2]}, "is of backprop_strategy uniform or refl, and gaussian does not"),
        ({"truncated_backprop_std": -1.0}, "truncated_backprop_std -1.0: must be at least 0"),
        ({"vae_slice": 0}, "vae_slice 0: must be at least 1"),
        ({"steps_per_generation": 2}, "steps_per_generation 2: Leave it out"),
        ({"num_iterations": 2}, "num_iterations 2 is not supported"),
        ({"truncated_backprop_rand": True}, "Give backprop_strategy: uniform"),
        ({"sample_num_steps": 4}, "It is called num_inference_steps"),
        ({"beta": 0.1, "peft_config": None}, "beta holds the model near to itself without its adapter"),
        ({"height": 15, "width": 16}, "height=15"),
    ],
)
def test_options_that_cannot_be_followed(tmp_path, given, told):
    with pytest.raises(UserError, match=told):
        make(tmp_path, **given)


def test_arguments_of_other_libraries_say_what_to_give():
    for name, told in (
        ("config", "called args"),
        ("sd_pipeline", "called model"),
        ("prompt_function", "as train_data"),
    ):
        with pytest.raises(UserError, match=told):
            AlignPropTrainer(**{name: None})


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_other_pipelines_and_half_precision(tmp_path, kind):
    made = {"height": 16, "width": 16, "bf16": True, "max_steps": 1, "per_device_train_batch_size": 2}
    trainer = make(tmp_path, pipeline=tiny_pipeline(kind), **made, guidance_scale=2.0, num_inference_steps=2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert history(trainer, "grad_norm")[0] > 0
    assert any(not torch.equal(value, dict(trainer.model.named_parameters())[name]) for name, value in before.items())
    trainer.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((tmp_path / "report" / "report.json").read_text())
