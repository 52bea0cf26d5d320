"""Models that score images, on tiny ones saved to folders: against transformers, their names, gradients and errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_scorers import SIDE, build_blip, build_clip, layers
from transformers import BlipForImageTextRetrieval, CLIPModel, CLIPVisionModelWithProjection

import shared.builtin
from shared.builtin.pictures import SIZE
from shared.errors import UserError
from shared.rewards.base import Sample
from shared.rewards.combine import RewardSet
from shared.rewards.image_models import AestheticScore, CLIPScore, HPSv2, ImageModel, ImageRewardScore, PickScore
from shared.rewards.loading import DIFFERENTIABLE, IMAGE_MODELS, check_reward, load_reward
from shared.rewards.pictures import to_pil

PROMPTS = ["a red circle", "What colour is the square", "a red circle"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(build_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return str(build_blip(tmp_path_factory.mktemp("blip")))


@pytest.fixture
def head(tmp_path):
    save_file(layers(12, 6, 4, 1), tmp_path / "own_head.safetensors")
    return str(tmp_path / "own_head.safetensors")


def images(count=3, size=(20, 28), seed=0):
    """Smooth pictures, none alike."""
    small = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size, mode="bilinear").mul(0.9).add(0.05)


def samples(pictures, prompts=PROMPTS):
    return [Sample(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]


def by_hand(state, embedding):
    """What linear layers of a file say, one by one."""
    for at in sorted({int(name.split(".")[1]) for name in state}):
        embedding = embedding @ state[f"layers.{at}.weight"].T + state[f"layers.{at}.bias"]
    return embedding[:, 0]


@torch.no_grad()
def test_clip_score_is_transformers_logits(clip):
    reward = CLIPScore(clip, batch_size=2)
    model, processor = CLIPModel.from_pretrained(clip).eval(), reward.processor
    pictures = images()
    inputs = processor(text=PROMPTS, return_tensors="pt", padding=True)
    pixels = processor.image_processor(pictures, do_rescale=False, return_tensors="pt")["pixel_values"]
    logits = model(**inputs, pixel_values=pixels).logits_per_image.diag()
    scale = model.logit_scale.exp()
    assert scale != 100 and logits.unique().numel() == 3
    for kind, expected in ((CLIPScore, 100 * logits / scale), (PickScore, logits), (HPSv2, logits / scale)):
        assert torch.allclose(kind(clip)(pictures, PROMPTS), expected, atol=1e-4 * expected.abs().max()), kind
    assert torch.allclose(reward(pictures, PROMPTS), 100 * logits / scale, atol=1e-3)
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert torch.equal(reward(list(pictures), chat), reward(pictures, PROMPTS))


def test_pixels_are_those_of_the_image_processor_of_files(clip):
    reward = CLIPScore(clip)
    pictures = images(size=(40, 31))
    files = reward.processor(images=[to_pil(each) for each in pictures], return_tensors="pt")["pixel_values"]
    ours = reward.pixels(pictures)
    assert ours.shape == (3, 3, SIDE, SIDE)
    # a file has 8 bits a channel before and after it is resized; std is .26 at least
    assert (ours - files).abs().max() < 1.01 / 255 / 0.26
    assert torch.equal(reward.pixels([to_pil(each) for each in pictures]), reward.pixels([*map(rounded, pictures)]))


def rounded(image):
    return (image * 255).round() / 255


def test_long_prompts_are_cut_and_sizes_may_differ(clip):
    reward = CLIPScore(clip)
    pictures = [images(1, (20, 28))[0], images(1, (33, 17))[0]]
    values = reward(pictures, ["red circle " * 100, "red"])
    assert values.isfinite().all() and values[1] == pytest.approx(reward([pictures[1]], ["red"]).item(), abs=1e-3)


@torch.no_grad()
def test_aesthetic_score_of_whole_and_half_models(clip, head, tmp_path):
    pictures = images()
    reward = load_reward(f"aesthetic:{clip}|{head}", device="cpu")
    half = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    embedding = half(pixel_values=reward.function.pixels(pictures)).image_embeds
    expected = by_hand(load_file(head), embedding / embedding.norm(dim=-1, keepdim=True))
    assert reward(samples(pictures), {}).tolist() == pytest.approx(expected.tolist(), abs=1e-5)

    whole = tmp_path / "predictor"  # as the public one is saved: one file, and a kind of its own
    half.save_pretrained(whole)
    save_file(
        {**load_file(whole / "model.safetensors"), **load_file(head)}, whole / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "model_type": "aesthetics_predictor"}))
    shutil.copy(f"{clip}/processor_config.json", whole)
    assert torch.allclose(AestheticScore(str(whole))(pictures, PROMPTS), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["linear.", "", "predictor."])
def test_a_head_of_one_layer(clip, tmp_path, name):
    weight, bias = torch.randn(1, 12), torch.randn(1)
    save_file({f"{name}weight": weight, f"{name}bias": bias}, tmp_path / "linear.safetensors")
    reward = AestheticScore(clip, str(tmp_path))
    with torch.no_grad():
        embedding = reward.model(pixel_values=reward.pixels(images())).image_embeds
    expected = (embedding / embedding.norm(dim=-1, keepdim=True)) @ weight[0] + bias
    assert torch.allclose(reward(images(), PROMPTS), expected, atol=1e-5)


@torch.no_grad()
def test_imagereward_is_the_head_on_the_first_token(blip):
    reward = load_reward(f"imagereward:{blip}|mean=0.5|std=2.0", device="cpu").function
    pictures = images()
    model = BlipForImageTextRetrieval.from_pretrained(blip).eval()
    words = reward.words(PROMPTS, 35)
    first = model(**words, pixel_values=reward.pixels(pictures)).question_embeds[:, 0]
    expected = (by_hand(load_file(f"{blip}/head.safetensors"), first) - 0.5) / 2
    values = reward(pictures, PROMPTS)
    assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-4) and (values[0] - values[2]).abs() > 1e-4


def test_gradients_go_through_frozen_models(clip, blip, head):
    for reward in (CLIPScore(clip, batch_size=2), AestheticScore(clip, head), ImageRewardScore(blip)):
        pictures = images().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(pictures, PROMPTS).sum(), pictures)
        assert not any(each.requires_grad for each in reward.model.parameters())
        assert not reward.model.training and not reward(images(), PROMPTS).requires_grad
        direction = gradient / gradient.norm()
        with torch.no_grad():
            ends = [reward(pictures + step * direction, PROMPTS).double().sum() for step in (1e-3, -1e-3)]
        assert (ends[0] - ends[1]).item() / 2e-3 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_half_precision(clip):
    whole, half = CLIPScore(clip), load_reward(f"clip:{clip}|dtype=bfloat16|batch_size=1", device="cpu").function
    assert half.model.dtype == torch.bfloat16 and half.batch_size == 1
    pictures = images().requires_grad_()
    values = half(pictures, PROMPTS)
    assert values.dtype == torch.float32 and torch.allclose(values, whole(pictures, PROMPTS), atol=4)
    values.sum().backward()
    assert pictures.grad.dtype == torch.float32 and pictures.grad.any()


def test_by_name_in_a_mixture(clip, blip, monkeypatch):
    monkeypatch.setitem(shared.builtin.MODELS, "builtin/clip-of-test", clip)
    specs = [f"clip:{clip}", "pickscore:builtin/clip-of-test", f"hpsv2:{clip}|scale=2", f"imagereward:{blip}"]
    rewards = RewardSet([*specs, "brightness_reward"], weights=[1, 0.1, 1, 1, 2], device="cpu")
    assert rewards.names == ["clip", "pickscore", "hpsv2", "imagereward", "brightness_reward"]
    values = rewards(samples(images())).values
    assert values.isfinite().all() and torch.allclose(values[:, 2], values[:, 0] / 50, atol=1e-3)
    loaded = CLIPModel.from_pretrained(clip)
    again = CLIPScore(loaded, rewards.rewards[0].function.processor)(images(), PROMPTS)
    assert torch.allclose(again, values[:, 0], atol=1e-3)


def test_the_reward_model_of_vision_language_models_by_name():
    reward = RewardSet("builtin/rm-shapes", device="cpu")
    pictures = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    values = reward(samples(pictures)).values
    assert values.isfinite().all() and values[0] != values[2] and reward.rewards[0].differentiable is False


def test_every_name_says_whether_it_has_a_gradient():
    from shared.rewards.loading import imported

    for name, path in IMAGE_MODELS.items():
        kind = imported(path)
        assert kind.differentiable is (name in DIFFERENTIABLE)
        assert name == "ocr" or (issubclass(kind, ImageModel) and kind.label == name)


def test_pickles_are_not_read(clip, head, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    told = "pickles .* are not read, since they can run code: load them where you trust them"
    with pytest.raises(UserError, match=f"reward model '.*pickled' cannot be loaded: .*{told}"):
        load_reward(f"clip:{folder}", device="cpu")
    torch.save({}, tmp_path / "sac.pth")
    for where in (str(tmp_path / "sac.pth"), str(folder)):
        with pytest.raises(UserError, match=f"the head .*{told}"):
            AestheticScore(clip, where)


def test_a_head_that_does_not_fit_is_told(clip, tmp_path):
    for state, words in (
        (layers(16, 1), "from the encoder's 12 to 1, found 16 to 1"),
        (layers(12, 6), "found 12 to 6"),
        ({**layers(12, 5), "layers.2.weight": torch.zeros(1, 6)}, "found 12 to 5, 6 to 1"),
        ({"other": torch.zeros(2)}, "found none"),
    ):
        save_file(state, tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match=words):
            AestheticScore(clip, str(tmp_path / "wrong.safetensors"))
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage!")
    with pytest.raises(UserError, match="garbage.safetensors cannot be read as safetensors"):
        AestheticScore(clip, str(tmp_path / "garbage.safetensors"))
    with pytest.raises(UserError, match="there are garbage.safetensors, wrong.safetensors: name the file"):
        AestheticScore(clip, str(tmp_path))


def test_a_model_that_lacks_weights_is_refused(clip, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(clip, folder)
    state = load_file(folder / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match="part is no whole CLIPModel: 1 of its weights are missing, such as visual_proj"
    ):
        CLIPScore(str(folder))


@pytest.mark.parametrize(
    "spec, words",
    [
        ("clip:", "expected clip:MODEL, and more arguments as"),
        ("clip:a/b|c/d", "expected clip:MODEL"),
        ("aesthetic:a/b|c|d", r"expected aesthetic:MODEL\|HEAD"),
        ("imagereward", r"expected imagereward:MODEL\|HEAD"),
        ("clip:./missing", "no such folder"),
        ("clip|model=a/b", "give model by its place"),
        ("pickscore|a b=1", "'a b=1' is no name=value"),
        ("hpsv3", "Did you mean hpsv2"),
        ("clip:builtin/missing", "no built-in model 'builtin/missing'"),
    ],
)
def test_what_is_no_model_of_images_is_told_before_one_loads(spec, words):
    with pytest.raises(UserError, match=words):
        check_reward(spec)


def test_a_processor_from_another_place(clip, tmp_path):
    folder = tmp_path / "alone"
    CLIPModel.from_pretrained(clip).save_pretrained(folder)
    with pytest.raises(UserError, match="alone' cannot be loaded"):
        load_reward(f"clip:{folder}", device="cpu")
    values = load_reward(f"clip:{folder}|processor={clip}", device="cpu").function(images(), PROMPTS)
    assert torch.allclose(values, CLIPScore(clip)(images(), PROMPTS), atol=1e-3)


def test_another_kind_of_model_is_told(clip):
    with pytest.raises(UserError, match="its weights are not those of a BlipForImageTextRetrieval"):
        load_reward(f"imagereward:{clip}", device="cpu")
    with pytest.raises(UserError, match="found none: name a file that has them"):
        load_reward(f"aesthetic:{clip}", device="cpu")


def test_options_that_a_model_does_not_take_are_told(clip):
    with pytest.raises(UserError, match="cannot be loaded: .*unexpected keyword argument 'colour'"):
        load_reward(f"clip:{clip}|colour=1", device="cpu")
    with pytest.raises(UserError, match="batch_size 0"):
        load_reward(f"clip:{clip}|batch_size=0", device="cpu")
