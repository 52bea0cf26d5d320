"""SFTTrainer on a tiny model: every kind of row, what is learnt of it, packing, resuming, and what is refused."""

import json
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from shared.errors import DataError, UserError
from textalign.dpo import DPOConfig
from textalign.sft import SFTConfig, SFTTrainer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"add {first} and {second}" + " please" * (first % 4)},
            {"role": "assistant", "content": str(first + second)},
        ],
        "kind": "even" if (first + second) % 2 == 0 else "odd",
    }
    for first in range(8)
    for second in range(6)
]
PAIRS = [{"prompt": f"{at} and {at} is ", "completion": f"{2 * at}"} for at in range(24)]
TEXTS = [{"text": f"line {at} of a text" + " that goes on" * (at % 5)} for at in range(24)]
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool['name'] }}{% endfor %}<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}call {{ call['function']['name'] }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def build(tiny, tmp_path):
    """A trainer for the tiny model; options by name, `folder` for another output folder."""

    def make(rows=ROWS, held_out=None, *, folder="out", trainer=None, **changed):
        options = {
            "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 2,
            "save_steps": 2, "eval_answers": 0, "max_new_tokens": 3, "max_length": 96, "disable_tqdm": True, **changed,
        }  # fmt: skip
        args = SFTConfig(output_dir=str(tmp_path / folder), **options)
        return SFTTrainer(str(tiny("lm")), args, train_dataset=rows, eval_dataset=held_out, **(trainer or {}))

    return make


def trained(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_close(left, right):
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=3e-5)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def learnt(trainer, at=0):
    """The text of a row that is learnt."""
    row = trainer.train_dataset[at]
    return trainer.processing_class.decode(row["input_ids"][row["learnt"]])


# ---- Training -------------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_held_out_questions_are_answered(build, tmp_path):
    trainer = trained(
        build(held_out=ROWS[:9], max_steps=20, eval_strategy="steps", eval_steps=10, eval_answers=6,
              assistant_only_loss=True)
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert losses(trainer)[-1] < losses(trainer)[0] / 2
    assert {"eval_loss", "eval_mean_token_accuracy", "entropy"} <= set(report["curves"])
    assert {"accuracy", "accuracy/even", "accuracy/odd"} <= set(report["before"]) == set(report["after"])
    assert len(report["samples"]) == 6 and "add" in report["samples"][0]["question"]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_texts_are_read_before_and_after(kind, build, tiny):
    rows = TEXTS
    if kind == "tokens":
        tokenizer = AutoTokenizer.from_pretrained(tiny("lm"))
        rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in TEXTS]
    trainer = trained(build(rows, rows[:6], max_steps=10, eval_answers=2))
    assert trainer.report.after["perplexity"] < trainer.report.before["perplexity"]
    assert trainer.report.after["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)


def test_dft_reports_the_perplexity_of_the_data(build):
    plain = build(held_out=ROWS[:8]).evaluate()
    other = build(held_out=ROWS[:8], loss_type="dft").evaluate()
    assert other["eval_perplexity"] == pytest.approx(plain["eval_perplexity"], rel=1e-5)
    assert other["eval_loss"] < plain["eval_loss"]


# ---- What is learnt -------------------------------------------------------------------------------------------------


def test_of_messages_all_is_learnt_or_the_assistant_alone(build):
    assert learnt(build(train_sampling_strategy="sequential")).startswith("user\nadd 0 and 0")
    assert learnt(build(assistant_only_loss=True)).strip() == "0<|im_end|>"


def test_of_completions_the_prompt_is_not_learnt_unless_asked(build):
    assert learnt(build(PAIRS), 3) == "6<|im_end|>"
    assert learnt(build(PAIRS, completion_only_loss=False), 3).endswith(" and 3 is 6<|im_end|>")


def test_of_a_completion_what_others_say_is_not_learnt_where_the_assistant_alone_is(build):
    turns = [("assistant", "one"), ("user", "secret"), ("assistant", "two")]
    said = [{"role": role, "content": text} for role, text in turns]
    rows = [{"prompt": [{"role": "user", "content": "count"}], "completion": said}] * 8
    assert "secret" in learnt(build(rows))
    for options in ({}, {"completion_only_loss": True}):
        text = learnt(build(rows, assistant_only_loss=True, **options))
        assert "one" in text and "two" in text and "secret" not in text
    with pytest.raises(UserError, match="assistant_only_loss without completion_only_loss"):
        build(rows, assistant_only_loss=True, completion_only_loss=False)


def test_tokenised_rows_are_learnt_as_their_masks_say(build):
    rows = [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}] * 8
    assert build(rows).train_dataset[0]["learnt"].tolist() == [False, True, False, True]
    rows = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}] * 8
    assert build(rows).train_dataset[0]["learnt"].tolist() == [False, False, True, True]
    assert build(rows, completion_only_loss=False).train_dataset[0]["learnt"].tolist() == [False, True, True, True]
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}] * 8
    trainer = build(rows, dataset_kwargs={"skip_prepare_dataset": True})
    assert trainer.train_dataset[0]["learnt"].tolist() == [False, True, False, True]


def test_texts_come_from_another_column_or_from_a_function(build):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "body": f"text {at}"} for at in range(8)])
    assert learnt(build(rows, dataset_text_field="body"), 5).endswith("ext 5<|im_end|>")
    trainer = build(rows, trainer={"formatting_func": lambda row: row["prompt"] + "!" + row["body"]})
    assert learnt(trainer, 5).endswith("!text 5<|im_end|>")
    stream = rows.to_iterable_dataset()
    trained(build(stream, dataset_text_field="body", max_steps=1))
    with pytest.raises(UserError, match="dataset_text_field words: the data set has no such column"):
        build(rows, dataset_text_field="words")
    with pytest.raises(DataError, match="row 0: formatting_func gave a list"):
        build(rows, trainer={"formatting_func": lambda row: [row["body"]]})
    some = {"formatting_func": lambda row: None if row["body"] == "text 2" else row["body"]}
    trainer = build(rows, trainer=some, on_bad_row="skip")
    assert len(trainer.train_dataset) == 7 and "text is" in trainer.row_notes[2]
    lacking = [{"body": "text"}, {"other": "text"}, {"body": "more text"}]
    trainer = build(lacking, dataset_text_field="body", on_bad_row="skip")
    assert trainer.train_dataset.rows.tolist() == [0, 2]


def test_tools_reach_the_template_and_calls_are_learnt(build, tmp_path):
    (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [{"role": "user", "content": "1 and 1"}, {"role": "assistant", "content": "", "tool_calls": call}]
    rows = [{"messages": turns, "tools": [{"name": "adder"}]}] * 8
    trainer = build(rows, chat_template_path=str(tmp_path / "tools.jinja"), assistant_only_loss=True)
    whole = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert "adder" in whole and learnt(trainer) == "call add<|im_end|>"


def test_rows_that_are_cut_are_told(build, capsys):
    trainer = build(TEXTS, max_length=12)
    said = capsys.readouterr().out
    assert "rows (" in said and "are cut" in said and trainer.train_dataset.lengths.max() == 12


# ---- Packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True}])
def test_packed_and_padded_rows_give_the_same_step(layout, build):
    held_out = ROWS[:7]
    plain = build(held_out=held_out, max_steps=1, per_device_train_batch_size=len(ROWS), folder="plain")
    other = build(held_out=held_out, max_steps=1, per_device_train_batch_size=len(ROWS), folder="other", **layout)
    expected, found = plain.evaluate(), other.evaluate()
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    assert_close(weights(trained(plain)), weights(trained(other)))


@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_free": True}, {"loss_type": "dft"}])
def test_accumulation_gives_the_step_of_one_big_batch(layout, build):
    options = {"max_steps": 2, "train_sampling_strategy": "sequential", **layout}
    whole = trained(build(folder="1", per_device_train_batch_size=8, **options))
    cut = trained(build(folder="2", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options))
    assert_close(weights(whole), weights(cut))
    assert losses(whole) == pytest.approx(losses(cut), rel=1e-3)


def test_documents_that_are_divided_lose_nothing(build):
    bfd = build(TEXTS, packing=True, max_length=16)
    split = build(TEXTS, packing=True, max_length=16, packing_strategy="bfd_split", shuffle_dataset=True)
    wrapped = build(TEXTS, packing=True, max_length=16, packing_strategy="wrapped", eval_packing=False)
    whole = build(TEXTS).train_dataset.lengths.sum()
    assert bfd.train_dataset.lengths.sum() < split.train_dataset.lengths.sum() == whole
    assert wrapped.train_dataset.lengths.sum() == whole and wrapped.train_dataset.lengths[:-1].min() == 16
    assert losses(trained(wrapped))[0] > 0


def test_held_out_rows_are_cut_where_they_are_not_packed(build):
    options = {"packing": True, "max_length": 16, "packing_strategy": "bfd_split"}
    whole = build(TEXTS[:8]).train_dataset.lengths
    trainer = build(TEXTS, TEXTS[:8], eval_packing=False, **options)
    assert trainer.eval_dataset.lengths.max() == 16 < whole.max()
    trainer = build(TEXTS, TEXTS[:8], **{**options, "packing": False}, eval_packing=True)
    assert trainer.train_dataset.lengths.max() == 16
    assert trainer.eval_dataset.lengths.sum() == whole.sum()


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"packing": True}])
def test_the_report_counts_documents(layout, build):
    trainer = build(max_steps=1, per_device_train_batch_size=4, max_length=96, **layout)
    documents = len(ROWS) if "packing" in layout else 4
    assert "packing" not in layout or len(trainer.train_dataset) > 4
    trained(trainer)
    seen = trainer._totals["samples"]
    assert 4 < seen < documents if "packing" in layout else seen == documents


def test_packed_rows_must_fill_a_batch(build):
    with pytest.raises(UserError, match="dataloader_drop_last"):
        build(packing=True, dataloader_drop_last=True, per_device_train_batch_size=len(ROWS))


def test_a_learnt_prompt_and_packing_exclude_each_other(build, monkeypatch):
    from peft import PromptTuningConfig

    monkeypatch.setattr("textalign.sft.load_text_model", None)  # said before anything is loaded
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for layout in ("packing", "padding_free"):
        with pytest.raises(UserError, match=f"{layout}: PromptTuningConfig puts learnt tokens"):
            build(trainer={"peft_config": adapter}, **{layout: True})


# ---- Noise and offloading -------------------------------------------------------------------------------------------


def test_neftune_moves_training_alone(build):
    noisy, plain = build(held_out=ROWS[:8], neftune_noise_alpha=20.0, folder="noisy"), build(held_out=ROWS[:8])
    assert noisy.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            ids = torch.tensor([[5, 6, 7]])
            with torch.no_grad():
                found = [model.train(mode).get_input_embeddings()(ids) for mode in (False, True)]
                seen.append([model.get_input_embeddings().weight[ids].clone(), *found])

    noisy.add_callback(Look())
    assert losses(trained(noisy)) != losses(trained(plain))
    own, still, moved = seen[0]
    assert torch.equal(still, own)
    assert 0 < (moved - own).abs().max() <= 20 / (3 * own.shape[-1]) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloading_changes_no_number(checkpointing, build):
    plain = trained(build(folder="1"))
    other = trained(build(folder="2", activation_offloading=True, activation_checkpointing=checkpointing))
    assert_close(weights(plain), weights(other))


# ---- Saving and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"packing": True, "neftune_noise_alpha": 5.0}])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_equals_one_that_was_not_interrupted(adapter, layout, build, tmp_path):
    from peft import LoraConfig

    def make(**changed):
        peft = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]) if adapter else None
        return build(trainer={"peft_config": peft}, per_device_train_batch_size=2, max_length=64, **layout, **changed)

    whole = trained(make())
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    again = trained(make(), resume=True)
    assert again.state.global_step == 4
    assert_same(weights(whole), weights(again))


def test_what_is_saved_loads_without_the_suite(build, tmp_path):
    trainer = trained(build())
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(weights(trainer), model.state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_an_adapter_is_trained_and_saved(build, tmp_path):
    from peft import LoraConfig, PeftModel

    trainer = build(trainer={"peft_config": LoraConfig(r=4)})
    before = weights(trainer)
    trained(trainer).save_model()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved and all("lora" in name for name in moved)
    base = AutoModelForCausalLM.from_pretrained(trainer.run.model_name)
    PeftModel.from_pretrained(base, tmp_path / "out")


def test_a_stream_is_trained_for_the_steps_asked_for(build):
    trainer = trained(build(IterableDataset.from_generator(lambda: iter(ROWS)), max_steps=3))
    assert trainer.state.global_step == 3 and losses(trainer)
    with pytest.raises(UserError, match="max_steps is missing"):
        build(IterableDataset.from_generator(lambda: iter(ROWS)), max_steps=-1)
    with pytest.raises(UserError, match="packing needs all rows at hand"):
        build(IterableDataset.from_generator(lambda: iter(ROWS)), packing=True)


# ---- What is refused ------------------------------------------------------------------------------------------------


def test_without_options_the_defaults_are_taken(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(str(tiny("lm")), train_dataset=ROWS)
    assert (trainer.args.learning_rate, trainer.args.max_length, trainer.args.packing) == (2e-5, 1024, False)
    assert trainer.args.output_dir == "runs/sft"


def test_what_cannot_be_followed_is_refused(build, tiny, tmp_path):
    with pytest.raises(UserError, match="args is a DPOConfig; give a SFTConfig"):
        SFTTrainer(str(tiny("lm")), DPOConfig(output_dir=str(tmp_path)), train_dataset=ROWS)
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        with pytest.raises(UserError, match=f"{name} is not taken"):
            build(trainer={name: print})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="data_collator .*GroupedBatch"):
        patch.setattr("textalign.sft.load_text_model", None)  # said before anything is loaded
        build(trainer={"data_collator": lambda rows: {"input_ids": 0}})
    with pytest.raises(UserError, match="dataset_kwargs: add_special_tokens is not taken"):
        build(dataset_kwargs={"add_special_tokens": False})
    with pytest.raises(UserError, match="the rows are not tokenised: they are messages"):
        build(dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(UserError, match="completion_only_loss needs rows with prompt and completion"):
        build(completion_only_loss=True)
    with pytest.raises(UserError, match="assistant_only_loss needs rows of messages"):
        build(TEXTS, assistant_only_loss=True)
    with pytest.raises(UserError, match="packing needs max_length"):
        build(packing=True, max_length=None)
    with pytest.raises(UserError, match="eos_token <end>: not a token of this tokenizer"):
        build(eos_token="<end>")
    with pytest.raises(UserError, match="splits train"):
        build(DatasetDict(train=Dataset.from_list(ROWS)))


def test_rows_that_cannot_be_used_are_named_or_left_out(build):
    rows = [*TEXTS[:5], {"text": None}, *TEXTS[5:]]
    with pytest.raises(DataError, match="row 5: text is"):
        build(rows)
    trainer = build(rows, on_bad_row="skip")
    assert len(trainer.train_dataset) == len(TEXTS)
    assert "text is" in trainer.row_notes[5]
