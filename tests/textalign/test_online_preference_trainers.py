"""Online DPO, XPO and Nash-MD: a step by hand, what they learn, who writes, how a step is cut, what judges say."""

import math

import pytest
import torch
from tiny_online import Recorded, even, history, perturb, questions, same, steps
from tiny_preference import TwoWriters, pairs_trainer

from shared.policies.prefix import evaluating

NAMES = ("OnlineDPO", "XPO", "NashMD")


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


def engine(name):
    return Recorded() if name == "OnlineDPO" else TwoWriters()


def moved(name, model_path, folder, **options):
    """A trainer whose policy is no longer its reference, and whose samples are fixed."""
    trainer = pairs_trainer(name, model_path, folder, **options)
    perturb(trainer.model)
    trainer.actor.engine = engine(name)
    return trainer


def log_probs(model, prompt, completion, temperature=0.9):
    """`(n,)` by a plain forward over the whole row."""
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, completion[:, None]).squeeze(1)


def by_hand(trainer, pair_loss):
    """The mean over the round's pairs of `pair_loss(own log-probs, reference's, P(first is better))`, each of two."""
    rollout, model, reference = trainer.buffer.rollout, trainer.model, trainer.reference.model
    losses = []
    for at in range(0, rollout.rows, 2):
        prompt = rollout.actions.prompts[at // 2].ids
        own = [log_probs(model, prompt, ids) for ids in rollout.actions.ids[at : at + 2]]
        with torch.no_grad():
            ref = [log_probs(reference, prompt, ids) for ids in rollout.actions.ids[at : at + 2]]
        first, second = (even([ids.tolist()])[0] for ids in rollout.actions.ids[at : at + 2])
        if first != second or pair_loss is nash:
            losses.append(pair_loss(own, ref, 1 / (1 + math.exp(second - first))))
    assert len(losses) > 1
    return sum(losses) / len(losses)


def dpo(own, ref, chance):
    first, second = (a.sum() - b.sum() for a, b in zip(own, ref, strict=True))
    return -torch.nn.functional.logsigmoid(0.3 * (first - second if chance > 0.5 else second - first))


def ipo(own, ref, chance):
    first, second = ((a - b).mean() for a, b in zip(own, ref, strict=True))
    return ((first - second if chance > 0.5 else second - first) - 1 / 0.6) ** 2


def xpo(own, ref, chance):
    return dpo(own, ref, chance) + 0.05 * own[1].sum()


def nash(own, ref, chance):
    held = (own[0] - ref[0]).detach().flip(0).cumsum(0).flip(0)
    return ((0.3 * held - (chance - 0.5)) * own[0]).sum()


CASES = {
    "dpo": ("OnlineDPO", dpo, {}),
    "ipo": ("OnlineDPO", ipo, {"loss_type": "ipo"}),
    "xpo": ("XPO", xpo, {"alpha": 0.05}),
    "nash": ("NashMD", nash, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_by_hand(case, model_path, tmp_path):
    name, pair_loss, options = CASES[case]
    trainer = moved(name, model_path, tmp_path, beta=0.3, **options)
    model = trainer.model
    ((loss, gradients),) = steps(trainer, 1, rate=0.0)
    model.zero_grad()
    with torch.enable_grad():
        expected = by_hand(trainer, pair_loss)
        expected.backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    same([(loss, gradients)], [(expected.item(), plain)])


def test_supervised_terms_are_means_over_the_better_ones_tokens(model_path, tmp_path):
    trainer = moved("OnlineDPO", model_path, tmp_path, beta=0.3, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    ((loss, _),) = steps(trainer, 1, rate=0.0)
    better = []

    def chosen(own, ref, chance):
        better.append(own[0 if chance > 0.5 else 1])
        return dpo(own, ref, chance)

    with torch.no_grad():
        expected = by_hand(trainer, chosen)
    tokens = torch.cat(better)
    assert loss == pytest.approx((expected - 0.5 * tokens.mean()).item(), rel=1e-4)
    assert trainer._drain_metrics()["loss/sft"] == pytest.approx(-tokens.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_depend_on_how_it_is_cut(name, model_path, tmp_path):
    """Two of eight pairs have no better answer, so that micro-batches count unlike numbers of pairs."""

    def some(number, completion_ids, **_):
        return [0.5 if at in (2, 5) else share for at, share in zip(number, even(completion_ids), strict=True)]

    def run(size, **options):
        folder = tmp_path / f"{size}{len(options)}"
        options = {"reward": some, "per_device_train_batch_size": size, **options}
        options["gradient_accumulation_steps"] = 16 // size
        return steps(moved(name, model_path, folder, beta=0.3, shuffle_dataset=False, **options), 2)

    whole = run(16)
    same(whole, run(4))
    same(whole, run(2))
    same(whole, run(8, share_prefix=False))
    if name == "NashMD":
        same(whole, run(4, steps_per_generation=2))


@pytest.mark.parametrize("name", NAMES)
def test_several_steps_on_a_round(name, model_path, tmp_path):
    """The reference's figures are kept for the further ones, and the same."""
    if name == "NashMD":
        pytest.skip("is right on policy alone")
    options = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.3}
    kept = moved(name, model_path, tmp_path / "a", **options)
    found = steps(kept, 4)
    rollout = kept.buffer.rollout
    decided = torch.stack(rollout.columns["preferred"]) != 0.5
    assert decided.any() and [value is not None for value in rollout.ref] == decided.tolist()
    fresh = moved(name, model_path, tmp_path / "b", **options)
    fresh._remember = lambda *_: None
    same(found, steps(fresh, 4))


# ---- Who writes ----------------------------------------------------------------------------------------------------


def first_round(trainer):
    trainer.model_wrapped = trainer.model
    trainer.next_micro_batch()
    return trainer.buffer.rollout


@torch.no_grad()
def mixed(model, reference, prompt, completion, share, temperature=0.9):
    """Log-probabilities under the product of the tempered softmaxes, token by token over the whole vocabulary."""
    row = torch.cat([prompt, completion])[None]
    chances = [
        (each(input_ids=row).logits[0, len(prompt) - 1 : -1] / temperature).softmax(-1).double()
        for each in (model, reference)
    ]
    product = chances[0] ** (1 - share) * chances[1] ** share
    return (product / product.sum(-1, keepdim=True)).log().gather(1, completion[:, None]).squeeze(1).float()


@pytest.mark.parametrize(
    ("name", "share", "options"),
    [
        ("XPO", 1.0, {}),
        ("NashMD", 0.4, {"mixture_coef": 0.4}),
        ("NashMD", 0.0, {"mixture_coef": 0.0}),
        ("NashMD", 1.0, {"mixture_coef": 1.0}),
        ("NashMD", 0.5, {"ref_num_shared_layers": 1}),
    ],
)
def test_the_other_completion_is_the_mixtures(name, share, options, model_path, tmp_path):
    trainer = pairs_trainer(name, model_path, tmp_path, **options)
    perturb(trainer.model)
    rollout = first_round(trainer)
    with evaluating(trainer.model):
        for row, (ids, logp) in enumerate(zip(rollout.actions.ids, rollout.logp, strict=True)):
            prompt = rollout.actions.prompts[row // 2].ids
            part = share if row % 2 else 0.0
            expected = mixed(trainer.model, trainer.reference.model, prompt, ids, part)
            torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)
    assert rollout.actions.ids[0].tolist() != rollout.actions.ids[1].tolist()


def test_the_model_without_its_adapter_writes_too(model_path, tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_path).eval()
    for name, share in (("XPO", 1.0), ("NashMD", 0.5)):
        trainer = pairs_trainer(name, model_path, tmp_path / name, peft_config=lora)
        perturb(trainer.model, seed=2)
        rollout = first_round(trainer)
        with evaluating(trainer.model):
            for row, (ids, logp) in enumerate(zip(rollout.actions.ids, rollout.logp, strict=True)):
                prompt = rollout.actions.prompts[row // 2].ids
                expected = mixed(trainer.model, base, prompt, ids, share if row % 2 else 0.0)
                torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)
        trainer.train()
        assert history(trainer, "objective/kl")


def test_numbers_for_each_epoch(model_path, tmp_path):
    seen = []
    options = {"beta": [0.5, 0.2], "mixture_coef": [0.0, 0.25, 1.0], "per_device_train_batch_size": 16}
    trainer = pairs_trainer("NashMD", model_path, tmp_path, max_steps=4, **options)
    plain = trainer.reference_share
    trainer.reference_share = lambda: seen.append((plain(), trainer.in_this_epoch(trainer.args.beta))) or plain()
    trainer.train()
    assert seen == [(0.0, 0.5), (0.25, 0.2), (1.0, 0.2), (1.0, 0.2)]


# ---- What is learnt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("OnlineDPO", {"beta": 0.1, "steps_per_generation": 2}),
        ("XPO", {"beta": 0.1, "alpha": 1e-3}),
        ("NashMD", {"beta": 0.001}),
    ],
)
def test_held_out_prompts_are_answered_better(name, options, model_path, tmp_path):
    trainer = pairs_trainer(
        name,
        model_path,
        tmp_path,
        rows=questions(chat=True),
        eval_dataset=questions(6, chat=True),
        num_generations_eval=8,
        max_steps=25,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        logging_steps=5,
        **options,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    assert before < 0.6 and after > before + 0.2
    assert history(trainer, "rewards/margins")[-1] > 0 and history(trainer, "objective/kl")[-1] > 0.1
    if name != "OnlineDPO":
        assert history(trainer, "win_rate")[-1] > 0.55


METRICS = {
    "loss", "reward", "reward_std", "rewards/even/mean", "frac_reward_zero_std", "rewards/chosen", "rewards/rejected",
    "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "objective/kl", "objective/entropy",
    "objective/scores", "objective/scores_margin", "scores/chosen", "scores/rejected", "val/contain_eos_token",
    "completions/mean_length", "kl", "entropy", "time/generation", "time/update",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_log_says_what_is_to_be_watched(name, model_path, tmp_path):
    trainer = pairs_trainer(name, model_path, tmp_path, max_steps=2, per_device_train_batch_size=16)
    trainer.train()
    first = trainer.state.log_history[0]
    more = set() if name == "OnlineDPO" else {"win_rate", "rewards/probabilities", "val/other_contain_eos_token"}
    assert not (METRICS | more) - first.keys()
    assert first["kl"] == pytest.approx(0, abs=1e-5) and 4 < first["entropy"] < 6
    assert first["objective/scores_margin"] == pytest.approx(first["scores/chosen"] - first["scores/rejected"])
    assert first["scores/chosen"] > first["scores/rejected"] and first["rewards/accuracies"] == 0.5


def test_figures_of_a_pair_by_hand(model_path, tmp_path):
    trainer = moved("NashMD", model_path, tmp_path, beta=0.3)
    trainer.train()
    first, rollout = trainer.state.log_history[0], None
    again = moved("NashMD", model_path, tmp_path / "b", beta=0.3)
    rollout = first_round(again)
    model, reference = again.model, again.reference.model
    chosen, own = [], []
    with torch.no_grad():
        for row, ids in enumerate(rollout.actions.ids):
            prompt, other = rollout.actions.prompts[row // 2].ids, rollout.actions.ids[row ^ 1]
            ratio = (log_probs(model, prompt, ids) - log_probs(reference, prompt, ids)).sum().item()
            shares = even([ids.tolist(), other.tolist()])
            chosen += [0.3 * ratio] if shares[0] > shares[1] else []
            own += [] if row % 2 else [ratio]
    assert first["rewards/chosen"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-4)
    assert first["objective/kl"] == pytest.approx(sum(own) / len(own), abs=1e-4)


# ---- What decides --------------------------------------------------------------------------------------------------


def test_pairs_that_are_as_good_as_each_other_teach_nothing(model_path, tmp_path):
    trainer = moved("OnlineDPO", model_path, tmp_path, reward=lambda prompts, **_: [1.0] * len(prompts))
    ((loss, gradients),) = steps(trainer, 1)
    assert loss == 0 and all(not value.any() for value in gradients.values())
    assert trainer._noted["frac_reward_zero_std"] == [1.0] and trainer._noted["frac_rows_trained"] == [0.0]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_which_nothing_is_known_teach_nothing(name, model_path, tmp_path):
    trainer = moved(name, model_path, tmp_path, reward=lambda prompts, **_: [None] * len(prompts))
    ((loss, gradients),) = steps(trainer, 1)
    assert loss == 0 and gradients and all(value.eq(0).all() for value in gradients.values())


def test_a_reward_that_does_not_apply_leaves_its_pair_out(model_path, tmp_path):
    def some(number, completion_ids, **_):
        return [None if at == 1 else share for at, share in zip(number, even(completion_ids), strict=True)]

    for name in NAMES:
        trainer = moved(name, model_path, tmp_path / name, reward=some, rows=questions(4), shuffle_dataset=False)
        rollout = first_round(trainer)
        unknown = torch.stack(rollout.columns["preferred"]).isnan()
        assert unknown.tolist() == [False, False, True, True, False, False, False, False]
        trainer.train()


def test_completions_without_an_end_cost(model_path, tmp_path):
    options = {"rows": questions(4), "shuffle_dataset": False}
    plain = first_round(moved("OnlineDPO", model_path, tmp_path / "a", **options))
    held = first_round(moved("OnlineDPO", model_path, tmp_path / "b", missing_eos_penalty=5.0, **options))
    assert plain.truncated.any() and not plain.truncated.all()
    torch.testing.assert_close(held.total, plain.total - 5.0 * plain.truncated)
    torch.testing.assert_close(held.rewards, plain.rewards)
    chances = torch.stack(held.columns["preferred"])
    assert chances[0::2].tolist() == pytest.approx((held.total[0::2] - held.total[1::2]).sigmoid().tolist())


def test_pairs_that_teach_nothing_are_drawn_anew(model_path, tmp_path):
    def few(number, completion_ids, **_):
        return [share if at % 3 == 0 else 0.0 for at, share in zip(number, even(completion_ids), strict=True)]

    options = {"reward": few, "dynamic_sampling": True, "max_resampling": 6, "rows": questions(24)}
    trainer = pairs_trainer("OnlineDPO", model_path, tmp_path, max_steps=3, **options)
    trainer.train()
    assert max(history(trainer, "dynamic_sampling/rounds")) > 0
    assert sum(history(trainer, "frac_rows_trained")) / 3 > 0.8, "of which 0.3 or so were decided at first"


class LikesEven:
    """A judge; it counts what it is asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, 0

    def judge(self, prompts, completions, shuffle_order=True):
        assert all(isinstance(text, str) for pair in completions for text in pair) and len(prompts) == len(completions)
        self.asked += len(prompts)
        shares = [[self.share(text) for text in pair] for pair in completions]
        return [-1 if one == other else int(other > one) for one, other in shares]

    def share(self, text):
        ids = self.tokenizer(text)["input_ids"]
        return sum(token % 2 == 0 for token in ids) / max(1, len(ids))


@pytest.mark.parametrize("name", ["OnlineDPO", "NashMD"])
def test_a_judge_decides_and_rewards_are_measured(name, model_path, tmp_path):
    from transformers import AutoTokenizer

    judge = LikesEven(AutoTokenizer.from_pretrained(model_path))
    trainer = pairs_trainer(
        name,
        model_path,
        tmp_path,
        judge=judge,
        eval_dataset=questions(6),
        eval_answers=6,
        num_generations_eval=8,
        max_steps=20,
        learning_rate=2e-2,
        per_device_train_batch_size=32,
        beta=0.001 if name == "NashMD" else 0.1,
    )
    before = trainer.evaluate()
    assert before["eval_rewards/win_rate/mean"] == before["eval_reward"] == pytest.approx(0.5, abs=0.2)
    trainer.train()
    after = trainer.evaluate()
    assert judge.asked > 100 and after["eval_reward"] > 0.57
    assert after["eval_rewards/even/mean"] > before["eval_rewards/even/mean"]
    assert trainer.report.before["win_rate"] == 0.5, "the answers of model and reference are then the same"
    assert trainer.report.after["win_rate"] > 0.5
    assert "reward" not in trainer.state.log_history[0] and history(trainer, "rewards/even/mean")
