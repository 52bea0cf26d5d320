"""Records what trl's GRPOTrainer and RLOOTrainer compute, for test_online_oracle.py to compare with.

    pip install trl==1.16.0 torch transformers accelerate datasets peft
    python tests/oracles/record_trl_online.py        # writes trl-1.16.0-online.json

Policy, old policy and reference are the small Llama of record_trl.py with weights from `weights.fill`; they see
completions that are part of the record, through trl's own log-probability code. Then each case of options has its
loss and d loss / d logp, from trl's own `compute_loss` on these log-probabilities. Advantages come from trl's own
scoring of rewards that are part of the record, with NaN where a reward does not apply.

Where trl differs from what the suite computes, and why:
- bnpo divides by the tokens of the micro-batch, which makes the gradient depend on how a step is cut. One batch is
  recorded, where both agree.
- dapo, cispo and vespo divide by the tokens of the generation batch, rescaled to one step; the suite by those of the
  step itself.
- epsilon_high is cispo's largest ratio, and trl takes ε = 0.2 where it is not given: every weight would be truncated.
  The suite takes 5, and the cases name it.
- vespo multiplies its clamped sums by a sampler's correction; no sampler but the model is recorded.
- Ratios are exponentiated as they are; the suite holds log-ratios within ±20.
- A row without a counted token has log-ratio 0 and a loss -A in trl's sequence-level RLOO; it has none in the suite.
"""

import functools
import json
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from record_trl import MODEL, REFERENCE, causal, digits, tokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from weights import fill

POLICY = {"seed": 1, "drift": 0.1}
OLD = {"seed": 1, "drift": 0.0}
PROMPTS = ["the sky is ", "two and two "]
COMPLETIONS = ["blue.", "a cheese", "four", "six", "grey", "up"]
METRICS = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio", "vespo/phi_seq_mean")
ROWS = [0, 0, 0, 1, 1, 1]  # the prompt of each completion
ADVANTAGES = [1.2, -0.7, 0.4, -1.5, 0.0, 0.6]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = [
    *({"loss_type": name, "importance_sampling_level": level}
      for name in (*CLIPPED, "sapo") for level in ("token", "sequence")),
    *({"loss_type": "cispo", "importance_sampling_level": level, "epsilon_high": 1.1}
      for level in ("token", "sequence")),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "vespo"},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 1.5},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3},
    {"loss_type": "grpo", "epsilon": 0.05, "delta": 1.2},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
]  # fmt: skip
CASES = [
    *({"old": old, "options": {"beta": 0.0, **options}} for options in LOSSES for old in (True, False)),
    *({"old": True, "options": {"beta": 0.3, "use_bias_correction_kl": corrected, **options}}
      for options in LOSSES[:16] for corrected in (True, False)),
    *({"old": False, "options": {"beta": 0.3, "loss_type": name}} for name in ("dapo", "grpo")),
    *({"old": True, "options": {"beta": 0.3, "loss_type": name, "top_entropy_quantile": 0.4}}
      for name in ("dapo", "grpo")),
    *({"old": True, "options": {"beta": 0.0, "loss_type": name, "entropy_coef": 0.05}} for name in ("dapo", "grpo")),
]  # fmt: skip
RLOO_CASES = [{"epsilon": 0.2}, {"epsilon": 1e-3, "epsilon_high": 2e-3}, {"epsilon": 0.9}]

NAN = float("nan")
REWARDS = [
    [1.0, 10.0], [0.0, -20.0], [0.5, 30.0], [0.5, NAN], [0.25, 5.0], [0.25, NAN], [NAN, 7.0], [NAN, NAN],
    [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0],
]  # fmt: skip
REWARD_WEIGHTS = [1.0, 0.05]
ADVANTAGE_CASES = [
    *({"scale_rewards": scale} for scale in ("group", "batch", "none")),
    {"multi_objective_aggregation": "normalize_then_sum"},
]
RLOO_ADVANTAGE_CASES = [{"normalize_advantages": False}, {"normalize_advantages": True}]


@functools.cache
def saved():
    folder = tempfile.mkdtemp()
    causal(POLICY).save_pretrained(folder)
    return folder


def zero(completions, **_):
    return [0.0] * len(completions)


def make(trainer_class, config_class, rewards=1, generations=3, **options):
    options = {"max_completion_length": 20, "num_generations": generations, **options}
    arguments = config_class(
        output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, per_device_train_batch_size=12, reward_weights=REWARD_WEIGHTS[:rewards], **options,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    model = causal(POLICY)
    model.config._name_or_path = saved()  # where trl takes a reference from, whose own weights are not used
    trainer = trainer_class(model, [zero] * rewards, arguments, train_dataset=rows, processing_class=tokenizer())
    trainer.model.eval()
    return trainer


def batch():
    """Prompts padded on the left, completions with their ending token on the right."""
    encode = tokenizer()
    prompts = [encode(PROMPTS[i])["input_ids"] for i in ROWS]
    completions = [encode(text)["input_ids"] + [MODEL["eos_token_id"]] for text in COMPLETIONS]
    pad = torch.nn.utils.rnn.pad_sequence

    def grid(lists, side):
        rows = [torch.tensor(row) for row in lists]
        return pad(rows, True, 0, side), pad([torch.ones_like(row) for row in rows], True, 0, side)

    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return dict(zip(names, (*grid(prompts, "left"), *grid(completions, "right")), strict=True))


@torch.no_grad()
def figures(trainer, weights, inputs):
    """Log-probabilities and entropies under other weights, by trl's own code."""
    model = fill(trainer.model, **weights)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    logp, entropy, _ = trainer._get_per_token_logps_and_entropies(model, ids, attention, width, compute_entropy=True)
    return logp, entropy


def loss_and_gradient(trainer, inputs, logp, entropy):
    """trl's loss on given log-probabilities, and its derivative by each that counts."""
    leaf = logp.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (leaf, entropy, None)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    (gradient,) = torch.autograd.grad(loss, leaf)
    counted = inputs["completion_mask"].bool()
    assert not gradient[~counted].any()
    return digits(float(loss.detach())), digits(gradient[counted].tolist())


def record_losses():
    inputs = batch()
    first = make(GRPOTrainer, GRPOConfig)
    logp, entropy = figures(first, POLICY, inputs)
    old, _ = figures(first, OLD, inputs)
    ref, _ = figures(first, REFERENCE, inputs)
    counted = inputs["completion_mask"].bool()
    record = {"batch": {name: value.tolist() for name, value in inputs.items()}, "advantages": ADVANTAGES}
    for name, values in (("logp", logp), ("old", old), ("ref", ref), ("entropy", entropy)):
        record[name] = digits(values[counted].tolist())
    given = {
        **inputs,
        "advantages": torch.tensor(ADVANTAGES),
        "ref_per_token_logps": ref,
        "num_items_in_batch": counted.sum(),
    }
    cases = []
    for case in CASES:
        trainer = make(GRPOTrainer, GRPOConfig, **case["options"])
        now = {**given, "old_per_token_logps": old} if case["old"] else given
        loss, gradient = loss_and_gradient(trainer, now, logp, entropy)
        metrics = {k: digits(v[-1]) for k, v in trainer._metrics["eval"].items() if k in METRICS}
        cases.append({**case, "loss": loss, "gradient": gradient, "metrics": metrics})
    rloo = []
    for options in RLOO_CASES:
        trainer = make(RLOOTrainer, RLOOConfig, beta=0.0, **options)
        now = {**given, "old_logps": (old * counted).sum(1)}
        loss, gradient = loss_and_gradient(trainer, now, logp, entropy)
        rloo.append({"options": options, "loss": loss, "gradient": gradient})
    return {**record, "cases": cases, "rloo": rloo}


def advantages(trainer_class, config_class, options):
    trainer = make(
        trainer_class, config_class, rewards=2, generations=4, **{"max_completion_length": 2, "beta": 0.0, **options}
    )
    trainer._calculate_rewards = lambda *args: torch.tensor(REWARDS)
    rows = [{"prompt": PROMPTS[0]} for _ in REWARDS]
    return digits(trainer._generate_and_score_completions(rows)["advantages"])


def main():
    import transformers

    header = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    scored = [{"options": o, "advantages": advantages(GRPOTrainer, GRPOConfig, o)} for o in ADVANTAGE_CASES]
    left_out = [{"options": o, "advantages": advantages(RLOOTrainer, RLOOConfig, o)} for o in RLOO_ADVANTAGE_CASES]
    content = {
        "versions": header,
        "model": MODEL,
        "policy": POLICY,
        "losses": record_losses(),
        "rewards": [[None if r != r else r for r in row] for row in REWARDS],
        "reward_weights": REWARD_WEIGHTS,
        "grpo_advantages": scored,
        "rloo_advantages": left_out,
    }
    path = Path(__file__).parent / f"trl-{trl.__version__}-online.json"
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
