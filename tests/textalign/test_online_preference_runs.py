"""Runs of online DPO, XPO and Nash-MD that stop and go on; and what a user can get wrong with them."""

import random

import pytest
import torch
from fake_server import FakeServer
from tiny_online import even, history, questions
from tiny_preference import pairs_trainer

import textalign
from shared.errors import UserError

NAMES = ("OnlineDPO", "XPO", "NashMD")
TIMES = ("time/", "tokens_per_second/", "train_", "eval_runtime", "eval_samples_per", "eval_steps_per")


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def noisy(completion_ids, **_):
    return [random.random() + len(ids) / 6 for ids in completion_ids]


def run(name, model_path, folder, resume=None, **options):
    options = {"reward": noisy, "rows": questions(10), "learning_rate": 5e-3, "save_total_limit": None, **options}
    options |= {"save_strategy": "steps", "beta": [0.3, 0.1]}
    trainer = pairs_trainer(name, model_path, folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


ROUNDS = {
    "OnlineDPO": {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 9},
    "XPO": {"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 2},
    "NashMD": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "mixture_coef": [0.2, 0.7]},
}


@pytest.mark.parametrize(("name", "at"), [("OnlineDPO", 5), ("XPO", 2), ("NashMD", 2)])
def test_a_run_goes_on_bit_for_bit(name, at, model_path, tmp_path):
    """In the middle of a round, where rounds are longer than a step."""
    options = {"save_steps": at, "sync_ref_model": True, "ref_model_sync_steps": 2, **ROUNDS[name]}
    whole = run(name, model_path, tmp_path, **options)
    checkpoint = tmp_path / f"checkpoint-{at}"
    state = torch.load(checkpoint / "online-0.pt", weights_only=True)
    assert ("buffer" in state) == (name != "NashMD")
    if name != "NashMD":
        kept = torch.stack(state["buffer"]["columns"]["preferred"])
        assert state["buffer"]["cursor"] > 0 and torch.allclose(kept[0::2] + kept[1::2], torch.ones(len(kept) // 2))
    random.seed(99)  # as another process would have it
    torch.manual_seed(99)
    after = run(name, model_path, tmp_path, resume=str(checkpoint), **options)
    for (key, one), two in zip(whole.model.state_dict().items(), after.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), key

    def plain(trainer):
        logs = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        return [{k: v for k, v in entry.items() if not k.startswith(TIMES)} for entry in logs]

    assert plain(after) == plain(whole)


def test_the_best_checkpoint_is_kept_and_the_report_written(model_path, tmp_path):
    trainer = pairs_trainer(
        "OnlineDPO",
        model_path,
        tmp_path,
        eval_dataset={"first": questions(3), "second": questions(2)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        eval_answers=2,
        max_steps=3,
        log_completions=True,
    )
    trainer.train()
    assert trainer.state.best_metric == max(history(trainer, "eval_first_reward"))
    assert trainer.report.before.keys() == trainer.report.after.keys() == {"even"}
    rows = trainer.report.rollouts[0].rows
    assert len(rows) == 8 and all(0 <= float(row.extra["preferred"]) <= 1 for row in rows)
    assert (tmp_path / "report" / "index.html").is_file()


# ---- Options -------------------------------------------------------------------------------------------------------


def test_names_of_other_libraries(tmp_path):
    base = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2}
    args = textalign.OnlineDPOConfig(max_new_tokens=53, reward_model_path="org/rm", loss_type="ipo", beta=0.2, **base)
    assert args.max_completion_length == 53 and args.reward_funcs == ["org/rm"] and args.loss_type == ["ipo"]
    again = textalign.OnlineDPOConfig(**args.chosen())
    assert again.reward_funcs == ["org/rm"] and again.beta == 0.2
    both = textalign.OnlineDPOConfig(max_new_tokens=53, max_completion_length=20, **base)
    assert (both.max_completion_length, both.max_new_tokens) == (20, 53)
    assert textalign.OnlineDPOConfig(**base).max_completion_length == 64
    nash = textalign.NashMDConfig(mixture_coef=[0.1, 0.9], beta=[0.1], missing_eos_penalty=1.0, top_p=0.9, **base)
    assert nash.mixture_coef == [0.1, 0.9] and textalign.XPOConfig(alpha=[1e-5, 0.0], **base).alpha == [1e-5, 0.0]
    assert nash.run_name_stem == "nash_md"


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("textalign.online_preference.load_text_model", load)


WRONG = [
    (NAMES, {"reward": None}, "Nothing says which completion is better: give reward_funcs"),
    (NAMES, {"num_generations": 4}, "num_generations 4: must be 2, since pairs"),
    (NAMES, {"per_device_train_batch_size": 3}, "per_device_train_batch_size 3: must be even. It counts samples"),
    (NAMES, {"beta": -0.1}, "beta -0.1: must be at least 0"),
    (NAMES, {"beta": []}, r"beta \[\]: must be at least 0, one number or one for each epoch"),
    (NAMES, {"missing_eos_penalty": -1.0}, "missing_eos_penalty -1.0: must be at least 0"),
    (NAMES, {"max_length": 512}, "max_length is not an option of .*Config. Give max_prompt_length"),
    (NAMES, {"reward_model_path": "a/b", "reward_funcs": ["c"]}, "name all rewards in reward_funcs"),
    (NAMES, {"judge": "pair_rm"}, "judge pair_rm: that model is not run here. Give a reward model"),
    (NAMES, {"judge": "acuracy_reward"}, "There is no reward 'acuracy_reward'.*Did you mean accuracy_reward"),
    (NAMES, {"judge": "adapter:a/b"}, "judge adapter:a/b: an adapter is run on the policy.*Give it as reward_funcs"),
    (NAMES, {"judge": lambda completions, colour: []}, "takes 'colour', and the rows have no such column"),
    (NAMES, {"judge": 3}, "judge is a int: give an object with a method judge"),
    (NAMES, {"judge": even, "missing_eos_penalty": 1.0}, "missing_eos_penalty: there is a judge"),
    (NAMES, {"judge": even, "reward_weights": [1.0]}, "reward_weights: there is a judge"),
    (NAMES, {"reward_model": "a/b"}, "reward_model is not an option of .*Config. Give its folder"),
    (("OnlineDPO", "XPO"), {"loss_type": "sigmod"}, "Unknown preference loss 'sigmod'.*Did you mean 'sigmoid'"),
    (("OnlineDPO", "XPO"), {"beta": 0.0}, "beta must be a positive number"),
    (("XPO",), {"alpha": -1.0}, "alpha -1.0: must be at least 0"),
    (("XPO", "NashMD"), {"use_vllm": True}, "use_vllm: half of the completions are written by"),
    (("NashMD",), {"mixture_coef": 1.5}, "mixture_coef 1.5: must be from 0 to 1"),
    (("NashMD",), {"mixture_coef": [0.1, -0.1]}, "mixture_coef .*: must be from 0 to 1"),
    (("NashMD",), {"num_iterations": 2}, "num_iterations 2: must be 1. Nash-MD's gradient"),
    (("NashMD",), {"steps_per_generation": 2}, "steps_per_generation 2: must divide gradient_accumulation_steps 1"),
    (("NashMD",), {"loss_type": "ipo"}, "loss_type is not an option of NashMDConfig. Leave it out"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"), [(name, options, told) for names, options, told in WRONG for name in names]
)
def test_options_that_cannot_work(name, options, message, model_path, tmp_path, unread):
    options = {"reward": even, **options} if "judge" not in options else {"reward": None, **options}
    with pytest.raises(UserError, match=message):
        pairs_trainer(name, model_path, tmp_path, **options)


def test_arguments_of_other_libraries(model_path, tmp_path, unread):
    args = textalign.OnlineDPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2)
    for argument, told in {
        "reward_model": "It is called reward_funcs",
        "reward_processing_class": "It is called reward_processing_classes",
        "tokenizer": "It is called processing_class",
        "data_collator": "Leave it out",
    }.items():
        with pytest.raises(UserError, match=f"takes no argument {argument}. {told}"):
            textalign.OnlineDPOTrainer(model_path, args=args, train_dataset=questions(), **{argument: 1})


@pytest.mark.parametrize("fails", ["raise", "skip"])
def test_a_judge_that_fails(fails, model_path, tmp_path):
    class Down(textalign.BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True):
            if any(" 1?" in prompt for prompt in prompts):
                raise RuntimeError("the judge is down")
            return [len(prompt) % 2 for prompt in prompts]

    options = {"judge": Down(), "reward": None, "rows": questions(4), "on_reward_error": fails, "max_steps": 2}
    trainer = pairs_trainer("OnlineDPO", model_path, tmp_path, shuffle_dataset=False, **options)
    if fails == "raise":
        with pytest.raises(UserError, match=r"Reward win_rate failed on row 1 .*RuntimeError: the judge is down"):
            trainer.train()
        return
    trainer.train()
    unknown = torch.stack(trainer.buffer.rollout.columns["preferred"]).isnan().tolist()
    assert unknown == [False, False, True, True, False, False, False, False]
    assert history(trainer, "frac_rows_trained")[0] == 0.75


def test_a_server_writes_and_the_reference_is_judged_against_here(model_path, tmp_path):
    with FakeServer(model_path) as server:
        trainer = pairs_trainer(
            "OnlineDPO",
            model_path,
            tmp_path,
            reward=None,
            judge=even,
            eval_dataset=questions(2),
            use_vllm=True,
            vllm_server_base_url=server.url,
            max_steps=2,
        )
        trainer.train()
        assert 0 <= trainer.evaluate()["eval_reward"] <= 1 and server.seen("/v1/completions")
