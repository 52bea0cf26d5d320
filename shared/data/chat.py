"""Chats as text: templates, and which characters of the rendered text are learnt.

What the assistant says is found in one of three ways: by the template's own `{% generation %}` marks; by the strings
that the template writes before and after every assistant turn, learnt once from a made-up chat and matched against the
row's own contents; by rendering the chat with something else said in that turn, or up to the turn: the text before it
and behind it must stay what it is. A row where none holds is an error: nothing is ever masked by guesswork.

Deliberately not here: tokens and images. A collator shifts the characters to where its processor moves them.
"""

from __future__ import annotations

import functools
import json
import os.path
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.data.schema import Conversation
from shared.data.template_inputs import row_tools, row_variables
from shared.errors import DataError, UserError

LOSS_ON = ("assistant", "completion", "all")

Span = tuple[int, int]

_KNOWN_ROLES = ("system", "user", "assistant", "tool")
_SAID = "Azj0"  # what nobody says
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Attributes:
        text: what the template writes.
        spans: the `(start, end)` characters of it that are learnt, in order and without overlap.

    Example:
        `<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n`, spans of `Hello<|im_end|>`.
    """

    text: str
    spans: list[Span]


def render(
    owner: Any,
    conversation: Conversation,
    *,
    loss_on: str = "assistant",
    add_generation_prompt: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    source: str | None = None,
) -> Rendered:
    """Write a conversation with its template and say which characters are learnt.

    Where a template closes no turn (LLaVA 1.5's), the tokenizer's end-of-sequence token is put after the last answer:
    without one the model would never learn to stop.

    Args:
        owner: the processor or tokenizer that has the template.
        conversation: the row. Its extras `tools` and `chat_template_kwargs` are given to the template.
        loss_on: `assistant`: what the assistant says, each turn with the token that ends it (in prompt-completion rows
            those of the completion alone); `completion`: all that follows the prompt; `all`: everything.
        add_generation_prompt: end with the header of an assistant turn; then nothing is learnt.
        template_kwargs: more variables for the template.
        source: a template in place of the owner's.

    Raises:
        UserError: no template, or an unknown `loss_on`.
        DataError: the template refuses the row, or what is learnt cannot be told exactly; names the row.
    """
    if loss_on not in LOSS_ON:
        raise UserError(f"loss_on is {loss_on!r}, allowed: {', '.join(LOSS_ON)}")
    extras = conversation.extras
    variables = {**(template_kwargs or {}), **row_variables(extras.get("chat_template_kwargs"), conversation.row)}
    chat = _Chat(_template(owner, variables, source), conversation, row_tools(extras.get("tools"), conversation.row))
    if add_generation_prompt:
        return Rendered(chat.write(generation=True), [])
    return chat.learnt(loss_on)


def has_template(owner: Any) -> bool:
    """Whether a processor or tokenizer has a chat template."""
    return bool(getattr(owner, "chat_template", None))


def token_ranges(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Ranges `[first, last)` of the tokens that overlap the character spans.

    Args:
        offsets: `(start, end)` characters of each real token, in order; padding left out.
        spans: character spans.
    """
    return [(bisect_right(offsets, start, key=_end), bisect_left(offsets, end, key=_start)) for start, end in spans]


def _start(offset: Span) -> int:
    return offset[0]


def _end(offset: Span) -> int:
    return offset[1]


@dataclass(frozen=True)
class _Template:
    """A chat template with what it does around an assistant turn, learnt from a made-up chat.

    Attributes:
        places: `image` and `video` -> the token that holds such a one's place.
        typed: contents are lists of typed parts; otherwise strings.
        marked: the template marks what the assistant says.
        header: what stands before every assistant turn and nowhere else; "" where there is no such string.
        leads: what may stand between header and content: an empty thinking block, a space.
        footer: what ends an assistant turn in the middle of a chat.
        last_footer: what ends the last turn of a chat.
        closing: what has to be added after the last turn, where the template does not end it.
        asks_as_written: a question with the header of an answer is how the question with its answer begins.
    """

    source: str
    variables: dict[str, Any]
    places: dict[str, str]
    typed: bool = True
    marked: bool = False
    header: str = ""
    leads: tuple[str, ...] = ("",)
    footer: str = ""
    last_footer: str = ""
    closing: str = ""
    asks_as_written: bool = False

    def write(
        self, messages: list[dict], *, generation: bool = False, marks: bool = False, tools: list | None = None
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.typed:
            messages = [{**message, "content": self.flat(message)} for message in messages]
        texts, indices = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.source,
            add_generation_prompt=generation,
            return_assistant_tokens_mask=marks,
            **self.variables,
        )
        return texts[0], [tuple(span) for span in indices[0]] if indices else []

    def flat(self, message: dict) -> str:
        parts = message["content"]
        return "".join(part["text"] if part["type"] == "text" else self.places[part["type"]] for part in parts)


def _template(owner: Any, kwargs: dict[str, Any], source: str | None) -> _Template:
    source = source or getattr(owner, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise UserError(
            f"The {type(owner).__name__} has no chat template, so a conversation cannot be written as text. Use the "
            "instruction-tuned version of the model, or set `chat_template` to a Jinja template."
        )
    tokenizer = getattr(owner, "tokenizer", owner)
    special = {**tokenizer.special_tokens_map, **kwargs}
    places = tuple((kind, getattr(owner, f"{kind}_token", None) or "") for kind in ("image", "video"))
    return _learn(source, json.dumps(special, sort_keys=True, default=str), places, tokenizer.eos_token or "")


@functools.lru_cache(maxsize=64)
def _learn(source: str, variables: str, places: tuple[tuple[str, str], ...], eos: str) -> _Template:
    """Find out what a template does, from a made-up chat of two questions and answers."""
    from jinja2 import TemplateError

    template = _Template(source, json.loads(variables), dict(places))
    q1, a1, q2, a2 = words = ("Qzj1", "Azj1", "Qzj2", "Azj2")
    roles = ("user", "assistant") * 2
    chat = [{"role": r, "content": [{"type": "text", "text": w}]} for r, w in zip(roles, words, strict=True)]
    try:
        text, spans = template.write(chat, marks=bool(_MARK.search(source)))
        typed = "'type'" not in text and all(text.count(word) == 1 for word in words)
    except (TemplateError, TypeError):  # a template for strings, given a list
        typed = False
    template = replace(template, typed=typed)
    try:
        text, spans = template.write(chat, marks=bool(_MARK.search(source)))
        closed, _ = template.write(chat[:1])
        opened, _ = template.write(chat[:1], generation=True)
    except (TemplateError, TypeError):
        return template  # it refuses the made-up chat, so nothing is known about it: rows are rendered turn by turn
    if [text.count(word) for word in words] != [1] * 4 or opened.count(q1) != 1 or closed.count(q1) != 1:
        return template
    turns = [text[text.index(q1) + 4 : text.index(a1)], text[text.index(q2) + 4 : text.index(a2)]]
    after, after_prompt = closed[closed.index(q1) + 4 :], opened[opened.index(q1) + 4 :]
    common = os.path.commonprefix([after_prompt, *turns])
    header = common[len(after) :] if common.startswith(after) and len(common) > len(after) else common
    between, tail = text[text.index(a1) + 4 : text.index(q2)], text[text.index(a2) + 4 :]
    return replace(
        template,
        marked=bool(spans),
        header=header if header.strip() else "",
        leads=tuple(sorted({turn[len(common) :] for turn in turns} | {""}, key=len, reverse=True)),
        footer=os.path.commonprefix([between, tail]).rstrip(),
        last_footer=tail.rstrip(),
        closing="" if tail.strip() else eos,
        asks_as_written=bool(header.strip()) and text.startswith(opened) and common == after_prompt,
    )


class _Chat:
    """One row on its way through its template."""

    def __init__(self, template: _Template, conversation: Conversation, tools: list | None):
        self.template = template
        self.messages = conversation.messages
        self.row = conversation.row
        self.prompt_messages = conversation.prompt_messages
        self.tools = tools
        self.assistant = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]

    def write(self, stop: int | None = None, *, generation: bool = False) -> str:
        return self._write(stop, generation=generation)[0]

    def _write(
        self, stop: int | None = None, *, exchange: int | None = None, **options: Any
    ) -> tuple[str, list[Span]]:
        """The text up to message `stop`; with `exchange`, that message of the assistant says `_SAID` alone."""
        from jinja2 import TemplateError

        messages = self.messages[:stop]
        if exchange is not None:
            messages[exchange] = {"role": "assistant", "content": [{"type": "text", "text": _SAID}]}
        try:
            text, spans = self.template.write(messages, tools=self.tools, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"row {self.row}: the chat template refuses the conversation: {error}") from error
        for at, message in enumerate(messages):
            # Many templates pass over a role that they do not know.
            if message["role"] not in _KNOWN_ROLES and self.template.flat(message).strip() not in text:
                raise DataError(
                    f"row {self.row}: the chat template leaves out message {at}, of role {message['role']!r}. Use a "
                    "role that it writes (system, user), or another template."
                )
        return text, spans

    def _finished(self, text: str) -> str:
        """The text with an end to its last answer, where the template gives it none."""
        if self.template.closing and self.messages[-1]["role"] == "assistant":
            return text.rstrip() + self.template.closing
        return text

    def learnt(self, loss_on: str) -> Rendered:
        marks = loss_on == "assistant" and self.template.marked
        text, marked = self._write(marks=marks)
        closed = bool(self.template.closing) and self.messages[-1]["role"] == "assistant"
        text = self._finished(text)
        end = len(text.rstrip())
        if loss_on == "all":
            return Rendered(text, [(0, len(text))])
        if loss_on == "completion":
            return Rendered(text, [(self._completion_start(text), end)])
        first = self.prompt_messages or 0
        turns = [i for i in self.assistant if i >= first]
        if not turns:
            raise DataError(f"row {self.row}: the conversation has no assistant turn: there is nothing to learn")
        if marks:
            skip = self._prompt_end(text) if any(i < first for i in self.assistant) else 0
            spans = [self._widen(text, span) for span in marked if span[0] < span[1] and span[1] > skip]
            if not spans:
                raise DataError(f"row {self.row}: the chat template marks nothing of it as said by the assistant")
        else:
            spans = self._turns(text, turns)
        # A space at a turn's end is often part of the next header's first token.
        spans = [(start, start + len(text[start:stop].rstrip())) for start, stop in spans]
        if closed:
            body = end - len(self.template.closing)
            follows = not text[spans[-1][1] : body].strip()  # an empty last answer has no span of its own
            spans = [*spans[:-1], (spans[-1][0], end)] if follows else [*spans, (body, end)]
        return Rendered(text, spans)

    def _completion_start(self, text: str) -> int:
        first = self.prompt_messages
        if self.template.asks_as_written and self.assistant[:1] == [first]:
            starts = find_all(text, self.template.header)
            position = starts[0] + len(self.template.header) if len(starts) == len(self.assistant) else -1
            if position > 0 and self._match(text, first, position):
                return position
        return self._prompt_end(text)

    def _prompt_end(self, text: str) -> int:
        """Where the completion begins: after what the model is given when it is asked."""
        if not self.prompt_messages:
            raise DataError(f"row {self.row}: the loss is on the completion, but the row has no prompt and completion")
        prompt = self.write(self.prompt_messages, generation=True)
        if not text.startswith(prompt):
            where = len(os.path.commonprefix([prompt, text]))
            raise DataError(
                f"row {self.row}: the prompt as the model is asked it is not how the whole row begins: the template "
                f"writes {prompt[where : where + 40]!r} for the prompt alone, {text[where : where + 40]!r} with the "
                "completion. Train on loss_on='assistant', or write the completion as the template ends its prompt."
            )
        return len(prompt)

    def _widen(self, text: str, span: Span) -> Span:
        """A marked span with the end of its turn and what the model itself writes before its content."""
        start, end = span
        template = self.template
        for lead in template.leads:
            if lead and template.header and text.endswith(template.header + lead, 0, start):
                start -= len(lead)
                break
        for footer in (template.last_footer, template.footer):
            if footer and text.startswith(footer, end):
                end += len(footer)
                break
        return start, end

    def _turns(self, text: str, turns: list[int]) -> list[Span]:
        header = self.template.header
        starts = find_all(text, header) if header else []
        by_header = len(starts) == len(self.assistant)  # otherwise someone wrote the header into a content
        spans = []
        for turn in turns:
            span = None
            if by_header:
                span = self._match(text, turn, starts[self.assistant.index(turn)] + len(header))
            spans.append(span or self._exchanged(text, turn) or self._between_prefixes(text, turn))
        return spans

    def _match(self, text: str, turn: int, position: int) -> Span | None:
        """The turn's span where header, content and end of turn follow each other letter by letter."""
        message = self.messages[turn]
        if set(message) > {"role", "content"}:
            return None  # tool calls, thoughts: only the template knows how it writes them
        template = self.template
        said = template.flat(message)
        last = turn == len(self.messages) - 1
        footers = (template.last_footer, template.footer) if last else (template.footer,)
        # Templates trim contents, and leave the thoughts of earlier turns out.
        for content in dict.fromkeys((said, said.strip(), said.rpartition("</think>")[2].strip())):
            for lead in template.leads:
                if text.startswith(lead + content, position):
                    end = position + len(lead) + len(content)
                    for footer in footers:
                        if text.startswith(footer, end):
                            return position, end + len(footer)
        return None

    def _exchanged(self, text: str, turn: int) -> Span | None:
        """The turn's span where the template writes all before and behind it alike, whatever is said in it."""
        template = self.template
        try:
            other = self._finished(self._write(exchange=turn)[0])
        except DataError:  # an answer of a tool, for one, has to follow a call
            return None
        if not template.header or other.count(_SAID) != 1:
            return None
        said, last = other.index(_SAID), turn == len(self.messages) - 1
        behind = other[said + len(_SAID) :]
        heads = [
            other[: said - len(lead)] for lead in template.leads if other.endswith(template.header + lead, 0, said)
        ]
        footers = (template.last_footer, template.footer) if last else (template.footer,)
        footer = next((footer for footer in footers if behind.startswith(footer)), None)
        start, stop = len(heads[0]) if heads else 0, len(text) - len(behind)
        if footer is None or not heads or stop < start or not (text.startswith(heads[0]) and text.endswith(behind)):
            return None
        if footer and text.count(footer, start, stop) > template.flat(self.messages[turn]).count(footer):
            return None  # more than one turn is written for this message
        return start, stop + len(footer)

    def _between_prefixes(self, text: str, turn: int) -> Span:
        start = self.write(turn, generation=True) if turn else ""
        end = self.write(turn + 1).rstrip()
        if text.startswith(start) and text.startswith(end) and len(start) < len(end):
            return len(start), len(end)
        raise DataError(
            f"row {self.row}: cannot tell exactly which part of the rendered text is message {turn}, the assistant's: "
            "the chat template writes it otherwise in the whole conversation than up to there. Use a template that "
            "marks it with {% generation %}, or give the row as prompt and completion with loss_on='completion'."
        )


def find_all(text: str, part: str) -> list[int]:
    """Where a part stands in a text, from left to right; places do not overlap."""
    found, position = [], text.find(part)
    while position >= 0:
        found.append(position)
        position = text.find(part, position + len(part))
    return found
