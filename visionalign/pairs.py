"""Preference rows with images to batches: each prompt with its images once, the chosen answer and the rejected one.

A prompt is what the model is asked, processed by itself; see prompting.py. Its answers are the rest of the row as the
chat template writes it, with the end of their turn: the tokens that supervised fine-tuning learns.

Deliberately not here: how a batch is scored, and how an image is corrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shared.data.chat import token_ranges
from shared.data.collators import PairCollator
from shared.data.conversation import Conversation
from shared.data.pairs import read_pair
from shared.data.rows import PADDING, ROW, Rows
from shared.data.schema import Kind, decode_image
from shared.data.tokens import NOTE
from shared.errors import DataError, UserError
from shared.policies.base import GroupedBatch
from shared.trainers.token_rollouts import Prompt
from visionalign.collators import VLMCollator
from visionalign.families import placeholder_ids
from visionalign.preparing import VLMRun, shards_the_model
from visionalign.prompting import VLMPrompts, prompt_collator
from visionalign.reading import row_number
from visionalign.video import BLANK

ANSWERS = ("chosen", "rejected")
REFERENCE = ("chosen_ref_logp", "rejected_ref_logp", "corrupted_ref_logp")
KEPT = (PADDING, "margin", *REFERENCE)
SHOWN = ("image", "video")

Corrupt = Callable[[Any, int, int], Any]  # an image, its row's number, its place in the row -> an image of its size


@dataclass
class ImagePairs(GroupedBatch):
    """A batch of pairs, `group_size` 2.

    Args:
        corrupted: the chosen answers behind the same prompts with corrupted images, `group_size` 1;
            `columns["counted"]` `(P,)` is False where there is no image to corrupt. None: not asked for.
    """

    corrupted: GroupedBatch | None = None

    def _map(self, function: Callable) -> ImagePairs:
        mapped = super()._map(function)
        return mapped if self.corrupted is None else replace(mapped, corrupted=self.corrupted._map(function))


@dataclass
class Apart:
    """Makes the rows of a batch with a prompt of its own for each completion.

    It holds the batch's own tensors, so that it costs nothing to send from a data worker.

    Args:
        batch: with prompts that are shared.
        counts: extra of the model -> how many of its rows belong to each prompt.
    """

    batch: GroupedBatch
    counts: dict[str, list[int]]

    def __call__(self) -> GroupedBatch:
        group = self.batch.group_size

        def each(values: Tensor, counts: list[int]) -> Tensor:
            return torch.cat([part for part in values.split(counts) for _ in range(group)])

        return replace(
            self.batch,
            prompt_ids=self.batch.prompt_ids.repeat_interleave(group, 0),
            prompt_mask=self.batch.prompt_mask.repeat_interleave(group, 0),
            model_inputs={name: each(value, self.counts[name]) for name, value in self.batch.model_inputs.items()},
            group_size=1,
            columns={},
        )


class VLMPairCollator:
    """Preference pairs about images: `group_size` 2, the rows `[chosen_0, rejected_0, chosen_1, …]` on shared prompts.

    Rows have `chosen` and `rejected`, a `prompt` where these are conversations that do not hold it, and `images` (or
    `image`). `columns` is PairCollator's: `counted` `(P,)`, `margin`, `ref_logp`; and `row` `(P,)`, the rows' numbers.

    Args:
        collator: of PROMPT_ONLY rows; its reader, its processor and its `on_bad_row` are used.
        max_prompt_length: the most tokens of a prompt, image tokens included; a longer one makes its row a bad one.
        max_completion_length: longer answers lose their end.
        pad_to_multiple_of: pad T to a multiple of this.
        needs_image: see VLMPrompts.
        corrupt: makes the images of `ImagePairs.corrupted`.

    Attributes:
        skipped: row number -> why it was left out.

    Raises:
        UserError: a collator of rows of another kind.
    """

    def __init__(
        self,
        collator: VLMCollator,
        *,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        needs_image: bool = False,
        corrupt: Corrupt | None = None,
    ):
        if collator.kind is not Kind.PROMPT_ONLY:
            raise UserError(f"collator reads {collator.kind} rows: give a VLMCollator of kind {Kind.PROMPT_ONLY}.")
        self.collator, self.family, self.tokenizer = collator, collator.family, collator.processor.tokenizer
        self.prompts = VLMPrompts(collator, max_prompt_length, needs_image=needs_image)
        self.max_completion_length, self.corrupt = max_completion_length, corrupt
        self.padding = PairCollator(self.tokenizer.pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self.placeholders = torch.tensor(sorted(placeholder_ids(collator.processor, family=self.family)))
        self.skipped: dict[int, str] = {}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> ImagePairs:
        """Collate rows, each its data set's columns and its number under `__row__`.

        Raises:
            DataError: naming the row and what is wrong with it; with `on_bad_row="skip"` the row is left out.
        """
        pairs, notes = [], {}
        for at, row in enumerate(rows):
            number = row_number(row, at)
            try:
                pairs.append(self._pair(row, number))
            except DataError as error:
                if self.collator.on_bad_row == "error":
                    raise
                self.skipped[number] = str(error)
                notes[number] = f"left out: {str(error).removeprefix(f'row {number}: ')}"
        batch = self._batch(pairs or [self._pair(self._blank(rows[0]), -1)])  # the step goes on without
        batch.notes |= notes
        return batch

    def encode_prompts(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], list[str]]:
        """What the model is asked in each row, left-padded for generation, and the chosen answers as text.

        Raises:
            DataError: naming the row, whatever `on_bad_row` says: answers must stay beside their rows.
        """
        chosen = [read_images(row, row_number(row, at))[0] for at, row in enumerate(rows)]
        inputs, _ = self.collator.encode_prompts([question_of(each) for each in chosen])
        return inputs, [_answer(each) for each in chosen]

    def _pair(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        """A row as PairCollator takes it, with its prompts. Raises DataError."""
        chats = read_images(row, number)
        record = {name: row[name] for name in KEPT if row.get(name) is not None} | {ROW: number}
        for name, chat in zip(ANSWERS, chats, strict=True):
            ids = self.answer_ids(chat, name)
            record[f"{name}_ids"] = ids[: self.max_completion_length]
            if len(record[f"{name}_ids"]) < len(ids):
                record[NOTE] = f"an answer cut from {len(ids)} tokens to {self.max_completion_length}"
        if record["chosen_ids"] == record["rejected_ids"]:
            cut = f" in their first {self.max_completion_length} tokens" if NOTE in record else ""
            raise DataError(f"row {number}: chosen and rejected are the same{cut}: there is nothing to prefer")
        question = question_of(chats[0])
        if self.corrupt is not None:
            images = [decode_image(each, row=number, max_pixels=self.prompts.max_pixels) for each in chats[0].images]
            question, record["images"] = {**question, "images": images}, len(images)
            worse = [self.corrupt(image, number, at) for at, image in enumerate(images)]
            record["corrupted"], _ = self.prompts.made({**question, "images": worse})
        record["prompt"], _ = self.prompts.made(question)
        record["prompt_ids"] = record["prompt"].ids.tolist()
        return record

    def _blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row that shows as little as the first one's kind, of which nothing counts, in the place of `row`."""
        from PIL import Image

        shows = self.prompts.shows or {"pixel_values"}
        images = [Image.new("RGB", (BLANK, BLANK))] if "pixel_values" in shows else []
        videos = [self.collator.reader.videos.blank().frames] if "pixel_values_videos" in shows else []
        computed = {name: [] for name in REFERENCE if row.get(name) is not None}
        said = {"prompt": ".", "chosen": ".", "rejected": ","}
        return {PADDING: True, "images": images, "videos": videos, **said, **computed}

    def answer_ids(self, chat: Conversation, name: str) -> list[int]:
        """The tokens of an answer, with the end of its turn."""
        text, start, end = self.collator.reader.answered(chat)
        for token in filter(None, (getattr(self.collator.processor, f"{kind}_token", None) for kind in SHOWN)):
            if token in text[start:end]:
                raise DataError(f"row {chat.row}: {name} holds {token}, which stands for what a prompt shows")
        encoded = self.tokenizer(
            [text, text[:start], text[start:end]], add_special_tokens=False, return_offsets_mapping=True
        )
        whole, prompt, answer = encoded["input_ids"]
        ((first, last),) = token_ranges(encoded["offset_mapping"][0], [(start, end)])
        # A token may lie over the end of the prompt: then the answer is said behind the prompt as the model is asked.
        ids = whole[first:last] if whole[:first] == prompt else answer
        if not ids:
            raise DataError(f"row {chat.row}: {name} has no token")
        return ids

    def _batch(self, pairs: list[dict[str, Any]]) -> ImagePairs:
        padded = self.padding(pairs)
        padded.columns["row"] = torch.tensor([pair[ROW] for pair in pairs])
        padded.completion_mask *= ~torch.isin(padded.completion_ids, self.placeholders)
        batch = self.behind(padded, [pair["prompt"] for pair in pairs])
        corrupted = None
        if self.corrupt is not None:
            corrupted = self.behind(padded.member(0), [pair["corrupted"] for pair in pairs])
            shown = torch.tensor([pair["images"] > 0 for pair in pairs])
            corrupted.columns = {"counted": padded.columns["counted"] & shown}
            if REFERENCE[2] in pairs[0]:
                logp = torch.zeros(corrupted.completion_ids.shape)
                for at, pair in enumerate(pairs):
                    logp[at, : len(pair[REFERENCE[2]])] = torch.tensor(pair[REFERENCE[2]])
                corrupted.columns["ref_logp"] = logp
        return ImagePairs(**vars(batch), corrupted=corrupted)

    def behind(self, batch: GroupedBatch, prompts: list[Prompt]) -> GroupedBatch:
        """The batch with its prompts as the model takes them."""
        extras = self.prompts.inputs(prompts)
        ids, mask = extras.pop("input_ids"), extras.pop("attention_mask")
        batch = replace(batch, prompt_ids=ids, prompt_mask=mask, model_inputs=extras, beyond=self.prompts.beyond)
        if not extras or batch.group_size == 1:
            return batch
        return replace(batch, alone=Apart(batch, {name: _counts(name, prompts, extras[name]) for name in extras}))


def pair_collator(run: VLMRun, args: Any, *, corrupt: Corrupt | None = None) -> VLMPairCollator:
    """Makes batches of pairs as VLMPromptOptions say, with `max_completion_length`.

    Args:
        run: the model's family and processor.
        args: the trainer's options.
        corrupt: see VLMPairCollator.
    """
    return VLMPairCollator(
        prompt_collator(run, args),
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
        pad_to_multiple_of=args.pad_to_multiple_of,
        needs_image=shards_the_model(),
        corrupt=corrupt,
    )


def check_pairs(collator: Any, rows: Any, args: Any) -> None:
    """See that a trainer's collator is one of pairs, and that the first rows can be used.

    Raises:
        UserError: another collator.
        DataError: a row that cannot be used, where the options want that to be an error.
    """
    if not isinstance(collator, VLMPairCollator):
        raise UserError(
            f"data_collator is a {type(collator).__name__}: give a VLMPairCollator. Leave it out: the trainer's own "
            "processes images and masks answers by the model's family."
        )
    if isinstance(rows, Rows) and args.on_bad_row == "error":
        collator([rows[at] for at in range(min(2, len(rows)))])  # a mistake in every row shows here


def read_images(row: dict[str, Any], number: int) -> tuple[Conversation, Conversation]:
    """The chats of a preference row with images: prompt with chosen, prompt with rejected.

    Raises:
        DataError: as shared.data.pairs.read_pair; no question, or an answer that shows something.
    """
    if row.get("prompt") is None and isinstance(row.get("chosen"), str):
        near = next((name for name in ("question", "query", "instruction") if row.get(name) is not None), None)
        hint = f"; its column {near} looks like one: rename it" if near else ""
        raise DataError(f"row {number}: has no prompt{hint}. Answers that are strings need the question beside them")
    columns = {name: value for name, value in row.items() if name not in (ROW, PADDING)}
    chats = read_pair(columns, number)
    for name, chat in zip(ANSWERS, chats, strict=True):
        shown = [part["type"] for turn in chat.messages[chat.prompt_messages :] for part in turn["content"]]
        if other := next((kind for kind in shown if kind != "text"), None):
            raise DataError(f"row {number}: {name} shows a{'n' * (other == 'image')} {other}; answers are text")
    return chats


def question_of(chat: Conversation) -> dict[str, Any]:
    """What comes before the answer, as a PROMPT_ONLY row."""
    extras = {name: value for name, value in chat.extras.items() if name not in ANSWERS}
    prompt = chat.messages[: chat.prompt_messages]
    return {**extras, ROW: chat.row, "prompt": prompt, "images": chat.images, "videos": chat.videos}


def _answer(chat: Conversation) -> str:
    """What the assistant says first."""
    said = next(turn for turn in chat.messages[chat.prompt_messages :] if turn["role"] == "assistant")
    return "".join(part["text"] for part in said["content"])


def _counts(name: str, prompts: list[Prompt], joined: Tensor) -> list[int]:
    """How many rows of one of the processor's tensors belong to each prompt."""
    own = [len(prompt.extras[name]) if name in prompt.extras else 0 for prompt in prompts]
    return own if sum(own) == len(joined) else [max(count, 1) for count in own]  # one of its own, filled with zeros
