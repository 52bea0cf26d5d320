"""The reference of the text trainers: what is said before anything is loaded, what fits it, and what is kept of it."""

import json

import pytest
import torch
from tiny import build_lm, build_tokenizer

import textalign
from shared.errors import UserError
from shared.trainers.reference import FrozenCopy
from textalign import preference

SHAPES = ("circle", "square", "triangle")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(build_lm(tmp_path_factory.mktemp("lm")))


@pytest.fixture(scope="module")
def half_path(tmp_path_factory):
    """The same model with a checkpoint in bfloat16."""
    from transformers import AutoModelForCausalLM

    folder = build_lm(tmp_path_factory.mktemp("half"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wordy_path(tmp_path_factory):
    """A model whose chat template needs twenty tokens that no other has."""
    folder = build_lm(tmp_path_factory.mktemp("wordy"))
    marks = [f"<|mark{i}|>" for i in range(20)]
    tokenizer = build_tokenizer(
        ["<|im_start|>", "<|im_end|>", *marks], bos=None, eos="<|im_end|>", pad="<|endoftext|>"
    )
    opening = "".join(marks)
    tokenizer.chat_template = (
        "{% for message in messages %}" + opening + "{{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}" + opening + "{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def unread(monkeypatch):
    """Neither rows are turned into tokens nor weights loaded."""

    def never(*args, **kwargs):
        raise AssertionError("rows or weights were read")

    monkeypatch.setattr(preference, "prepare_text", never)
    monkeypatch.setattr(preference, "load_text_model", never)


def pairs(count=8):
    return [
        {
            "prompt": [{"role": "user", "content": f"What colour is the {SHAPES[i % 3]}?"}],
            "chosen": [{"role": "assistant", "content": ("red", "green", "blue")[i % 3]}],
            "rejected": [{"role": "assistant", "content": f"{SHAPES[(i + 1) % 3]} {SHAPES[i % 3]}"}],
        }
        for i in range(count)
    ]


def dpo(model, folder, ref_model=None, peft_config=None, train_dataset=None, **options):
    config = {
        "output_dir": str(folder),
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "eval_answers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    rows = pairs() if train_dataset is None else train_dataset
    args = textalign.DPOConfig(**config)
    return textalign.DPOTrainer(model, ref_model, args, train_dataset=rows, peft_config=peft_config)


def lora(**changed):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changed})


def reference_figures(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return trainer.reference.log_probs(trainer.model, batch).clone()


# ---- A reference that stays ----------------------------------------------------------------------------------------


def test_a_learnt_prompt_is_no_reference_of_its_own_but_trains_against_a_given_one(model_path, tmp_path):
    from peft import PromptTuningConfig

    def prompt():
        return PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")

    with pytest.raises(UserError, match="learns a prompt"):
        dpo(model_path, tmp_path, peft_config=prompt())
    trainer = dpo(model_path, tmp_path, model_path, prompt(), learning_rate=0.1)
    before = reference_figures(trainer)
    trainer.train()
    assert torch.equal(reference_figures(trainer), before)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] != pytest.approx(losses[0], abs=1e-4)


def test_weights_trained_beside_the_adapter_are_named(model_path, tmp_path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), lora())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"outside of its adapter: base_model\.model\.model\.norm\.weight\."):
        dpo(model, tmp_path)
    assert isinstance(dpo(model, tmp_path, model_path).reference, FrozenCopy)


def test_a_model_of_which_nothing_is_trained(model_path, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dpo(model_path, tmp_path / "first", peft_config=lora()).save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), tmp_path / "adapter")
    with pytest.raises(UserError, match="is_trainable=True"):
        dpo(model, tmp_path / "second")


# ---- Said first ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "exclude each other"),
        ({"precompute_ref_log_probs": True, "ref_num_shared_layers": 1}, "exclude each other"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps is 0"),
        ({"sync_ref_model": True, "ref_load_in_8bit": True}, "cannot be moved"),
        ({"ref_num_shared_layers": 1, "ref_load_in_8bit": True}, "excludes"),
        ({"ref_load_in_8bit": True, "peft_config": True}, "model without it is the reference"),
        ({"ref_model_name_or_path": "./no/such/model"}, "no/such/model"),
        ({"precompute_ref_log_probs": True, "precompute_ref_batch_size": -1}, "must be at least 1"),
        ({"precompute_ref_log_probs": True, "precompute_ref_batch_size": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(options, words, model_path, tmp_path, unread):
    options = {**options, "peft_config": lora()} if "peft_config" in options else options
    with pytest.raises(UserError, match=words):
        dpo(model_path, tmp_path, **options)


def test_a_stream_cannot_be_run_beforehand(model_path, tmp_path, unread):
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(pairs)
    with pytest.raises(UserError, match="streamed"):
        dpo(model_path, tmp_path, train_dataset=stream, precompute_ref_log_probs=True)


# ---- Run once, kept by a key ---------------------------------------------------------------------------------------


def kept(tmp_path):
    return {path.name for path in (tmp_path / "cache" / "reference").iterdir()}


def test_what_is_known_already_is_checked_all_the_same(model_path, tmp_path):
    dpo(model_path, tmp_path / "a", precompute_ref_log_probs=True)
    for options in ({"sync_ref_model": True}, {"ref_num_shared_layers": 1}):
        with pytest.raises(UserError, match="exclude each other"):
            dpo(model_path, tmp_path / "b", precompute_ref_log_probs=True, **options)


def test_the_type_of_the_weights_counts(half_path, model_path, tmp_path):
    dpo(half_path, tmp_path / "a", precompute_ref_log_probs=True)
    assert len(kept(tmp_path)) == 1
    given = dpo(half_path, tmp_path / "b", half_path, precompute_ref_log_probs=True)
    assert len(kept(tmp_path)) == 2
    live = dpo(half_path, tmp_path / "c", half_path)
    assert live.reference.model.dtype == torch.bfloat16
    torch.testing.assert_close(reference_figures(given), reference_figures(live), atol=2e-2, rtol=0)
    asked = {"model_init_kwargs": {"dtype": "float32"}}
    dpo(half_path, tmp_path / "d", half_path, precompute_ref_log_probs=True, **asked)
    assert len(kept(tmp_path)) == 2, "as the policy itself, which is held in float32"


def test_added_embeddings_count_with_the_seed_that_draws_them(model_path, wordy_path, tmp_path):
    def run(seed, ref_model=None):
        options = {"seed": seed, "chat_template_path": wordy_path, "precompute_ref_log_probs": True}
        dpo(model_path, tmp_path / f"{seed} {ref_model is None}", ref_model, **options)

    run(0)
    run(1)
    assert len(kept(tmp_path)) == 2
    run(0, model_path)
    assert len(kept(tmp_path)) == 2, "a reference's are drawn as the policy's"


def test_the_adapter_does_not_count(model_path, tmp_path):
    from transformers import AutoModelForCausalLM

    def run(folder, **options):
        model = AutoModelForCausalLM.from_pretrained(model_path)
        dpo(model, tmp_path / folder, precompute_ref_log_probs=True, **options)

    run("whole")
    run("queries", peft_config=lora())
    run("others", peft_config=lora(target_modules=["up_proj", "v_proj"], modules_to_save=["lm_head"]))
    run("head", peft_config=lora(target_modules=["embed_tokens", "lm_head"]))
    (folder,) = (tmp_path / "cache" / "reference").iterdir()
    assert json.loads((folder / "made_of.json").read_text())["weights"]


# ---- A reference that fits the tokenizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["name", "model"])
def test_a_reference_learns_of_added_tokens(given, model_path, wordy_path, tmp_path):
    from transformers import AutoModelForCausalLM

    ref_model = model_path if given == "name" else AutoModelForCausalLM.from_pretrained(model_path)
    trainer = dpo(model_path, tmp_path / "a", ref_model, chat_template_path=wordy_path)
    assert trainer.model.get_input_embeddings().num_embeddings == len(trainer.run.tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("beforehand", [False, True])
def test_a_reference_of_another_vocabulary_is_refused(beforehand, model_path, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = AutoModelForCausalLM.from_pretrained(model_path).config.to_dict()
    LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 50})).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="embeddings for 50 tokens"):
        dpo(model_path, tmp_path / "a", str(tmp_path / "small"), precompute_ref_log_probs=beforehand)


# ---- Arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPO", "KTO", "BCO", "CPO", "ORPO"])
def test_an_unknown_word_is_refused_at_once(name, model_path, unread):
    with pytest.raises(TypeError, match="nonsense"):
        getattr(textalign, f"{name}Trainer")(model_path, train_dataset=pairs(), nonsense=1)


def test_a_reference_is_no_argument_without_one(model_path, unread):
    with pytest.raises(TypeError, match="ref_model"):
        textalign.CPOTrainer(model_path, train_dataset=pairs(), ref_model=model_path)


def test_arguments_by_position(model_path, tmp_path):
    common = {"max_steps": 1, "eval_answers": 0, "per_device_train_batch_size": 4, "save_strategy": "no"}
    seen = []

    from transformers import TrainerCallback

    class Seeing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    def shared(config, folder):
        return config(output_dir=str(tmp_path / folder), **common), None, pairs(), None, None

    nothing = (None, None)
    dpo_args = shared(textalign.DPOConfig, "dpo")
    trainer = textalign.DPOTrainer(model_path, None, *dpo_args, None, [Seeing()], nothing, None, lora())
    trainer.train()
    assert hasattr(trainer.model, "peft_config") and seen == [1]
    cpo_args = shared(textalign.CPOConfig, "cpo")
    trainer = textalign.CPOTrainer(model_path, *cpo_args, None, [Seeing()], nothing, None, lora(), None)
    trainer.train()
    assert hasattr(trainer.model, "peft_config") and seen == [1, 1]
    with pytest.raises(UserError, match="model_init"):
        textalign.CPOTrainer(model_path, *cpo_args, lambda: None)


def test_rows_that_the_reference_was_not_run_over_are_refused():
    from shared.policies.base import GroupedBatch
    from shared.trainers.reference import Cached

    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(UserError, match="Give them as eval_dataset"):
        Cached().log_probs(torch.nn.Identity(), GroupedBatch.of_rows(ids, attention=ids, mask=ids))
