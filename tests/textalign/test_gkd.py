"""GKDTrainer on tiny models: the loss by hand, who answers which row, resuming, and what is refused."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import UserError
from shared.objectives.distillation import jsd
from shared.runtime.generation import InProcessGenerator, Sampling
from shared.trainers.distillation_rows import draws, evenly_chosen, places_in_step
from textalign import GKDConfig, GKDTrainer

WORDS = ("one", "two", "three", "four")
ROWS = [
    {"messages": [{"role": "user", "content": f"count {at}" + " please" * (at % 3)},
                  {"role": "assistant", "content": " ".join(WORDS[: 1 + at % 4])}]}
    for at in range(24)
]  # fmt: skip
PAIRS = [{"prompt": f"{at} and {at} is ", "completion": f"{2 * at}"} for at in range(24)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """The folder of a teacher: the student's tokenizer, other weights, wider, and a padded head."""
    folder = tmp_path_factory.mktemp("teacher")
    config = AutoModelForCausalLM.from_pretrained(tiny("lm")).config
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    config.vocab_size += 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny("lm")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def build(tiny, teacher, tmp_path):
    """A trainer for the tiny model; options by name, `folder` for another output folder."""

    def make(rows=ROWS, held_out=None, *, folder="out", model=None, teacher_model=teacher, trainer=None, **changed):
        options = {
            "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1,
            "save_steps": 2, "eval_answers": 0, "max_new_tokens": 5, "max_length": 96, "disable_tqdm": True,
            "train_sampling_strategy": "sequential", "report_to": "none", **changed,
        }  # fmt: skip
        args = GKDConfig(output_dir=str(tmp_path / folder), **options)
        model = str(tiny("lm")) if model is None else model
        return GKDTrainer(model, teacher_model, args, train_dataset=rows, eval_dataset=held_out, **(trainer or {}))

    return make


def trained(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]


def step(trainer, count=1):
    """The micro-batches of the first step as they are trained on."""
    loader = iter(trainer.get_train_dataloader())
    batches, _ = trainer.get_batch_samples(loader, count, trainer.args.device)
    return batches


def learnt(trainer, batch):
    """The text of each row that is learnt."""
    rows = zip(batch.completion_ids, batch.completion_mask.bool(), strict=True)
    return [trainer.processing_class.decode(ids[mask]) for ids, mask in rows]


# ---- The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.7), (0.3, 2.0)])
def test_loss_and_gradient_are_those_of_whole_logits(beta, temperature, build, teacher):
    trainer = build(lmbda=0.0, beta=beta, loss_temperature=temperature)
    (batch,) = step(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    other = AutoModelForCausalLM.from_pretrained(teacher)
    inputs = {"input_ids": batch.completion_ids, "attention_mask": batch.completion_attention}
    own = trainer.model(**inputs).logits[:, :-1]
    mask = batch.completion_mask[:, 1:].bool()
    with torch.no_grad():
        target = other(**inputs).logits[:, :-1, : own.shape[-1]]
    expected = jsd(own[mask], target[mask], beta=beta, temperature=temperature).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    agreement = (own.argmax(-1) == target.argmax(-1))[mask].float().mean()
    assert trainer._drain_metrics()["agreement"] == pytest.approx(agreement.item())


def test_only_completions_are_learnt(build):
    (batch,) = step(build(lmbda=0.0))
    assert [text.strip() for text in learnt(build(), batch)][:2] == ["one<|im_end|>", "one two<|im_end|>"]
    trainer = build(PAIRS, lmbda=0.0)
    assert learnt(trainer, *step(trainer))[3] == "6<|im_end|>"
    tokens = [{"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}] * 8
    (batch,) = step(build(tokens, lmbda=0.0))
    assert batch.completion_mask[0].tolist() == [0, 0, 1, 1]


def test_held_out_divergence_falls_and_agreement_rises(build, tmp_path):
    trainer = trained(build(held_out=ROWS[:9], max_steps=25, eval_answers=4, max_new_tokens=8))
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["after"]["loss"] < 0.6 * report["before"]["loss"]
    assert report["after"]["agreement"] > report["before"]["agreement"] + 0.1
    assert "accuracy" in report["after"] and len(report["samples"]) == 4
    assert report["after"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    assert {"agreement", "entropy", "on_policy", "completions/mean_length"} <= set(report["curves"])


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_accumulation_gives_the_step_of_one_big_batch(lmbda, build):
    options = {"max_steps": 2, "lmbda": lmbda, "temperature": 1.0, "learning_rate": 1e-3}
    whole = trained(build(folder="1", per_device_train_batch_size=8, **options))
    cut = trained(build(folder="2", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options))
    assert logged(whole) == pytest.approx(logged(cut), rel=1e-3)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-3, atol=3e-5)


# ---- Who answers ----------------------------------------------------------------------------------------------------


def test_a_share_of_the_rows_is_answered_by_the_student(build):
    trainer = build(lmbda=0.25, per_device_train_batch_size=4)
    batches = step(trainer, 4)
    recorded = [
        text for batch in step(build(lmbda=0.0, per_device_train_batch_size=4), 4) for text in learnt(trainer, batch)
    ]
    own = evenly_chosen(16, 0.25, (trainer.args.seed, 0))
    texts = [text for batch in batches for text in learnt(trainer, batch)]
    assert sum(own) == 4 and [text != old for text, old in zip(texts, recorded, strict=True)] == own
    assert trainer._drain_metrics()["on_policy"] == 0.25


@pytest.mark.parametrize("options", [{"lmbda": 1.0}, {"lmbda": 0.5, "seq_kd": True}, {"lmbda": 0.0, "seq_kd": True}])
def test_answers_are_those_that_student_and_teacher_write(options, build, teacher):
    trainer = build(PAIRS, **options, temperature=0.7)
    (batch,) = step(trainer)
    own = evenly_chosen(8, options["lmbda"], (trainer.args.seed, 0))
    tokenizer = trainer.processing_class
    other = AutoModelForCausalLM.from_pretrained(teacher).eval()
    own_size = trainer.model.config.vocab_size  # the teacher's head has 8 tokens more
    for at, row in enumerate(PAIRS[:8]):
        inputs = tokenizer([row["prompt"]], return_tensors="pt")
        writer = trainer.model.eval() if own[at] else other
        made = InProcessGenerator(tokenizer, suppressed=range(own_size, own_size + 8)).generate(
            writer,
            {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]},
            1,
            Sampling(max_new_tokens=5, temperature=0.7),
            random=[draws(trainer.args.seed, 0, at)],
        )
        length = len(inputs["input_ids"][0])
        assert batch.completion_ids[at, :length].tolist() == inputs["input_ids"][0].tolist()
        assert batch.completion_ids[at][batch.completion_mask[at].bool()].tolist() == made.ids[0].tolist()
        assert not batch.completion_mask[at, :length].any()


def test_of_a_conversation_the_last_answer_is_written_anew(build):
    turns = [("user", "count"), ("assistant", "one"), ("user", "more"), ("assistant", "two")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 8
    recorded, trainer = build(rows, lmbda=0.0), build(rows, lmbda=1.0)
    assert learnt(trainer, *step(recorded))[0].replace("\n", "") == "one<|im_end|>two<|im_end|>"
    (batch,) = step(trainer)
    text = trainer.processing_class.decode(batch.completion_ids[0][~batch.completion_mask[0].bool()])
    assert "one" in text and "more" in text and "two" not in text


def test_prompts_alone_are_answered_in_training_and_in_evaluations(build, capsys):
    trainer = trained(build(PROMPTS, PROMPTS[:7], lmbda=1.0, max_steps=15, eval_answers=3))
    assert trainer.report.after["loss"] < trainer.report.before["loss"]
    assert "accuracy" not in trainer.report.after and len(trainer.report.samples) == 3
    assert logged(trainer, "on_policy") == [1.0] * 15
    short = build(PROMPTS, lmbda=0.5, seq_kd=True, folder="2", max_length=11)
    assert max(len(row["input_ids"]) for row in short.train_dataset) == 6 and "are cut" in capsys.readouterr().out
    stream = build(Dataset.from_list(PROMPTS).to_iterable_dataset(), lmbda=1.0, folder="3", max_steps=2)
    assert logged(trained(stream), "completions/mean_length")[0] > 1


def test_places_do_not_depend_on_how_a_step_is_cut():
    assert [list(each) for each in places_in_step([2, 2], 1, 2)] == [[2, 3], [6, 7]]
    cut = [at for process in (0, 1) for each in places_in_step([2, 1], process, 2) for at in each]
    assert sorted(cut) == list(range(6))
    for share in (0.0, 0.3, 0.5, 1.0):
        chosen = evenly_chosen(1000, share, (1, 2))
        assert abs(sum(chosen) - 1000 * share) < 1 and chosen[:10] == evenly_chosen(10, share, (1, 2))
    firsts = [evenly_chosen(1, 0.3, (0, at))[0] for at in range(400)]
    assert sum(firsts) / 400 == pytest.approx(0.3, abs=0.07)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(build, tmp_path):
    options = {"lmbda": 0.5, "seq_kd": True, "max_steps": 4}
    whole = weights(trained(build(folder="whole", **options)))
    trained(build(folder="part", **options))
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    resumed = weights(trained(build(folder="part", **options), resume=True))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


# ---- Teachers -------------------------------------------------------------------------------------------------------


def test_a_student_with_an_adapter_can_be_taught_by_itself(build, tiny):
    from peft import LoraConfig

    adapter = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=32, init_lora_weights=False
    )
    trainer = build(teacher_model=None, trainer={"peft_config": adapter}, lmbda=0.5, max_steps=12)
    trained(trainer)
    assert logged(trainer)[-1] < 0.8 * logged(trainer)[0]
    assert "teacher" not in {name.split(".")[0] for name in trainer.model.state_dict()}


def test_a_student_with_an_adapter_on_its_embeddings(build):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    assert logged(trained(build(trainer={"peft_config": adapter}, lmbda=0.5, max_steps=1)))[0] > 0


def test_teachers_in_other_types_stay_as_they_are(build, teacher):
    half = build(teacher_model_init_kwargs={"dtype": "bfloat16"}, lmbda=0.0)
    assert {p.dtype for p in half.teacher.model.parameters()} == {torch.bfloat16}
    full = build(teacher_model=AutoModelForCausalLM.from_pretrained(teacher), lmbda=0.0)
    losses = [each.compute_loss(each.model, step(each)[0]).item() for each in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    before = {name: value.clone() for name, value in full.teacher.model.state_dict().items()}
    trained(full)
    assert all(torch.equal(value, before[name]) for name, value in full.teacher.model.state_dict().items())
    assert not any(p.requires_grad for p in full.teacher.model.parameters())


@pytest.mark.parametrize("option", ["teacher_load_in_8bit", "teacher_load_in_4bit"])
def test_teachers_in_few_bits(option, build):
    pytest.importorskip("bitsandbytes")
    names = {"model": "builtin/lm-small", "teacher_model": "builtin/lm-small-sft"}  # tiny layers cannot be packed
    trainer = build(**names, **{option: True}, model_init_kwargs={"num_hidden_layers": 1}, seq_kd=True, max_steps=2)
    trained(trainer)
    assert trainer.teacher.model.is_quantized and logged(trainer)[-1] > 0


def test_a_teacher_with_another_tokenizer_is_refused_before_weights_are_read(
    build, teacher, tiny, tmp_path, monkeypatch
):
    folder = tmp_path / "other"
    shutil.copytree(teacher, folder)
    text = (folder / "tokenizer.json").read_text()
    table = json.loads(text)
    vocabulary = table["model"]["vocab"]
    names = [name for name in vocabulary if name.isalpha() and len(name) == 1][:2]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    monkeypatch.setattr("textalign.distillation.load_text_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="tokenizer is another one: 2 of the student's .* student's own tokenizer"):
        build(teacher_model=str(folder))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.config._name_or_path = ""
    model.config.vocab_size += 5000
    with pytest.raises(UserError, match="The teacher has 5,.* tokens and the student"):
        build(teacher_model=model)
    model.config.vocab_size = 20
    with pytest.raises(UserError, match="The teacher has embeddings for 20 tokens"):
        build(teacher_model=model)


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, "lmbda 1.5: must be in .0, 1."),
        ({"beta": -0.1}, "beta -0.1: must be in .0, 1."),
        ({"temperature": -1.0}, "temperature -1.0: must be 0"),
        ({"loss_temperature": 0.0}, "loss_temperature 0.0: must be a positive number"),
        ({"lmbda": 1.0, "seq_kd": True}, "the student answers all rows"),
        ({"packing": True}, "packing is not an option of GKDConfig. Rows are not packed"),
        ({"loss_type": "nll"}, "beta chooses"),
        ({"max_new_tokens": 96}, "leave no room for a prompt in rows of max_length 96"),
        ({"teacher_load_in_8bit": True, "teacher_load_in_4bit": True}, "exclude each other"),
    ],
)
def test_options_that_cannot_be_followed(options, message, build):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_zero3_cannot_hold_a_teacher_in_few_bits(build, monkeypatch):
    monkeypatch.setattr("textalign.teachers.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="A teacher in 8 or 4 bits cannot be loaded under ZeRO-3"):
        build(teacher_load_in_4bit=True)


def test_arguments_that_cannot_be_followed(build, tiny):
    from peft import LoraConfig, PeftModel

    with pytest.raises(UserError, match="There is no teacher"):
        build(teacher_model=None)
    with pytest.raises(UserError, match="teacher_model is a int"):
        build(teacher_model=3)
    model = AutoModelForCausalLM.from_pretrained(tiny("lm"))
    for student in (model, PeftModel(model, LoraConfig(r=2, target_modules="all-linear"))):
        with pytest.raises(UserError, match="teacher_model is the model itself"):
            build(model=student, teacher_model=model)
    with pytest.raises(UserError, match="teacher_load_in_8bit cannot be followed: the teacher is loaded"):
        build(teacher_model=model, teacher_load_in_8bit=True)
    with pytest.raises(UserError, match="prompts without completions, and with lmbda 0.5"):
        build(PROMPTS)
    with pytest.raises(UserError, match="do not say what is their completion"):
        build([{"input_ids": [5, 6, 7]}] * 8)
    with pytest.raises(UserError, match="formatting_func"):
        build(trainer={"formatting_func": str})
    with pytest.raises(UserError, match="compute_metrics is not taken"):
        build(trainer={"compute_metrics": len})
