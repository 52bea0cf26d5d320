"""One row of a vision-language data set, read: its text with the learnt characters, images and videos decoded.

No processor is called here and nothing becomes a token: that is collators.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from shared.data.chat import LOSS_ON, has_template, render
from shared.data.rows import PADDING, ROW, Rows
from shared.data.schema import (
    STREAMED_ROWS_CHECKED,
    Conversation,
    Kind,
    column_names,
    decode_image,
    to_conversation,
)
from shared.data.videos import Video
from shared.errors import DataError, UserError
from visionalign.families import Family
from visionalign.video import BLANK, SHOWN_PIXELS, VideoReader, as_pictures, shown_frames, template_of

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class Item:
    """A row on its way into a batch.

    Attributes:
        row: its number, for errors.
        text: what the processor is given as text.
        images: decoded, in the order of their places in the text.
        videos: likewise.
        spans: the characters of the text that are learnt.
        suffix: the answer, for a family that wants it apart from its prompt.
        counted: False where nothing of the row is learnt whatever its spans say.
    """

    row: int
    text: str
    images: list[Any] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    suffix: str | None = None
    counted: bool = True


class Reader:
    """Reads rows for one processor. The arguments are VLMCollator's."""

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        family: Family,
        kind: Kind,
        loss_on: str,
        max_pixels: int | None,
        template_kwargs: dict[str, Any] | None,
        videos: VideoReader,
    ):
        _check_options(processor, family, kind, loss_on)
        self.processor, self.family, self.kind = processor, family, kind
        self.videos, self.video_template = videos, template_of(processor, family)
        self.loss_on, self.max_pixels, self.template_kwargs = loss_on, max_pixels, template_kwargs
        self.tokens: dict[str, str | None] = {
            kind: getattr(processor, f"{kind}_token", None) for kind in ("image", "video")
        }
        self.bos: str | None = processor.tokenizer.bos_token

    def read(self, row: dict[str, Any], position: int) -> Item:
        """The row as it is trained on. Raises DataError."""
        conversation = self._conversation(row, position)
        counted = not row.get(PADDING)
        if self.family.prefix_suffix:
            prefix, suffix = _prefix_and_suffix(conversation, answered=True)
            text = self.tokens["image"] * len(conversation.images) + prefix
            return self._placed(conversation, Item(conversation.row, text, suffix=suffix, counted=counted))
        rendered = self._render(conversation, loss_on=self.loss_on)
        return self._placed(conversation, Item(conversation.row, rendered.text, spans=rendered.spans, counted=counted))

    def ask(self, row: dict[str, Any], position: int) -> tuple[Item, str]:
        """The row up to the answer that the model is to give, and that answer. Raises DataError."""
        asked, answer = _question(self._conversation(row, position))
        if self.family.prefix_suffix:
            prefix, _ = _prefix_and_suffix(asked, answered=False)
            text = self.tokens["image"] * len(asked.images) + prefix
        else:
            text = self._render(asked, add_generation_prompt=True).text
        return self._placed(asked, Item(asked.row, text)), answer

    def answered(self, conversation: Conversation) -> tuple[str, int, int]:
        """A prompt with its answer as text, images not expanded, and which of its characters are the answer.

        The answer has the end of its turn. Raises DataError.
        """
        if self.family.prefix_suffix:
            _, suffix = _prefix_and_suffix(conversation, answered=True)
            text = suffix + self.processor.tokenizer.eos_token  # the processor ends a suffix with it
            return text, 0, len(text)
        try:
            rendered = self._render(conversation, loss_on="completion")
        except (
            DataError
        ):  # some templates ask otherwise than they write: then it is said behind what the model is asked
            rendered = self._render(conversation, loss_on="assistant")
            asked = replace(conversation, messages=conversation.messages[: conversation.prompt_messages])
            prompt = self._render(asked, add_generation_prompt=True).text
            answer = rendered.text[rendered.spans[0][0] : rendered.spans[-1][1]].lstrip()
            return prompt + answer, len(prompt), len(prompt) + len(answer)
        ((start, end),) = rendered.spans
        return rendered.text, start, end

    def blank(self, *kinds: str) -> Item:
        """A row of one tiny blank image, or of what `kinds` names (`image`, `video`), of which nothing is learnt.

        For families with a chat template.
        """
        from PIL import Image

        kinds = kinds or ("image",)
        parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": "."}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[-1:]}]
        images = [Image.new("RGB", (BLANK, BLANK))] * ("image" in kinds)
        chat = Conversation(messages, images, row=-1, videos=[self.videos.blank()] * ("video" in kinds))
        return self._placed(chat, Item(chat.row, self._render(chat, loss_on="all").text, counted=False))

    def shown(self, conversation: Conversation) -> list[Any]:
        """The images of a conversation, and some frames of its videos, small, for people."""
        row = conversation.row
        pictures = [decode_image(raw, row=row, max_pixels=SHOWN_PIXELS) for raw in conversation.images]
        return pictures + [frame for raw in conversation.videos for frame in shown_frames(self.videos(raw, row))]

    def _render(self, conversation: Conversation, **options: Any):
        source = self.video_template if conversation.videos else None
        return render(self.processor, conversation, template_kwargs=self.template_kwargs, source=source, **options)

    def _conversation(self, row: dict[str, Any], position: int) -> Conversation:
        number = row_number(row, position)
        columns = {name: value for name, value in row.items() if name not in (ROW, PADDING)}
        conversation = self._seen(to_conversation(columns, number, self.kind))
        if not conversation.images and not self.family.text_only_rows:
            raise DataError(
                f"row {number}: has no image, but models of the family {self.family.name} need one in each row"
            )
        return conversation

    def _seen(self, conversation: Conversation) -> Conversation:
        """The conversation with its videos as the family sees them: decoded, or each as the images it is made of."""
        number, family = conversation.row, self.family
        if not conversation.videos:
            return conversation
        if not (family.video or family.frames_as_images):
            raise DataError(f"row {number}: has a video, but models of the family {family.name} take no video")
        videos = [self.videos(raw, number) for raw in conversation.videos]
        if family.video:
            return replace(conversation, videos=videos)
        raw_images, clips = iter(conversation.images), iter(videos)
        messages, images = [], []
        for turn in conversation.messages:
            parts = []
            for part in turn["content"]:
                if part["type"] == "text":
                    parts.append(part)
                    continue
                shown = as_pictures(next(clips)) if part["type"] == "video" else [next(raw_images)]
                images += shown
                parts += [{"type": "image"} for _ in shown]
            messages.append({**turn, "content": parts})
        return replace(conversation, messages=messages, images=images, videos=[])

    def _placed(self, conversation: Conversation, item: Item) -> Item:
        """Decode the images, each to its place; write what the processor would itself write into the text unseen."""
        for kind, given in (("image", conversation.images), ("video", conversation.videos)):
            self._check_places(kind, len(given), item)
        item.images = [decode_image(raw, row=item.row, max_pixels=self.max_pixels) for raw in conversation.images]
        item.videos = conversation.videos
        bos, token = self.bos, self.tokens["image"]
        if self.family.bos_in_text and bos and bos not in item.text:
            at = 0
            while item.text.startswith(token, at):
                at += len(token)
            item.text = item.text[:at] + bos + item.text[at:]
            item.spans = [(start + len(bos) * (start >= at), end + len(bos) * (end > at)) for start, end in item.spans]
        return item

    def _check_places(self, kind: str, given: int, item: Item) -> None:
        """Raise DataError where the text has not one place for each image (or video)."""
        token = self.tokens[kind]
        places = item.text.count(token) if token else given
        if places != given:
            raise DataError(
                f"row {item.row}: {given} {kind}{'' if given == 1 else 's'} but {places} {kind} "
                f"place{'' if places == 1 else 's'} ({token}) in the rendered text. Neither a text that holds {token} "
                f"itself nor a chat template that leaves {kind}s out can be used."
            )


def tower_passes(rows: Any, kind: Kind, family: Family) -> set[str]:
    """What the vision tower may be run on for the rows of a data set: `image`, `video` or both, a pass each.

    A column tells, or else the parts of messages: of all rows, or of a stream's first ones.
    """
    plain = rows.dataset if isinstance(rows, Rows) else rows
    columns = set(column_names(plain))
    found = {name for name in ("image", "video") if columns & {name, f"{name}s"}}
    if not found:
        for at, row in enumerate(plain if hasattr(plain, "__len__") else islice(plain, STREAMED_ROWS_CHECKED)):
            conversation = to_conversation({k: v for k, v in row.items() if k not in (ROW, PADDING)}, at, kind)
            found |= {name for name in ("image", "video") if getattr(conversation, f"{name}s")}
    return found if found and family.video_passes else {"image"}


def row_number(row: dict[str, Any], position: int) -> int:
    """The row's number in its data set; its position in the batch where it does not know."""
    return int(row.get(ROW, position))


def _check_options(processor: Any, family: Family, kind: Kind, loss_on: str) -> None:
    if loss_on not in LOSS_ON:
        raise UserError(f"loss_on is {loss_on!r}, allowed: {', '.join(LOSS_ON)}")
    if loss_on == "completion" and kind is not Kind.PROMPT_COMPLETION:
        raise UserError(
            f"loss_on='completion' needs the columns `prompt` and `completion`, but the data set is {kind} data; "
            "use loss_on='assistant'"
        )
    if family.prefix_suffix and loss_on == "all":
        raise UserError(
            f"loss_on='all' cannot be used with {family.name}: its prompt is seen from both sides, so there is "
            "nothing to predict in it; use loss_on='assistant'"
        )
    if getattr(processor, "image_token", None) is None:
        raise UserError(
            f"A {type(processor).__name__} does not say which token holds an image's place (`image_token`): it cannot "
            "be used for training on images."
        )
    if not family.prefix_suffix and not has_template(processor):
        raise UserError(
            f"The {type(processor).__name__} has no chat template, so a conversation cannot be written as text. Use "
            "the instruction-tuned version of the model, or set the processor's `chat_template` to a Jinja template."
        )


def _prefix_and_suffix(conversation: Conversation, *, answered: bool) -> tuple[str, str | None]:
    """The text of a question, and of its answer, for a family that has no chats."""
    turns = [turn for turn in conversation.messages if turn["role"] != "system"]
    roles = [turn["role"] for turn in turns]
    if roles != (["user", "assistant"] if answered else ["user"]):
        if "assistant" not in roles and answered:
            raise DataError(f"row {conversation.row}: the conversation has no assistant turn: nothing to learn")
        raise DataError(
            f"row {conversation.row}: has the turns {', '.join(roles)}, but a model of this family takes one question "
            "and gives one answer"
        )
    question = "\n".join(filter(None, (_text(turn) for turn in conversation.messages if turn["role"] != "assistant")))
    return question, _text(turns[1]) if answered else None


def _question(conversation: Conversation) -> tuple[Conversation, str]:
    """The conversation up to the answer that a model is to give, and that answer."""
    messages = conversation.messages
    count = conversation.prompt_messages
    if count is None:
        answers = [at for at, turn in enumerate(messages) if turn["role"] == "assistant"]
        count = answers[-1] if answers else len(messages)
    answer = next((turn for turn in messages[count:] if turn["role"] == "assistant"), None)
    asked = messages[:count]
    kinds = [part["type"] for turn in asked for part in turn["content"]]
    images, videos = (conversation.images[: kinds.count("image")], conversation.videos[: kinds.count("video")])
    kept = replace(conversation, messages=asked, images=images, prompt_messages=None, videos=videos)
    return kept, _text(answer) if answer else ""


def _text(turn: dict[str, Any]) -> str:
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")
