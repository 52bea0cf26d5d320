"""The online trainers on text: what they learn, what an evaluation says, and what a run tells of itself."""

import json
import random

import pytest
import torch
from tiny_online import Recorded, even, history, make, questions

import textalign
from shared.errors import UserError

METRICS = {
    "loss",
    "reward",
    "reward_std",
    "rewards/even/mean",
    "rewards/even/std",
    "frac_reward_zero_std",
    "frac_rows_trained",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "entropy",
    "kl",
    "time/generation",
    "time/rewards",
    "time/rewards/even",
    "time/log_probs",
    "time/update",
    "tokens_per_second/generation",
    "tokens_per_second/update",
}


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


@pytest.mark.parametrize(
    ("name", "chat", "options"),
    [
        ("GRPO", False, {}),
        ("GRPO", True, {"recipe": "gspo", "steps_per_generation": 2, "gradient_accumulation_steps": 2}),
        ("GRPO", True, {"recipe": "dr_grpo", "num_iterations": 2}),
        ("RLOO", False, {"beta": 0.01}),
        ("RLOO", True, {"beta": 0.01, "steps_per_generation": 2}),
    ],
)
def test_the_reward_rises(name, chat, options, model_path, tmp_path):
    trainer = make(
        name,
        model_path,
        tmp_path,
        rows=questions(chat=chat),
        max_steps=30,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        **options,
    )
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[:2]) / 2 < 0.6
    assert sum(rewards[-3:]) / 3 > 0.75


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_an_adapter_learns_and_its_base_stays(name, model_path, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["v_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    options = {"peft_config": lora, "beta": 0.02, "per_device_train_batch_size": 16}
    trainer = make(
        name, model_path, tmp_path, learning_rate=3e-2, lr_scheduler_type="constant", max_steps=25, **options
    )
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    trainer.train()
    rewards, kl = history(trainer, "reward"), history(trainer, "kl")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert abs(kl[0]) < 1e-4 and kl[-1] > 1e-3, "the base is the reference"
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").is_file()


def test_the_log_says_what_is_to_be_watched(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, beta=0.1)
    trainer.train()
    first = trainer.state.log_history[0]
    missing = METRICS - first.keys()
    assert not missing, missing
    assert first["ratio/mean"] == pytest.approx(1.0, abs=1e-5) and first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert 4 < first["entropy"] < 6, "of some 330 tokens, nearly uniform"
    assert 0 <= first["completions/min_length"] <= first["completions/mean_length"] <= 6
    assert history(trainer, "kl")[-1] > 0
    assert trainer.state.log_history[1]["epoch"] == pytest.approx(4 / 8)


def test_dropout_is_off_so_that_the_first_ratio_is_one(model_path, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, attention_dropout=0.5)
    trainer = make("GRPO", model_path, tmp_path, model=model, steps_per_generation=2, learning_rate=0.0, max_steps=2)
    trainer.train()
    assert history(trainer, "ratio/mean") == pytest.approx([1.0, 1.0], abs=1e-5)


# ---- How long a run is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 8),  # 16 prompts, 2 a step
        ({"num_train_epochs": 0.5}, 4),
        ({"num_iterations": 2}, 16),  # each step uses one new prompt
        ({"gradient_accumulation_steps": 3}, 3),  # 6 prompts a step: 2.67, rounded up
        ({"steps_per_generation": 4}, 8),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 16),
    ],
)
def test_steps_of_an_epoch(options, steps, model_path, tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 1, **options}
    trainer = make("GRPO", model_path, tmp_path, rows=questions(16), **options)
    assert trainer.steps_in_all == steps
    if steps == 8 and len(options) == 2:
        trainer.train()
        assert trainer.prompts.cursor == 16 and trainer.state.epoch == 1.0


def test_a_stream_with_max_steps(model_path, tmp_path):
    from datasets import IterableDataset

    read = []

    def rows():
        for row in questions(200):
            read.append(row["number"])
            yield row

    stream = IterableDataset.from_generator(rows)
    trainer = make("GRPO", model_path, tmp_path, rows=stream, max_steps=3, shuffle_dataset=False)
    trainer.train()
    assert trainer.state.global_step == 3 and max(read) < 100, "only what the run can draw is read"
    first = trainer.report.rollouts[0].rows
    assert [row.prompt for row in first] == [questions(2)[at]["prompt"] for at in (0, 0, 0, 0, 1, 1, 1, 1)]


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def test_an_evaluation_by_hand(model_path, tmp_path):
    rows = questions(5)
    trainer = make(
        "GRPO",
        model_path,
        tmp_path,
        reward=[lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids], even],
        reward_weights=[1.0, 0.0],
        eval_dataset=rows,
        num_generations_eval=3,
        pass_reward=4.0,
        per_device_eval_batch_size=2,
    )
    trainer.actor.engine = Recorded()
    found = trainer.evaluate()
    engine, lengths, shares = Recorded(), [], []
    for row in rows:
        inputs = trainer.actor.encoder.inputs(trainer.actor.encoder.prompts([row]))
        ids = engine.generate(None, inputs, 3, None).ids
        lengths.append([len(each) for each in ids])
        shares += even([each.tolist() for each in ids])
    lengths = torch.tensor(lengths, dtype=torch.float)
    passed = (lengths >= 4).float()
    assert found["eval_reward"] == found["eval_completions/mean_length"] == pytest.approx(lengths.mean().item())
    assert found["eval_completions/clipped_ratio"] == pytest.approx((lengths == 6).float().mean().item())
    assert found["eval_rewards/even/mean"] == pytest.approx(sum(shares) / 15)
    assert found["eval_pass@1"] == pytest.approx(passed.mean().item())
    assert found["eval_pass@3"] == pytest.approx(passed.amax(1).mean().item())
    assert 0 < found["eval_pass@1"] < found["eval_pass@3"]


def test_an_evaluation_says_the_same_twice_and_leaves_the_run_as_it_is(model_path, tmp_path):
    def noisy(completion_ids, **_):
        return [share + random.random() for share in even(completion_ids)]

    def fresh(folder, **options):
        return make("GRPO", model_path, folder, reward=noisy, eval_dataset=questions(3), **options)

    def run(folder, **options):
        trainer = fresh(folder, steps_per_generation=2, **options)
        before = trainer.evaluate() if options else None
        trainer.train()
        return trainer, before

    plain, _ = run(tmp_path / "plain")
    watched, before = run(tmp_path / "watched", eval_strategy="steps", eval_steps=1)
    assert before["eval_reward"] == fresh(tmp_path / "again").evaluate()["eval_reward"]
    assert watched.evaluate()["eval_reward"] == watched.evaluate()["eval_reward"]
    assert len(history(watched, "eval_reward")) >= 4
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_has_its_own_sampling(model_path, tmp_path):
    seen = []

    def spread(completion_ids, **_):
        seen.append([len(set(map(tuple, completion_ids[at : at + 4]))) for at in range(0, len(completion_ids), 4)])
        return even(completion_ids)

    options = {"eval_dataset": questions(4), "reward": spread, "per_device_eval_batch_size": 16}
    greedy = make("GRPO", model_path, tmp_path / "a", eval_temperature=0.0, **options)
    figures = greedy.evaluate()
    assert seen == [[1, 1, 1, 1]] and figures["eval_pass@1"] == figures["eval_pass@4"]
    make("GRPO", model_path, tmp_path / "b", **options).evaluate()
    assert min(seen[1]) > 1
    make("GRPO", model_path, tmp_path / "c", eval_top_k=1, **options).evaluate()
    assert seen[2] == [1, 1, 1, 1]


def test_the_best_checkpoint_is_that_of_the_highest_reward(model_path, tmp_path):
    figures = iter([0.2, 0.9, 0.4, 0.1])

    class Watched(textalign.GRPOTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_reward"] = next(figures)
            weights.append({k: v.clone() for k, v in self.model.state_dict().items()})
            return output

    weights = []
    trainer = make(
        "GRPO",
        model_path,
        tmp_path,
        trainer=Watched,
        eval_dataset=questions(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.9 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(torch.equal(value, weights[1][name]) for name, value in trainer.model.state_dict().items())
    assert not torch.equal(weights[1]["lm_head.weight"], weights[3]["lm_head.weight"])


def test_several_held_out_sets(model_path, tmp_path):
    sets = {"easy": questions(2), "hard": questions(3, chat=False)}
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options = {"eval_dataset": sets, "load_best_model_at_end": True, "eval_answers": 2, **saving}
    trainer = make("GRPO", model_path, tmp_path / "a", **options)
    trainer.train()
    assert len(history(trainer, "eval_easy_reward")) == len(history(trainer, "eval_hard_reward")) == 2
    assert trainer.state.best_metric == max(history(trainer, "eval_easy_reward")), "of the first set"
    assert trainer.report.before and trainer.report.after
    other = make("GRPO", model_path, tmp_path / "b", metric_for_best_model="hard_reward", **options)
    other.train()
    assert other.state.best_metric == max(history(other, "eval_hard_reward"))
    with pytest.raises(UserError, match="metric_for_best_model acuracy: .* there are: .*easy_reward"):
        make("GRPO", model_path, tmp_path / "c", metric_for_best_model="acuracy", **options).train()


def test_answers_before_and_after_by_kind(model_path, tmp_path):
    rows = [{**row, "kind": "odd" if row["number"] % 2 else "plain", "solution": "7"} for row in questions(4)]
    options = {"eval_dataset": rows, "eval_answers": 4, "max_steps": 25, "per_device_train_batch_size": 16}
    trainer = make("GRPO", model_path, tmp_path, **options)
    trainer.train()
    before, after = trainer.report.before, trainer.report.after
    assert before.keys() == after.keys() == {"even", "even/odd", "even/plain"}
    assert after["even"] == pytest.approx((after["even/odd"] + after["even/plain"]) / 2)
    assert after["even"] > before["even"]
    sample = trainer.report.samples[0]
    assert sample.question == rows[0]["prompt"] and sample.before is not None and sample.after is not None
    assert sample.answer == "7" and not sample.verbatim
    assert sample.columns["kind"] == "plain" and 0 <= float(sample.columns["even of the last answer"]) <= 1


# ---- The report ----------------------------------------------------------------------------------------------------


def test_tables_of_samples_are_kept_every_so_many_steps(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, sample_every=2, max_steps=5, num_completions_to_print=6)
    trainer.train()
    tables = json.loads((tmp_path / "report" / "report.json").read_text())["rollouts"]
    assert [table["step"] for table in tables] == [1, 3, 5]
    rows = [row for prompt in tables[0]["prompts"] for row in prompt["completions"]]
    assert [len(prompt["completions"]) for prompt in tables[0]["prompts"]] == [4, 2]
    assert tables[0]["prompts"][0]["prompt"].startswith("What colour is")
    assert all(row["rewards"] == {"even": row["reward"]} and 1 <= row["tokens"] <= 6 for row in rows)
    assert sum(row["advantage"] for row in rows[:4]) == pytest.approx(0, abs=1e-4)
    assert sum(row["reward"] for row in rows[:4]) > 0


def test_rounds_that_begin_between_the_tables_steps(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, sample_every=2, max_steps=7, steps_per_generation=3)
    trainer.train()
    assert [table.step for table in trainer.report.rollouts] == [1, 4, 7]
    silent = make("GRPO", model_path, tmp_path / "none", sample_every=0, max_steps=1)
    silent.train()
    assert silent.report.rollouts == []


def test_samples_are_printed_with_the_log(model_path, tmp_path, capsys):
    options = {"steps_per_generation": 2, "logging_steps": 2, "log_completions": True}
    make("GRPO", model_path, tmp_path, **options).train()
    printed = capsys.readouterr().out
    assert printed.count("Rollouts at step 1") == printed.count("Rollouts at step 3") == 1
    assert "advantage" in printed and "What colour is" in printed
