"""Rows with images and videos as prompts to be answered: each is processed once, alone, and batches are made of them.

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
from shared.data.videos import Video
from shared.errors import DataError
from shared.trainers.token_rollouts import Prompt, PromptsOnce
from visionalign.collators import VLMCollator
from visionalign.families import SAMPLE, TOKEN, Family
from visionalign.preparing import VLMRun
from visionalign.processing import stacked
from visionalign.video import shown_frames, video_reader

# not handed to rewards as the row has them
NOT_COLUMNS = ("prompt", "completion", "image", "images", "video", "videos")


def prompt_collator(run: VLMRun, args: Any) -> VLMCollator:
    """What reads prompts as VLMPromptOptions say.

    Args:
        run: the model's family and processor.
        args: the trainer's options.
    """
    return VLMCollator(
        run.processor,
        family=run.family,
        kind=Kind.PROMPT_ONLY,
        max_pixels=args.max_pixels,
        on_bad_row=args.on_bad_row,
        videos=video_reader(run.family, run.processor, args),
        template_kwargs=args.chat_template_kwargs,
    )


class VLMPrompts(PromptsOnce):
    """A PromptEncoder of a vision-language model.

    Args:
        collator: of PROMPT_ONLY rows; its reader and processor are used.
        longest: the most tokens of a prompt, image tokens included; None: no limit. Prompts are never cut.
        needs_image: refuse prompts that do not show what the first one shows, images, videos or both, and such as show
            nothing: where an engine shards the model, all processes run its tower, and equally often.

    Attributes:
        shows: what the first prompt showed, as the model takes it (`pixel_values`, …); None before there was one.
    """

    def __init__(self, collator: VLMCollator, longest: int | None = None, *, needs_image: bool = False):
        super().__init__()
        self.collator, self.family, self.longest = collator, collator.family, longest
        self.needs_image, self.shows = needs_image, None
        self.beyond = {"token_type_ids": 1} if self.family.prefix_suffix else {}  # an answer sees what is before it
        self.tokenizer, self.max_pixels = collator.processor.tokenizer, collator.reader.max_pixels

    def made(self, row: dict[str, Any]) -> tuple[Prompt, None]:
        inputs, _ = self.collator.encode_prompts([row])
        self._check_shown({name for name in inputs if name.startswith("pixel_values")}, row.get(ROW, 0))
        real = inputs.pop("attention_mask")[0].bool()
        ids = inputs.pop("input_ids")[0][real]
        if self.longest is not None and len(ids) > self.longest:
            raise DataError(
                f"row {row.get(ROW, 0)}: its prompt has {len(ids)} tokens, max_prompt_length is {self.longest}. Raise "
                "it, or make images smaller with max_pixels, videos with video_num_frames or video_max_pixels."
            )
        return Prompt(ids, inputs), None

    def _check_shown(self, shown: set[str], number: int) -> None:
        if self.needs_image and not shown:
            raise DataError(
                f"row {number}: has no image; with an engine that cuts the model up (DeepSpeed, FSDP) each prompt "
                "needs one. Leave such rows out, or train data-parallel without such an engine."
            )
        self.shows = self.shows or shown
        if self.needs_image and shown != self.shows:
            raise DataError(
                f"row {number}: does not show what the first prompt shows (images, videos, or both); with an engine "
                "that cuts the model up (DeepSpeed, FSDP) all have to. Leave such rows out, or train data-parallel "
                "without such an engine."
            )
        if not (shown or self.family.rows_apart):
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
        """The prompt with its images and videos in their places, decoded; the columns, both among them."""
        number = row.get(ROW, 0)
        conversation = to_conversation(dict(row), number, Kind.PROMPT_ONLY)
        images = [decode_image(raw, row=number, max_pixels=self.max_pixels) for raw in conversation.images]
        videos = [self.collator.reader.videos(raw, number) for raw in conversation.videos]
        left = {"image": iter(images), "video": iter(videos)}
        prompt = [
            {**turn, "content": [_filled(part, left) for part in turn["content"]]} for turn in conversation.messages
        ]
        columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
        return prompt, columns | {"images": images} | ({"videos": videos} if videos else {})

    def shown(self, row: Mapping[str, Any]) -> tuple[list[Any], str]:
        if placed := _placed(row["prompt"]):  # a sample's prompt, as `asked` gives it
            return placed, _last_question(row["prompt"])
        conversation = to_conversation(dict(row), row.get(ROW, 0), Kind.PROMPT_ONLY)
        return self.collator.reader.shown(conversation), _last_question(conversation.messages)


def _last_question(messages: Sequence[dict[str, Any]]) -> str:
    asked = [turn["content"] for turn in messages if turn["role"] == "user"]
    return " ".join(part["text"] for part in asked[-1] if part["type"] == "text") if asked else ""


def _filled(part: dict[str, Any], left: Mapping[str, Iterator[Any]]) -> dict[str, Any]:
    kind = part["type"]
    return {"type": kind, kind: next(left[kind])} if kind in left else dict(part)


def _placed(prompt: Any) -> list[Image.Image]:
    """The images, and some frames of the videos, that stand in a prompt's messages, small."""
    contents = [] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    pictures: list[Image.Image] = []
    for part in (part for content in contents if not isinstance(content, str) for part in content):
        if isinstance(part.get("image"), Image.Image):
            pictures.append(_small(part["image"]))
        elif isinstance(part.get("video"), Video):
            pictures += shown_frames(part["video"])
    return pictures


def _small(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((256, 256))
    return image


def _joined(name: str, prompts: Sequence[Prompt], family: Family, width: int) -> Tensor:
    """One of the processor's tensors for all prompts: one behind the other, padded with zeros to one shape."""
    by_token = _counts_tokens(name, prompts, family)
    given = [prompt.extras.get(name) for prompt in prompts]
    rows = by_token or family.index.get(name) == SAMPLE
    return stacked(given, rows=rows, width=width if by_token else None)


def _counts_tokens(name: str, prompts: Sequence[Prompt], family: Family) -> bool:
    if name in family.index:
        return family.index[name] == TOKEN
    having = [prompt for prompt in prompts if name in prompt.extras]
    return all(tuple(prompt.extras[name].shape[:2]) == (1, len(prompt.ids)) for prompt in having)
