"""A script in TRL's usage runs with its imports changed and nothing else."""

import json
import runpy
import sys
from dataclasses import dataclass, field

import pytest

from textalign import compat

SCRIPT = """
from dataclasses import dataclass, field

from datasets import load_dataset

from textalign import DPOConfig, DPOTrainer
from textalign.compat import (
    ModelConfig, ScriptArguments, TrlParser, get_kbit_device_map, get_peft_config, get_quantization_config,
)


@dataclass
class Extra:
    tag: str = field(default="x", metadata={"help": "A word of the script's own."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, Extra))
    script_args, training_args, model_args, extra = parser.parse_args_and_config()
    quantization_config = get_quantization_config(model_args)
    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        trust_remote_code=training_args.trust_remote_code,
        device_map=get_kbit_device_map() if quantization_config is not None else None,
        quantization_config=quantization_config,
    )
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    result = (trainer.state.global_step, extra.tag)
"""


@dataclass
class Own:
    """Own options."""

    tag: str = field(default="x", metadata={"help": "A word."})


def parse(*words, types=(compat.ScriptArguments, compat.ModelConfig, Own), **more):
    return compat.TrlParser(types).parse_args_and_config(list(words), **more)


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"What colour is {i} ?", "chosen": " red", "rejected": " blue circle"} for i in range(12)]
    (tmp_path / "pairs").mkdir()
    for split, kept in (("train", rows[:8]), ("test", rows[8:])):
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, kept)))
    return tmp_path / "pairs"


def test_a_dpo_script_trains_an_adapter(pairs, tiny, tmp_path, monkeypatch):
    script, config = tmp_path / "dpo.py", tmp_path / "run.yaml"
    script.write_text(SCRIPT)
    config.write_text(f"env:\n  TRIED: 3\nmodel_name_or_path: {tiny('lm')}\nmax_steps: 9\n")
    monkeypatch.setenv("TRIED", "0")
    words = "--max_steps 2 --per_device_train_batch_size 2 --eval_strategy steps --eval_steps 2 --eval_answers 0"
    words += f" --dataset_name {pairs} --output_dir {tmp_path / 'out'} --use_peft --lora_r 2 --tag mine --disable_tqdm"
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--config", str(config), *words.split()])
    assert runpy.run_path(str(script), run_name="__main__")["result"] == (2, "mine")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_instances_come_in_order_and_the_command_line_wins(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("tag: from file\ndataset_name: a\nenv:\n  SEEN_HERE: yes\n")
    monkeypatch.setenv("SEEN_HERE", "")
    script, model, own = parse("--config", str(tmp_path / "run.yaml"), "--tag", "mine", "--lora_r", "4", "--use_peft")
    assert (script.dataset_name, script.dataset_train_split, model.lora_r, own.tag) == ("a", "train", 4, "mine")
    assert compat.get_peft_config(model).r == 4 and compat.get_quantization_config(model) is None
    assert parse(return_remaining_strings=True)[-1] == []
    assert parse(types=Own) == (Own(),)


def test_a_fault_is_one_line_and_status_2(capsys):
    for words, message in (
        (["--tagg", "1"], "error: --tagg: unknown option. Did you mean --tag?"),
        (["--load_in_4bit"], "error: load_in_4bit: quantised weights cannot be trained themselves"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse(*words)
        assert ended.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_a_quantised_model_is_asked_for_in_the_same_words():
    model = parse("--load_in_4bit", "--use_peft", types=compat.ModelConfig)[0]
    quantised = compat.get_quantization_config(model)
    assert quantised.load_in_4bit and quantised.bnb_4bit_quant_type == "nf4"
    assert set(compat.get_kbit_device_map()) == {""}


def test_data_sets_are_joined_and_split(pairs):
    given = json.dumps({"path": "json", "data_files": str(pairs / "train.jsonl"), "columns": ["prompt", "chosen"]})
    mixture = parse("--datasets", given, given, "--test_split_size", "0.25", types=compat.DatasetMixtureConfig)[0]
    rows = compat.get_dataset(mixture)
    assert (len(rows["train"]), len(rows["test"])) == (12, 4) and rows["train"].column_names == ["prompt", "chosen"]
    with pytest.raises(ValueError, match="datasets is empty"):
        compat.get_dataset(compat.DatasetMixtureConfig())


def test_a_configuration_of_transformers_itself_is_refused(capsys):
    from transformers import TrainingArguments

    with pytest.raises(SystemExit):
        parse(types=TrainingArguments)
    assert "TrainingArguments is transformers' own" in capsys.readouterr().err
