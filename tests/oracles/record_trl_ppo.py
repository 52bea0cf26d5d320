"""Records what trl's PPO, GKD, XPO and Nash-MD compute, for test_ppo_oracle.py to compare with.

    pip install trl==0.11.4 transformers==4.45.2 accelerate==0.34.2   # the last with the step interface
    python tests/oracles/record_trl_ppo.py                            # writes trl-0.11.4-ppo.json
    pip install trl==1.12.0 requests                                  # another environment
    python tests/oracles/record_trl_ppo.py                            # writes trl-1.12.0-ppo.json

Of 0.11.4: `compute_rewards`, `compute_advantages` and `loss` on tensors of the record, its controllers, its running
moments; and `step` itself, twice, on a small Llama with a value head and weights from `weights.fill`, with what went
in and out of these methods on the way. Of 1.12.0: PPOTrainer's `train`, which is one function, read through its frame
where it whitens advantages and where it calls backward; and its losses of distillation, XPO and Nash-MD.

Where trl differs from what the suite computes, and why:
- `whiten_rewards` of 0.11.4 leaves its mean at masked places, from where it leaks into the advantages of the row:
  recorded with rows of one length.
- `use_score_scaling` of 0.11.4 raises: its running deviation has become a float. The moments are recorded alone.
- 1.12.0 puts the score of a row that ends early on the place after its ending token, and gives that place a value:
  the recorded masks of values are one place longer than those of actions. The suite has it on the ending token.
- Nash-MD's estimate of the divergence's gradient counts a token's own log-ratio alone: the suite's credit "token".
- Means over a micro-batch depend on how a step is cut. One batch is recorded, where they agree.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from weights import fill

MODEL = {
    "vocab_size": 12, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS, WIDTH = [5, 3, 4], 5
OPTIONS = {"init_kl_coef": 0.3, "gamma": 0.9, "lam": 0.8, "cliprange": 0.15, "cliprange_value": 0.25, "vf_coef": 0.4}
REWARD_CASES = [{"kl_penalty": name} for name in ("kl", "abs", "mse", "full")]
ADVANTAGE_CASES = [{"whiten_rewards": False}, {"whiten_rewards": False, "gamma": 1.0, "lam": 0.95},
                   {"whiten_rewards": True}]  # fmt: skip
LOSS_CASES = [{}, {"cliprange": 0.5, "cliprange_value": 0.05, "vf_coef": 0.1}, {"ratio_threshold": 0.5}]
KL_STEPS = [(3.0, 64), (9.0, 64), (6.5, 256), (-2.0, 16), (6.0, 256)]
SCORES = [[0.5, -1.0, 2.0, 0.25], [3.0, 1.0], [-4.0, 0.5, 0.75, 1.5, 2.5]]
QUERIES = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [2, 3]]
RESPONSES = [[4, 5, 6, 1], [2, 1], [3, 9, 1], [10, 7, 5, 4, 8]]
STATS = ("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/approxkl", "ppo/policy/policykl",
         "ppo/policy/clipfrac", "ppo/val/error", "ppo/val/clipfrac", "objective/kl", "objective/kl_coef")  # fmt: skip


def digits(value):
    """Nine significant digits: float32 is read back as it was."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [digits(v) for v in value]
    return float(f"{float(value):.9g}") if not isinstance(value, bool | int) else value


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(95 + i): i for i in range(2, MODEL["vocab_size"])}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="c"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="c")


def causal(**weights):
    return fill(LlamaForCausalLM(LlamaConfig(**MODEL)), **weights)


def fixed():
    """One set of tensors that all the cases of 0.11.4 are computed from."""
    shape, rows = (len(LENGTHS), WIDTH), len(LENGTHS)
    full = [x.log_softmax(-1) for x in drawn(2, *shape, 4, seed=1)]
    logp, ref, old, advantages, values, vpreds, returns, rewards = drawn(8, *shape, seed=2)
    return {
        "logp": -1 + 0.2 * logp, "ref": -1 + 0.3 * ref, "old": -1 + 0.2 * old, "advantages": advantages,
        "values": values, "vpreds": values + 0.3 * vpreds, "returns": returns, "rewards": rewards,
        "scores": drawn(rows, seed=3), "full_logp": full[0], "full_ref": full[1],
    }  # fmt: skip


def bare(**options):
    """0.11.4's trainer without a model: enough for the methods that take tensors."""
    from trl import PPOConfig, PPOTrainer
    from trl.trainer.utils import AdaptiveKLController

    trainer = PPOTrainer.__new__(PPOTrainer)
    trainer.config = PPOConfig(**{**OPTIONS, **options})
    trainer.kl_ctl = AdaptiveKLController(trainer.config.init_kl_coef, 6, 10000)
    return trainer


def record_methods(tensors):
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    rewards, advantages, losses = [], [], []
    for case in REWARD_CASES:
        names = ("full_logp", "full_ref") if case["kl_penalty"] == "full" else ("logp", "ref")
        found, _, kl = bare(**case).compute_rewards(tensors["scores"], *(tensors[n] for n in names), mask)
        rewards.append({"options": case, "rewards": digits(found), "kl": digits(kl)})
    for case in ADVANTAGE_CASES:
        used = torch.ones_like(mask) if case["whiten_rewards"] else mask
        _, found, returns = bare(**case).compute_advantages(tensors["values"], tensors["rewards"], used)
        advantages.append({"options": case, "whole": case["whiten_rewards"], "advantages": digits(found),
                           "returns": digits(returns)})  # fmt: skip
    for case in LOSS_CASES:
        logp, vpreds = (tensors[name].clone().requires_grad_() for name in ("logp", "vpreds"))
        policy, value, stats = bare(**case).loss(
            tensors["old"], tensors["values"], tensors["full_logp"], vpreds, logp, mask, tensors["advantages"],
            tensors["returns"],
        )  # fmt: skip
        gradients = torch.autograd.grad(policy + value, (logp, vpreds))
        names = [name.removeprefix("ppo/") for name in STATS if name.startswith("ppo/")]
        losses.append({"options": case, "gradients": digits(list(map(torch.Tensor.tolist, gradients))),
                       "stats": {name: digits(stats[name]) for name in names}})  # fmt: skip
    return {"mask": digits(mask), "rewards": rewards, "advantages": advantages, "losses": losses}


def record_controllers():
    from trl.trainer.utils import AdaptiveKLController, RunningMoments

    control, coefficients = AdaptiveKLController(0.2, 6, 1000), []
    for kl, rows in KL_STEPS:
        control.update(kl, rows)
        coefficients.append(digits(float(control.value)))
    moments, seen = RunningMoments(SimpleNamespace(use_distributed=False)), []
    for batch in SCORES:
        moments.update(torch.tensor(batch))
        seen.append([digits(moments.mean), digits(moments.std)])
    return {"kl_steps": KL_STEPS, "coefficients": coefficients, "scores": SCORES, "moments": seen}


def record_steps(scores=((1.0, -0.5, 2.0, 0.25), (0.5, 3.0, -1.0, -4.0))):
    """Two calls of `step`, with all that goes in and out of its methods."""
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    wrap = AutoModelForCausalLMWithValueHead.from_pretrained
    policy, reference = wrap(causal(seed=1)), wrap(causal(seed=1, drift=0.5))
    for model in (policy, reference):
        fill(model.v_head, seed=7)
        model.v_head.dropout = torch.nn.Identity()
    config = PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=2, learning_rate=3e-3, score_clip=1.5, target=2.0,
                       horizon=100, **OPTIONS)  # fmt: skip
    trainer = PPOTrainer(config, policy, reference, tokenizer())
    seen = []

    def watched(name, kept_in, kept_out):
        method = getattr(trainer, name)

        def call(*arguments):
            found = method(*arguments)
            pairs = [*zip(kept_in, arguments, strict=True), *zip(kept_out, found, strict=True)]
            seen[-1].setdefault(name, []).append({k: digits(v.detach().clone()) for k, v in pairs if k})
            return found

        setattr(trainer, name, call)

    watched("compute_rewards", ("scores", "logp", "ref", "mask"), ("rewards", "", "kl"))
    watched("compute_advantages", ("values", "rewards", "mask"), ("", "advantages", "returns"))
    loss_inputs = ("old", "values", "", "vpreds", "logp", "mask", "advantages", "returns")
    loss = trainer.loss

    def watched_loss(*arguments):
        policy_loss, value_loss, stats = loss(*arguments)
        pairs = [*zip(loss_inputs, arguments, strict=True), ("policy", policy_loss), ("value", value_loss)]
        seen[-1].setdefault("loss", []).append({k: digits(v.detach().clone()) for k, v in pairs if k})
        return policy_loss, value_loss, stats

    trainer.loss = watched_loss
    queries, responses = ([torch.tensor(row) for row in rows] for rows in (QUERIES, RESPONSES))
    for row in scores:
        seen.append({"given": list(row)})
        stats = trainer.step(queries, responses, [torch.tensor(score) for score in row])
        seen[-1]["stats"] = {name: digits(stats[name]) for name in STATS}
        seen[-1]["coefficient"] = digits(float(trainer.kl_ctl.value))
    options = {"score_clip": 1.5, "target": 2.0, "horizon": 100, **OPTIONS}
    return {"queries": QUERIES, "responses": RESPONSES, "options": options, "steps": seen}


def old():
    tensors = fixed()
    return {
        "options": OPTIONS,
        "tensors": {name: digits(value) for name, value in tensors.items()},
        "methods": record_methods(tensors),
        "controllers": record_controllers(),
        "step": record_steps(),
    }


ROLLOUT = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "padding_mask", "padding_mask_p1", "advantages",
           "returns", "contain_eos_token")  # fmt: skip
UPDATE = ("mb_advantage", "mb_logprobs", "mb_return", "mb_values", "new_logprobs", "vpred", "pg_loss", "vf_loss",
          "loss", "micro_batch_inds")  # fmt: skip


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": [2 + index, 3 + index % 5]}


def record_train(estimator):
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.manual_seed(0)
    judges = [fill(LlamaForSequenceClassification(LlamaConfig(**MODEL, num_labels=1)), seed=s) for s in (3, 4)]
    options = {"kl_estimator": estimator, "kl_coef": 0.2, "gamma": 0.9, "lam": 0.8, "cliprange": 0.15,
               "cliprange_value": 0.1, "vf_coef": 0.4, "missing_eos_penalty": 0.75}  # fmt: skip
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, num_mini_batches=1, num_ppo_epochs=3, total_episodes=4, response_length=6,
        learning_rate=2e-2, stop_token="eos", num_sample_generations=0, save_strategy="no", disable_tqdm=True,
        max_grad_norm=None, temperature=1.0, **options,
    )  # fmt: skip
    trainer = PPOTrainer(
        arguments, tokenizer(), causal(seed=1), causal(seed=1, drift=0.5), judges[0], Rows(), judges[1]
    )
    seen, whiten, backward = (
        {"options": options, "updates": []},
        ppo_trainer.masked_whiten,
        trainer.accelerator.backward,
    )

    score = ppo_trainer.get_reward

    def watched_score(*arguments):
        found = score(*arguments)
        seen["raw_scores"] = digits(found[1])  # the last call is that of the reward model
        return found

    def watched_whiten(values, mask, shift_mean=True):
        found = whiten(values, mask, shift_mean=shift_mean)
        local = sys._getframe(1).f_locals
        seen["rollout"] = {n: digits(local[n]) for n in ROLLOUT if n != "advantages"}
        seen["rollout"] |= {"raw_advantages": digits(values), "advantages": digits(found)}
        return found

    def watched_backward(loss):
        local = sys._getframe(1).f_locals
        seen["updates"].append({n: digits(local[n].tolist()) for n in UPDATE})
        return backward(loss)

    ppo_trainer.masked_whiten, trainer.accelerator.backward = watched_whiten, watched_backward
    ppo_trainer.get_reward = watched_score
    trainer.train()
    ppo_trainer.masked_whiten, ppo_trainer.get_reward = whiten, score
    return seen


def record_divergences():
    from trl.experimental.gkd import GKDTrainer

    student, teacher = drawn(2, 2, 4, 5, seed=5)
    labels = torch.tensor([[-100, 1, 1, 1], [-100, -100, 1, -100]])
    cases = []
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        for temperature in (1.0, 0.7):
            own = student.clone().requires_grad_()
            loss = GKDTrainer.generalized_jsd_loss(own, teacher, labels, beta, temperature)
            (gradient,) = torch.autograd.grad(loss, own)
            cases.append({"beta": beta, "temperature": temperature, "loss": digits(loss.item()),
                          "gradient": digits(gradient)})  # fmt: skip
    return {"student": digits(student), "teacher": digits(teacher), "labels": digits(labels), "cases": cases}


def record_online():
    from trl.experimental.nash_md import NashMDTrainer
    from trl.experimental.xpo import XPOTrainer

    own, other, own_ref, other_ref = -1 + 0.4 * drawn(4, 3, 4, seed=6)
    names = ("own", "other", "own_ref", "other_ref")
    record = dict(zip(names, map(digits, (own, other, own_ref, other_ref)), strict=True))
    wins, probability = torch.tensor([True, False, True]), torch.tensor([0.9, 0.3, 0.5])
    state = SimpleNamespace(beta=0.3, alpha=0.05, args=SimpleNamespace(loss_type="sigmoid"))
    inputs = [x.clone().requires_grad_() for x in (own, other)]
    loss, pairs, bonus = XPOTrainer._compute_losses(state, *inputs, other_ref, own_ref, wins)
    record["xpo"] = {"wins": wins.tolist(), "beta": 0.3, "alpha": 0.05, "losses": digits(pairs + bonus),
                     "gradients": digits([g.tolist() for g in torch.autograd.grad(loss, inputs)])}  # fmt: skip
    loss, _, _ = NashMDTrainer._compute_losses(state, inputs[0], own_ref, probability)
    record["nash_md"] = {"probability": digits(probability), "beta": 0.3, "loss": digits(loss.item()),
                         "gradient": digits(torch.autograd.grad(loss, inputs[0])[0])}  # fmt: skip
    return record


def new():
    return {
        "ppo": [record_train(estimator) for estimator in ("k1", "k3")],
        "distillation": record_divergences(),
        "online": record_online(),
    }


def main():
    header = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    with contextlib.redirect_stdout(sys.stderr):
        content = old() if trl.__version__.startswith("0.") else new()
    path = Path(__file__).parent / f"trl-{trl.__version__}-ppo.json"
    path.write_text(json.dumps({"versions": header, "model": MODEL, **content}, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
