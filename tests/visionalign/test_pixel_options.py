"""Options on the size and the pieces of images: what they do to the tokens, and which models cannot follow them."""

import types

import pytest
from PIL import Image

from shared.data.schema import Kind
from shared.errors import UserError
from shared.runtime.commands import COMMANDS
from shared.runtime.models import load_processor
from shared.runtime.run import read_options
from visionalign import VLMSFTConfig, VLMSFTTrainer
from visionalign.collators import VLMCollator
from visionalign.families import FAMILIES
from visionalign.image_options import check_image_options, with_image_options
from visionalign.preparing import prepare_vlm


def args(**options):
    return types.SimpleNamespace(model_init_kwargs=None, should_log=False, **options)


def tokens_of(run, size=(96, 64), images=1):
    """How many tokens stand for the images of a row, and how many tiles or images the model sees."""
    pictures = [Image.new("RGB", size, (at, 200, 0)) for at in range(images)]
    places = [{"type": "image"}] * images
    messages = [
        {"role": "user", "content": [*places, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]
    collator = VLMCollator(run.processor, family=run.family, kind=Kind.MESSAGES)
    batch = collator([{"images": pictures, "messages": messages}])
    word = getattr(run.processor.tokenizer, "image_token", None) or run.processor.image_token
    count = int((batch.completion_ids == run.processor.tokenizer.convert_tokens_to_ids(word)).sum())
    assert batch.completion_mask.sum() >= 2  # the answer and its end, wherever the images push them
    return count, batch.model_inputs["pixel_values"].shape


def prepared(model, **options):
    return prepare_vlm(str(model), args(**options), None)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_pieces_are_a_matter_of_the_longer_edge_and_can_be_left_out(family, tiny):
    # Pieces of 32 pixels, 4 tokens each; the tiny processor makes 96 x 64 to 64 x 43: 2 x 2 pieces, and the whole.
    for options, pieces in (
        ({}, 5),
        ({"image_longest_edge": 96}, 3 * 2 + 1),
        ({"image_longest_edge": 32}, 1),
        ({"image_splitting": False}, 1),
        ({"image_longest_edge": 96, "image_splitting": False}, 1),
    ):
        count, shape = tokens_of(prepared(tiny(family), **options))
        assert (count, shape[1]) == (4 * pieces, pieces), options


def test_the_built_in_model_splits_and_two_pictures_take_twice_the_tokens():
    run = prepared("builtin/smolvlm-small")
    assert tokens_of(run)[0] == 9 * 5 and tokens_of(run, images=2)[0] == 9 * 10
    assert tokens_of(prepared("builtin/smolvlm-small", image_longest_edge=48), images=3)[0] == 9 * 3


def test_pan_and_scan_of_gemma_adds_crops_of_images_that_are_long(tiny):
    kwargs = {"pan_and_scan_min_crop_size": 16}
    whole = tokens_of(prepared(tiny("gemma3"), processor_kwargs=kwargs), size=(64, 32))
    split = tokens_of(prepared(tiny("gemma3"), processor_kwargs=kwargs, image_splitting=True), size=(64, 32))
    assert (whole[0], whole[1][0]) == (4, 1) and (split[0], split[1][0]) == (4 * 3, 3)


def test_small_images_are_enlarged_where_the_family_can(tiny):
    plain = tokens_of(prepared(tiny("qwen2_vl")), size=(32, 32))[0]
    assert tokens_of(prepared(tiny("qwen2_vl"), min_pixels=64 * 64), size=(32, 32))[0] == 4 * plain
    with pytest.raises(UserError, match=r"min_pixels 16384 is more than the 4096 .*\"longest_edge\": 16384\}\}'"):
        prepared(tiny("qwen2_vl"), min_pixels=128 * 128)
    limits = {"size": {"shortest_edge": 128 * 128, "longest_edge": 128 * 128}}
    larger = prepared(tiny("qwen2_vl"), min_pixels=128 * 128, processor_kwargs=limits)
    assert tokens_of(larger, size=(32, 32))[0] == 16 * plain


def test_the_processor_of_the_caller_stays_as_it_is(tiny):
    processor = load_processor(str(tiny("smolvlm")))
    changed = with_image_options(processor, args(image_splitting=False, image_longest_edge=96), FAMILIES["smolvlm"])
    assert changed.image_processor.size["longest_edge"] == 96 and not changed.image_processor.do_image_splitting
    assert processor.image_processor.size["longest_edge"] == 64 and processor.image_processor.do_image_splitting
    assert with_image_options(processor, args(), FAMILIES["smolvlm"]) is processor


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "llava",
            {"image_longest_edge": 64},
            "image_longest_edge: models of the family llava have no such option, only",
        ),
        ("llava", {"image_splitting": False}, "only idefics3, smolvlm, gemma3"),
        ("gemma3", {"image_longest_edge": 64}, "This model takes max_pixels, image_splitting"),
        ("smolvlm", {"min_pixels": 64}, "min_pixels: models of the family smolvlm .* only qwen2_vl, qwen2_5_vl"),
        ("smolvlm", {"image_longest_edge": 0}, "image_longest_edge 0: must be at least 1"),
        ("qwen2_vl", {"min_pixels": 500, "max_pixels": 400}, "min_pixels 500 is more than max_pixels 400"),
    ],
)
def test_what_a_family_cannot_follow_is_refused(family, options, message):
    with pytest.raises(UserError, match=message):
        check_image_options(args(**options), FAMILIES[family])


def test_more_pieces_than_there_are_words_for(tiny):
    with pytest.raises(UserError, match="makes 7 pieces of 32 .* words for 6. Give 192 at most"):
        prepared(tiny("smolvlm"), image_longest_edge=200)
    prepared(tiny("smolvlm"), image_longest_edge=200, image_splitting=False)


def test_arguments_of_the_processor(tiny):
    run = prepared(tiny("llava"), processor_kwargs={"size": {"shortest_edge": 48}, "padding_side": "left"})
    assert run.processor.image_processor.size["shortest_edge"] == 48 and run.processor.tokenizer.padding_side == "left"
    with pytest.raises(UserError, match="do_image_splitting is no argument of a LlavaProcessor.*do_resize"):
        prepared(tiny("llava"), processor_kwargs={"do_image_splitting": False})
    with pytest.raises(UserError, match="processor_kwargs: the processor is given"):
        prepare_vlm(str(tiny("llava")), args(processor_kwargs={"size": 1}), run.processor)


def test_they_are_refused_before_the_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("visionalign.preparing.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    config = VLMSFTConfig(output_dir=str(tmp_path), image_splitting=True, eval_answers=0)
    with pytest.raises(UserError, match="family llava have no such option"):
        VLMSFTTrainer(str(tiny("llava")), config, train_dataset=[{"messages": []}])


@pytest.mark.parametrize("name", [name for name, row in COMMANDS.items() if row.options.startswith("visionalign")])
def test_every_command_offers_them(name):
    words = ["--model_name_or_path", "x/y", "--dataset_name", "a/b", "--image_longest_edge", "768"]
    options, _ = read_options(name, [*words, "--image_splitting", "false", "--processor_kwargs", '{"resample": 2}'])
    assert (options.values["image_longest_edge"], options.values["image_splitting"]) == (768, False)
    assert options.values["processor_kwargs"] == {"resample": 2}
