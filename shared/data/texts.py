"""A row as text: what is written, and which of its characters are learnt, answer, or end a step.

A row is written once. Strings are joined as they are, without a chat template; messages are written by the template.

Deliberately not here: tokens (tokenise.py), templates and what they do around a turn (chat.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.data.chat import LOSS_ON, Span, render
from shared.data.conversation import Conversation, read_conversation
from shared.data.pairs import split_pair
from shared.data.schema import Kind, to_conversation
from shared.data.template_inputs import without_nones
from shared.errors import DataError, UserError

SUPERVISED = (Kind.LANGUAGE_MODELING, Kind.MESSAGES, Kind.PROMPT_COMPLETION, Kind.TOKENS)
_LOSS_ON = {
    Kind.LANGUAGE_MODELING: ("all",),
    Kind.MESSAGES: ("assistant", "all"),
    Kind.PROMPT_COMPLETION: LOSS_ON,
    Kind.TOKENS: LOSS_ON,
}
_COLUMNS = {
    Kind.MESSAGES: ("messages", "conversations"),
    Kind.PROMPT_COMPLETION: ("prompt", "completion", "messages", "conversations"),
    Kind.PROMPT_ONLY: ("prompt",),
    Kind.PREFERENCE: ("prompt", "chosen", "rejected", "margin"),
    Kind.UNPAIRED: ("prompt", "completion", "label"),
    Kind.STEPWISE: ("prompt", "completions", "labels"),
    Kind.TOKENS: ("input_ids", "labels", "completion_mask", "assistant_masks"),
}
_EXTRAS = ("tools", "chat_template_kwargs", "image", "images", "video", "videos")


@dataclass
class Text:
    """A text on its way to its tokens.

    Attributes:
        text: what is tokenised.
        spans: the characters that count: what is learnt, the answer, or one span a step. None: all of it.
        plain: no template wrote it, so the tokenizer's own leading special tokens belong to it.
        ends: it is an answer, or a whole text, that ends there: an end-of-sequence token belongs to it.
    """

    text: str
    spans: list[Span] | None
    plain: bool = True
    ends: bool = True


class Writer:
    """Writes rows of one kind as text. The arguments are Tokeniser's."""

    def __init__(
        self,
        tokenizer: Any,
        kind: Kind,
        *,
        loss_on: str,
        template_kwargs: dict[str, Any] | None,
        step_separator: str,
        text_field: str,
    ):
        allowed = _LOSS_ON.get(kind, LOSS_ON)
        if loss_on not in allowed:
            raise UserError(f"loss_on is {loss_on!r}; with {kind} data allowed: {', '.join(allowed)}.")
        self.tokenizer, self.kind, self.loss_on = tokenizer, kind, loss_on
        self.template_kwargs, self.step_separator, self.text_field = template_kwargs, step_separator, text_field

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are looked at."""
        own = (self.text_field,) if self.kind is Kind.LANGUAGE_MODELING else _COLUMNS[self.kind]
        return (*own, *_EXTRAS)

    def write(self, row: Mapping[str, Any], number: int) -> list[Text]:
        """The texts of a row: two for a preference pair, one otherwise.

        Raises:
            DataError: `row N: ...`.
        """
        if self.kind is Kind.LANGUAGE_MODELING:
            text = row.get(self.text_field)
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"row {number}: {self.text_field} is no text, or an empty one")
            return [Text(text, None)]
        if self.kind is Kind.PREFERENCE:
            return self._pair(row, number)
        if self.kind is Kind.STEPWISE:
            return [self._steps(row, number)]
        if self.kind is Kind.PROMPT_ONLY:
            return [self.ask(row, number)[0]]
        prompt, answer = row.get("prompt"), row.get("completion")
        if self.kind is not Kind.MESSAGES and isinstance(prompt, str) and isinstance(answer, str):
            whole = self.kind is Kind.PROMPT_COMPLETION and self.loss_on == "all"
            return [_joined(prompt, answer, number, "completion", whole=whole)]
        if self.kind is Kind.UNPAIRED:
            return [self._rendered(read_conversation(row, number, "prompt", "completion"), "completion")]
        conversation = to_conversation(row, number, self.kind)
        # In a mixture with prompts and completions, what a row of messages completes is what the assistant says.
        whole_chat = self.loss_on == "completion" and conversation.prompt_messages is None
        return [self._rendered(conversation, "assistant" if whole_chat else self.loss_on)]

    def ask(self, row: Mapping[str, Any], number: int) -> tuple[Text, str]:
        """The row up to the answer that a model is to give, and that answer as the model would write it.

        Raises:
            DataError: `row N: ...`.
        """
        name = "completion"
        if self.kind is Kind.PREFERENCE:
            name = "chosen"
            prompt, chosen, _ = split_pair(row, number)
            row = {**row, "prompt": prompt, "chosen": chosen}
        elif self.kind is Kind.STEPWISE:
            row = {**row, "completion": self.step_separator.join(row["completions"])}
        prompt, answer = row.get("prompt"), row.get(name)
        alone = self.kind is Kind.PROMPT_ONLY
        if self.kind is not Kind.MESSAGES and isinstance(prompt, str) and (alone or isinstance(answer, str)):
            return Text(prompt, None, ends=False), "" if alone else answer
        if alone:
            chat = _text_only(read_conversation(row, number, "prompt", None))
            return Text(self._render(chat, add_generation_prompt=True).text, None, plain=False, ends=False), ""
        if self.kind in (Kind.MESSAGES, Kind.PROMPT_COMPLETION):
            conversation = to_conversation(row, number, self.kind)
        else:
            conversation = read_conversation(row, number, "prompt", name)
        spoken = [at for at, turn in enumerate(conversation.messages) if turn["role"] == "assistant"]
        count = conversation.prompt_messages
        if count is None:
            count = spoken[-1]
        asked = Conversation(conversation.messages[:count], extras=conversation.extras, row=number)
        text = self._render(asked, add_generation_prompt=True).text
        turn = next((at for at in spoken if at >= count), None)
        answer = "" if turn is None else self._answer(conversation, turn, text)
        return Text(text, None, plain=False, ends=False), answer

    def _answer(self, conversation: Conversation, turn: int, asked: str) -> str:
        """What the template writes for one turn of the assistant, behind what the model is asked."""
        # A template may lead an answer with empty thoughts, write calls of tools, or drop earlier thoughts.
        until = Conversation(
            conversation.messages[: turn + 1],
            prompt_messages=conversation.prompt_messages,
            extras=conversation.extras,
            row=conversation.row,
        )
        try:
            whole = self._render(until, loss_on="all").text.rstrip()
            if whole.startswith(asked):
                return whole[len(asked) :]
            rendered = self._render(until, loss_on="assistant")
        except DataError:  # it cannot be told from the template: then as the row has it
            return "".join(part.get("text", "") for part in conversation.messages[turn]["content"])
        start, end = rendered.spans[-1]
        return rendered.text[start:end]

    def _pair(self, row: Mapping[str, Any], number: int) -> list[Text]:
        prompt, chosen, rejected = split_pair(row, number)
        if chosen == rejected:
            raise DataError(f"row {number}: chosen and rejected are the same: there is nothing to prefer")
        if isinstance(prompt, str) and isinstance(chosen, str):
            return [_joined(prompt, chosen, number, "chosen"), _joined(prompt, rejected, number, "rejected")]
        whole = {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
        chats = (read_conversation(whole, number, "prompt", name) for name in ("chosen", "rejected"))
        return [self._rendered(chat, "completion") for chat in chats]

    def _steps(self, row: Mapping[str, Any], number: int) -> Text:
        prompt, plain = row.get("prompt"), True
        if not isinstance(prompt, str):
            chat = read_conversation(row, number, "prompt", None)
            prompt, plain = self._render(_text_only(chat), add_generation_prompt=True).text, False
        spans, pieces, at = [], [prompt], len(prompt)
        for step in row["completions"]:
            pieces += [step, self.step_separator]
            end = at + len(step) + len(self.step_separator)
            spans.append((at, end))
            at = end
        return Text("".join(pieces), spans, plain, ends=False)

    def _rendered(self, conversation: Conversation, loss_on: str) -> Text:
        rendered = self._render(_text_only(conversation), loss_on=loss_on)
        return Text(rendered.text, None if loss_on == "all" else rendered.spans, plain=False, ends=False)

    def _render(self, conversation: Conversation, **options: Any):
        for message in conversation.messages:
            if "tool_calls" in message:
                message["tool_calls"] = without_nones(message["tool_calls"])
        return render(self.tokenizer, conversation, template_kwargs=self.template_kwargs, **options)


def _joined(prompt: str, answer: str, number: int, name: str, *, whole: bool = False) -> Text:
    if not answer.strip():
        raise DataError(f"row {number}: {name} is empty, so there is nothing to learn")
    text = prompt + answer
    return Text(text, None if whole else [(len(prompt), len(text))])


def _text_only(conversation: Conversation) -> Conversation:
    if conversation.images or conversation.videos:
        shown = "an image" if conversation.images else "a video"
        raise DataError(f"row {conversation.row}: has {shown}, but this trainer takes text; use the vision trainer")
    return conversation
