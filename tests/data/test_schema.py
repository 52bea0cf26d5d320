"""Columns, rows and images: what is accepted, and what the errors say."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from PIL import Image

from shared.data.schema import (
    Kind,
    check_rows,
    column_names,
    decode_image,
    detect_kind,
    require,
    to_conversation,
    undecoded,
)
from shared.errors import DataError, UserError


def picture(width: int = 8, height: int = 6, colour=(255, 0, 0), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chat(question="What colour?", answer="red") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# columns


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["text"], Kind.LANGUAGE_MODELING),
        (["images", "messages"], Kind.MESSAGES),
        (["id", "image", "conversations"], Kind.MESSAGES),
        (["prompt", "prompt_id", "messages"], Kind.MESSAGES),
        (["prompt", "completion", "image"], Kind.PROMPT_COMPLETION),
        (["prompt", "solution"], Kind.PROMPT_ONLY),
        (["prompt", "chosen", "rejected", "messages"], Kind.PREFERENCE),
        (["chosen", "rejected"], Kind.PREFERENCE),
        (["prompt", "completion", "label"], Kind.UNPAIRED),
        (["prompt", "completions", "labels"], Kind.STEPWISE),
    ],
)
def test_detect_kind(columns, kind):
    assert detect_kind(columns) is kind


def test_a_label_that_is_no_truth_value_is_another_column():
    columns = ["prompt", "completion", "label"]
    assert detect_kind(columns, {"label": True}) is Kind.UNPAIRED
    assert detect_kind(columns, {"label": "animal"}) is Kind.PROMPT_COMPLETION


def test_detect_kind_chooses_among_the_allowed():
    assert detect_kind(["prompt", "completion"], allowed=[Kind.PROMPT_ONLY]) is Kind.PROMPT_ONLY


def test_detect_kind_error_names_columns_missing_and_allowed():
    with pytest.raises(DataError) as error:
        detect_kind(["image", "prompt"], allowed=[Kind.MESSAGES, Kind.PROMPT_COMPLETION])
    message = str(error.value)
    assert "columns `image`, `prompt`" in message
    assert "prompt-completion, which lacks `completion`" in message
    assert "messages (`messages`)" in message and "stepwise" not in message


def test_the_order_of_rows_does_not_decide_the_kind():
    rows = [{"messages": chat()}, {"prompt": "a", "completion": "b"}]
    for mixture in (rows, rows[::-1]):
        assert detect_kind(column_names(mixture), mixture[0]) is Kind.PROMPT_COMPLETION
    assert column_names(iter(rows)) == ["messages"]


def test_require():
    require(Kind.MESSAGES, [Kind.MESSAGES])
    with pytest.raises(DataError, match=r"prompt-only data. Allowed: messages \(`messages`\)"):
        require(Kind.PROMPT_ONLY, [Kind.MESSAGES])


def test_importing_schema_is_light():
    code = "import sys, shared.data.schema; print([m for m in ('torch','datasets','PIL','numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# conversations


def test_strings_become_turns_and_the_image_goes_before_the_question():
    row = {"prompt": "What colour?", "completion": "red", "image": "a.png", "kind": "colour"}
    conversation = to_conversation(row, 3, Kind.PROMPT_COMPLETION)
    assert conversation.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    assert conversation.images == ["a.png"]
    assert conversation.prompt_messages == 1
    assert conversation.extras == {"kind": "colour"}
    assert conversation.row == 3


def test_the_image_goes_to_the_first_user_turn_not_to_the_system():
    row = {"messages": [{"role": "system", "content": "Be brief."}, *chat()], "images": [picture(), picture()]}
    conversation = to_conversation(row, 0, Kind.MESSAGES)
    assert [len(turn["content"]) for turn in conversation.messages] == [1, 3, 1]
    assert conversation.prompt_messages is None


def test_llava_rows():
    first, second = picture(2, 2), picture(3, 3)

    def part(kind, text=None, index=None):
        return {"index": index, "text": text, "type": kind}

    row = {
        "messages": [
            {"role": "user", "content": [part("text", "First?"), part("image", index=1), part("image", index=0)]},
            {"role": "assistant", "content": [part("text", "Yes.")]},
        ],
        "images": [first, second],
    }
    conversation = to_conversation(row, 0, Kind.MESSAGES)
    assert conversation.messages[0]["content"] == [
        {"type": "text", "text": "First?"},
        {"type": "image"},
        {"type": "image"},
    ]
    assert [image.size for image in conversation.images] == [(3, 3), (2, 2)]


def test_sharegpt_rows_with_markers():
    row = {
        "image": "coco/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}],
    }
    conversation = to_conversation(row, 0, Kind.MESSAGES)
    assert conversation.messages[0] == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    }


def test_a_marker_is_text_in_a_row_without_images():
    conversation = to_conversation({"messages": chat("What does <image> do in HTML?")}, 0, Kind.MESSAGES)
    assert conversation.messages[0]["content"] == [{"type": "text", "text": "What does <image> do in HTML?"}]


def test_images_inside_parts_keep_their_order_with_those_in_the_column():
    content = [{"type": "image", "image": "inline.png"}, {"type": "image"}, {"type": "text", "text": "Same?"}]
    row = {"messages": chat(content), "image": "column.png"}
    assert to_conversation(row, 0, Kind.MESSAGES).images == ["inline.png", "column.png"]


def test_the_row_is_not_changed():
    row = {"messages": chat([{"type": "image"}, {"type": "text", "text": "?"}]), "images": ["a.png"]}
    to_conversation(row, 0, Kind.MESSAGES)
    assert row == {"messages": chat([{"type": "image"}, {"type": "text", "text": "?"}]), "images": ["a.png"]}


def test_tool_calls_and_tools_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    row = {"messages": [{"role": "user", "content": "Look."}, call], "tools": [{"name": "look"}]}
    conversation = to_conversation(row, 0, Kind.MESSAGES)
    assert conversation.messages[1] == {"role": "assistant", "content": [], "tool_calls": [{"name": "look"}]}
    assert conversation.extras == {"tools": [{"name": "look"}]}


def test_prompt_only_keeps_other_columns_for_rewards():
    conversation = to_conversation({"prompt": "2+2?", "completion": "4"}, 0, Kind.PROMPT_ONLY)
    assert conversation.prompt_messages == 1
    assert conversation.extras == {"completion": "4"}


def test_a_mixture_of_messages_and_prompt_completion():
    row = {"prompt": None, "completion": None, "messages": chat()}
    assert to_conversation(row, 0, Kind.PROMPT_COMPLETION).prompt_messages is None


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (
            {"messages": chat(answer=[{"type": "text", "text": 7}])},
            Kind.MESSAGES,
            r"row 17: messages\[1\].content\[0\].text is int, expected str",
        ),
        ({"messages": "hello"}, Kind.MESSAGES, "messages is str, expected a list of messages"),
        ({"messages": []}, Kind.MESSAGES, "empty list"),
        ({"messages": None}, Kind.MESSAGES, "missing"),
        ({"messages": [{"role": "user", "content": "?"}]}, Kind.MESSAGES, "no assistant turn with content"),
        ({"messages": chat(answer=" ")}, Kind.MESSAGES, "no assistant turn with content"),
        ({"messages": [{"role": "bot", "content": "?"}]}, Kind.MESSAGES, r"messages\[0\].role is 'bot', expected"),
        ({"messages": chat(question=5)}, Kind.MESSAGES, r"messages\[0\].content is int, expected a string or a list"),
        ({"messages": chat([{"type": "audio"}])}, Kind.MESSAGES, r"content\[0\] has type 'audio'.*text, image, video"),
        ({"messages": chat(["hi"])}, Kind.MESSAGES, r"messages\[0\].content\[0\] is str"),
        ({"messages": ["hi"]}, Kind.MESSAGES, r"messages\[0\] is str"),
        ({"prompt": 3, "completion": "x"}, Kind.PROMPT_COMPLETION, "prompt is int"),
        ({"prompt": "x", "completion": ""}, Kind.PROMPT_COMPLETION, "completion has no assistant turn with content"),
        ({"prompt": " "}, Kind.PROMPT_ONLY, "prompt is empty"),
        (
            {"messages": chat([{"type": "image"}]), "images": ["a", "b"]},
            Kind.MESSAGES,
            "row 17: 2 images but 1 image place in the messages",
        ),
        ({"messages": chat([{"type": "image"}])}, Kind.MESSAGES, "0 images but 1 image place"),
        ({"messages": chat(), "image": "https://x.org/a.png"}, Kind.MESSAGES, "is a URL, and nothing is downloaded"),
        ({"messages": chat(), "image": 5}, Kind.MESSAGES, "an image is int"),
        ({"messages": chat(), "images": [{"bytes": None, "path": None}]}, Kind.MESSAGES, "neither bytes nor a path"),
        ({"text": "x"}, Kind.LANGUAGE_MODELING, "language modeling data is not one conversation"),
    ],
)
def test_row_errors(row, kind, message):
    with pytest.raises(DataError, match=message) as error:
        to_conversation(row, 17, kind)
    assert str(error.value).startswith("row 17: ")


# images


def test_decode_image_takes_every_form(tmp_path):
    path = tmp_path / "red.png"
    picture().save(path)
    data = path.read_bytes()
    forms = [picture(), data, str(path), path, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for raw in forms:
        image = decode_image(raw, row=0)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), (255, 0, 0))
    assert decode_image("red.png", row=0, base_dir=tmp_path).size == (8, 6)


@pytest.mark.parametrize("name", ["cut.jpg", "text.png", "empty.png", "gone.png"])
def test_broken_files_are_named_with_their_row(tmp_path, name):
    if name == "cut.jpg":
        data = encoded(picture(64, 64), "JPEG")
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    elif name != "gone.png":
        (tmp_path / name).write_bytes(b"no image" if name == "text.png" else b"")
    with pytest.raises(DataError, match=rf"^row 17: image '.*{name}' cannot be read: ."):
        decode_image(str(tmp_path / name), row=17)


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encoded(picture(8, 6), "JPEG", exif=exif), row=0).size == (6, 8)


def test_transparency_is_laid_on_white():
    assert decode_image(picture(colour=(255, 0, 0, 0), mode="RGBA"), row=0).getpixel((0, 0)) == (255, 255, 255)
    palette = picture(colour=3, mode="P")
    palette.putpalette([0] * 9 + [10, 20, 30])
    assert decode_image(encoded(palette), row=0).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encoded(palette, transparency=3), row=0).getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_sixteen_bit():
    assert decode_image(picture(colour=77, mode="L"), row=0).getpixel((0, 0)) == (77, 77, 77)
    sixteen = Image.new("I;16", (4, 4), 128 * 256)
    assert decode_image(encoded(sixteen), row=0).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_max_pixels_keeps_the_aspect(kind):
    image = decode_image(encoded(picture(400, 200), kind), row=0, max_pixels=20_000)
    assert image.size == (200, 100)
    assert decode_image(encoded(picture(400, 200), kind), row=0, max_pixels=80_000).size == (400, 200)


def test_no_pixels_and_too_many(monkeypatch):
    with pytest.raises(DataError, match="row 2: the image has no pixels"):
        decode_image(Image.new("RGB", (0, 5)), row=2)
    data = encoded(picture(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="row 2: the image cannot be read: .*decompression bomb"):
        decode_image(data, row=2)


# whole data sets


def rows_of(count: int, bad: dict[int, dict] | None = None) -> list[dict]:
    rows = [{"messages": chat(), "images": [{"bytes": encoded(picture()), "path": None}]} for _ in range(count)]
    for index, columns in (bad or {}).items():
        rows[index] |= columns
    return rows


def dataset_of(rows: list[dict]):
    from datasets import Dataset, List
    from datasets import Image as ImageFeature

    return Dataset.from_list(rows, on_mixed_types="use_json").cast_column("images", List(ImageFeature()))


def test_undecoded_reaches_nested_images_and_keeps_selections():
    from datasets import Image as ImageFeature
    from datasets import List

    dataset = dataset_of(rows_of(3)).add_column("n", [0, 1, 2]).select([2, 0])
    plain = undecoded(dataset)
    assert plain.features["images"] == List(ImageFeature(decode=False))
    assert plain[0]["n"] == 2 and isinstance(plain[0]["images"][0], dict)
    assert dataset[0]["images"][0].size == (8, 6)


def test_check_rows_reports_images():
    rows = rows_of(5)
    rows[1]["images"][0]["bytes"] = encoded(picture(20, 10))
    report = check_rows(dataset_of(rows), Kind.MESSAGES, check_images=2)
    assert (report.rows, report.kept, report.bad, report.images) == (5, None, {}, 2)
    assert (report.smallest, report.largest) == ((8, 6), (20, 10))


@pytest.mark.parametrize("make", [list, dataset_of])
def test_check_rows_error_lists_rows_and_reasons(make):
    bad = {3: {"messages": chat(answer="")}, 4: {"images": [{"bytes": b"broken", "path": "x.png"}]}}
    with pytest.raises(DataError) as error:
        check_rows(make(rows_of(6, bad)), Kind.MESSAGES, check_images=6)
    message = str(error.value)
    assert "2 of 6 rows of the train data cannot be used" in message
    assert "row 3: messages has no assistant turn" in message
    assert "row 4: image 'x.png' cannot be read" in message
    assert "on_bad_row=skip" in message


def test_check_rows_skip_keeps_the_others():
    bad = {1: {"messages": chat(5)}, 2: {"images": []}, 3: {"images": [{"bytes": b"?", "path": None}]}}
    dataset = dataset_of(rows_of(5, bad))
    report = check_rows(dataset, Kind.MESSAGES, on_bad_row="skip", check_images=5)
    assert report.kept == [0, 2, 4]
    assert sorted(report.bad) == [1, 3]
    assert check_rows(dataset, Kind.MESSAGES, on_bad_row="skip").kept == [0, 2, 3, 4]


def test_check_rows_lists_at_most_ten():
    rows = rows_of(30, {index: {"messages": []} for index in range(0, 30, 2)})
    with pytest.raises(DataError, match="and 5 more") as error:
        check_rows(rows, Kind.MESSAGES)
    assert str(error.value).count("  row ") == 10


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match="The eval data is empty"):
        check_rows([], Kind.MESSAGES, what="eval")
    with pytest.raises(DataError, match="No row is left"):
        check_rows(rows_of(2, {0: {"messages": []}, 1: {"messages": []}}), Kind.MESSAGES, on_bad_row="skip")
    with pytest.raises(UserError, match="allowed: error, skip"):
        check_rows(rows_of(1), Kind.MESSAGES, on_bad_row="ignore")


def test_a_stream_is_checked_at_its_start():
    stream = dataset_of(rows_of(120, {110: {"messages": []}})).to_iterable_dataset()
    report = check_rows(stream, Kind.MESSAGES, check_images=2)
    assert (report.rows, report.images, report.bad) == (100, 2, {})


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"text": "some"}, Kind.LANGUAGE_MODELING, None),
        ({"text": ""}, Kind.LANGUAGE_MODELING, "text is empty"),
        ({"text": 4}, Kind.LANGUAGE_MODELING, "text is int"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Kind.PREFERENCE, None),
        ({"chosen": chat(), "rejected": chat(answer="no"), "image": "a.png"}, Kind.PREFERENCE, None),
        ({"prompt": "p", "chosen": "a", "rejected": None}, Kind.PREFERENCE, "rejected is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, Kind.PREFERENCE, "rejected has no assistant turn"),
        ({"prompt": "p", "completion": "c", "label": False}, Kind.UNPAIRED, None),
        ({"prompt": "p", "completion": "c", "label": "yes"}, Kind.UNPAIRED, "label is 'yes'"),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}, Kind.STEPWISE, None),
        ({"prompt": "p", "completions": ["a", "b"], "labels": [True]}, Kind.STEPWISE, "has 2 and labels 1"),
    ],
)
def test_the_other_kinds_are_checked_too(row, kind, message):
    if message is None:
        assert check_rows([row], kind).bad == {}
    else:
        with pytest.raises(DataError, match=message):
            check_rows([row], kind)
