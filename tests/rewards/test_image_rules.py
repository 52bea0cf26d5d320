"""Rewards of images by rule against numbers by hand, and what functions are handed where images were made."""

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from shared.builtin.pictures import COLOURS, FORMS, draw, other_colour, paint
from shared.errors import UserError
from shared.rewards.base import FunctionReward, Sample
from shared.rewards.combine import RewardSet
from shared.rewards.images import (
    brightness_reward,
    colour_reward,
    colourfulness_reward,
    jpeg_compressibility_reward,
    jpeg_incompressibility_reward,
)
from shared.rewards.loading import DIFFERENTIABLE, IMAGE_RULES, check_reward, load_reward
from shared.rewards.ocr import OCRReward, edit_distance
from shared.rewards.pictures import to_pil, within


def made(*images, **columns):
    return [
        Sample(f"p{at}", image, {"__row__": 10 + at, **{name: values[at] for name, values in columns.items()}})
        for at, image in enumerate(images)
    ]


def flat(red, green, blue, size=8):
    return torch.tensor([red, green, blue])[:, None, None].expand(3, size, size).clone()


def drawn(colour, form, seed=0):
    return torch.from_numpy(paint(draw(colour, form, random.Random(seed)))).permute(2, 0, 1).float() / 255


def test_functions_get_the_images_that_were_made():
    seen = {}

    def tensors(images, prompts, completions, kind, metadata):
        seen["tensors"] = images, prompts, completions, kind, metadata
        return images.mean((1, 2, 3))

    def pictures(images):
        seen["pictures"] = images
        return [image.getpixel((0, 0))[0] for image in images]

    pictures.takes = "pil"
    rows = made(flat(1.0, 0.2, 0), flat(0.0, 0, 0), kind=["x", "y"])
    table = RewardSet([tensors, pictures])(rows)
    assert table.values.tolist() == [[pytest.approx(0.4), 255.0], [0.0, 0.0]]  # integers are cast
    images, prompts, completions, kind, metadata = seen["tensors"]
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32 and completions is images
    assert prompts == ["p0", "p1"] and kind == ["x", "y"] and metadata == [{"kind": "x"}, {"kind": "y"}]
    assert seen["pictures"][0].size == (8, 8) and seen["pictures"][0].getpixel((0, 0)) == (255, 51, 0)

    RewardSet(tensors)(made(flat(1.0, 1, 1), flat(1.0, 1, 1), kind=[1, 2], metadata=[{"a": 1}, {}]))
    assert seen["tensors"][4] == [{"a": 1}, {}]  # a column of that name


def test_images_of_unlike_size_are_a_list():
    def sizes(images, prompts):
        assert isinstance(images, list)
        return [image.shape[-1] for image in images]

    rows = made(flat(1.0, 0, 0, 4), flat(1.0, 0, 0, 6))
    assert RewardSet([sizes, "brightness_reward"])(rows).values.tolist() == [
        [4, pytest.approx(0.299)],
        [6, pytest.approx(0.299)],
    ]


def test_images_of_a_prompt_stay_a_column_where_text_was_made():
    def reward(completions, images):
        assert images == [["picture"]]
        return [1.0]

    def no_column(images):
        return [1.0]

    rows = [Sample("p", "text", {"images": ["picture"]})]
    assert RewardSet(reward)(rows).values.tolist() == [[1.0]]
    with pytest.raises(UserError, match="takes 'images', and the rows have no such column"):
        RewardSet(no_column)([Sample("p", "text")])


@pytest.mark.parametrize("metadata", [{"seen": ["a", "b"], "all": 3}, [{"seen": "a"}, {"seen": "b"}]])
def test_metadata_beside_the_rewards(metadata):
    def field_form(images, prompts, prompt_metadata):
        return np.array([1, 2]), metadata

    table = RewardSet(field_form)(made(flat(0.0, 0, 0), flat(0.0, 0, 0)))
    assert table.values.tolist() == [[1.0], [2.0]] and table.extras == {"seen": ["a", "b"]}

    def pair(images):
        return 0.5, 0.25

    def tensors(images):
        return tuple(torch.tensor([0.5, 0.25]))

    for rewards in (pair, tensors):
        assert RewardSet(rewards)(made(flat(0.0, 0, 0), flat(0.0, 0, 0))).values.tolist() == [[0.5], [0.25]]


@pytest.mark.parametrize(
    "result, words",
    [
        (torch.ones(2, 1), r"rows together.*a Tensor of shape \(2, 1\); expected one number for each row, \(2,\)"),
        (torch.ones(3), "it returned 3 values for 2 rows"),
        (torch.tensor(1.0), r"a Tensor of shape \(\)"),
        ([1.0, math.inf], r"row 11 \('p1'\): it gave inf, which is not finite"),
    ],
)
def test_a_wrong_result_is_named(result, words):
    with pytest.raises(UserError, match=words):
        RewardSet(lambda images: result)(made(flat(0.0, 0, 0), flat(0.0, 0, 0)))
    assert RewardSet(lambda images: [None, math.nan])(made(flat(0.0, 0, 0), flat(0.0, 0, 0))).values.isnan().all()


def test_brightness_by_hand():
    images = torch.stack([flat(1.0, 0, 0), flat(0, 0.5, 0), flat(1.0, 1, 1), flat(-1.0, 2, 0)])
    assert brightness_reward(images).tolist() == pytest.approx([0.299, 0.2935, 1.0, 0.587])
    noise = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    grey = np.asarray(to_pil(noise).convert("L"), np.float32).mean() / 255
    assert brightness_reward([noise])[0].item() == pytest.approx(grey, abs=0.005)
    assert brightness_reward([to_pil(noise)])[0].item() == pytest.approx(grey, abs=0.005)


def test_colourfulness_by_hand():
    halves = torch.cat([flat(1.0, 0, 0), flat(0.0, 1, 0)], -1)
    # rg is 1 and -1, yb .5 everywhere: spread 1, mean .5
    assert colourfulness_reward(halves[None]).item() == pytest.approx(1 + 0.3 * 0.5, abs=1e-4)
    # rg 1 and 0, yb .5 and 0: spreads .5 and .25, means .5 and .25
    part = torch.cat([flat(1.0, 0, 0), flat(0.7, 0.7, 0.7)], -1)
    expected = math.hypot(0.5, 0.25) * 1.3
    assert colourfulness_reward(part[None]).item() == pytest.approx(expected, abs=1e-4)
    assert colourfulness_reward(flat(0.3, 0.3, 0.3)[None]).item() == pytest.approx(0, abs=1e-4)


def test_jpeg_sizes_are_those_of_pil_without_headers():
    generator = torch.Generator().manual_seed(0)
    images = [flat(0.5, 0.2, 0.1, 16), torch.rand(3, 16, 16, generator=generator), drawn("red", "circle")]
    headers = []
    for image, size in zip(images, jpeg_incompressibility_reward([to_pil(each) for each in images]), strict=True):
        buffer = io.BytesIO()
        to_pil(image).save(buffer, format="JPEG", quality=95)
        headers.append(len(buffer.getvalue()) - round(size * 1000))
    assert len(set(headers)) == 1 and 550 < headers[0] < 700  # markers, tables and sizes: alike for all
    values = RewardSet(["jpeg_compressibility_reward", "jpeg_incompressibility_reward"])(made(*images[:2])).values
    assert torch.equal(values[:, 0], -values[:, 1]) and values[1, 1] > 10 * values[0, 1] > 0
    assert jpeg_compressibility_reward.takes == "pil"


def test_the_named_colour_is_rewarded():
    rng = random.Random(0)
    for colour in COLOURS:
        pictures = [drawn(colour, form, at) for at, form in enumerate(FORMS)]
        right = [f"a {colour} {form}" for form in FORMS]
        wrong = [f"a picture of one {other_colour(colour, rng).capitalize()} {form}" for form in FORMS]
        assert colour_reward(torch.stack(pictures), right).min() > 0.94
        assert colour_reward(torch.stack(pictures), wrong).max() < 0.2


def test_what_would_trick_the_colour_reward():
    def reward(image):
        return colour_reward(image[None], ["a red circle"]).item()

    red = torch.tensor(COLOURS["red"]) / 255
    filled = flat(*red.tolist(), 32)
    half = torch.cat([filled[..., :16], flat(0.9, 0.9, 0.9, 32)[..., 16:]], -1)
    speck = flat(0.9, 0.9, 0.9, 32)
    speck[:, 15:17, 15:17] = red[:, None, None]
    dull = 0.5 * drawn("red", "circle") + 0.2
    two = drawn("red", "square", 3).maximum(drawn("blue", "square", 4))
    for image, most in (
        (filled, 0.01),
        (half, 0.3),
        (speck, 0.05),
        (flat(0.9, 0.9, 0.9, 32), 0.01),
        (two, 0.8),
        (dull, 0.8),
    ):
        assert reward(image) < most, most
    noisy = drawn("red", "circle") + 0.03 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert reward(noisy) > 0.9 and reward(noisy.clamp(0, 1)) > 0.9


def test_a_prompt_without_a_colour_has_no_colour_reward():
    images = torch.stack([drawn("red", "circle")] * 3).requires_grad_()
    values = colour_reward(images, ["a circle", "a red circle on blue", "a redder circle"])
    assert values.isnan().tolist() == [True, False, True] and values[1] > 0.9
    values.nan_to_num().sum().backward()
    assert images.grad.isfinite().all() and images.grad[1].any() and not images.grad[0].any()


@pytest.mark.parametrize("function", [brightness_reward, colourfulness_reward, colour_reward])
def test_gradients_against_finite_differences(function):
    prompts = () if function is not colour_reward else (["a purple circle"],)
    generator = torch.Generator().manual_seed(1)
    image = 0.1 + 0.8 * drawn("red", "circle")[None] + 0.02 * torch.randn(1, 3, 32, 32, generator=generator)
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(function(image, *prompts).sum(), image)
    for direction in (gradient / gradient.norm(), torch.randn(1, 3, 32, 32, generator=generator) / 50):
        step = 0.02 * direction
        with torch.no_grad():
            difference = (function(image + step, *prompts) - function(image - step, *prompts)).item() / 2
        assert difference == pytest.approx((gradient * step).sum().item(), rel=0.03, abs=2e-6)


def test_a_pixel_outside_can_be_brought_back():
    pixels = torch.tensor([-0.2, 0.5, 1.3]).requires_grad_()
    assert within(pixels).tolist() == [0, 0.5, 1]
    for sign, expected in ((1, [0, 1, 1]), (-1, [-1, -1, 0])):  # of a loss: what is followed is minus it
        (gradient,) = torch.autograd.grad(sign * within(pixels).sum(), pixels)
        assert gradient.tolist() == expected


def test_the_judges_of_drawn_pictures_by_name():
    rows = [Sample("a red circle", drawn("red", "circle")), Sample("a red circle", drawn("red", "square"))]
    table = RewardSet(["right_colour", "right_form", "right_picture"])(rows)
    assert table.values.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_every_name_is_a_reward_that_says_whether_it_has_a_gradient():
    for name in IMAGE_RULES:
        reward = load_reward(name)
        assert isinstance(reward, FunctionReward) and reward.__name__ == name and reward.function.__doc__
        assert reward.differentiable is (name in DIFFERENTIABLE)
    with pytest.raises(UserError, match="Did you mean brightness_reward"):
        check_reward("brightnes_reward")


def test_ocr_by_hand():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("ab", "ab"))] == [3, 3, 0]
    said = {"8": "he1lo", "9": "The HELLO\nworld!", "10": "nothing like it at all"}
    reward = RewardSet(OCRReward(read=lambda image: said[str(image.size[0])]))
    prompt = "a sign that says “Hello” in my brother's room"
    values = reward([Sample(prompt, flat(0.0, 0, 0, size)) for size in (8, 9, 10)]).values[:, 0].tolist()
    assert values == pytest.approx([0.8, 1.0, 0.0])
    both = "the words \"ab\" and 'cd'"
    rows = [Sample(both, flat(0.0, 0, 0)), Sample("no quotes: don't, can't", flat(0.0, 0, 0))]
    found = RewardSet(OCRReward(read=lambda image: "abxd"))(rows).values[:, 0]
    assert found[0] == 0.75 and found[1].isnan()


def test_ocr_without_a_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed: pip install pytesseract.*or pip install easyocr"):
        load_reward("ocr")
    with pytest.raises(UserError, match="engine is 'paddle'; allowed: pytesseract, easyocr"):
        load_reward("ocr:paddle")


def test_pil_images_are_8_bit_and_rounded():
    assert to_pil(flat(0.5, 2.0, -1.0)).getpixel((0, 0)) == (128, 255, 0)
    image = Image.new("RGB", (4, 4), (0, 0, 255))
    rows = [Sample("p", image), Sample("p", image)]
    assert RewardSet("brightness_reward")(rows).values[:, 0].tolist() == pytest.approx([0.114, 0.114])
