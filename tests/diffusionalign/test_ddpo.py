"""DDPOTrainer on tiny pipelines: exact ratios, gradients however a step is cut, advantages, resuming, learning."""

import json
import threading
import time
from dataclasses import fields

import pytest
import torch
from tiny_denoising import PROMPTS, bright, history, make, perturb, same, step

from diffusionalign import AlignPropConfig, DDPOConfig, DiffusionDPOConfig
from shared.errors import UserError
from shared.trainers.prompt_statistics import PromptStatistics


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_ratio_is_one_until_the_first_update(tmp_path, dtype):
    """What sampling kept gives the probability that sampling gave it, rounded latents and all."""
    trainer = make(
        "DDPO", tmp_path, model_init_kwargs={"dtype": dtype}, generation_rows=1, pairs_at_once=1, num_generations=2,
        per_device_train_batch_size=2, max_steps=1, guidance_scale=3.0,
    )  # fmt: skip
    perturb(trainer.model)
    trainer.train()
    assert trainer.buffer.rollout.actions.final.dtype == getattr(torch, dtype)
    for figure in ("ratio/first_step_error", "sampling/logp_difference", "sampling/ratio_beyond_clip"):
        assert history(trainer, figure) == [0.0], figure
    assert history(trainer, "ratio/mean") == [1.0] and history(trainer, "grad_norm")[0] > 0


def test_a_changed_policy_is_seen_in_the_figures(tmp_path):
    """The figures above are measured, not assumed."""
    trainer = make("DDPO", tmp_path, max_steps=1)
    trainer.before_updates = lambda buffer: perturb(trainer.model)
    trainer.train()
    assert history(trainer, "sampling/logp_difference")[0] > 1e-5
    trainer = make("DDPO", tmp_path / "noisy", peft_config=None, max_steps=1)
    trainer.model.conv_out.register_forward_hook(lambda *given: given[2] + 0.1 * torch.randn_like(given[2]))
    trainer.train()
    assert history(trainer, "ratio/first_step_error")[0] > 1e-5


def test_old_probabilities_of_later_steps(tmp_path):
    """In float32 the sampler's; in half precision they are computed again, in the batches of the update."""
    for dtype, pairs in (("float32", 3), ("bfloat16", 3)):
        trainer = make(
            "DDPO", tmp_path / dtype, model_init_kwargs={"dtype": dtype}, steps_per_generation=2, pairs_at_once=pairs,
            per_device_train_batch_size=4,
        )  # fmt: skip
        stream = iter(trainer.get_train_dataloader())
        step(trainer, stream)
        _, _, (late,) = step(trainer, stream)
        rollout, old = late.rollout, late.batch.columns["old"]
        if dtype == "float32":
            assert torch.equal(old, torch.stack([rollout.logp[row] for row in late.rows]))
            assert rollout.old[0] is rollout.logp[0]
        else:
            assert rollout.old[[row for row in range(8) if row not in late.rows][0]] is None
            again = torch.cat([trainer.policy.steps(trainer.model, part).logp for part in late.batch.parts(pairs)])
            assert torch.equal(old.flatten(), again.detach()), "nothing was updated in between"


def test_gradients_are_the_same_however_a_step_is_cut(tmp_path):
    whole = None
    cuts = (
        {"pairs_at_once": 32},
        {"pairs_at_once": 5},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "pairs_at_once": 1},
    )
    for number, shape in enumerate(cuts):
        trainer = make("DDPO", tmp_path / str(number), beta=0.5, generation_rows=8, **shape)
        perturb(trainer.model)
        loss, gradients, _ = step(trainer)
        if whole is None:
            whole = loss, gradients
        assert loss == pytest.approx(whole[0], rel=1e-4)
        same(gradients, whole[1])


def test_the_loss_by_hand(tmp_path):
    """The clipped ratio and the exact divergence, of a policy that has moved since it sampled."""
    trainer = make("DDPO", tmp_path, beta=0.5, num_iterations=2, epsilon=1e-3, epsilon_high=2e-3)
    stream = iter(trainer.get_train_dataloader())
    step(trainer, stream)
    perturb(trainer.model)
    loss, _, (micro,) = step(trainer, stream)
    rollout, schedule = micro.rollout, trainer.actor.schedule
    table = trainer.actor.sampler
    terms, divergences = [], []
    for at, row in enumerate(micro.rows):
        part = list(micro.batch.parts(4))[at]
        with torch.no_grad():
            now = trainer.policy.steps(trainer.model, part)
            with trainer.model.disable_adapter():
                before = trainer.policy.steps(trainer.model, part)
        assert now.std.tolist() == [table.step(schedule, torch.tensor([i]), *part.before[:1].unbind(1), part.before[0])
                                    .std.item() for i in part.at.flatten().tolist()]  # fmt: skip
        x = part.after[:, 0].double()
        sigma = now.std.double()
        logp = (-((x - now.mean) ** 2).mean((1, 2, 3)) / (2 * sigma**2) - sigma.log() - 0.5 * torch.tensor(
            2 * torch.pi, dtype=torch.float64).log())  # fmt: skip
        ratio = (logp - rollout.logp[row].double()).exp()
        advantage = rollout.advantages[row].double()
        terms += torch.maximum(-ratio * advantage, -ratio.clamp(1 - 1e-3, 1 + 2e-3) * advantage).tolist()
        divergences += (((now.mean - before.mean).double() ** 2).mean((1, 2, 3)) / (2 * sigma**2)).tolist()
    assert max(divergences) > 1e-4
    assert loss == pytest.approx((sum(terms) + 0.5 * sum(divergences)) / 32, rel=1e-3)


def test_the_reference_of_a_whole_denoiser_is_a_copy(tmp_path):
    trainer = make("DDPO", tmp_path, peft_config=None, beta=1.0, max_steps=2, learning_rate=1e-3)
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == 0 and kl[1] > 0
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())


def whole_numbers(images, **_):
    return [int(value > images.mean()) for value in images.mean((1, 2, 3))]


def test_whole_numbers_as_rewards_teach(tmp_path):
    trainer = make("DDPO", tmp_path, whole_numbers, advantages="prompt", num_generations=1, prompt_min_count=2)
    for _ in range(2):
        step(trainer)
    assert trainer.buffer.rollout.advantages.abs().min() > 0


def test_statistics_of_a_prompt():
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    first = statistics.advantages(["a", "b", "b"], torch.tensor([3, 1, 2]))
    # of "a" there is one reward: the whole round, mean 2, deviation sqrt(2/3); of "b" mean 1.5, deviation .5
    assert first.tolist() == pytest.approx([1.224745, -1, 1])
    second = statistics.advantages(["a", "b", "b"], torch.tensor([1.0, 6.0, float("nan")]))
    # "a": 3 1, mean 2, deviation 1; "b": 1 2 6, mean 3, deviation 2.160247
    assert second.tolist() == pytest.approx([-1, 1.388730, 0])
    kept = statistics.state()
    again = PromptStatistics(3, 2)
    again.load_state(json.loads(json.dumps(kept)))
    again.advantages(["b"], torch.tensor([4.0]))
    assert kept == {"a": [3.0, 1.0], "b": [1.0, 2.0, 6.0]} and again.state()["b"] == [2.0, 6.0, 4.0]


def test_advantages_of_a_round_and_their_bound(tmp_path):
    trainer = make("DDPO", tmp_path, advantages="batch", num_generations=1, advantage_clip=1.2)
    rewards = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    assert trainer.advantages(rewards, torch.zeros(4)).tolist() == pytest.approx([-0.92582, -0.46291, 0, 1.2])


def test_epsilon_in_units_that_hold_over_latent_sizes(tmp_path):
    trainer = make("DDPO", tmp_path, scale_epsilon=True, epsilon_high=2e-4)
    assert trainer.objective.epsilon == pytest.approx(8e-4), "latents of 4 x 8 x 8 scatter 8 times as much"
    assert trainer.objective.epsilon_high == pytest.approx(16e-4)


def test_rewards_that_apply_to_no_picture_end_the_run(tmp_path):
    """Nothing would ever be learnt; where some picture has a reward the others may have none."""

    def some(images, prompts, **_):
        return [None if "red" in prompt else 1.0 for prompt in prompts]

    trainer = make("DDPO", tmp_path, reward=lambda images, **_: [float("nan")] * len(images))
    with pytest.raises(UserError, match="No reward applies to any of the first . pictures: .* gave NaN or None"):
        trainer.train()
    make("DDPO", tmp_path / "some", reward=some, max_steps=1).train()


def test_rewards_that_are_computed_beside_sampling(tmp_path):
    """Give what they give otherwise, in a thread of their own."""
    calls = []

    def slow(images, number, log_extra, log_metric, **_):
        calls.append((threading.current_thread() is threading.main_thread(), len(images)))
        log_extra("row", number)
        log_metric("seen", len(images))
        return [round(float(value), 6) for value in images.mean((1, 2, 3))]

    found = []
    for beside in (False, True):
        trainer = make(
            "DDPO", tmp_path / str(beside), slow, async_reward_computation=beside, generation_rows=6,
            num_inference_steps=2, steps_per_generation=2,
        )  # fmt: skip
        _, _, (micro,) = step(trainer)
        rollout = trainer.buffer.rollout
        found.append((rollout.rewards, rollout.advantages, rollout.extras, rollout.lengths, micro.batch.before))
        assert trainer._noted["seen"] == [16.0 if not beside else 4.0]
    assert calls == [(True, 16), *[(False, 4)] * 4]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_reward_that_fails_beside_sampling_is_told(tmp_path):
    """And no more pictures are drawn for it."""
    failed, parts = threading.Event(), []

    def fails(images, **_):
        failed.set()
        raise RuntimeError("no such picture")

    trainer = make(
        "DDPO", tmp_path, fails, async_reward_computation=True, generation_rows=4, steps_per_generation=4,
        num_inference_steps=2,
    )  # fmt: skip
    draw = trainer.actor.act

    def drawn(*args, **options):
        parts.append(draw(*args, **options))
        if len(parts) > 1:
            failed.wait(10)
            time.sleep(0.05)
        return parts[-1]

    trainer.actor.act = drawn
    with pytest.raises(UserError, match="Reward fails failed on .*no such picture"):
        trainer.train()
    assert len(parts) < 8


def test_a_reward_that_fails_leaves_the_rounds_before_it_counted_once(tmp_path):
    """A step of two rounds, of which the second fails: it is drawn whole when the run goes on."""
    calls = []

    def fails(images, **_):
        calls.append(len(images))
        if len(calls) > 3:
            raise RuntimeError("no such picture")
        return images.mean((1, 2, 3))

    trainer = make(
        "DDPO", tmp_path, fails, advantages="prompt", prompt_min_count=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, steps_per_generation=1, num_inference_steps=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="Reward fails failed on"):
        trainer.train()
    kept = torch.load(tmp_path / "checkpoint-1" / "online-0.pt", weights_only=True)
    assert kept["controllers"]["reward_queries"] == 8 and kept["prompts"] == 2
    assert [len(held) for held in kept["controllers"]["prompts"].values()] == [4, 4]


def test_pictures_of_groups_that_teach_nothing_were_rewarded_too(tmp_path):
    trainer = make(
        "DDPO", tmp_path, lambda images: [1] * len(images), dynamic_sampling=True, max_resampling=1,
        num_inference_steps=2, generation_rows=8,
    )  # fmt: skip
    step(trainer)
    assert trainer.reward_queries == 16


def test_a_run_goes_on_in_the_middle_of_a_round(tmp_path):
    options = {
        "advantages": "prompt", "num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4,
        "prompt_min_count": 3, "beta": 0.1, "train_timestep_fraction": 0.5, "window_size": 2, "window": "random",
        "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2,
    }  # fmt: skip
    whole = make("DDPO", tmp_path, **options)
    whole.train()
    expected = {name: p.clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    again = make("DDPO", tmp_path, **options)
    torch.manual_seed(77)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(history(again, "loss")) == 6
    for name, parameter in again.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name
    kept = torch.load(tmp_path / "checkpoint-3" / "online-0.pt", weights_only=True)
    assert kept["buffer"]["cursor"] == 3 and kept["controllers"]["reward_queries"] == 8
    assert len(kept["controllers"]["prompts"]) == 2
    other = make("DDPO", tmp_path, **options | {"height": 32})
    with pytest.raises(UserError, match="Resume with the options of the run"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_evaluation_draws_the_same_pictures_each_time(tmp_path):
    """Of equal weights equal figures, whatever was drawn before and in which batches; the best checkpoint by them."""
    held_out = ["a yellow cross", "purple", "cyan square"]
    trainer = make(
        "DDPO", tmp_path, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, max_steps=2, num_generations_eval=2, eval_num_inference_steps=3,
        per_device_eval_batch_size=4, guidance_scale=2.0, eval_guidance_scale=1.0, learning_rate=3e-2,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.args.generation_rows = 1
    trainer.actor.refresh(trainer)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(before, abs=1e-6)
    trainer.args.generation_rows = None
    trainer.train()
    measured = history(trainer, "eval_reward")
    assert len(set(measured)) == 2 and before not in measured
    assert trainer.evaluate()["eval_reward"] == max(measured)
    assert not any("completions" in name for entry in trainer.state.log_history for name in entry)


def test_negative_prompts_in_turn_and_by_column(tmp_path):
    rows = [*PROMPTS[:3], {**PROMPTS[3], "negative_prompt": "own"}]
    rows = [{"negative_prompt": None, **row} for row in rows]
    trainer = make(
        "DDPO", tmp_path, rows=rows, negative_prompt=["blurry", "dark"], guidance_scale=3.0, shuffle_dataset=False,
        per_device_train_batch_size=16,
    )  # fmt: skip
    perturb(trainer.model)
    _, _, (micro,) = step(trainer)
    assert micro.batch.negatives[::4] == ["blurry", "dark", "blurry", "own"]
    part = next(micro.batch.parts(4))
    with torch.no_grad():
        one = trainer.policy.steps(trainer.model, part).logp
        part.negatives = ["dark"] * 4
        assert (one - trainer.policy.steps(trainer.model, part).logp).abs().max() > 0


def test_prompts_are_encoded_once_and_guidance_is_one_batch(tmp_path):
    trainer = make(
        "DDPO", tmp_path, guidance_scale=3.0, rows=PROMPTS[:2], pairs_at_once=4, per_device_train_batch_size=8
    )
    encoded, ran = [], []
    plain = trainer.adapter.encode
    trainer.adapter.encode = lambda prompt: encoded.append(prompt) or plain(prompt)
    trainer.model.get_base_model().conv_in.register_forward_hook(lambda *given: ran.append(len(given[1][0])))
    trainer.train()
    assert sorted(map(str, encoded)) == ["None", "a red circle", "blue"]
    rounds, looked = 2, 1
    assert ran.count(16) == 4 * rounds, "sampling: 8 pictures and their counterparts, 4 steps"
    assert ran.count(8) == 8 * rounds + looked, "update: 32 pairs and their counterparts, 4 at once"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"eta": 0.0}, "nothing to learn from"),
        ({"sampler": "ode"}, "nothing to learn from"),
        ({"sampler": "sde"}, "flow matching"),
        ({"window_size": 9}, "window_size 9 from 0: the steps with noise are 0 to 3 of 4"),
        ({"window_size": 2, "window_start": 3}, "window_size 2 from 3"),
        ({"train_timestep_fraction": 0.0}, "train_timestep_fraction 0.0"),
        ({"height": 17}, "height=17"),
        ({"num_inference_steps": 2000}, "num_inference_steps=2000"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"num_generations": 1}, "num_generations 1: must be at least 2"),
        ({"prompt_min_count": 20, "advantages": "prompt"}, "prompt_min_count 20"),
        ({"advantage_clip": 0.0}, "advantage_clip 0.0"),
        ({"advantages": "batch", "scale_rewards": "none"}, "scale_rewards none: for advantages group alone"),
        ({"eval_num_inference_steps": 0}, "eval_num_inference_steps 0"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"sample_num_steps": 9}, "It is called num_inference_steps"),
        ({"ref_model": "anything"}, "ref_model"),
    ],
)
def test_what_cannot_be_followed_is_told_at_once(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        make("DDPO", tmp_path, lambda images: pytest.fail("something was sampled"), **options)


def test_options_of_tokens_are_not_offered():
    for name in ("entropy_coef", "top_entropy_quantile", "mask_truncated_completions", "temperature", "loss_type"):
        assert not hasattr(DDPOConfig, name), name
    for config in (DDPOConfig, AlignPropConfig, DiffusionDPOConfig):
        assert "max_new_tokens" not in {field.name for field in fields(config)}, config


def test_it_learns(tmp_path):
    """By the bias of its last layer alone, from one noise and without the noisiest steps: few pictures are enough."""
    trainer = make(
        "DDPO", tmp_path, bright, rows=["a red circle"], peft_config=None, learning_rate=0.1, num_generations=16,
        per_device_train_batch_size=16, max_steps=6, window_size=2, pairs_at_once=32, same_initial_noise=True,
    )  # fmt: skip
    trainer.model.requires_grad_(False).conv_out.bias.requires_grad_(True)
    trainer.train()
    reward = history(trainer, "reward")
    assert reward[-1] > reward[0] + 0.015
