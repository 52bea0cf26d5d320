"""What is kept of sampling runs, whose noise depends on what, and which steps are actions."""

from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import tiny_pipeline

from diffusionalign.actor import DenoisingActions, DenoisingActor
from diffusionalign.ddpo import DDPOConfig
from diffusionalign.sampling import Trajectory
from diffusionalign.windows import ActionWindow
from shared.data.rows import ROW
from shared.errors import DataError, UserError

ROWS = [{ROW: at, "prompt": text, "number": at} for at, text in enumerate(("red", "a blue square", "green"))]


def trajectory(steps, rows=2):
    """Latents whose one number says at which level they are: 100 times the row, and the level."""
    levels = torch.arange(rows)[:, None] * 100 + torch.tensor(steps)[None]
    shaped = levels[..., None, None, None].float()
    at = torch.tensor(steps).expand(rows, -1)
    return Trajectory(shaped[:, -1] + 9, shaped, shaped + 1, at, levels.float())


def test_neighbouring_steps_share_their_latents():
    actions = DenoisingActions.of(trajectory([0, 1, 4, 6, 7]))
    assert actions.chains[1].flatten().tolist() == [100, 101, 102, 104, 105, 106, 107, 108]
    assert actions.slots.tolist() == [[0, 1, 3, 5, 6]] * 2
    other = DenoisingActions.of(trajectory([2, 3, 4, 5, 6], rows=1))
    joined = DenoisingActions.joined([actions.of_rows([1]), other])
    assert [len(chain) for chain in joined.chains] == [8, 6] and joined.at.tolist()[1] == [2, 3, 4, 5, 6]
    assert joined.final.flatten().tolist() == [116, 15]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline("sd")


def actor_of(pipeline, folder, **options):
    from diffusionalign.pipelines.loading import adapter_of

    args = DDPOConfig(
        **{
            "output_dir": str(folder),
            "num_inference_steps": 3,
            "guidance_scale": 1.0,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            **options,
        }
    )
    return DenoisingActor(adapter_of(pipeline), args, records=True)


def drawn(actor, rows=ROWS, group_size=2, mode="train", *, number=0, before=0, step=0):
    state = SimpleNamespace(global_step=step)
    actor.refresh(SimpleNamespace(first_number=number, drawn_before=before, state=state))
    return actor.act(actor.adapter.denoiser, rows, group_size, mode=mode)


def test_noise_depends_on_no_batch_and_no_process(pipeline, tmp_path):
    together = drawn(actor_of(pipeline, tmp_path), number=10)
    alone = drawn(actor_of(pipeline, tmp_path, generation_rows=1), number=10)
    other = drawn(actor_of(pipeline, tmp_path), ROWS[1:], number=12)
    torch.testing.assert_close(alone.actions.final, together.actions.final, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.actions.final, together.actions.final[2:], rtol=0, atol=1e-5)
    later = drawn(actor_of(pipeline, tmp_path), number=16)
    assert (later.actions.final - together.actions.final).abs().amax((1, 2, 3)).min() > 0.1
    held_out = [drawn(actor_of(pipeline, tmp_path), rows, mode=mode, number=number).actions.final
                for rows, mode, number in ((ROWS, "eval", 0), (ROWS[::-1], "greedy", 5))]  # fmt: skip
    torch.testing.assert_close(held_out[0].unflatten(0, (3, 2)).flip(0).flatten(0, 1), held_out[1], rtol=0, atol=1e-5)
    assert (held_out[0][0] - held_out[0][1]).abs().max() > 0.1, "a row's pictures differ"


def test_pictures_of_a_prompt_may_begin_alike(pipeline, tmp_path):
    rollout = drawn(actor_of(pipeline, tmp_path, same_initial_noise=True))
    begin = torch.stack([chain[0] for chain in rollout.actions.chains])
    assert torch.equal(begin[0], begin[1]) and not torch.equal(begin[1], begin[2])
    assert not torch.equal(rollout.actions.chains[0][1], rollout.actions.chains[1][1])


def test_what_rewards_see_and_what_is_kept(pipeline, tmp_path):
    actor = actor_of(pipeline, tmp_path)
    rollout = drawn(actor)
    sample = rollout.samples[3]
    assert sample.prompt == "a blue square" and sample.columns == {ROW: 1, "number": 1}
    assert sample.output.shape == (3, 16, 16) and sample.output.dtype == torch.float32
    assert sample.output.min() >= 0 and sample.output.max() <= 1
    assert rollout.lengths.tolist() == [3] * 6
    again = actor.restored(actor.state(rollout), ROWS, 2)
    assert [each.columns for each in again.samples] == [each.columns for each in rollout.samples]
    torch.testing.assert_close(again.samples[3].output, sample.output)
    kept = actor.batch(again, [5, 0], 1, skipped=torch.tensor([True, *[False] * 5]))
    assert kept.prompts == ["green", "red"] and kept.action_mask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert torch.equal(kept.after[:, 0], kept.before[:, 1])
    pairs = list(kept.parts(4))
    assert [part.at.flatten().tolist() for part in pairs] == [[0, 1, 2, 0], [1, 2]]
    assert pairs[0].prompts == ["green", "green", "green", "red"] and torch.equal(
        pairs[1].before[0, 0], kept.before[1, 1]
    )


def test_rows_that_cannot_be_drawn(pipeline, tmp_path):
    actor = actor_of(pipeline, tmp_path)
    for row, words in (({ROW: 4, "prompt": " "}, "row 4: prompt is empty"),
                       ({ROW: 5, "prompt": "a", "negative_prompt": 3}, "row 5: negative_prompt")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            actor.check(row)


def test_an_empty_negative_prompt_of_a_row_wins_too(pipeline, tmp_path):
    actor = actor_of(pipeline, tmp_path, negative_prompt=["dark", "blurry"])
    rows = [{ROW: 0, "negative_prompt": ""}, {ROW: 1, "negative_prompt": None}, {ROW: 2}]
    assert actor.negatives(rows) == ["", "blurry", "dark"]


def window(stochastic=range(9), **options):
    options = {
        "window_size": None, "window": "fixed", "window_start": 0, "window_end": None, "window_every": 25,
        "window_stride": 1, "train_timestep_fraction": 1.0, "seed": 3, "sampler": None, "eta": 1.0,
        "noise_level": None, "num_inference_steps": 10, **options,
    }  # fmt: skip
    return ActionWindow(list(stochastic), SimpleNamespace(**options))


def test_windows():
    assert window().actions(0, 0).noisy == window().actions(0, 0).learnt == tuple(range(9))
    assert window(window_size=2, window_start=3).actions(5, 99).noisy == (3, 4)
    moving = window(window_size=4, window="moving", window_every=2, window_stride=3, window_end=8)
    assert [moving.actions(0, step).noisy[0] for step in range(8)] == [0, 0, 3, 3, 1, 1, 4, 4]
    random = window(window_size=2, window="random", window_start=1, window_end=5)
    found = [random.actions(drawn, 0).noisy for drawn in range(40)]
    assert set(found) == {(1, 2), (2, 3), (3, 4)} and found == [random.actions(drawn, 1).noisy for drawn in range(40)]
    share = window(train_timestep_fraction=0.4, window_size=5)
    chosen = [share.actions(drawn, 0) for drawn in range(40)]
    assert {len(each.learnt) for each in chosen} == {2} and {each.noisy for each in chosen} == {tuple(range(5))}
    assert {step for each in chosen for step in each.learnt} == set(range(5))
    assert all(list(each.learnt) == sorted(each.learnt) for each in chosen)


def test_windows_beyond_the_steps_with_noise():
    cases = (
        {"window_size": 10}, {"window_size": 2, "window_start": 8}, {"window_size": 2, "window_end": 10},
        {"window_size": 3, "window_start": 2, "window_end": 4}, {"window_size": 0}, {"stochastic": []},
        {"window_size": 2, "window_start": -1},
    )  # fmt: skip
    for options in cases:
        with pytest.raises(UserError, match="window_size|nothing to learn"):
            window(**options)
