"""One row of a vision-language data set, read: its text with the learnt characters, and its images decoded.

No processor is called here and nothing becomes a token: that is collators.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shared.data.chat import LOSS_ON, has_template, render
from shared.data.rows import PADDING, ROW
from shared.data.schema import Conversation, Kind, decode_image, to_conversation
from shared.errors import DataError, UserError
from visionalign.families import Family

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class Item:
    """A row on its way into a batch.

    Attributes:
        row: its number, for errors.
        text: what the processor is given as text.
        images: decoded, in the order of their places in the text.
        spans: the characters of the text that are learnt.
        suffix: the answer, for a family that wants it apart from its prompt.
        counted: False where nothing of the row is learnt whatever its spans say.
    """

    row: int
    text: str
    images: list[Any] = field(default_factory=list)
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
    ):
        _check_options(processor, family, kind, loss_on)
        self.processor, self.family, self.kind = processor, family, kind
        self.loss_on, self.max_pixels, self.template_kwargs = loss_on, max_pixels, template_kwargs
        self.image_token: str = processor.image_token
        self.bos: str | None = processor.tokenizer.bos_token

    def read(self, row: dict[str, Any], position: int) -> Item:
        """The row as it is trained on. Raises DataError."""
        conversation = self._conversation(row, position)
        counted = not row.get(PADDING)
        if self.family.prefix_suffix:
            prefix, suffix = _prefix_and_suffix(conversation, answered=True)
            text = self.image_token * len(conversation.images) + prefix
            return self._placed(conversation, Item(conversation.row, text, suffix=suffix, counted=counted))
        rendered = self._render(conversation, loss_on=self.loss_on)
        return self._placed(conversation, Item(conversation.row, rendered.text, spans=rendered.spans, counted=counted))

    def ask(self, row: dict[str, Any], position: int) -> tuple[Item, str]:
        """The row up to the answer that the model is to give, and that answer. Raises DataError."""
        asked, answer = _question(self._conversation(row, position))
        if self.family.prefix_suffix:
            prefix, _ = _prefix_and_suffix(asked, answered=False)
            text = self.image_token * len(asked.images) + prefix
        else:
            text = self._render(asked, add_generation_prompt=True).text
        return self._placed(asked, Item(asked.row, text)), answer

    def blank(self) -> Item:
        """A row of one tiny blank image, of which nothing is learnt; for families with a chat template."""
        from PIL import Image

        parts = [{"type": "image"}, {"type": "text", "text": "."}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
        chat = Conversation(messages, [Image.new("RGB", (32, 32))], row=-1)
        return self._placed(chat, Item(chat.row, self._render(chat, loss_on="all").text, counted=False))

    def _render(self, conversation: Conversation, **options: Any):
        return render(self.processor, conversation, template_kwargs=self.template_kwargs, **options)

    def _conversation(self, row: dict[str, Any], position: int) -> Conversation:
        number = row_number(row, position)
        columns = {name: value for name, value in row.items() if name not in (ROW, PADDING)}
        conversation = to_conversation(columns, number, self.kind)
        name = self.family.name
        if conversation.videos:
            reason = "this trainer takes images" if self.family.video else f"models of the family {name} take no video"
            raise DataError(f"row {number}: has a video, but {reason}")
        if not conversation.images and not self.family.text_only_rows:
            raise DataError(f"row {number}: has no image, but models of the family {name} need one in each row")
        return conversation

    def _placed(self, conversation: Conversation, item: Item) -> Item:
        """Decode the images, each to its place; write what the processor would itself write into the text unseen."""
        token = self.image_token
        places, images = item.text.count(token), len(conversation.images)
        if places != images:
            raise DataError(
                f"row {item.row}: {images} image{'' if images == 1 else 's'} but {places} image "
                f"place{'' if places == 1 else 's'} ({token}) in the rendered text. Neither a text that holds {token} "
                "itself nor a chat template that leaves images out can be used."
            )
        item.images = [decode_image(raw, row=item.row, max_pixels=self.max_pixels) for raw in conversation.images]
        bos = self.bos
        if self.family.bos_in_text and bos and bos not in item.text:
            at = 0
            while item.text.startswith(token, at):
                at += len(token)
            item.text = item.text[:at] + bos + item.text[at:]
            item.spans = [(start + len(bos) * (start >= at), end + len(bos) * (end > at)) for start, end in item.spans]
        return item


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
    images = sum(part["type"] == "image" for turn in asked for part in turn["content"])
    kept = Conversation(asked, conversation.images[:images], None, conversation.extras, conversation.row)
    return kept, _text(answer) if answer else ""


def _text(turn: dict[str, Any]) -> str:
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")
