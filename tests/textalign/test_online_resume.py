"""A run that stops in the middle of a round and goes on is the run that did not stop, bit for bit."""

import json
import random

import pytest
import torch
from tiny_online import make, questions

from shared.errors import UserError

TIMES = ("time/", "tokens_per_second/", "train_", "eval_runtime", "eval_samples_per", "eval_steps_per")


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def noisy(completion_ids, trainer_state, **_):
    """Draws from Python's random state; every third group or so has no spread."""
    kind = random.random()
    return [0.5 if kind < 0.3 else random.random() + len(ids) / 6 for ids in completion_ids]


def run(name, model_path, folder, resume=None, **options):
    options = {
        "reward": noisy,
        "rows": questions(10),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 9,
        "learning_rate": 5e-3,
        "sample_every": 1,
        **options,
    }
    trainer = make(name, model_path, folder, **options)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def plain(trainer):
    """The log without what a clock says."""
    return [
        {name: value for name, value in entry.items() if not name.startswith(TIMES)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def resumed_is_whole(name, model_path, tmp_path, at, **options):
    saving = {"save_strategy": "steps", "save_steps": at, "save_total_limit": None}
    whole = run(name, model_path, tmp_path / "cut", **saving, **options)
    checkpoint = tmp_path / "cut" / f"checkpoint-{at}"
    state = torch.load(checkpoint / "online-0.pt", weights_only=True)
    random.seed(99)  # as another process would have it
    torch.manual_seed(99)
    tables = json.loads((whole.report.directory / "report.json").read_text())["rollouts"]
    after = run(name, model_path, tmp_path / "cut", resume=checkpoint, **saving, **options)
    for (key, one), two in zip(whole.model.state_dict().items(), after.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    assert plain(after) == plain(whole)
    assert json.loads((after.report.directory / "report.json").read_text())["rollouts"] == tables
    return state, whole, after


@pytest.mark.parametrize(("accumulation", "at"), [(1, 5), (2, 3)])
def test_grpo_goes_on_in_the_middle_of_a_round(accumulation, at, model_path, tmp_path):
    state, _, after = resumed_is_whole(
        "GRPO",
        model_path,
        tmp_path,
        at,
        gradient_accumulation_steps=accumulation,
        dynamic_sampling=True,
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.5,
        use_adaptive_entropy=True,
        entropy_coef=0.01,
        entropy_target=9.0,
    )
    assert 0 < state["buffer"]["cursor"] < 8
    assert len(after.report.rollouts) >= 2


@pytest.mark.parametrize("at", [3])
def test_rloo_goes_on_in_the_middle_of_a_round(at, model_path, tmp_path):
    state, *_ = resumed_is_whole(
        "RLOO", model_path, tmp_path, at, num_generations=4, normalize_advantages=True, gradient_accumulation_steps=1
    )
    assert state["buffer"]["cursor"] == at


def test_rounds_that_end_within_a_step_go_on(model_path, tmp_path):
    resumed_is_whole(
        "GRPO", model_path, tmp_path, 2, steps_per_generation=3, gradient_accumulation_steps=2, max_steps=6
    )


def test_an_adapter_with_dropout_goes_on(model_path, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    resumed_is_whole("GRPO", model_path, tmp_path, 3, peft_config=lora, disable_dropout=False, beta=0.05, max_steps=6)


def test_between_two_rounds(model_path, tmp_path):
    state, *_ = resumed_is_whole("GRPO", model_path, tmp_path, 8, max_steps=10)
    assert "buffer" not in state and state["prompts"] == 4


def test_a_sampler_that_does_not_tell_goes_on(model_path, tmp_path, monkeypatch):
    """Old log-probabilities are then the trainer's own, some known only once their first step is taken."""
    from shared.runtime.generation import InProcessGenerator

    plain = InProcessGenerator.generate

    def silent(*args, **kwargs):
        done = plain(*args, **kwargs)
        done.logp = None
        return done

    monkeypatch.setattr(InProcessGenerator, "generate", silent)
    state, *_ = resumed_is_whole("GRPO", model_path, tmp_path, 1, gradient_accumulation_steps=2, max_steps=5)
    assert all(value is not None for value in state["buffer"]["old"])


class Failing:
    """A reward that fails at its call of this number; at 0 never."""

    __name__ = "failing"

    def __init__(self, at):
        self.left = at

    def __call__(self, completion_ids, **_):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("the judge is down")
        return [float(len(ids)) + ids[0] % 3 for ids in completion_ids]


@pytest.mark.parametrize(
    ("shape", "call", "step"),
    [
        ({"gradient_accumulation_steps": 1, "num_iterations": 1}, 2, 4),  # a step begins with a round
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, 4, 4),  # and in the middle of one
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 3, "dynamic_sampling": True}, 4, None),
    ],
)
def test_a_reward_that_fails_costs_no_finished_step(shape, call, step, model_path, tmp_path, capsys):
    """And the draw that failed is repeated whole: the same prompts, the same samples, the same figures."""
    options = {"num_iterations": 1, "logging_steps": 3, "beta": 0.1, **shape}
    whole = run("GRPO", model_path, tmp_path / "whole", reward=Failing(0), **options)
    with pytest.raises(UserError, match="the judge is down"):
        run("GRPO", model_path, tmp_path / "cut", reward=Failing(call), **options)
    (checkpoint,) = (tmp_path / "cut").glob("checkpoint-*")
    done = int(checkpoint.name.split("-")[1])
    assert f"Saved at step {done}. Go on with" in capsys.readouterr().out
    assert done == step if step else 0 < done < 9
    after = run("GRPO", model_path, tmp_path / "cut", resume=checkpoint, reward=Failing(0), **options)
    for (key, one), two in zip(whole.model.state_dict().items(), after.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    assert after.prompts.cursor == whole.prompts.cursor
    for name in ("reward", "kl", "completions/mean_length"):
        assert [e[name] for e in plain(after) if name in e] == [e[name] for e in plain(whole) if name in e], name


def test_an_error_before_anything_is_trained_leaves_the_checkpoint(model_path, tmp_path):
    run("GRPO", model_path, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    kept = (tmp_path / "checkpoint-1" / "online-0.pt").read_bytes()
    with pytest.raises(UserError, match=r"row \d is not in the data set"):
        run("GRPO", model_path, tmp_path, resume=tmp_path / "checkpoint-1", rows=questions(1), max_steps=3)
    assert (tmp_path / "checkpoint-1" / "online-0.pt").read_bytes() == kept
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_between_two_logs(model_path, tmp_path):
    """Figures are those of all steps since the last log, also of those before the checkpoint."""
    options = {"logging_steps": 4, "max_steps": 8, "beta": 0.1}
    whole = run("GRPO", model_path, tmp_path / "whole", **options)
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    run("GRPO", model_path, tmp_path / "cut", **saving, **options)
    after = run("GRPO", model_path, tmp_path / "cut", resume=tmp_path / "cut" / "checkpoint-3", **saving, **options)
    names = {name for name in plain(whole)[0] if name not in ("loss", "grad_norm", "step", "epoch")}
    assert {"kl", "entropy", "reward"} <= names
    for name in names:
        assert plain(after)[0][name] == pytest.approx(plain(whole)[0][name], rel=1e-6), name


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_generations": 8}, "num_generations was 4: the round under way is left"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size was 4: the round"),
        ({"steps_per_generation": 2}, "steps_per_generation was 4: the round"),
    ],
)
def test_a_round_of_another_shape_is_sampled_anew(changed, told, model_path, tmp_path, capsys):
    """Else its rows would be taken for those of other prompts."""
    whole = run("GRPO", model_path, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    state = torch.load(tmp_path / "checkpoint-1" / "online-0.pt", weights_only=True)
    assert state["buffer"]["cursor"] == 1
    drawn = []

    def seen(prompts, completion_ids, **_):
        drawn.append([prompt[-1]["content"] if isinstance(prompt, list) else prompt for prompt in prompts])
        return [float(len(ids)) for ids in completion_ids]

    after = run("GRPO", model_path, tmp_path, resume=tmp_path / "checkpoint-1", reward=seen, max_steps=2, **changed)
    assert told in capsys.readouterr().out
    assert after.buffer.born == 1 and drawn
    size = after.args.num_generations
    assert all(len(set(group[at : at + size])) == 1 for group in drawn for at in range(0, len(group), size))
    assert after.prompts.cursor == whole.prompts.cursor + after.local_rows // size


def test_what_cannot_be_gone_on_with(model_path, tmp_path):
    run("GRPO", model_path, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(UserError, match=r"row \d is not in the data set"):
        run("GRPO", model_path, tmp_path, resume=checkpoint, rows=questions(1), max_steps=3)
    (checkpoint / "online-0.pt").unlink()
    with pytest.raises(UserError, match="was not written by an online trainer"):
        run("GRPO", model_path, tmp_path, resume=checkpoint, max_steps=3)
