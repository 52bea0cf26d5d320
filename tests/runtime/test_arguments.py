"""The shared options: documented, and refused where they cannot be meant."""

from __future__ import annotations

from dataclasses import fields

import pytest

from shared.errors import UserError
from shared.runtime.arguments import AlignOptions, DataArguments, ModelArguments
from shared.runtime.parser import parse_arguments
from visionalign.preference_options import VLMDPOOptions

GROUPS = (ModelArguments, DataArguments, AlignOptions)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_is_documented_and_has_a_default(group):
    group(**({"dataset_name": ["a"]} if group is DataArguments else {}))
    names = {item.name for item in fields(group)}
    for item in fields(group):
        assert item.metadata["help"].endswith((".", "…")), item.name
        assert item.metadata["needs"] is None or item.metadata["needs"] in names


@pytest.mark.parametrize(
    ("group", "argv", "message"),
    [
        (ModelArguments, ["--use_peft", "--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit exclude"),
        (ModelArguments, ["--load_in_4bit"], "load_in_4bit: quantised weights cannot be trained themselves"),
        (ModelArguments, ["--use_peft", "--lora_r", "0"], "lora_r 0: the rank must be at least 1"),
        (ModelArguments, ["--use_peft", "--lora_dropout", "1"], "lora_dropout 1.0: must be at least 0 and below 1"),
        (ModelArguments, ["--lora_r", "8"], "--lora_r: has no effect without use_peft. Add --use_peft"),
        (ModelArguments, ["--bnb_4bit_quant_type", "fp4"], "has no effect without load_in_4bit"),
        (VLMDPOOptions, ["--image_corruption", "noise"], "without image_loss_weight. Add --image_loss_weight$"),
        (DataArguments, [], "dataset_name is missing"),
        (DataArguments, ["--dataset_name", "a", "b", "--dataset_weights", "1"], "dataset_weights 1.0: give one"),
        (DataArguments, ["--dataset_name", "a", "--dataset_weights", "0"], "dataset_weights 0.0: give one"),
        (DataArguments, ["--dataset_name", "a", "--eval_fraction", "1"], "eval_fraction 1.0: must be at least 0"),
        (DataArguments, ["--dataset_name", "a", "--max_train_rows", "0"], "max_train_rows 0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(group, argv, message):
    with pytest.raises(UserError, match=message):
        parse_arguments([group], argv).build(group)


def test_an_adapter_that_goes_on_may_stand_on_quantised_weights():
    parsed = parse_arguments([ModelArguments], ["--load_in_4bit", "--adapter_name_or_path", "out"])
    assert parsed.build(ModelArguments).load_in_4bit


def test_one_data_set_may_be_given_as_a_word_in_python():
    assert DataArguments(dataset_name="a").dataset_name == ["a"]
