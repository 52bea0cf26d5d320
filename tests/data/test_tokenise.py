"""Rows to tokens: boundaries against tokenising by hand, templates, truncation, the cache, streams."""

from __future__ import annotations

import pytest
from tiny import build_tokenizer

from shared.data.collators import PairCollator, SupervisedCollator
from shared.data.rows import ROW, Rows
from shared.data.schema import Kind
from shared.data.tokenise import Tokeniser, tokenise, tokenise_stream
from shared.data.tokens import NOTE
from shared.errors import DataError, UserError

PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool['name'] }};{% endfor %}{% endif %}" + PLAIN


@pytest.fixture(scope="module")
def tokenizer():
    return make()


def make(template: str = PLAIN, bos: str | None = None):
    tokenizer = build_tokenizer(["<|im_start|>", "<|im_end|>"], bos=bos, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.chat_template = template
    if bos:
        from tokenizers.processors import TemplateProcessing

        special = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def user(content):
    return {"role": "user", "content": content}


def says(content):
    return {"role": "assistant", "content": content}


def one(tokenizer, kind, row, **options):
    (found,) = Tokeniser(tokenizer, kind, **options).rows([row])
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in found.items()}


def learnt_text(tokenizer, row) -> str:
    return tokenizer.decode([token for token, learnt in zip(row["input_ids"], row["learnt"], strict=True) if learnt])


# plain strings


def test_text_ends_with_one_eos_and_its_first_token_is_not_learnt(tokenizer):
    eos = tokenizer.eos_token_id
    row = one(tokenizer, Kind.LANGUAGE_MODELING, {"text": "red blue"})
    assert row["input_ids"] == [*ids(tokenizer, "red blue"), eos]
    assert row["learnt"] == [False] + [True] * (len(row["input_ids"]) - 1)
    ended = one(tokenizer, Kind.LANGUAGE_MODELING, {"text": "red blue<|im_end|>"})
    assert ended["input_ids"] == row["input_ids"] and ended["learnt"] == row["learnt"]
    assert one(tokenizer, Kind.LANGUAGE_MODELING, {"story": "red"}, text_field="story")["input_ids"][-1] == eos


def test_bos_follows_the_tokenizer_for_strings_and_the_template_for_chats():
    tokenizer = make("<s>" + PLAIN, bos="<s>")
    bos = tokenizer.bos_token_id
    assert one(tokenizer, Kind.LANGUAGE_MODELING, {"text": "red"})["input_ids"][:2] == [
        bos,
        *ids(tokenizer, "red")[:1],
    ]
    assert one(tokenizer, Kind.LANGUAGE_MODELING, {"text": "<s>red"})["input_ids"].count(bos) == 1
    row = one(tokenizer, Kind.PROMPT_COMPLETION, {"prompt": "red ", "completion": "blue"}, loss_on="completion")
    assert row["input_ids"] == [bos, *ids(tokenizer, "red blue"), tokenizer.eos_token_id]
    assert row["learnt"] == [False, False, False, True, True, True, True]
    chat = one(tokenizer, Kind.MESSAGES, {"messages": [user("red?"), says("blue")]}, loss_on="assistant")
    assert chat["input_ids"].count(bos) == 1 and chat["input_ids"][0] == bos
    assert learnt_text(tokenizer, chat) == "blue<|im_end|>"
    plain = make(PLAIN, bos="<s>")
    chat = one(plain, Kind.MESSAGES, {"messages": [user("red?"), says("blue")]}, loss_on="assistant")
    assert bos not in chat["input_ids"]  # as in apply_chat_template(tokenize=True)


def test_prompt_and_completion_are_tokenised_together(tokenizer):
    assert [tokenizer.decode([token]) for token in ids(tokenizer, "red blue")] == ["re", "d", " b", "lu", "e"]
    row = {"prompt": "red ", "completion": "blue"}
    found = one(tokenizer, Kind.PROMPT_COMPLETION, row, loss_on="completion")
    assert found["input_ids"] == [*ids(tokenizer, "red blue"), tokenizer.eos_token_id]
    # " b" lies over the boundary: it belongs to the completion
    assert found["learnt"] == [False, False, True, True, True, True]
    assert one(tokenizer, Kind.PROMPT_COMPLETION, row, loss_on="assistant")["learnt"] == found["learnt"]
    assert one(tokenizer, Kind.PROMPT_COMPLETION, row, loss_on="all")["learnt"] == [False] + [True] * 5
    within = one(tokenizer, Kind.PROMPT_COMPLETION, {"prompt": "red", "completion": " blue"}, loss_on="completion")
    assert within["learnt"] == found["learnt"]


def test_letters_of_several_tokens(tokenizer):
    row = {"prompt": "é→ü", "completion": "ß→ü"}
    found = one(tokenizer, Kind.PROMPT_COMPLETION, row, loss_on="completion")
    assert learnt_text(tokenizer, found) == "ß→ü<|im_end|>"


# chats


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_chats_with_and_without_marks(template):
    tokenizer = make(template)
    messages = [user("red?"), says("blue"), user("yes?"), says("green")]
    row = one(tokenizer, Kind.MESSAGES, {"messages": messages}, loss_on="assistant")
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert learnt_text(tokenizer, row) == "blue<|im_end|>green<|im_end|>"
    everything = one(tokenizer, Kind.MESSAGES, {"messages": messages}, loss_on="all")
    assert everything["learnt"] == [False] + [True] * (len(row["input_ids"]) - 1)
    split = {"prompt": messages[:1], "completion": messages[1:]}
    completion = one(tokenizer, Kind.PROMPT_COMPLETION, split, loss_on="completion")
    assert learnt_text(tokenizer, completion).startswith("blue<|im_end|>\n<|im_start|>user\nyes?")
    assert learnt_text(tokenizer, one(tokenizer, Kind.PROMPT_COMPLETION, split, loss_on="assistant")) == (
        "blue<|im_end|>green<|im_end|>"
    )


@pytest.mark.parametrize(
    "tools", [[{"name": "look", "unit": None}, {"name": "ask"}], '[{"name": "look"}, {"name": "ask"}]']
)
def test_tools_and_template_variables_reach_the_template(tools):
    tokenizer = make(TOOLS.replace(";", "{{ mark }}"))
    row = {"messages": [user("?"), says("red")], "tools": tools, "chat_template_kwargs": {"mark": "!"}}
    found = one(tokenizer, Kind.MESSAGES, row, loss_on="assistant", template_kwargs={"mark": "?"})
    assert tokenizer.decode(found["input_ids"]).startswith("look!ask!<|im_start|>user")
    del row["tools"], row["chat_template_kwargs"]
    assert tokenizer.decode(one(tokenizer, Kind.MESSAGES, row, loss_on="all")["input_ids"]).startswith("<|im_start|>u")


def test_images_are_refused(tokenizer):
    row = {"messages": [user("?"), says("red")], "images": ["a.png"]}
    with pytest.raises(DataError, match="row 0: has an image, but this trainer takes text"):
        one(tokenizer, Kind.MESSAGES, row, loss_on="assistant")


# preferences


def test_pairs_share_their_prompt_exactly(tokenizer):
    eos = tokenizer.eos_token_id
    row = one(tokenizer, Kind.PREFERENCE, {"prompt": "red ", "chosen": "blue", "rejected": "12", "margin": 2})
    # the prompt's last token is " b" in one and " " in the other: it goes to the answers
    assert row["prompt_ids"] == ids(tokenizer, "red")
    assert row["chosen_ids"] == [*ids(tokenizer, " blue"), eos]
    assert row["rejected_ids"] == [*ids(tokenizer, " 12"), eos]
    assert row["margin"] == 2.0
    assert "margin" not in one(tokenizer, Kind.PREFERENCE, {"prompt": "red ", "chosen": "blue", "rejected": "12"})


CHATS = [
    {"prompt": [user("red?")], "chosen": [says("blue")], "rejected": [says("green")]},
    {"chosen": [user("red?"), says("blue")], "rejected": [user("red?"), says("green")]},
    {"prompt": [user("red?")], "chosen": [user("red?"), says("blue")], "rejected": [user("red?"), says("green")]},
    {"prompt": "red?", "chosen": [user("red?"), says("blue")], "rejected": [user("red?"), says("green")]},
    {"prompt": "red?", "chosen": [says("blue")], "rejected": [says("green")]},
    {"prompt": [user("red?")], "chosen": "blue", "rejected": "green"},
]


@pytest.mark.parametrize("row", CHATS)
def test_conversational_pairs(tokenizer, row):
    found = one(tokenizer, Kind.PREFERENCE, row)
    asked = "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"
    assert found["prompt_ids"] == ids(tokenizer, asked)
    assert found["chosen_ids"] == ids(tokenizer, "blue<|im_end|>")
    assert found["rejected_ids"] == ids(tokenizer, "green<|im_end|>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Human: red? Assistant: yes", "Human: red? Assistant: you", "Human: red? Assistant:"),
        ("Q: red?\n\nyes", "Q: red?\n\nno", "Q: red?\n\n"),
        ("it is red now", "it is red", "it is"),
        ("red", "blue", ""),
    ],
)
def test_the_prompt_of_strings_ends_with_a_word(tokenizer, chosen, rejected, prompt):
    found = one(tokenizer, Kind.PREFERENCE, {"chosen": chosen, "rejected": rejected})
    assert tokenizer.decode(found["prompt_ids"]) == prompt
    assert tokenizer.decode(found["prompt_ids"] + found["chosen_ids"]) == chosen + "<|im_end|>"


def test_unpaired_and_stepwise(tokenizer):
    row = one(tokenizer, Kind.UNPAIRED, {"prompt": "red ", "completion": "blue", "label": 0})
    assert row["prompt_ids"] == ids(tokenizer, "red") and row["label"] is False
    assert row["completion_ids"] == [*ids(tokenizer, " blue"), tokenizer.eos_token_id]
    steps = {"prompt": "red", "completions": [" blue", " green"], "labels": [True, False]}
    row = one(tokenizer, Kind.STEPWISE, steps)
    assert row["input_ids"] == ids(tokenizer, "red blue\n green\n")
    newline = ids(tokenizer, "\n")[0]
    assert [row["input_ids"][end] for end in row["step_ends"]] == [newline] * 2
    assert row["step_labels"] == [True, False]
    last = one(tokenizer, Kind.STEPWISE, steps, last_step_only=True)
    assert (last["step_ends"], last["step_labels"]) == (row["step_ends"][1:], [False])
    chat = one(tokenizer, Kind.STEPWISE, {**steps, "prompt": [user("red")]}, step_separator="<|im_end|>")
    assert tokenizer.decode(chat["input_ids"]).endswith("assistant\n blue<|im_end|> green<|im_end|>")


# tokens


def test_tokenised_rows(tokenizer):
    row = one(tokenizer, Kind.TOKENS, {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]})
    assert row["input_ids"] == [5, 6, 7, 8] and row["learnt"] == [False, True, False, True]
    assert one(tokenizer, Kind.TOKENS, {"input_ids": [5, 6]})["learnt"] == [False, True]
    masked = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1], "assistant_masks": [0, 1, 0]}
    assert one(tokenizer, Kind.TOKENS, masked, loss_on="completion")["learnt"] == [False, False, True]
    both = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}
    assert one(tokenizer, Kind.TOKENS, both, loss_on="assistant")["learnt"] == [False, False, False, True]
    with pytest.raises(DataError, match="neither labels nor assistant_masks"):
        one(tokenizer, Kind.TOKENS, {"input_ids": [5, 6]}, loss_on="assistant")


# truncation


def test_supervised_rows_are_cut(tokenizer):
    row = {"text": "red blue"}
    whole = one(tokenizer, Kind.LANGUAGE_MODELING, row)["input_ids"]
    cut = one(tokenizer, Kind.LANGUAGE_MODELING, row, max_length=4)
    assert cut["input_ids"] == whole[:4] and cut[NOTE] == "cut from 6 tokens to 4"
    end = one(tokenizer, Kind.LANGUAGE_MODELING, row, max_length=4, truncation_mode="keep_end")
    assert end["input_ids"] == whole[-4:] and end["learnt"] == [False, True, True, True]
    assert NOTE not in one(tokenizer, Kind.LANGUAGE_MODELING, row, max_length=6)


def test_a_row_of_which_nothing_learnt_is_left_is_bad(tokenizer):
    row = {"prompt": "red red red red", "completion": " blue"}
    with pytest.raises(
        DataError, match=r"row 0: of its 15 tokens 5 are left after cutting, and none of .* max_length=5"
    ):
        one(tokenizer, Kind.PROMPT_COMPLETION, row, loss_on="completion", max_length=5)
    pair = {"prompt": "red red red red", "chosen": " blue", "rejected": " 12"}
    with pytest.raises(DataError, match="no token of an answer is left after cutting: its prompt has 11 tokens"):
        one(tokenizer, Kind.PREFERENCE, pair, max_length=8)
    with pytest.raises(DataError, match="the same after cutting"):
        one(
            tokenizer,
            Kind.PREFERENCE,
            {"prompt": "red", "chosen": " blue", "rejected": " bl"},
            max_completion_length=1,
        )
    steps = {"prompt": "red", "completions": [" blue"], "labels": [True]}
    with pytest.raises(DataError, match="no step's end is left"):
        one(tokenizer, Kind.STEPWISE, steps, max_length=3)


def test_pairs_are_cut_by_part(tokenizer):
    row = {"prompt": "red green", "chosen": " blue blue", "rejected": " 12"}
    whole = one(tokenizer, Kind.PREFERENCE, row)
    prompt, chosen, rejected = (whole[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))

    def cut(**options):
        found = one(tokenizer, Kind.PREFERENCE, row, **options)
        return found["prompt_ids"], found["chosen_ids"], found["rejected_ids"]

    assert cut(max_prompt_length=2) == (prompt[-2:], chosen, rejected)
    assert cut(max_completion_length=3) == (prompt, chosen[:3], rejected[:3])
    assert cut(max_length=len(prompt) + 2) == (prompt, chosen[:2], rejected[:2])
    short = len(chosen) + 2
    assert cut(max_length=short, truncation_mode="keep_end") == (prompt[-2:], chosen, rejected)
    assert cut(max_length=4, truncation_mode="keep_end") == (prompt[-1:], chosen[:3], rejected[:3])


def test_steps_are_cut_with_their_labels(tokenizer):
    steps = {"prompt": "red red", "completions": [" blue", " blue"], "labels": [True, False]}
    whole = one(tokenizer, Kind.STEPWISE, steps)
    cut = one(tokenizer, Kind.STEPWISE, steps, max_length=9)
    assert cut["input_ids"] == whole["input_ids"][:9] and cut["step_ends"] == whole["step_ends"][:1]
    short = one(tokenizer, Kind.STEPWISE, steps, max_prompt_length=1)
    assert short["step_ends"] == [end - 4 for end in whole["step_ends"]]
    assert short["input_ids"] == whole["input_ids"][4:]


# asking


def test_ask_gives_the_prompt_as_generation_needs_it(tokenizer):
    asked = "<|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n"
    messages = [user("red?"), says("blue")]
    for kind, row, loss_on in [
        (Kind.MESSAGES, {"messages": messages}, "assistant"),
        (Kind.PROMPT_COMPLETION, {"prompt": messages[:1], "completion": messages[1:]}, "completion"),
        (Kind.PREFERENCE, {"chosen": messages, "rejected": [user("red?"), says("green")]}, "all"),
        (Kind.UNPAIRED, {"prompt": messages[:1], "completion": messages[1:], "label": True}, "all"),
    ]:
        found = Tokeniser(tokenizer, kind, loss_on=loss_on).ask(row)
        assert (found.prompt_text, found.prompt_ids, found.answer) == (asked, ids(tokenizer, asked), "blue")
    plain = Tokeniser(tokenizer, Kind.PROMPT_COMPLETION, loss_on="all", max_prompt_length=1)
    found = plain.ask({"prompt": "red", "completion": " blue"})
    assert (found.prompt_text, found.prompt_ids, found.answer) == ("red", ids(tokenizer, "red")[-1:], " blue")
    text = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING).ask({"text": "red blue"})
    assert (text.prompt_text, text.answer) == ("red b", None)
    tokens = Tokeniser(tokenizer, Kind.TOKENS).ask({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]})
    assert tokens.prompt_ids == [5, 6] and tokens.answer == tokenizer.decode([7])


THINKING = PLAIN.replace(
    "message['content'] }}",
    "('<think>\n\n</think>\n\n' if loop.last and loop.index > 1 else '') + message['content'] }}",
)


@pytest.mark.parametrize("quick", [False, True])
def test_the_recorded_answer_is_what_the_model_learns_to_say(quick):
    asks = "<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * quick
    tokenizer = make(THINKING.replace("<|im_start|>assistant\n", asks))
    row = {"messages": [user("red?"), says("blue")]}
    asked = Tokeniser(tokenizer, Kind.MESSAGES, loss_on="assistant").ask(row)
    assert asked.prompt_text.endswith(asks)
    assert asked.answer == ("blue" if quick else "<think>\n\n</think>\n\nblue")
    if not quick:
        learnt = one(tokenizer, Kind.MESSAGES, row, loss_on="assistant")
        assert learnt_text(tokenizer, learnt) == asked.answer + "<|im_end|>"


def test_recorded_answers_of_other_shapes(tokenizer):
    calling = make(
        PLAIN.replace("+ message['content']", "+ message['content'] + (message['tool_calls'] or '') | string")
    )
    row = {"prompt": [user("red?")], "completion": [{"role": "assistant", "tool_calls": [{"name": "look"}]}]}
    asked = Tokeniser(calling, Kind.PROMPT_COMPLETION, loss_on="completion").ask(row)
    assert asked.answer == "[{'name': 'look'}]"
    ended = Tokeniser(tokenizer, Kind.PROMPT_COMPLETION, loss_on="completion")
    assert ended.ask({"prompt": "red", "completion": " blue<|im_end|>"}).answer == " blue"
    several = {"prompt": [user("red?")], "completion": [says("blue"), user("12"), says("green")]}
    assert ended.ask(several).answer == "blue"
    tokens = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}
    assert Tokeniser(tokenizer, Kind.TOKENS).ask(tokens).answer == tokenizer.decode([6])


def test_questions_are_cut_to_the_limits(tokenizer):
    row = {"prompt": "red green blue", "completion": " 12"}
    whole = ids(tokenizer, row["prompt"])
    tokeniser = Tokeniser(tokenizer, Kind.PROMPT_COMPLETION, loss_on="completion", max_length=5)
    assert tokeniser.ask(row).prompt_ids == whole[-5:]
    assert tokeniser.ask(row, room=3).prompt_ids == whole[-3:]
    assert Tokeniser(tokenizer, Kind.PROMPT_COMPLETION, loss_on="completion").ask(row).prompt_ids == whole


# mixtures, white space, token numbers


def test_messages_among_prompts_and_completions(tokenizer):
    for column in ("messages", "conversations"):
        rows = [
            {"prompt": "red", "completion": " blue", column: None},
            {"prompt": None, "completion": None, column: [user("red?"), says("blue")]},
        ]
        found = Tokeniser(tokenizer, Kind.PROMPT_COMPLETION, loss_on="completion").rows(rows)
        said = [tokenizer.decode(row["input_ids"][row["learnt"]]) for row in found]
        assert said == [" blue<|im_end|>", "blue<|im_end|>"]


def test_white_space_behind_the_end_of_a_text(tokenizer):
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING)
    batch = tokeniser.encode([{"text": "red<|im_end|> \n\t"}, {"text": "red \n"}])
    assert [row["input_ids"].count(tokenizer.eos_token_id) for row in batch.records] == [1, 1]
    assert batch.records[1]["input_ids"][-1] == tokenizer.eos_token_id and batch.endless == 0
    chats = make(PLAIN.replace("<|im_end|>\n", "<|im_end|> \n\t"))
    assert Tokeniser(chats, Kind.MESSAGES).encode([{"messages": [user("red?"), says("blue")]}]).endless == 0


def test_token_numbers_of_another_tokenizer(tokenizer):
    with pytest.raises(DataError, match=f"input_ids holds {len(tokenizer)}, but the tokenizer's numbers end at"):
        one(tokenizer, Kind.TOKENS, {"input_ids": [5, len(tokenizer)]})
    skipping = Tokeniser(tokenizer, Kind.TOKENS, on_bad_row="skip")
    assert list(skipping.encode([{"input_ids": [5, 2**40]}, {"input_ids": [5, 6]}]).bad) == [0]


def test_tools_that_are_none_are_bad_rows(tokenizer):
    rows = [{"messages": [user("red?"), says("blue")], "tools": tools} for tools in (["x"], {"x": 1}, None)]
    assert list(Tokeniser(tokenizer, Kind.MESSAGES, on_bad_row="skip").encode(rows).bad) == [0, 1]


# options


def test_options_that_cannot_work(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow is a slow tokenizer"):
        Tokeniser(Slow(), Kind.LANGUAGE_MODELING)
    with pytest.raises(UserError, match="loss_on is 'completion'; with messages data allowed: assistant, all"):
        Tokeniser(tokenizer, Kind.MESSAGES, loss_on="completion")
    with pytest.raises(UserError, match="allowed: keep_start, keep_end"):
        Tokeniser(tokenizer, Kind.MESSAGES, truncation_mode="middle")
    with pytest.raises(UserError, match="max_length is 0"):
        Tokeniser(tokenizer, Kind.MESSAGES, max_length=0)
    with pytest.raises(UserError, match="step_separator is empty"):
        Tokeniser(tokenizer, Kind.STEPWISE, step_separator="")


def test_the_key_follows_what_matters(tokenizer):
    def key(other=tokenizer, **options):
        return Tokeniser(other, Kind.MESSAGES, **options).key

    assert key() == key() == key(make())
    assert len({key(), key(max_length=5), key(loss_on="assistant"), key(make(MARKED)), key(make(bos="<s>"))}) == 5
    before = key()
    tokenizer(["red", "red blue"], padding=True)  # leaves its padding behind in the tokenizer
    assert key() == before


# whole data sets


def texts(count: int) -> list[dict]:
    return [{"text": "red blue " * (1 + row % 3)} for row in range(count)]


def test_a_data_set_with_a_summary(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path))
    rows = [{"text": "red " * count} for count in (1, 2, 8)] + [{"text": " "}]
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING, max_length=8, on_bad_row="skip")
    table, summary = tokenise(Rows(rows, kept=[1, 2, 3]), tokeniser)
    assert [row[ROW] for row in table] == [1, 2] and table.lengths.tolist() == [7, 8]
    assert (summary.rows, summary.used, summary.tokens, summary.cut) == (3, 2, 15, 1)
    assert summary.lengths == {"row": [7, 7, 25, 25, 25]} and summary.lost == 17 and summary.endless == 1
    assert list(summary.left_out) == [3] and summary.rows_per_second > 0
    said = summary.text("train")
    assert "train: 2 rows, 15 tokens" in said and "1 rows (50.0%) are cut: 17 tokens (53.1%) are lost" in said
    assert "1 of 3 rows are left out:\n    row 3: text is" in said and "1 rows (50.0%) teach no end" in said
    again, cached = tokenise(Rows(rows, kept=[1, 2, 3]), tokeniser)
    assert cached.rows_per_second is None and cached.text("train") == said and cached.left_out == summary.left_out
    assert [row["input_ids"].tolist() for row in again] == [row["input_ids"].tolist() for row in table]
    other, _ = tokenise(Rows(rows, kept=[0, 1]), tokeniser)
    assert [row[ROW] for row in other] == [0, 1]


def test_bad_rows_are_listed(tokenizer):
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING, max_length=1)
    with pytest.raises(
        DataError, match=r"2 of 2 rows of the eval data cannot be used:\n  row 0: of its 7 tokens 1"
    ) as error:
        tokenise(texts(2), tokeniser, what="eval", cache=False)
    assert str(error.value).count("row ") >= 2
    skipping = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING, max_length=1, on_bad_row="skip")
    with pytest.raises(DataError, match="No row is left"):
        tokenise(texts(2), skipping, cache=False)
    with pytest.raises(DataError, match="empty"):
        tokenise([], tokeniser, cache=False)


def test_several_processes_give_the_same(tokenizer, monkeypatch):
    monkeypatch.setattr("shared.data.tokenise.BATCH", 4)
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING)
    one_process, _ = tokenise(texts(11), tokeniser, cache=False)
    two, summary = tokenise(texts(11), tokeniser, cache=False, num_proc=2)
    assert [row["input_ids"].tolist() for row in two] == [row["input_ids"].tolist() for row in one_process]
    assert two.rows.tolist() == list(range(11)) and summary.rows == 11


def test_margins_that_some_rows_lack(tokenizer):
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "margin": margin} for margin in (None, 1.5)]
    tokeniser = Tokeniser(tokenizer, Kind.PREFERENCE)
    table, _ = tokenise(rows, tokeniser, cache=False)
    assert table.columns["margin"].tolist() == [0.0, 1.5]
    assert "margin" not in tokenise(rows[:1], tokeniser, cache=False)[0].columns


def test_a_folder_that_cannot_be_written_to_costs_the_cache_alone(tokenizer, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "file"))
    table, _ = tokenise(texts(2), Tokeniser(tokenizer, Kind.LANGUAGE_MODELING))
    assert len(table) == 2 and "Tokens are not kept" in caplog.text


def test_a_file_that_cannot_be_read_is_not_the_caches_fault(tokenizer, tmp_path, monkeypatch, caplog):
    class Torn(list):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            self.read = getattr(self, "read", 0) + 1
            if self.read > len(self):  # hashed, then gone
                raise OSError("the disk is gone")
            return row

    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="the disk is gone"):
        tokenise(Torn(texts(2)), Tokeniser(tokenizer, Kind.LANGUAGE_MODELING))
    assert "cannot be written" not in caplog.text


def test_tokens_are_made_once_where_they_cannot_be_saved(tokenizer, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError("no space left")

    made = []
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr("shared.data.tokenise.save_table", full)
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING)
    encode = tokeniser.encode
    monkeypatch.setattr(tokeniser, "encode", lambda rows: made.append(1) or encode(rows))
    table, _ = tokenise(texts(2), tokeniser)
    assert len(table) == 2 and made == [1] and "no space left" in caplog.text


def test_rows_that_cannot_be_hashed_are_tokenised_anew(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [user("red?"), {**says("blue"), "name": object()}]}]
    for _ in range(2):
        _, summary = tokenise(rows, Tokeniser(tokenizer, Kind.MESSAGES))
        assert summary.rows_per_second is not None
    assert not (tmp_path / "cache").exists()


def test_columns_that_nobody_looks_at_do_not_matter(tokenizer, tmp_path, monkeypatch):
    from datasets import Dataset

    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path))
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING)
    tokenise(Dataset.from_list(texts(3)), tokeniser)
    _, summary = tokenise(Dataset.from_list(texts(3)).add_column("score", [1, 2, 3]), tokeniser)
    assert summary.rows_per_second is None


def test_streams_are_tokenised_when_read(tokenizer, caplog):
    from datasets import Dataset

    rows = [{"text": "red blue", "id": 1}, {"text": "", "id": 2}, {"text": "red", "id": 3}]
    stream = Dataset.from_list(rows).to_iterable_dataset().map(lambda row, at: {ROW: at}, with_indices=True)
    tokeniser = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING, max_length=4, on_bad_row="skip")
    found = list(tokenise_stream(stream, tokeniser))
    assert [row[ROW] for row in found] == [0, 2] and "id" not in found[0]
    assert list(found[1]["input_ids"]) == [*ids(tokenizer, "red"), tokenizer.eos_token_id]
    assert found[0][NOTE] == "cut from 6 tokens to 4" and found[1].get(NOTE) is None
    assert "Left out: row 1" in caplog.text
    strict = Tokeniser(tokenizer, Kind.LANGUAGE_MODELING)
    with pytest.raises(DataError, match="row 1"):
        list(tokenise_stream(stream, strict))


@pytest.mark.parametrize("margins", [(None, 1.5), (None, None)])
def test_a_stream_of_pairs_is_collated(tokenizer, margins):
    from datasets import Dataset

    rows = [{"prompt": "red", "chosen": " blue" * 9, "rejected": " 12", "margin": margin} for margin in margins]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    found = list(tokenise_stream(stream, Tokeniser(tokenizer, Kind.PREFERENCE, max_completion_length=4)))
    batch = PairCollator(tokenizer.pad_token_id)(found)
    assert batch.completion_ids.shape == (4, 4) and batch.notes[0].startswith("cut from")
    assert ("margin" in batch.columns) is (margins[1] is not None)
    texts = Dataset.from_list([{"text": "red blue"}, {"text": "red"}]).to_iterable_dataset()
    found = list(tokenise_stream(texts, Tokeniser(tokenizer, Kind.LANGUAGE_MODELING)))
    assert SupervisedCollator(tokenizer.pad_token_id)(found).counted_tokens() == 5 + 2
