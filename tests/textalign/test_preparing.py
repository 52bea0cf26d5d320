"""What all text trainers do before they train: options and rows as they come, positions, new tokens, later rows."""

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import build_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, TrainingArguments

from shared.errors import UserError
from textalign.dpo import DPOConfig, DPOTrainer
from textalign.sft import SFTConfig, SFTTrainer

ROWS = [
    {"messages": [{"role": "user", "content": f"{at} and 1"}, {"role": "assistant", "content": str(at + 1)}]}
    for at in range(16)
]
PAIRS = [{"prompt": f"{at} and 1 is ", "completion": str(at + 1)} for at in range(16)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def build(tiny, tmp_path):
    """A trainer for the tiny model; options by name."""

    def make(rows=ROWS, held_out=None, *, model=None, trainer=None, **changed):
        options = {
            "per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no", "eval_answers": 0,
            "max_new_tokens": 3, "disable_tqdm": True, **changed,
        }  # fmt: skip
        args = SFTConfig(output_dir=str(tmp_path / "out"), **options)
        model = str(tiny("lm")) if model is None else model
        return SFTTrainer(model, args, train_dataset=rows, eval_dataset=held_out, **(trainer or {}))

    return make


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny model with a table of 32 positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = build_tokenizer([], bos=None, eos="</s>", pad="<pad>")
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- Options --------------------------------------------------------------------------------------------------------


def test_options_are_read_as_on_the_command_line():
    args = SFTConfig(max_length="512", model_init_kwargs='{"attn_implementation": "eager"}', packing="true")
    assert (args.max_length, args.packing) == (512, True)
    assert args.model_init_kwargs == {"attn_implementation": "eager"}
    assert SFTConfig(dataset_kwargs='{"skip_prepare_dataset": true}').dataset_kwargs == {"skip_prepare_dataset": True}
    assert SFTConfig(pad_to_multiple_of="auto").pad_to_multiple_of is None
    assert SFTConfig(loss_type="chunked_nll").loss_type == "nll"
    assert DPOConfig(loss_type="hinge").loss_type == ["hinge"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss_type": "nl"}, "loss_type 'nl': not one of nll, dft, chunked_nll. Did you mean nll"),
        ({"packing_strategy": "bdf"}, "packing_strategy 'bdf': not one of"),
        ({"truncation_mode": "x"}, "truncation_mode 'x': not one of"),
        ({"on_bad_row": "x"}, "on_bad_row 'x': not one of"),
        ({"max_length": "many"}, "max_length 'many': not a whole number"),
        ({"max_length": [5]}, r"max_length \[5\]: must be a whole number"),
        ({"dataset_kwargs": "x"}, "dataset_kwargs 'x': not a JSON object"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics .* is not supported"),
        ({"label_names": ["chosen"]}, "label_names .* is not supported"),
        ({"max_seq_length": 5}, "max_seq_length is not an option of SFTConfig. It is called max_length"),
        ({"num_of_sequences": 5}, "num_of_sequences is not an option"),
        ({"router_aux_loss_coef": 0.1}, "router's auxiliary loss is not part of the objectives"),
    ],
)
def test_options_that_cannot_be_meant_are_named(option, message):
    with pytest.raises(UserError, match=message):
        SFTConfig(**option)


def test_code_of_the_model_is_run_where_it_is_asked_for():
    args = SFTConfig(trust_remote_code=True, model_init_kwargs={"revision": "v1"})
    assert args.model_init_kwargs == {"trust_remote_code": True, "revision": "v1"}
    assert SFTConfig().model_init_kwargs is None


def test_plain_training_arguments_give_what_is_said_in_them(tiny, tmp_path):
    given = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=3, weight_decay=0.5, save_strategy="no")
    args = SFTTrainer(str(tiny("lm")), given, train_dataset=ROWS).args
    assert isinstance(args, SFTConfig) and args.output_dir == str(tmp_path / "out")
    assert (args.max_steps, args.weight_decay, args.save_strategy) == (3, 0.5, "no")
    assert (args.learning_rate, args.logging_steps, args.remove_unused_columns) == (2e-5, 10, False)
    assert SFTConfig.of(None).learning_rate == 2e-5 and SFTConfig.of(args) is args


# ---- What a trainer is given ----------------------------------------------------------------------------------------


class Mapped(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, at):
        return ROWS[range(len(ROWS))[at]]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def test_a_torch_data_set_is_read(build):
    assert len(build(Mapped(), Mapped()).eval_dataset) == len(ROWS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((row for row in ROWS), "train_dataset is a generator: give .*IterableDataset"),
        (Streamed(), "train_dataset is a Streamed: give .*IterableDataset"),
        (pd.DataFrame({"text": ["a"]}), "train_dataset is a DataFrame: give datasets.Dataset.from_pandas"),
        ("rows.json", "train_dataset is a str: give the rows themselves"),
        (["a", "b"], "train_dataset: its rows are to be dicts .* the first is a str"),
    ],
)
def test_what_is_no_data_set_is_refused(rows, message, build):
    with pytest.raises(UserError, match=message):
        build(rows)
    with pytest.raises(UserError, match=message):
        build(rows, trainer={"formatting_func": str})


def test_arguments_of_another_kind_are_refused(build, tiny):
    for held_out, message in (("x", "eval_dataset is a str"), ({"a": None}, "eval_dataset 'a' is None")):
        with pytest.raises(UserError, match=message):
            build(held_out=held_out)
    with pytest.raises(UserError, match="processing_class is a str"):
        build(trainer={"processing_class": str(tiny("lm"))})
    with pytest.raises(UserError, match="model is a PosixPath"):
        build(model=tiny("lm"))
    with pytest.raises(UserError, match="peft_config is a dict: give a PEFT configuration"):
        build(trainer={"peft_config": {"r": 4}})
    with pytest.raises(UserError, match="the argument is called processing_class"):
        build(trainer={"tokenizer": None})


def test_how_to_load_a_model_is_said_with_its_name(build, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("lm"))
    with pytest.raises(UserError, match="model_init_kwargs: dtype cannot be followed"):
        build(model=model, model_init_kwargs={"dtype": "float32", "revision": "main"})
    with pytest.raises(UserError, match="quantization_config: the model is loaded"):
        build(model=model, trainer={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})
    with pytest.raises(UserError, match="model_init_kwargs: .*nonsense"):
        build(model_init_kwargs={"nonsense": 1})


# ---- Positions ------------------------------------------------------------------------------------------------------


def test_rows_stay_within_the_positions_that_a_model_has(build, gpt2, capsys):
    long = [{"text": "a text that goes on " * 20}] * 8
    trainer = build(long, model=gpt2)
    assert "max_length is 32" in capsys.readouterr().out
    assert trainer.train_dataset.lengths.max() == trainer.args.max_length == 32
    trainer.train()
    with pytest.raises(UserError, match="max_length 64: this model has 32 positions"):
        build(long, model=gpt2, max_length=64)


def test_questions_are_cut_to_what_can_be_answered(build, gpt2):
    long = [{"prompt": "one and one is " * 20, "completion": "two"}]
    trainer = build(PAIRS, long, model=gpt2, eval_answers=2, truncation_mode="keep_end")
    inputs, _ = trainer.run.encode_prompts(trainer.run.questions)
    assert inputs["input_ids"].shape == (1, 29)
    trainer.train()
    trainer = build(PAIRS, long, model=gpt2, max_new_tokens=40, truncation_mode="keep_end")
    with pytest.raises(UserError, match="max_new_tokens: .* no position for a prompt"):
        trainer.run.encode_prompts(trainer.run.questions)
    trainer = build(PAIRS, long, max_length=20, truncation_mode="keep_end")
    inputs, recorded = trainer.run.encode_prompts(trainer.run.questions)
    assert inputs["input_ids"].shape == (1, 20) and recorded == ["two"]
    assert trainer.processing_class.decode(inputs["input_ids"][0]).endswith("one and one is ")


def test_rows_that_are_left_out_are_not_asked(build):
    rows = [PAIRS[0], {"prompt": "a " * 60, "completion": "b"}, *PAIRS[1:4]]
    trainer = build(PAIRS, rows, max_length=24, on_bad_row="skip")
    assert [row["completion"] for row in trainer.run.questions] == ["1", "2", "3", "4"]


# ---- New tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture
def template(tmp_path):
    """A tokenizer whose template ends turns with a token that the tiny model does not have."""
    folder = tmp_path / "template"
    tokenizer = build_tokenizer(["<turn>", "<end>"], bos=None, eos="<end>", pad="<pad>")
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    GPT2Config().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_an_adapter_trains_tokens_that_a_template_brings(config, build, template):
    adapter = LoraConfig(r=2, target_modules=["q_proj"], **config)
    trainer = build(chat_template_path=template, trainer={"peft_config": adapter}, learning_rate=1e-1)
    new = trainer.processing_class.convert_tokens_to_ids(["<turn>", "<end>"])
    model = trainer.model.get_base_model()
    places = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [place.weight.detach().clone() for place in places]
    trainer.train()
    changed = [(place.weight != old).any(1) for place, old in zip(places, before, strict=True)]
    moved = [which.nonzero().flatten().tolist() for which in changed]
    assert set(new) <= set(moved[0]) <= {*new, 5} and set(new) <= set(moved[1])
    assert adapter.trainable_token_indices == config.get("trainable_token_indices")  # the user's own is left as it is


def test_an_adapter_that_is_gone_on_with_is_warned_of_new_tokens(build, template, tmp_path, caplog):
    build(trainer={"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}).save_model(str(tmp_path / "adapter"))
    build(chat_template_path=template, trainer={"peft_config": str(tmp_path / "adapter")})
    assert "embeddings of 2 new tokens" in caplog.text


# ---- Rows that come later -------------------------------------------------------------------------------------------


def test_rows_that_come_later_are_packed_as_the_held_out_ones(build):
    trainer = build(held_out=ROWS[:8], packing=True, packing_strategy="wrapped", max_length=24)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(ROWS[:8])["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_other_rows_are_evaluated_as_they_come(build, tiny, tmp_path):
    trainer = build(held_out=ROWS[:8])
    expected = trainer.evaluate()
    for rows in (ROWS[:8], Dataset.from_list(ROWS[:8])):
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert trainer.predict(ROWS[:8]).metrics["test_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    pairs = [{"prompt": f"{at} is ", "chosen": "even", "rejected": "a word"} for at in range(8)]
    args = DPOConfig(output_dir=str(tmp_path / "dpo"), max_steps=1)
    dpo = DPOTrainer(str(tiny("lm")), args=args, train_dataset=pairs, eval_dataset=pairs[:4])
    assert dpo.evaluate(pairs[:4])["eval_loss"] == pytest.approx(dpo.evaluate()["eval_loss"], rel=1e-6)
