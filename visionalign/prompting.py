"""Rows with images as prompts to be answered: each is processed once and by itself, and batches are made of them.

What a processor gives for a prompt stays opaque but for what its first dimension counts, which families.py tells. That
the result is what the processor gives for the whole batch is a test, family by family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from shared.data.collators import left_padded
from shared.data.rows import ROW
from shared.data.schema import Kind, decode_image, to_conversation
from shared.errors import DataError
from shared.trainers.token_rollouts import Prompt, PromptsOnce
from visionalign.collators import VLMCollator
from visionalign.families import SAMPLE, TOKEN, Family

NOT_COLUMNS = ("prompt", "completion", "image", "images")  # not handed to rewards as the row has them
SHOWN_PIXELS = 65_536  # of an image in the report


class VLMPrompts(PromptsOnce):
    """A PromptEncoder of a vision-language model.

    Args:
        collator: of PROMPT_ONLY rows; its reader and processor are used.
        longest: the most tokens of a prompt, image tokens included; None: no limit. Prompts are never cut.
        needs_image: refuse prompts without images: where an engine shards the model, all processes run its tower.
    """

    def __init__(self, collator: VLMCollator, longest: int | None = None, *, needs_image: bool = False):
        super().__init__()
        self.collator, self.family, self.longest = collator, collator.family, longest
        self.needs_image = needs_image
        self.beyond = {"token_type_ids": 1} if self.family.prefix_suffix else {}  # an answer sees what is before it
        self.tokenizer, self.max_pixels = collator.processor.tokenizer, collator.reader.max_pixels

    def made(self, row: dict[str, Any]) -> tuple[Prompt, None]:
        inputs, _ = self.collator.encode_prompts([row])
        if "pixel_values" not in inputs:
            self._check_imageless(row.get(ROW, 0))
        real = inputs.pop("attention_mask")[0].bool()
        ids = inputs.pop("input_ids")[0][real]
        if self.longest is not None and len(ids) > self.longest:
            raise DataError(
                f"row {row.get(ROW, 0)}: its prompt has {len(ids)} tokens, max_prompt_length is {self.longest}. Raise "
                "it, or make images smaller with max_pixels."
            )
        return Prompt(ids, inputs), None

    def _check_imageless(self, number: int) -> None:
        if self.needs_image:
            raise DataError(
                f"row {number}: has no image; with an engine that cuts the model up (DeepSpeed, FSDP) each prompt "
                "needs one. Leave such rows out, or train data-parallel without such an engine."
            )
        if not self.family.rows_apart:
            raise DataError(
                f"row {number}: has no image; a model of the family {self.family.name} answers such a prompt "
                "differently beside prompts with images, so what it wrote could not be learnt from. Leave such rows "
                "out."
            )

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        padded = left_padded([prompt.ids for prompt in prompts], self.tokenizer.pad_token_id)
        names = dict.fromkeys(name for prompt in prompts for name in prompt.extras)
        width = padded["input_ids"].shape[1]
        return padded | {name: _joined(name, prompts, self.family, width) for name in names}

    def asked(self, row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The prompt with its images in their places, decoded; the columns, images among them."""
        number = row.get(ROW, 0)
        conversation = to_conversation(dict(row), number, Kind.PROMPT_ONLY)
        images = [decode_image(raw, row=number, max_pixels=self.max_pixels) for raw in conversation.images]
        left = iter(images)
        prompt = [
            {**turn, "content": [_filled(part, left) for part in turn["content"]]} for turn in conversation.messages
        ]
        columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
        return prompt, columns | {"images": images}

    def shown(self, row: Mapping[str, Any]) -> tuple[list[Any], str]:
        if placed := _placed(row["prompt"]):  # a sample's prompt, as `asked` gives it
            return [_small(image) for image in placed], _last_question(row["prompt"])
        conversation = to_conversation(dict(row), row.get(ROW, 0), Kind.PROMPT_ONLY)
        images = [decode_image(raw, row=row.get(ROW, 0), max_pixels=SHOWN_PIXELS) for raw in conversation.images]
        return images, _last_question(conversation.messages)


def _last_question(messages: Sequence[dict[str, Any]]) -> str:
    asked = [turn["content"] for turn in messages if turn["role"] == "user"]
    return " ".join(part["text"] for part in asked[-1] if part["type"] == "text") if asked else ""


def _filled(part: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    return {"type": "image", "image": next(images)} if part["type"] == "image" else dict(part)


def _placed(prompt: Any) -> list[Image.Image]:
    """The images that stand in a prompt's messages."""
    contents = [] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part["image"] for part in parts if isinstance(part.get("image"), Image.Image)]


def _small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((256, 256))
    return image


def _joined(name: str, prompts: Sequence[Prompt], family: Family, width: int) -> Tensor:
    """One of the processor's tensors for all prompts: one behind the other, padded with zeros to one shape."""
    by_token = _counts_tokens(name, prompts, family)
    given = [prompt.extras.get(name) for prompt in prompts]
    pattern = next(value for value in given if value is not None)
    if by_token or family.index.get(name) == SAMPLE:  # a prompt without it has a row of its own all the same
        given = [pattern.new_zeros(1, *pattern.shape[1:]) if value is None else value for value in given]
    given = [value for value in given if value is not None]
    shape = [max(value.shape[axis] for value in given) for axis in range(1, pattern.dim())]
    if by_token:
        shape[0] = width
    joined = pattern.new_zeros(sum(len(value) for value in given), *shape)
    at = 0
    for value in given:
        place = [slice(at, at + len(value)), *(slice(0, size) for size in value.shape[1:])]
        if by_token:
            place[1] = slice(width - value.shape[1], width)
        joined[tuple(place)] = value
        at += len(value)
    return joined


def _counts_tokens(name: str, prompts: Sequence[Prompt], family: Family) -> bool:
    if name in family.index:
        return family.index[name] == TOKEN
    having = [prompt for prompt in prompts if name in prompt.extras]
    return all(tuple(prompt.extras[name].shape[:2]) == (1, len(prompt.ids)) for prompt in having)
