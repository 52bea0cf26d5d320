"""FlowGRPOTrainer on tiny pipelines: flow samplers, windows of steps with noise, fewer steps than at evaluation."""

import pytest
import torch
from tiny_denoising import history, make, perturb, step


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_only_steps_of_the_window_have_noise_and_are_learnt_from(tmp_path, sampler):
    trainer = make(
        "FlowGRPO", tmp_path, pipeline="sd3", sampler=sampler, num_inference_steps=6, window_size=2, window_start=1,
        solver="dpm", generation_rows=1, pairs_at_once=1, num_generations=2, per_device_train_batch_size=2,
        max_steps=1, same_initial_noise=True,
    )  # fmt: skip
    trainer.train()
    rollout = trainer.buffer.rollout
    assert rollout.actions.at.tolist() == [[1, 2]] * 2 and rollout.lengths.tolist() == [2, 2]
    assert [len(chain) for chain in rollout.actions.chains] == [3, 3], "neighbours share the latents between them"
    first, second = rollout.actions.chains
    assert torch.equal(first[0], second[0]), "the first step has no noise, and both began alike"
    assert not torch.allclose(first[1], second[1])
    for figure in ("ratio/first_step_error", "sampling/logp_difference", "kl"):
        assert history(trainer, figure) == [0.0], figure


def test_fewer_steps_in_training_than_at_evaluation(tmp_path):
    trainer = make("FlowGRPO", tmp_path, pipeline="sd3", num_inference_steps=3, eval_dataset=["a", "b"])
    told = []
    trainer.model.get_base_model().register_forward_pre_hook(
        lambda module, args, given: told.append(given["timestep"].tolist()), with_kwargs=True
    )
    trainer.evaluate()
    assert len(told) == 40
    told.clear()
    step(trainer)
    assert len(told) > 3 and max(map(len, told)) == 8


def test_a_window_in_the_chain_has_the_gradient_of_its_steps(tmp_path):
    """All steps, or those of two windows that make them up: the same latents, the gradients add up."""

    def gradients(name, **options):
        trainer = make(
            "FlowGRPO", tmp_path / name, pipeline="sd3", beta=0.0, advantages="batch", num_generations=1, **options
        )
        perturb(trainer.model)
        _, found, (micro,) = step(trainer)
        return found, micro

    whole, micro = gradients("whole")
    assert micro.batch.at.tolist() == [[0, 1, 2]] * 8
    part, chosen = gradients("part", train_timestep_fraction=0.7)
    learnt = chosen.batch.at[0].tolist()
    assert len(learnt) == 2
    assert torch.equal(chosen.batch.before, micro.batch.before[:, learnt]), "all steps keep their noise"
    assert any(not torch.allclose(value, part[name]) for name, value in whole.items())


def test_flux_is_told_the_guidance_scale(tmp_path):
    trainer = make(
        "FlowGRPO", tmp_path, pipeline="flux", height=16, width=16, guidance_scale=3.5, max_sequence_length=8,
        beta=0.01, num_generations=2, per_device_train_batch_size=2, generation_rows=1, pairs_at_once=1, max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert history(trainer, "ratio/first_step_error") == [0.0] == history(trainer, "sampling/logp_difference")
    assert trainer.buffer.rollout.actions.final.shape == (2, 4, 8, 8)


def test_it_learns(tmp_path):
    """By the bias of its last layer alone, and from one noise, for which few pictures are enough."""
    trainer = make(
        "FlowGRPO", tmp_path, rows=["a red circle"], pipeline="sd3", peft_config=None, beta=0.0, learning_rate=0.2,
        num_generations=16, per_device_train_batch_size=16, max_steps=6, num_inference_steps=3, pairs_at_once=32,
        same_initial_noise=True,
    )  # fmt: skip
    trainer.model.requires_grad_(False).proj_out.bias.requires_grad_(True)
    trainer.train()
    reward = history(trainer, "reward")
    assert reward[-1] > reward[0] + 0.004
