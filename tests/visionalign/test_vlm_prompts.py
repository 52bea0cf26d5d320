"""Prompts with images, processed one by one and put together, are what the processor makes of the whole batch."""

import pytest
import torch
from tiny import FAMILIES
from tiny_pictures import SEVERAL, TEXT_ONLY, asks, loud, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from shared.data.rows import ROW
from shared.data.schema import Kind
from shared.errors import DataError
from visionalign.collators import VLMCollator
from visionalign.families import family_of
from visionalign.prompting import VLMPrompts


def encoder(path, **options):
    processor = AutoProcessor.from_pretrained(path)
    model = loud(AutoModelForImageTextToText.from_pretrained(path).eval())
    collator = VLMCollator(processor, family=family_of(model.config), kind=Kind.PROMPT_ONLY)
    return VLMPrompts(collator, **options), model


@pytest.fixture(params=FAMILIES)
def family(request, tiny):
    return request.param, *encoder(tiny(request.param))


def figures(model, inputs):
    """Of the last tokens: a sliding window can lie behind the image at the very last one."""
    with torch.no_grad():
        return model(**inputs).logits[:, -12:].log_softmax(-1)


def test_prompts_put_together_are_the_processors_batch(family):
    name, prompts, model = family
    rows = asks(name)
    assert {len(row["images"]) for row in rows} >= ({1, 2} if name in SEVERAL else {1})
    if name in TEXT_ONLY:
        assert [] in [row["images"] for row in rows]
    for chosen in (rows, rows[:1], rows[1:3], rows[::-1], [rows[0], rows[0], rows[2]]):
        expected, _ = prompts.collator.encode_prompts(chosen)
        found = prompts.inputs(prompts.prompts(chosen))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
            # the aspect of an image that is not there
            if key != "aspect_ratio_mask":
                assert torch.equal(found[key], value), key
        torch.testing.assert_close(figures(model, found), figures(model, expected), rtol=1e-5, atol=1e-5)


def test_each_prompt_sees_its_own_images(family):
    """The figures of a prompt are those that it has alone, and change with its image and with no other."""
    name, prompts, model = family
    rows = asks(name)
    together = figures(model, prompts.inputs(prompts.prompts(rows)))
    for at, row in enumerate(rows):
        alone = figures(model, prompts.inputs(prompts.prompts([row])))
        torch.testing.assert_close(together[at : at + 1], alone, rtol=1e-4, atol=2e-5)
    changed = [{**row, "images": [picture(99, *row["images"][0].size), *row["images"][1:]]} for row in rows[:1]]
    other = figures(model, prompts.inputs(prompts.prompts([*changed, *rows[1:]])))
    apart = (other - together).abs().amax((1, 2))
    assert apart[0] > 1e-3 and apart[1:].max() < 2e-5


def test_a_row_that_is_drawn_twice_is_processed_once(tiny):
    prompts, _ = encoder(tiny("llava"))
    calls, plain = [], prompts.collator.encode_prompts
    prompts.collator.encode_prompts = lambda rows: calls.append(len(rows)) or plain(rows)
    row, other = asks("llava", 2)
    found = prompts.prompts([row, other, row])
    assert calls == [1, 1] and found[0] is found[2]


def test_rewards_see_the_images_in_their_places(tiny):
    prompts, _ = encoder(tiny("llava"))
    parts = [{"type": "text", "text": "Here:"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    row = {
        ROW: 3,
        "prompt": [{"role": "user", "content": parts}],
        "images": [picture(1), picture(2, 400, 300)],
        "answer": "red",
    }
    prompts.max_pixels = 40_000
    asked, columns = prompts.asked(row)
    first, second = (part["image"] for part in asked[0]["content"][1:3])
    assert [part["type"] for part in asked[0]["content"]] == ["text", "image", "image", "text"]
    assert first.tobytes() == picture(1).tobytes() and second.width * second.height <= 40_000
    assert columns.pop("images") == [first, second]
    assert columns == {ROW: 3, "answer": "red"}
    shown, text = prompts.shown({**columns, "images": [first, second], "prompt": asked})
    assert [image.size for image in shown] == [(32, 40), second.size]
    assert text == "Here: ?"
    assert prompts.shown(row)[1] == "Here: ?" and len(prompts.shown(row)[0]) == 2


def test_a_single_image_and_a_plain_question(tiny):
    prompts, _ = encoder(tiny("llava"))
    asked, columns = prompts.asked({"prompt": "What colour?", "image": picture(1)})
    assert asked[0]["role"] == "user" and [part["type"] for part in asked[0]["content"]] == ["image", "text"]
    assert "image" not in columns and len(columns["images"]) == 1


@pytest.mark.parametrize(
    ("family", "options", "changed", "message"),
    [
        ("paligemma", {}, {"images": []}, "row 7: has no image, but models of the family paligemma need one"),
        ("mllama", {}, {"images": []}, "row 7: has no image; a model of the family mllama answers such a prompt"),
        ("llava", {"needs_image": True}, {"images": []}, "row 7: has no image; with an engine that cuts the model up"),
        ("llava", {"longest": 20}, {}, r"row 7: its prompt has \d\d tokens, max_prompt_length is 20"),
        ("llava", {}, {"prompt": "<image> and <image>"}, "row 7: "),
    ],
)
def test_prompts_that_cannot_be_used(family, options, changed, message, tiny):
    prompts, _ = encoder(tiny(family), **options)
    row = {ROW: 7, **asks(family, 1)[0], **changed}
    with pytest.raises(DataError, match=message):
        prompts.prompts([row])
