"""The built-in video model and its processor work as any from the hub would."""

import numpy as np
import yaml
from written import content

from shared import builtin
from shared.builtin import make_vlms
from shared.builtin.models import load_model, load_processor

NAME = "builtin/video-small"


def test_a_step_on_a_clip_reaches_all_of_it():
    """48 x 48 pixels are nine places, and two frames share a token."""
    model, processor = load_model(NAME), load_processor(NAME)
    assert 0.5e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 1.0e6
    row = builtin.load_dataset("builtin/moving-shapes", "test")[0]
    content = [{"type": "video"}, {"type": "text", "text": row["messages"][0]["content"]}]
    messages = [{"role": "user", "content": content}, row["messages"][1]]
    text = processor.apply_chat_template(messages, tokenize=False)
    assert text.endswith(f"<assistant>{row['messages'][1]['content']}<end>")
    frames = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
    inputs = processor(text=[text], videos=[frames], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 18
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_make_writes_the_files_that_are_in_the_repository(tmp_path):
    make_vlms.save(tmp_path, *make_vlms.MADE[NAME]())
    committed = builtin.model_path(NAME)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in committed.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        assert content(tmp_path / name) == content(committed / name), name


def test_the_words_of_the_questions_are_short_and_the_longest_answer_fits_the_recipe():
    tokenizer = load_processor(NAME).tokenizer
    options = yaml.safe_load((builtin.RECIPES / "sft_video_llm.yaml").read_text())
    for messages in builtin.load_dataset("builtin/moving-shapes", "test")["messages"]:
        question, answer = (message["content"] for message in messages)
        assert len(tokenizer(question)["input_ids"]) <= len(question.split()) + 2, question
        assert len(tokenizer(answer)["input_ids"]) < options["max_new_tokens"], answer
