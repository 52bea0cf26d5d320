"""Rewards with their gradient: totals and parts, against finite differences, and what has no gradient."""

import math

import pytest
import torch

from shared.errors import UserError
from shared.rewards.base import Sample
from shared.rewards.combine import RewardSet
from shared.rewards.differentiable import DifferentiableRewards
from shared.rewards.judges import EndpointJudge

SAMPLES = [Sample("a red circle", None, {"kind": "x"}), Sample("a circle", None, {"kind": "y"})]


def images(count=2):
    return (0.1 + 0.8 * torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))).requires_grad_()


def squares(images, prompts, kind):
    return -(images - 0.5).square().mean((1, 2, 3)) * torch.tensor([1.0 if each == "x" else 3.0 for each in kind])


def listed(images):
    return [image.mean() for image in images], {"seen": ["a"] * len(images)}


def some(images, prompts):
    return [image.max() if prompt == "a circle" else torch.tensor(math.nan) for image, prompt in zip(images, prompts,
            strict=True)]  # fmt: skip


def test_totals_and_parts_have_the_gradient():
    rewards = DifferentiableRewards(RewardSet([squares, listed, "brightness_reward"], weights=[1, 0.5, 2]))
    pictures = images()
    total, parts = rewards(pictures, SAMPLES)
    assert total.shape == (2,) and parts.shape == (2, 3)
    assert torch.allclose(total, parts @ torch.tensor([1, 0.5, 2]))
    plain = RewardSet([squares, listed, "brightness_reward"])(
        [Sample(each.prompt, image, each.columns) for each, image in zip(SAMPLES, pictures.detach(), strict=True)]
    )
    assert torch.allclose(parts, plain.values)
    (gradient,) = torch.autograd.grad(total.sum(), pictures)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends = [rewards(pictures + step * direction, SAMPLES)[0].double().sum() for step in (0.01, -0.01)]
    assert (ends[0] - ends[1]).item() / 0.02 == pytest.approx((gradient * direction).sum().item(), rel=0.01)
    expected = -2 * (pictures[1] - 0.5) * 3 / 432 + 0.5 / 432  # of the second image, without brightness
    assert torch.allclose(torch.autograd.grad(
        rewards(pictures, SAMPLES)[1][1, 0] + 0.5 * rewards(pictures, SAMPLES)[1][1, 1], pictures)[0][1],
        expected, atol=1e-6)  # fmt: skip


def test_what_does_not_apply_counts_nothing():
    rewards = DifferentiableRewards(RewardSet([some, "colour_reward"]))
    pictures = images()
    total, parts = rewards(pictures, SAMPLES)
    assert parts.isnan().tolist() == [[True, False], [False, True]]
    assert total[0] == parts[0, 1] and total[1] == parts[1, 0]
    (gradient,) = torch.autograd.grad(total.sum(), pictures)
    assert gradient.isfinite().all() and gradient[1].count_nonzero() == 1
    total, parts = DifferentiableRewards(RewardSet(some))(pictures, SAMPLES[:1] * 2)
    assert total.tolist() == [0, 0] and parts.isnan().all()


def test_half_precision_images_and_no_gradient():
    rewards = DifferentiableRewards(RewardSet("brightness_reward"))
    total, _ = rewards(images().bfloat16(), SAMPLES)
    assert total.dtype == torch.float32 and total.requires_grad
    assert not rewards(images().detach(), SAMPLES)[0].requires_grad
    with torch.no_grad():
        assert not DifferentiableRewards(RewardSet(lambda images: [1, 2]))(images(), SAMPLES)[0].requires_grad


def test_a_gradient_of_0_to_all_examples_is_told(caplog):
    def rounded(images):
        return (255 * images).round().mean((1, 2, 3)) + 0 * images[:, 0, 0, 0]

    DifferentiableRewards(RewardSet(["brightness_reward", rounded])).check(images(), ["a", "b"])
    assert [record.getMessage()[:38] for record in caplog.records] == ["Reward rounded has a gradient of 0 to "]


def test_images_are_not_clamped_for_functions():
    seen = []
    rewards = DifferentiableRewards(RewardSet([lambda images: seen.append(images) or images.mean((1, 2, 3))]))
    pictures = torch.full((2, 3, 4, 4), 1.5, requires_grad=True)
    total, _ = rewards(pictures, SAMPLES)
    assert seen[0].max() == 1.5 and torch.autograd.grad(total.sum(), pictures)[0].all()


def test_a_reward_of_weight_0_is_only_looked_at():
    rewards = DifferentiableRewards(RewardSet(["brightness_reward", "jpeg_compressibility_reward"], weights=[1, 0]))
    pictures = torch.full((2, 3, 8, 8), 1.5, requires_grad=True)
    rewards.check(pictures, ["a", "b"])
    total, parts = rewards(pictures, SAMPLES)
    assert total.tolist() == [1, 1] and parts[0, 1] < 0 and total.requires_grad


def detached(images):
    return images.detach().mean((1, 2, 3))


def numbers(images):
    return [0.5] * len(images)


def unrelated(images):
    return torch.nn.Parameter(torch.zeros(len(images))) * 2


def pictures_only(images):
    return [1.0] * len(images)


pictures_only.takes = "pil"


async def later(images):
    return images.mean((1, 2, 3))


def owns_up(images):
    return images.mean((1, 2, 3))


owns_up.differentiable = False
BUILT_IN = "brightness_reward, colourfulness_reward, colour_reward, clip, aesthetic, pickscore, hpsv2, imagereward"


@pytest.mark.parametrize(
    "reward",
    ["jpeg_compressibility_reward", "right_colour", pictures_only, later, owns_up,
     EndpointJudge("http://localhost:1", "m")],
)  # fmt: skip
def test_what_is_known_to_have_no_gradient_is_refused_at_once(reward):
    with pytest.raises(UserError, match=rf"reward \w+ has none.* these have it: {BUILT_IN}\. .*DDPO"):
        DifferentiableRewards(RewardSet(["brightness_reward", reward]))


@pytest.mark.parametrize(
    "reward, words",
    [
        (detached, "reward detached returned numbers without one.*these have it"),
        (numbers, "reward numbers returned numbers without one"),
        (unrelated, "reward unrelated gave a result that does not follow from the images"),
        (lambda images: images.mean(), r"failed: it returned a tensor of shape \(\); expected \(2,\)"),
        (lambda images: images.mean((2, 3)), r"a tensor of shape \(2, 3\); expected \(2,\)"),
        (lambda images: images.mean((1, 2, 3)) / 0, "gave inf, which is not finite, for sample 0"),
        (lambda images: images.mean((1, 2, 3)) * math.nan, "No reward applies to the first 2 prompts.*such as 'a'"),
        (lambda images: (images - images).sum((1, 2, 3)).sqrt(), "has a gradient to the image that is not finite"),
        (lambda images: images.nothing, r"failed: AttributeError: .*\(test_differentiable.py, line \d+\)"),
        (lambda images: None, "it returned NoneType 'None'"),
        (lambda images, kind: images.mean((1, 2, 3)), "takes 'kind', and the rows have no such column"),
    ],
)
def test_an_example_is_scored_before_the_first_sampling(reward, words):
    with pytest.raises(UserError, match=words):
        DifferentiableRewards(RewardSet(reward)).check(torch.rand(2, 3, 8, 8), ["a", "b"])


def test_examples_that_pass():
    rewards = DifferentiableRewards(RewardSet([squares, "colour_reward", "colourfulness_reward", some]))
    with torch.no_grad():
        rewards.check(torch.rand(2, 3, 8, 8), ["a", "b"], [{"kind": "x"}, {"kind": "y"}])


def test_what_functions_log_is_handed_on():
    seen = {}

    def telling(images, log_metric, log_extra):
        log_metric("m", 2)
        return images.mean((1, 2, 3)), [{"side": "a"}, {"side": "b"}]

    rewards = DifferentiableRewards(RewardSet(telling))
    rewards(images(), SAMPLES, log_metric=seen.__setitem__, log_extra=seen.__setitem__)
    assert seen == {"m": 2, "side": ["a", "b"]}


class Scores:
    """A Reward of samples."""

    __name__ = "scores"
    differentiable = True

    def __call__(self, samples, context):
        return torch.stack([sample.output.mean() for sample in samples])


def test_a_reward_of_samples():
    pictures = images()
    total, _ = DifferentiableRewards(RewardSet(Scores()))(pictures, SAMPLES)
    assert torch.allclose(torch.autograd.grad(total.sum(), pictures)[0], torch.tensor(1 / 432))
    silent = Scores()
    silent.differentiable = False
    with pytest.raises(UserError, match="reward scores has none"):
        DifferentiableRewards(RewardSet(silent))


def test_autocast_of_the_training_does_not_reach_the_rewards():
    def product(images):
        return (images.flatten(1) @ images.new_ones(432, 1))[:, 0]

    rewards, pictures = DifferentiableRewards(RewardSet(product)), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = rewards(pictures, SAMPLES)
    assert torch.allclose(total, pictures.sum((1, 2, 3)))
