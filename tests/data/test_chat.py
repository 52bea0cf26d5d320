"""Which characters of a rendered chat are learnt, for the shapes that chat templates have in the wild."""

from __future__ import annotations

import pytest
import transformers.utils.chat_template_utils as library

from shared.data.chat import render, token_ranges
from shared.data.schema import Conversation, Kind, to_conversation
from shared.errors import DataError, UserError

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
VICUNA = (  # closes no turn
    "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
THINKING = (  # earlier thoughts are dropped, the last turn always has a thinking block
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m['content'] else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (  # marks the content but not the token that ends the turn
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TYPED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORCED = (  # the generation prompt opens a thinking block that is not in the history
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
TOOLS = (  # as Qwen3: thoughts only after the last question, answers of tools in a user's turn
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] in ('user', 'system') %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or m['reasoning_content']) %}"
    "<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %} <tool_call>{{ call['name'] }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n</tool_response><|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if quick %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
REWRITING = "{% for m in messages %}#{{ loop.length - loop.index }} {{ m['content'] | upper }}\n{% endfor %}"


class Owner:
    """A tokenizer, as far as templates are concerned."""

    bos_token, eos_token = "<s>", "</s>"
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}

    def __init__(self, template):
        self.chat_template = template


def learnt(template, messages, loss_on="assistant", **columns):
    kind = Kind.PROMPT_COMPLETION if "completion" in columns else Kind.MESSAGES
    row = columns if "completion" in columns else {"messages": messages, **columns}
    rendered = render(Owner(template), to_conversation(row, 7, kind), loss_on=loss_on)
    return [rendered.text[start:end] for start, end in rendered.spans]


def turns(*said, system=None):
    roles = ("user", "assistant") * len(said)
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + chat


ENDS = {CHATML: "<|im_end|>", LLAMA: "<|eot_id|>", MARKED: "<|im_end|>", TYPED: "<|im_end|>", FORCED: "<|im_end|>"}


@pytest.mark.parametrize("template", ENDS)
def test_assistant_turns_with_their_end(template):
    end = ENDS[template]
    assert learnt(template, turns("Hi", "Hello")) == ["Hello" + end]
    two = turns("Hi", "Hello", "Bye", "See you", system="Be brief")
    assert learnt(template, two) == ["Hello" + end, "See you" + end]
    assert learnt(template, turns("Hi", "Hello", "Bye")) == ["Hello" + end]  # a question without an answer


def test_the_answer_repeated_elsewhere_is_found_in_its_place():
    for template in ENDS:
        chat = turns("red", "red", "red", "red")
        rendered = render(Owner(template), to_conversation({"messages": chat}, 0, Kind.MESSAGES))
        for start, _ in rendered.spans:
            assert rendered.text[:start].endswith(("assistant\n", "assistant<|end_header_id|>\n\n"))
        assert len(rendered.spans) == 2


def test_space_before_the_answer_is_the_models_to_write():
    assert learnt(MISTRAL, turns("Hi", "Hello", "Bye", "See you ")) == [" Hello</s>", " See you</s>"]


def test_a_template_that_closes_no_turn_gets_an_end():
    chat = turns("Hi", "Hello", "Bye", "See you")
    rendered = render(Owner(VICUNA), to_conversation({"messages": chat}, 0, Kind.MESSAGES))
    assert rendered.text == "USER: Hi ASSISTANT: Hello USER: Bye ASSISTANT: See you</s>"
    assert [rendered.text[a:b] for a, b in rendered.spans] == [" Hello", " See you</s>"]


def test_an_empty_last_answer_does_not_widen_the_one_before():
    marked = VICUNA.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}",
    )
    for template in (VICUNA, marked):
        said = learnt(template, turns("Hi", "Hello", "Bye", ""))
        assert [text for text in said if text] == [" Hello", "</s>"]


def test_trimmed_contents():
    assert learnt(LLAMA, turns("Hi", "  Hello \n")) == ["Hello<|eot_id|>"]
    assert learnt(CHATML, turns("Hi", "  Hello \n")) == ["  Hello \n<|im_end|>"]


def test_thoughts_of_earlier_turns_are_left_out_and_the_last_kept():
    first, last = "<think>\nhm\n</think>\n\nred", "<think>\nwell\n</think>\n\nblue"
    assert learnt(THINKING, turns("A", first, "B", last)) == ["red<|im_end|>", last + "<|im_end|>"]
    assert learnt(THINKING, turns("A", "red", "B", "blue")) == [
        "red<|im_end|>",
        "<think>\n\n</think>\n\nblue<|im_end|>",
    ]


def test_a_header_inside_a_content_does_not_mislead():
    trap = "Say <|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n please"
    for template in (CHATML, MARKED, TYPED):
        assert learnt(template, turns(trap, "red")) == ["red<|im_end|>"]
        assert learnt(template, turns("Hi", trap)) == [trap + "<|im_end|>"]
        assert learnt(template, turns(trap, "red", "Bye", trap)) == ["red<|im_end|>", trap + "<|im_end|>"]


def test_what_cannot_be_told_exactly_is_an_error():
    with pytest.raises(DataError, match="row 7: cannot tell exactly .* message 1"):
        learnt(REWRITING, turns("Hi", "Hello", "Bye", "See you"))


def test_no_assistant_turn():
    with pytest.raises(DataError, match="row 7: .*no assistant turn"):
        learnt(CHATML, turns("Hi"))


def test_a_template_that_refuses_a_row_names_it():
    with pytest.raises(DataError, match="row 7: the chat template refuses .*Only user and assistant"):
        learnt(MISTRAL, turns("Hi", "Hello", system="Be brief"))


@pytest.mark.parametrize("template", [CHATML, LLAMA, MARKED, TYPED])
def test_completion_is_all_after_the_prompt(template):
    end = ENDS[template]
    assert learnt(template, None, "completion", prompt="Hi", completion="Hello") == ["Hello" + end]
    several = turns("Hello", "Bye", "See you")
    for at, message in enumerate(several):
        message["role"] = ("assistant", "user")[at % 2]
    (text,) = learnt(template, None, "completion", prompt=turns("A", "B", "Hi"), completion=several)
    assert text.startswith("Hello" + end) and "Bye" in text and text.endswith("See you" + end)


def test_completion_without_end_gets_one():
    assert learnt(VICUNA, None, "completion", prompt="Hi", completion="Hello") == [" Hello</s>"]
    assert learnt(MISTRAL, None, "completion", prompt="Hi", completion="Hello") == [" Hello</s>"]


def test_a_prompt_that_is_not_how_the_row_begins():
    with pytest.raises(DataError, match="row 7: the prompt .*<think>.* for the prompt alone, 'Hello"):
        learnt(FORCED, None, "completion", prompt="Hi", completion="Hello")
    assert learnt(FORCED, None, "completion", prompt="Hi", completion="<think>\nHello") == ["Hello<|im_end|>"]


def test_assistant_turns_of_a_prompt_are_not_learnt():
    for template in (CHATML, MARKED, THINKING):
        said = learnt(template, None, "assistant", prompt=turns("A", "red", "B"), completion="blue")
        assert len(said) == 1 and said[0].endswith("blue<|im_end|>")


def test_all():
    conversation = to_conversation({"messages": turns("Hi", "Hello")}, 0, Kind.MESSAGES)
    rendered = render(Owner(CHATML), conversation, loss_on="all")
    assert rendered.spans == [(0, len(rendered.text))]


def test_generation_prompt():
    conversation = to_conversation({"prompt": turns("Hi")}, 0, Kind.PROMPT_ONLY)
    rendered = render(Owner(LLAMA), conversation, add_generation_prompt=True)
    assert rendered.text.endswith("Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert rendered.spans == []


def test_tools_and_template_variables_reach_the_template():
    template = CHATML.replace("Be kind.", "{{ mood }}{{ tools[0]['name'] if tools }}")
    row = {"messages": turns("Hi", "Hello"), "tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "glad "}}
    assert "glad look" in render(Owner(template), to_conversation(row, 0, Kind.MESSAGES)).text


def test_tool_calls_are_learnt_as_the_template_writes_them():
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<call>{{ c['name'] }}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "A cat"},
    ]
    assert learnt(template, chat) == ["<call>look<|im_end|>", "A cat<|im_end|>"]


CALL = {"role": "assistant", "content": "Wait", "tool_calls": [{"name": "look"}]}
FOUND = {"role": "tool", "content": "<|im_start|>assistant\na cat"}  # a trap: the header inside a content


def test_rounds_of_tools_where_the_last_turn_thinks():
    one, two = turns("A", "red")
    said = "Wait <tool_call>look</tool_call><|im_end|>"
    last = "<think>\n\n</think>\n\nred<|im_end|>"
    assert learnt(TOOLS, [one, CALL, FOUND, two]) == [said, last]
    assert learnt(TOOLS, [one, CALL, FOUND, CALL, FOUND, two]) == [said, said, last]
    assert learnt(TOOLS, [*turns("A", "blue"), one, CALL, FOUND, two]) == ["blue<|im_end|>", said, last]
    assert learnt(TOOLS, [one, CALL, FOUND]) == [said]


def test_thoughts_beside_the_content():
    thought = [
        {**turn, "reasoning_content": "hm"} if turn["role"] == "assistant" else turn for turn in turns("A", "B")
    ]
    last = "<think>\nhm\n</think>\n\nB<|im_end|>"
    assert learnt(TOOLS, thought) == [last]
    assert learnt(TOOLS, [*thought, *thought]) == ["B<|im_end|>", last]
    first = {**CALL, "reasoning_content": "so"}
    said = "<think>\nso\n</think>\n\nWait <tool_call>look</tool_call><|im_end|>"
    assert learnt(TOOLS, [thought[0], first, FOUND, thought[1]]) == [said, last]


def test_keys_that_the_template_passes_over():
    named = [{**turn, "name": "x", "weight": 1} for turn in turns("A", "<think>\nhm\n</think>\n\nred", "B", "blue")]
    assert learnt(THINKING, named) == ["red<|im_end|>", "<think>\n\n</think>\n\nblue<|im_end|>"]


def test_a_turn_that_changes_what_is_around_it_is_not_guessed():
    # The number of calls stands before the chat, so no two renderings begin alike; the other writes two turns for one.
    counting = "{{ messages | selectattr('tool_calls', 'defined') | list | length }}" + TOOLS
    two = TOOLS.replace(" <tool_call>", "<|im_end|>\n<|im_start|>call\n<tool_call>")
    for template in (counting, two):
        with pytest.raises(DataError, match="cannot tell exactly"):
            learnt(template, [turns("A")[0], CALL, FOUND, *turns("A", "red")[1:]])


def test_developers_are_for_the_template_to_know():
    chat = [{"role": "developer", "content": "Be brief"}, *turns("Hi", "Hello")]
    assert learnt(CHATML, chat) == ["Hello<|im_end|>"]
    with pytest.raises(DataError, match="row 7: the chat template leaves out message 0, of role 'developer'"):
        learnt(TOOLS, chat)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("tools", ["x"], r"tools\[0\] is no JSON"),
        ("tools", [4], r"tools\[0\] is int, expected a function"),
        ("tools", {"x": 1}, "tools is dict, expected a list of functions"),
        ("chat_template_kwargs", "[1]", "chat_template_kwargs is list, expected a dict"),
        ("chat_template_kwargs", "{", "chat_template_kwargs is no JSON"),
    ],
)
def test_tools_and_variables_that_are_none(column, value, said):
    with pytest.raises(DataError, match=f"row 7: {said}"):
        learnt(CHATML, turns("Hi", "Hello"), **{column: value})


def test_tools_and_variables_as_json():
    template = CHATML.replace("Be kind.", "{{ mood }}{{ tools[0]['name'] if tools }}")
    for tools in ('[{"name": "look"}]', ['{"name": "look"}']):
        row = {"messages": turns("Hi", "Hello"), "tools": tools, "chat_template_kwargs": '{"mood": "glad "}'}
        assert "glad look" in render(Owner(template), to_conversation(row, 0, Kind.MESSAGES)).text


def test_whatever_a_template_raises_names_the_row(monkeypatch):
    learnt(CHATML, turns("Hi", "Hello"))  # what the template does is known

    def fails(*args, **options):
        raise ValueError("no such month")

    monkeypatch.setattr(library, "render_jinja_template", fails)
    with pytest.raises(DataError, match="row 7: the chat template refuses .*no such month"):
        learnt(CHATML, turns("Hi", "Hello"))


def test_two_renderings_at_most_for_a_question_and_an_answer(monkeypatch):
    calls = []
    original = library.render_jinja_template
    monkeypatch.setattr(library, "render_jinja_template", lambda *a, **k: calls.append(1) or original(*a, **k))
    for template in (CHATML, LLAMA, MISTRAL, THINKING, MARKED, TYPED):
        learnt(template, turns("warm", "up"))
        calls.clear()
        learnt(template, turns("Hi", "Hello"))
        assert len(calls) <= 2
        calls.clear()
        learnt(template, None, "completion", prompt="Hi", completion="Hello")
        assert len(calls) <= 2


def test_no_template_and_unknown_loss():
    conversation = Conversation([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    with pytest.raises(UserError, match="no chat template.*instruction-tuned"):
        render(Owner(None), conversation)
    with pytest.raises(UserError, match="'assistent', allowed: assistant, completion, all"):
        render(Owner(CHATML), conversation, loss_on="assistent")


def test_token_ranges():
    # <s> (added, no width) | Hi | " you" | "r" split from the next | e d | </s>
    offsets = [(0, 0), (0, 2), (2, 6), (6, 7), (7, 9), (9, 13)]
    assert token_ranges(offsets, [(7, 9)]) == [(4, 5)]
    assert token_ranges(offsets, [(3, 4)]) == [(2, 3)]
    assert token_ranges(offsets, [(2, 6), (7, 13)]) == [(2, 3), (4, 6)]
    assert all(first >= last for first, last in token_ranges(offsets, [(20, 25)]))
    assert token_ranges(offsets, []) == []
