"""Data whose columns are called otherwise: recognised, or mapped by option, and what was done is told."""

import json

import pytest
from datasets import Dataset, Image, IterableDataset, List
from PIL import Image as Picture

from shared.data.columns import adapt, media_columns
from shared.data.loading import load_datasets
from shared.data.schema import Kind, check_rows, decode_image, detect_kind, to_conversation
from shared.errors import UserError
from shared.runtime.run import read_options


def write(folder, rows, name="rows.jsonl", pictures=3):
    for number in range(pictures):
        Picture.new("RGB", (8, 6), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def reds(conversation):
    return [decode_image(image, row=0).getpixel((0, 0))[0] for image in conversation.images]


def said(conversation):
    return [
        (turn["role"], "".join(part.get("text", f"<{part['type']}>") for part in turn["content"]))
        for turn in conversation.messages
    ]


MMIU = {
    "task": "order",
    "input_image_path": ["./1.png", "./0.png", "./2.png"],
    "question": "In which order?",
    "context": "Select from these choices.\nA: 1 2 3\nB: 2 1 3",
    "options": "A: 1 2 3\nB: 2 1 3",
    "output": "B",
}


def test_rows_of_several_image_paths_with_options_are_prompts(tmp_path):
    data = load_datasets(write(tmp_path, [MMIU, {**MMIU, "input_image_path": ["2.png"], "output": "A"}]))
    assert detect_kind(data.train.column_names, data.train[0]) is Kind.PROMPT_COMPLETION
    first, second = (to_conversation(data.train[at], at, Kind.PROMPT_COMPLETION) for at in range(2))
    assert reds(first) == [1, 0, 2] and reds(second) == [2]
    asked = "<image><image><image>In which order?\nSelect from these choices.\nA: 1 2 3\nB: 2 1 3"
    assert said(first) == [("user", asked), ("assistant", "B")]
    assert said(second)[1] == ("assistant", "A") and first.extras["task"] == "order"
    told = data.sources[0].adapted
    assert told == "input_image_path → images; question + context + options → prompt; output → completion"
    assert check_rows(data.train, Kind.PROMPT_COMPLETION, check_images=2).images == 4


def test_options_that_stand_nowhere_else_are_listed_and_an_answer_by_number_gets_its_letter():
    rows = [{"question": "Which?", "choices": ["a cat", "a dog"], "answer": 1, "image": None}]
    made, told = adapt(Dataset.from_list(rows))
    assert (made[0]["prompt"], made[0]["completion"]) == ("Which?\nA. a cat\nB. a dog", "B")
    assert told == "question + choices → prompt; answer → completion" and made[0]["answer"] == 1


def test_choices_by_letter_are_listed_as_such():
    for choices in ({"A": "a cat", "B": "a dog", "C": None}, {"text": ["a cat", "a dog"], "label": ["A", "B"]}):
        made, _ = adapt(Dataset.from_list([{"question": "Which?", "choices": choices, "answer": "B"}]))
        assert (made[0]["prompt"], made[0]["completion"]) == ("Which?\nA. a cat\nB. a dog", "B")


def test_an_input_that_stands_in_the_question_by_chance_is_still_said():
    made, _ = adapt(Dataset.from_list([{"instruction": "Count the vowels in the word", "input": "word", "output": 1}]))
    assert (made[0]["prompt"], made[0]["completion"]) == ("Count the vowels in the word\nword", "1")


def test_pairs_of_turns_become_one_chat_and_images_stay_as_they_are(tmp_path):
    source = "".join(map(chr, range(97, 100)))
    rows = [{"images": ["0.png", "1.png"], "texts": [{"user": "What?", "assistant": "red", "source": source}] * 2}]
    data = load_datasets(write(tmp_path, rows))
    conversation = to_conversation(data.train[0], 0, Kind.MESSAGES)
    assert said(conversation) == [("user", "<image><image>What?"), ("assistant", "red")] + [
        ("user", "What?"),
        ("assistant", "red"),
    ]
    assert data.train.features["images"] == List(Image(decode=False)) and reds(conversation) == [0, 1]
    assert data.sources[0].adapted == "texts → messages"


def test_query_with_a_list_of_labels_is_a_question_with_its_answer():
    made, told = adapt(Dataset.from_list([{"query": "How many?", "label": ["3", "three"]}]))
    assert detect_kind(made.column_names, made[0]) is Kind.PROMPT_COMPLETION  # not marked good or bad
    assert made[0]["label"] == ["3", "three"]  # a reward may want it
    assert (made[0]["prompt"], made[0]["completion"]) == ("How many?", "3")
    assert told == "query → prompt; label → completion"


def test_pairs_of_answers_to_a_question_have_a_prompt():
    pairs = {"question": ["What?"], "chosen": ["red"], "rejected": ["blue"], "image_path": ["x"], "image": [None]}
    made, told = adapt(Dataset.from_dict(pairs))
    assert told == "question → prompt" and made[0]["prompt"] == "What?" and made[0]["image_path"] == "x"
    whole = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    same = Dataset.from_list([{"question": "What?", "chosen": whole, "rejected": whole}])
    assert adapt(same) == (same, None)  # these hold the question themselves


def test_llava_rows_need_no_help(tmp_path):
    turns = [{"from": "human", "value": "First <image> then <image>: same?"}, {"from": "gpt", "value": "no"}]
    data = load_datasets(write(tmp_path, [{"id": "7", "image": ["2.png", "0.png"], "conversations": turns}]))
    conversation = to_conversation(data.train[0], 0, Kind.MESSAGES)
    assert said(conversation)[0] == ("user", "First <image> then <image>: same?") and reds(conversation) == [2, 0]
    assert data.sources[0].adapted is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "answer": "7", "question": "x"},
        {"messages": [{"role": "user", "content": "q"}], "question": "x", "answer": "y"},
        {"text": "all", "query": "x", "label": 1},
        {"question": "x", "image": "a.png"},
        {"question": "x", "label": 1},  # the number of a class, or whether something is good
        {"query": "x", "label": True},
        {"question": "x", "context": {"title": ["a"], "sentences": [["b"]]}, "answer": "y"},
        {"question": "x", "context": ["one passage", "another"], "answer": 1},
        {"question": [{"role": "user", "content": "x"}], "answer": "y"},
        {"question": "x", "answer": [{"role": "assistant", "content": "y"}]},
        {"question": "x", "options": [["a"], ["b"]], "answer": 0},
    ],
)
def test_what_is_known_or_not_clear_is_left_alone(row):
    rows = Dataset.from_list([row])
    assert adapt(rows) == (rows, None)


def test_the_option_maps_columns_and_their_paths_and_nothing_else_is_made_of_them(tmp_path):
    rows = [{"pics": ["1.png", "2.png"], "Q": "What?", "A": "red", "context": "no part of it"}] * 2
    columns = {"pics": "images", "Q": "prompt", "A": "completion"}
    for streaming in (False, True):
        data = load_datasets(write(tmp_path, rows), columns=columns, streaming=streaming)
        row = next(iter(data.train))
        assert reds(to_conversation(row, 0, Kind.PROMPT_COMPLETION)) == [1, 2]
        assert row["prompt"] == "What?" and row["context"] == "no part of it"
        assert data.sources[0].adapted == "pics → images; Q → prompt; A → completion"


def test_the_option_may_swap_names_and_may_not_give_one_twice():
    rows = Dataset.from_list([{"prompt": "red", "completion": "What?", "Q": "other"}])
    made, _ = adapt(rows, {"prompt": "completion", "completion": "prompt"})
    assert made[0] == {"prompt": "What?", "completion": "red", "Q": "other"}
    with pytest.raises(UserError, match="calls Q and completion all prompt"):
        adapt(rows, {"Q": "prompt", "completion": "prompt"})


def test_a_mixture_joins_columns_that_are_called_differently(tmp_path):
    first = write(tmp_path, [MMIU])
    second = write(tmp_path, [{"image_path": "0.png", "question": "What?", "answer": "red"}], "other.jsonl")
    train = load_datasets([first, second]).train
    assert [len(to_conversation(row, 0, Kind.PROMPT_COMPLETION).images) for row in train] == [3, 1]


def test_a_stream_is_adapted_row_by_row():
    stream = IterableDataset.from_generator(lambda: iter([{"question": "a", "answer": "b", "id": 1}]))
    made, told = adapt(stream)
    assert list(made) == [{"question": "a", "answer": "b", "id": 1, "prompt": "a", "completion": "b"}]
    assert told == "question → prompt; answer → completion"


def test_a_column_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(UserError, match=r"names Q, but the data has the columns answer, question\."):
        load_datasets(write(tmp_path, [{"question": "a", "answer": "b"}]), columns={"Q": "prompt"})


def test_rows_that_cannot_be_put_together_are_bad_rows_like_any():
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}, {"question": None, "answer": "b"}]
    made, _ = adapt(Dataset.from_list(rows))
    report = check_rows(made, Kind.PROMPT_COMPLETION, on_bad_row="skip")
    assert report.kept == [0] and "completion is missing" in report.bad[1] and "prompt is missing" in report.bad[2]
    turns = [{"texts": [{"user": "a", "assistant": "b"}]}, {"texts": []}]
    assert check_rows(adapt(Dataset.from_list(turns))[0], Kind.MESSAGES, on_bad_row="skip").kept == [0]
    picked = adapt(Dataset.from_list(turns).select([0, 0]))[0]
    assert [turn["content"] for row in picked for turn in row["messages"]] == ["a", "b"] * 2


def test_media_columns_by_their_present_names():
    assert media_columns(["pics", "film", "text"], {"pics": "images", "film": "video"}) == {
        "pics": "image",
        "film": "video",
    }
    assert media_columns(["image_path", "q"]) == {"image_path": "image"}
    assert media_columns(["image", "image_path"]) == {"image": "image"}


def test_the_option_is_read_from_the_command_line():
    words = ["--model_name_or_path", "x/y", "--dataset_name", "a/b", "--dataset_columns", '{"Q": "prompt"}']
    options, _ = read_options("sft-vlm", words)
    assert options.values["dataset_columns"] == {"Q": "prompt"}


def test_a_field_of_a_column_is_named_by_both(tmp_path):
    rows = [{"prompt": {"text": text, "toxicity": 0.1}, "picture": f"{at}.png"} for at, text in enumerate("ab")]
    columns = {"prompt.text": "prompt", "picture": "image"}
    data = load_datasets(write(tmp_path, rows), columns=columns)
    assert data.train["prompt"][:] == ["a", "b"] and set(data.train.column_names) == {"prompt", "image"}
    assert data.sources[0].adapted == "prompt.text → prompt; picture → image"
    streamed = IterableDataset.from_generator(lambda: iter(rows[:1]))
    assert [row["prompt"] for row in adapt(streamed, {"prompt.text": "prompt"})[0]] == ["a"]
    with pytest.raises(UserError, match="prompt.words, but the column prompt has the fields text, toxicity"):
        load_datasets(write(tmp_path, rows), columns={"prompt.words": "prompt"})
    with pytest.raises(UserError, match="asked.text, but the data has the columns"):
        load_datasets(write(tmp_path, rows), columns={"asked.text": "prompt"})
