"""The built-in text-to-image pipelines and their data: they load offline, are small, and draw what their cards say."""

import collections
import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from written import content

from shared import builtin
from shared.builtin import make_diffusion, measure_pictures, pictures, pictures_judge, train_diffusion
from shared.builtin.pictures_judge import Seen, asked_for, right_colour, right_form, right_picture, see

NAMES = {"builtin/sd-small": "StableDiffusionPipeline", "builtin/sd3-small": "StableDiffusion3Pipeline"}
DATA = ("builtin/picture-prompts", "builtin/picture-preferences")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_builtin_models.py"


@pytest.fixture(scope="module", params=NAMES)
def pipeline(request):
    loaded = measure_pictures.load_pipeline(request.param)
    loaded.told = request.param
    return loaded


@pytest.fixture(scope="module")
def prompts():
    return builtin.load_dataset("builtin/picture-prompts", "test")["prompt"][:]


def on_the_card(name, what):
    card = (builtin.pipeline_path(name) / make_diffusion.CARD).read_text()
    return float(re.search(rf"\| {re.escape(what)} \| ([0-9.]+)%", card).group(1)) / 100


def test_pipelines_load_in_full_precision_with_no_network(pipeline):
    assert type(pipeline).__name__ == NAMES[pipeline.told]
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) >= 3 and {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert pipeline.components.get("safety_checker") is None
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    assert 0.4e6 <= sum(parameter.numel() for parameter in denoiser.parameters()) <= 0.8e6


def test_pipelines_are_small_on_disk():
    files = [path for name in NAMES for path in builtin.pipeline_path(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3.6e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_pictures_show_the_form_and_often_the_wrong_colour(pipeline, prompts):
    shown = measure_pictures.sample(pipeline, prompts)
    found = {"colour": right_colour(shown, prompts), "form": right_form(shown, prompts)}
    for what, right in found.items():
        said = on_the_card(pipeline.told, f"{what} as asked for, {measure_pictures.STEPS} steps, no guidance")
        assert np.mean(right) == pytest.approx(said, abs=0.12)
        low, high = (0.4, 0.7) if what == "colour" else (0.7, 0.95)
        assert low <= said <= high


def test_pictures_are_the_same_from_the_same_seed(pipeline):
    first, again, other = (
        measure_pictures.sample(pipeline, ["a red circle"], 4, seed=seed)[0].tobytes() for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_prompt_is_one_token_a_word_and_any_text_can_be_said():
    tokenizer = make_diffusion.make_tokenizer()
    for phrase in pictures.PHRASES:
        prompt = phrase.format(colour="yellow", form="triangle")
        assert len(tokenizer.tokenize(prompt)) == len(prompt.split()) <= make_diffusion.PROMPT - 2
    assert tokenizer.unk_token_id not in tokenizer("Zebra, né 漢!", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_is_the_one_that_is_shipped(name, tmp_path):
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(builtin.pipeline_path(name) / "tokenizer")
    assert shipped.get_vocab() == make_diffusion.make_tokenizer().get_vocab()
    assert shipped.model_max_length == make_diffusion.PROMPT


def test_zeros_in_place_of_t5_make_no_difference_by_their_number(prompts):
    pipeline = measure_pictures.load_pipeline("builtin/sd3-small")
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "np"}
    few, many = (
        pipeline(prompts[:16], max_sequence_length=zeros, generator=torch.Generator().manual_seed(0), **options).images
        for zeros in (pipeline.tokenizer.model_max_length, 256)
    )
    assert np.abs(few - many).mean() < 0.08
    assert not np.array_equal(few, many)


def test_making_writes_what_is_in_the_repository(tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    assert set(NAMES) == set(make_diffusion.MADE) and set(NAMES) <= set(script["NAMES"])
    monkeypatch.setattr(train_diffusion, "PICTURES", 64)
    monkeypatch.setattr(make_diffusion, "VAE_STEPS", 1)
    monkeypatch.setattr(train_diffusion, "VAE_PICTURES", 64)
    monkeypatch.setattr(measure_pictures, "pipeline_figures", lambda name: {"something": "50.0%"})
    for name, made in make_diffusion.MADE.items():
        monkeypatch.setitem(make_diffusion.MADE, name, made._replace(rounds=(train_diffusion.Round(1),)))
        folder, shipped = tmp_path / name.split("/")[1], builtin.pipeline_path(name)
        make_diffusion.make(name, folder)
        here, there = ({f.relative_to(at): f for f in at.rglob("*") if f.is_file()} for at in (folder, shipped))
        assert here.keys() == there.keys()
        for part, file in here.items():
            assert part.suffix in (".json", ".md") or file.stat().st_size == there[part].stat().st_size
            if part.name == "config.json" and part.parent.name != "vae":
                assert content(file) == content(there[part]), part
        assert "1 steps of" in (folder / "README.md").read_text()


# ---- Data -----------------------------------------------------------------------------------------------------------


def test_prompts_of_the_two_splits_have_no_combination_in_common():
    seen = {}
    for split in builtin.SPLITS:
        rows = builtin.load_dataset("builtin/picture-prompts", split)
        assert rows.column_names == ["prompt", "colour", "form"]
        assert all(asked_for(row["prompt"]) == (row["colour"], row["form"]) for row in rows)
        assert len(set(rows["prompt"])) == len(rows)
        seen[split] = set(zip(rows["colour"], rows["form"], strict=True))
    assert not seen["train"] & seen["test"]
    assert {colour for colour, _ in seen["test"]} == set(pictures.COLOURS)
    assert {form for _, form in seen["test"]} == set(pictures.FORMS)


@pytest.mark.parametrize("split", builtin.SPLITS)
def test_the_preferred_picture_alone_has_the_colour_that_is_asked_for(split):
    rows = builtin.load_dataset("builtin/picture-preferences", split)
    assert rows.column_names == ["prompt", "chosen", "rejected"]
    assert len(rows) == pictures.PREFERENCE_ROWS[split]
    asked = {asked_for(prompt) for prompt in rows["prompt"]}
    assert asked <= {Seen(*each) for each in pictures.combinations(split)}
    part = rows.select(range(64))
    assert all(image.size == (32, 32) for image in part["chosen"])
    assert right_picture(part["chosen"], part["prompt"]) == [1.0] * 64
    assert right_colour(part["rejected"], part["prompt"]) == [0.0] * 64
    assert right_form(part["rejected"], part["prompt"]) == [1.0] * 64
    shown = {see(pictures_judge.pixels(image)) for image in part["rejected"]}
    assert bool(shown & set(pictures.HELD_OUT)) == (split == "test")


@pytest.mark.parametrize("name", DATA)
def test_two_loads_give_the_same_rows(name):
    assert builtin.load_dataset(name, "test").data == builtin.load_dataset(name, "test").data


@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_captions_name_the_form_and_a_part_of_them_another_colour(wrong):
    drawings = pictures.drawings(600)
    shown = [Image.fromarray(pictures.paint(drawing)) for drawing in drawings]
    said = pictures.captions(drawings, wrong)
    assert np.mean(right_form(shown, said)) == 1
    assert np.mean(right_colour(shown, said)) == pytest.approx(1 - wrong, abs=0.05 * bool(wrong))
    assert {(drawing.colour, drawing.form) for drawing in drawings} >= set(pictures.HELD_OUT)


# ---- The judge ------------------------------------------------------------------------------------------------------


def drawn(rows, seed=0):
    rng = random.Random(seed)
    return [pictures.draw(rng.choice(list(pictures.COLOURS)), rng.choice(pictures.FORMS), rng) for _ in range(rows)]


@pytest.mark.parametrize("noise", [0, 0.05])
def test_the_judge_sees_what_is_drawn(noise):
    rng = np.random.default_rng(0)
    drawings = drawn(500)
    assert len({(drawing.colour, drawing.form) for drawing in drawings}) == 24
    right = collections.Counter()
    for drawing in drawings:
        picture = pictures.paint(drawing).astype(np.float32) / 255
        seen = see((picture + noise * rng.standard_normal(picture.shape)).clip(0, 1))
        right.update(colour=seen.colour == drawing.colour, form=seen.form == drawing.form)
    assert right["colour"] >= 495 and right["form"] >= 495


def test_the_judge_sees_nothing_where_there_is_no_object():
    noise = np.random.default_rng(0).random((32, 32, 3))
    grey_disc = pictures.paint(drawn(1)[0]._replace(colour="red")).astype(np.float32) / 255
    grey_disc[...] = grey_disc.mean(axis=-1, keepdims=True)
    full = np.full((32, 32, 3), 0.5)
    assert see(full) == see(noise) == (None, None)
    assert see(grey_disc).colour is None


def test_judges_take_tensors_and_images_and_read_the_prompt():
    image = Image.fromarray(pictures.paint(pictures.Drawing("red", "cross", 5, 6, 16, 30)))
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    asked = ["a picture of a Red cross", "a red circle", "a blue cross", "nothing"]
    for given in ([image] * 4, torch.stack([tensor] * 4), [tensor] * 4):
        assert right_colour(given, asked) == [1, 1, 0, 0]
        assert right_form(given, asked) == [1, 0, 1, 0]
        assert right_picture(given, asked) == [1, 0, 0, 0]
