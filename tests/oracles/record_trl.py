"""Records what trl's own trainers compute, for test_oracle.py to compare with. trl is needed here and nowhere else.

    pip install trl==1.16.0 torch transformers accelerate datasets peft
    python tests/oracles/record_trl.py dpo kto reward cpo orpo       # writes trl-1.16.0.json
    pip install trl==1.12.0 scikit-learn joblib
    python tests/oracles/record_trl.py bco prm                       # writes trl-1.12.0.json: the last to have them

A small Llama with weights from `weights.fill` sees a handful of rows through trl's own collators. The record of each
family holds the batch (token ids, masks), so that a trainer can be run on it end to end, the log-probabilities or
scores of its rows, and a loss for each case of options. Files hold 9 significant digits.

Where trl differs from what the suite computes, and why (the papers decide):
- ORPO: trl's NLL also counts the prompt; the paper has P(y_w | x). The record has trl's NLL apart.
- DPO with "sigmoid" takes no notice of label_smoothing in trl: conservative DPO has no record.
- `use_weighting` with "sft" raises in trl (it multiplies an expanded tensor in place): not recorded.
- `use_weighting` with "aot" multiplies sorted values by the weights of unsorted pairs: not recorded.
- AlphaPO's reward on sums ("sigmoid", "hinge") is NaN in trl once a completion's probability underflows: recorded for
  short completions.
- KTO's z and BCO's δ are trl's means over the batch; δ includes the batch itself.
"""

import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)
from weights import fill

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .?\n"
SPECIAL = ["<pad>", "<eos>", "<unk>"]
MODEL = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
POLICY = {"seed": 1, "drift": 0.0}
REFERENCE = {"seed": 1, "drift": 0.4}

PAIRS = [
    ("the sky is ", "blue.", "made of cheese."),
    ("two and two ", "are four.", "five."),
    ("water ", "boils when hot.", "burns."),
    ("say yes ", "yes", "perhaps not."),
    ("a cat ", "purrs.", "barks."),
    ("red or ", "green.", "black."),
    ("up and ", "down", "left"),
    ("left or ", "right.", "gauche"),
]
MARGINS = [1.0, 0.5, 2.0, 0.0, 1.5, 0.25, 0.75, 1.25]
UNPAIRED = [("the sky ", "is blue.", True), ("a dog ", "meows.", False), ("snow is ", "white and cold.", True),
            ("fire is ", "wet.", False), ("one ", "two three.", True)]  # fmt: skip
STEPS = [
    ("add two ", ["two", "plus two", "is four"], [True, True, True]),
    ("add three ", ["three", "is two"], [True, False]),
]


def tokenizer():
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def causal(weights):
    return fill(LlamaForCausalLM(LlamaConfig(**MODEL)), **weights)


def arguments(config_class, **options):
    folder = tempfile.mkdtemp()
    return config_class(
        output_dir=folder, report_to=[], use_cpu=True, per_device_train_batch_size=8, bf16=False,
        gradient_checkpointing=False, max_length=64, disable_tqdm=True, **options,
    )  # fmt: skip


def digits(value):
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [digits(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


@torch.no_grad()
def tokens(model, ids, attention, mask):
    """Each row's log-probabilities of its counted tokens, and log Σ p² there."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    logp = logits.log_softmax(-1)
    own = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    collision = (2 * logp).logsumexp(-1)
    rows = [m.bool() for m in mask[:, 1:]]
    return [digits(own[i, m]) for i, m in enumerate(rows)], [digits(collision[i, m]) for i, m in enumerate(rows)]


def alternating(rows):
    """trl stacks the chosen rows on the rejected ones; the suite alternates."""
    half = len(rows) // 2
    return list(itertools.chain.from_iterable(zip(rows[:half], rows[half:], strict=True)))


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def ids_of(batch, names):
    return {name: batch[name].long().tolist() for name in names}


def loss_of(trainer, batch):
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    value = float(loss.detach())
    assert math.isfinite(value)
    return digits(value)


def preference_rows():
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])


DPO_CASES = [
    *({"loss_type": [name], "beta": beta} for beta in (0.1, 0.5) for name in (
        "sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft",
    )),
    *({"loss_type": [name], "beta": 0.3, "label_smoothing": 0.1} for name in (
        "exo_pair", "robust", "aot", "aot_unpaired",
    )),
    {"loss_type": ["discopop"], "beta": 0.2, "discopop_tau": 0.5},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1},
    {"loss_type": ["sigmoid", "sft"], "beta": 0.1},
    *({"loss_type": [name], "beta": 0.4, "f_divergence_type": f}
      for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm")
      for f in ("forward_kl", "js_divergence", "alpha_divergence")),
    {"loss_type": ["sigmoid"], "beta": 0.4, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
    {"loss_type": ["sigmoid"], "beta": 0.4, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
    *({"loss_type": [name], "beta": 0.4, "ld_alpha": a} for name in ("sigmoid", "ipo", "sft") for a in (0.0, 0.3)),
    *({"loss_type": [name], "beta": 0.4, "use_weighting": True} for name in ("sigmoid", "ipo", "apo_zero")),
]  # fmt: skip


def record_dpo():
    from trl import DPOConfig, DPOTrainer

    def make(options):
        return DPOTrainer(
            causal(POLICY), causal(REFERENCE), arguments(DPOConfig, **options), train_dataset=preference_rows(),
            processing_class=tokenizer(),
        )  # fmt: skip

    batch = batch_of(make({}))
    own = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    logp, collision = tokens(causal(POLICY), *own)
    reference, _ = tokens(causal(REFERENCE), *own)
    cases = [{"options": options, "loss": loss_of(make(options), batch)} for options in DPO_CASES]
    return {
        "batch": ids_of(batch, ["input_ids", "attention_mask", "completion_mask"]),
        "logp": alternating(logp),
        "ref_logp": alternating(reference),
        "collision": alternating(collision),
        "cases": cases,
    }


def record_kto():
    from trl import KTOConfig, KTOTrainer

    rows = Dataset.from_list([{"prompt": p, "completion": c, "label": label} for p, c, label in UNPAIRED])
    options = [
        {"loss_type": "kto", "beta": 0.1},
        {"loss_type": "kto", "beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        {"loss_type": "apo_zero_unpaired", "beta": 0.5},
        {"loss_type": "apo_zero_unpaired", "beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 2.0},
    ]
    record = {"label": [label for _, _, label in UNPAIRED], "cases": []}
    # a policy on either side of its reference: z is positive for one of them and clamped to 0 for the other
    for name, (own, other) in {"plain": (POLICY, REFERENCE), "swapped": (REFERENCE, POLICY)}.items():
        for case in options:
            trainer = KTOTrainer(
                causal(own), causal(other), arguments(KTOConfig, **case), train_dataset=rows,
                processing_class=tokenizer(),
            )  # fmt: skip
            batch = batch_of(trainer)
            loss = loss_of(trainer, batch)
            kl = digits(trainer._metrics["eval"]["kl"][-1])
            record["cases"].append({"models": name, "options": case, "kl": kl, "loss": loss})
            if case["loss_type"] == "kto" and "batch" not in record:
                kinds = ["input_ids", "attention_mask", "completion_mask"]
                record["batch"] = ids_of(batch, kinds + [f"KL_{kind}" for kind in kinds])
                for prefix, key in (("", "logp"), ("KL_", "kl_logp")):
                    rows_of = [batch[prefix + kind] for kind in kinds]
                    record[key], _ = tokens(causal(POLICY), *rows_of)
                    record[f"ref_{key}"], _ = tokens(causal(REFERENCE), *rows_of)
    return record


def record_reward():
    from trl import RewardConfig, RewardTrainer

    record = {"cases": []}
    for margin, center in itertools.product((False, True), (None, 0.01, 0.5)):
        rows = preference_rows()
        if margin:
            rows = rows.add_column("margin", MARGINS)
        model = fill(LlamaForSequenceClassification(LlamaConfig(**MODEL, num_labels=1)), **POLICY)
        trainer = RewardTrainer(
            model, arguments(RewardConfig, center_rewards_coefficient=center), train_dataset=rows,
            processing_class=tokenizer(),
        )  # fmt: skip
        batch = batch_of(trainer)
        with torch.no_grad():
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            record["scores"] = digits(alternating(model(**inputs).logits.squeeze(-1).tolist()))
        record["batch"] = ids_of(batch, ["input_ids", "attention_mask"])
        record["cases"].append(
            {"margin": MARGINS if margin else None, "center": center, "loss": loss_of(trainer, batch)}
        )
    return record


CPO_CASES = [
    {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    {"loss_type": "sigmoid", "beta": 0.5, "cpo_alpha": 0.0, "label_smoothing": 0.1},
    {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.5},
    {"loss_type": "ipo", "beta": 0.2, "cpo_alpha": 1.0},
    {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 0.5},
    {"loss_type": "simpo", "beta": 2.5, "cpo_alpha": 0.3, "simpo_gamma": 1.0, "label_smoothing": 0.2},
    {"loss_type": "alphapo", "beta": 2.5, "alpha": 0.25, "simpo_gamma": 0.3},
    {"loss_type": "alphapo", "beta": 1.0, "alpha": -0.5},
    {"loss_type": "ipo", "beta": 0.5, "alpha": 0.1, "cpo_alpha": 0.0},
    {"loss_type": "sigmoid", "beta": 0.5, "alpha": 0.02, "cpo_alpha": 0.0},
]


def _reference_free(trainer_class, config_class, cases):
    record = {"cases": []}
    for options in cases:
        trainer = trainer_class(
            causal(POLICY), arguments(config_class, max_completion_length=64, **options),
            train_dataset=preference_rows(), processing_class=tokenizer(),
        )  # fmt: skip
        trainer.model.eval()
        batch = batch_of(trainer)
        with torch.no_grad():
            loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch, train_eval="train")
        ids = torch.nn.utils.rnn.pad_sequence
        rows, masks = [], []
        for side in ("chosen", "rejected"):
            labels, inputs = batch[f"{side}_labels"], batch[f"{side}_input_ids"]
            attention = batch[f"{side}_attention_mask"].bool()
            rows += [row[kept] for row, kept in zip(inputs, attention, strict=True)]
            masks += [row[kept] != -100 for row, kept in zip(labels, attention, strict=True)]
        attention = ids([torch.ones_like(row) for row in rows], batch_first=True)
        inputs, mask = ids(rows, batch_first=True), ids(masks, batch_first=True)
        record["batch"] = {"input_ids": inputs.tolist(), "completion_mask": mask.long().tolist()}
        record["logp"] = alternating(tokens(causal(POLICY), inputs, attention, mask)[0])
        case = {"options": options, "loss": digits(float(loss)), "nll": digits(metrics["nll_loss"])}
        case["rewards"] = {side: digits(metrics[f"rewards/{side}"]) for side in ("chosen", "rejected")}
        record["cases"].append(case)
    return record


def record_cpo():
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return _reference_free(CPOTrainer, CPOConfig, CPO_CASES)


def record_orpo():
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return _reference_free(ORPOTrainer, ORPOConfig, [{"beta": 0.1}, {"beta": 1.0}])


BCO_BATCHES = [[0, 1, 2], [3, 4]]


def record_bco():
    from trl.experimental.bco import BCOConfig, BCOTrainer

    rows = Dataset.from_list([{"prompt": p, "completion": c, "label": label} for p, c, label in UNPAIRED])
    table = 8 * torch.sin(torch.arange(MODEL["vocab_size"] * 3, dtype=torch.float64)).view(-1, 3).float()

    def embed(input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return (table[input_ids] * mask).sum(1) / mask.sum(1)

    samples = []

    class Watched(BCOTrainer):
        def _get_sample_prompt_embeddings(self, *args, **kwargs):
            samples.append(super()._get_sample_prompt_embeddings(*args, **kwargs))
            return samples[-1]

    record = {"label": [label for _, _, label in UNPAIRED], "batches": BCO_BATCHES, "cases": []}
    for matching, bounds in ((False, {}), (True, {}), (True, {"min_density_ratio": 0.9, "max_density_ratio": 1.1})):
        options = {"beta": 0.3, **bounds}
        trainer = Watched(
            causal(POLICY), causal(REFERENCE), arguments(BCOConfig, max_completion_length=64, **options),
            train_dataset=rows, processing_class=tokenizer(),
            **({"embedding_func": embed, "embedding_tokenizer": tokenizer()} if matching else {}),
        )  # fmt: skip
        case = {"options": options, "losses": [], "deltas": []}
        trainer.model.eval()
        with torch.no_grad():
            for part in BCO_BATCHES:
                batch = trainer.data_collator([trainer.train_dataset[i] for i in part])
                loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
                case["losses"].append(digits(float(loss)))
                case["deltas"].append(digits(float(metrics["delta"])))
            batch = batch_of(trainer)
            if matching:
                case["sample"] = {"desirable": digits(samples[-2]), "undesirable": digits(samples[-1])}
                case["weight"] = digits(trainer.clf.coef_[0].tolist())
                case["bias"] = digits(float(trainer.clf.intercept_[0]))
                case["features"] = digits(embed(batch["embedding_input_ids"], batch["embedding_attention_mask"]))
        record["cases"].append(case)
        ids, attention = batch["completion_input_ids"], batch["completion_attention_mask"]
        mask = batch["completion_labels"] != -100
        record["batch"] = {"input_ids": ids.tolist(), "completion_mask": mask.long().tolist()}
        record["logp"], _ = tokens(causal(POLICY), ids, attention, mask)
        record["ref_logp"], _ = tokens(causal(REFERENCE), ids, attention, mask)
    return record


def record_prm():
    from trl.experimental.prm import PRMConfig, PRMTrainer

    rows = Dataset.from_list([{"prompt": p, "completions": c, "labels": labels} for p, c, labels in STEPS])
    record = {"cases": []}
    for last_only in (False, True):
        model = fill(LlamaForTokenClassification(LlamaConfig(**MODEL, num_labels=2)), **POLICY)
        trainer = PRMTrainer(
            model=model, args=arguments(PRMConfig, train_on_last_step_only=last_only, max_completion_length=64),
            train_dataset=rows, processing_class=tokenizer(),
        )  # fmt: skip
        batch = batch_of(trainer)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        record["batch"] = ids_of(batch, ["input_ids", "attention_mask"])
        record["logits"] = digits(logits)
        record["cases"].append(
            {"last_only": last_only, "labels": batch["labels"].tolist(), "loss": loss_of(trainer, batch)}
        )
    return record


def main(families):
    import transformers

    records = {family: globals()[f"record_{family}"]() for family in families}
    header = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    content = {"versions": header, "model": MODEL, "policy": POLICY, "reference": REFERENCE, **records}
    path = Path(__file__).parent / f"trl-{trl.__version__}.json"
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
