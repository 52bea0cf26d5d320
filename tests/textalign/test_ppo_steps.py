"""PPO with a loop of one's own: the contract of trl 0.11's `step`, checked against what it gave."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.weights import fill
from tiny_online import questions

from shared.errors import UserError
from shared.policies.critic import critic_of
from textalign import PPOConfig, PPOTrainer

RECORD = json.loads((Path(__file__).parent.parent / "oracles" / "trl-0.11.4-ppo.json").read_text())
STEP = RECORD["step"]
QUERIES, RESPONSES = ([torch.tensor(row) for row in STEP[name]] for name in ("queries", "responses"))
# what it is called here -> in trl's statistics
NAMES = {
    "loss/policy": "ppo/loss/policy",
    "loss/value": "ppo/loss/value",
    "loss/total": "ppo/loss/total",
    "approx_kl": "ppo/policy/approxkl",
    "policy_kl": "ppo/policy/policykl",
    "value/error": "ppo/val/error",
    "value/clip_ratio": "ppo/val/clipfrac",
    "objective/kl": "objective/kl",
    "objective/kl_coef": "objective/kl_coef",
}


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(95 + i): i for i in range(2, RECORD["model"]["vocab_size"])}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="c"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="c")


def causal(**weights):
    from transformers import LlamaConfig, LlamaForCausalLM

    return fill(LlamaForCausalLM(LlamaConfig(**RECORD["model"])), **weights)


def recorded(folder, mini_batch=4, **changed):
    """The trainer of the record, with its weights."""
    args = PPOConfig(
        output_dir=str(folder), max_grad_norm=0.0, gradient_accumulation_steps=4 // mini_batch, logging_steps=1,
        **{**STEP["options"], "adap_kl_ctrl": True, "ppo_epochs": 2, "batch_size": 4, "mini_batch_size": mini_batch},
        **changed,
    )  # fmt: skip
    model = causal(seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    trainer = PPOTrainer(
        model, args=args, ref_model=causal(seed=1, drift=0.5), processing_class=tokenizer(),
        optimizers=(optimizer, None),
    )  # fmt: skip
    fill(critic_of(trainer.model).head, seed=7)
    return trainer


@pytest.mark.parametrize("mini_batch", [4, 2, 1])
def test_two_steps_are_those_of_trl(mini_batch, tmp_path):
    """From tokens and scores to weights: with them the second step's log-probabilities and values are right too."""
    trainer = recorded(tmp_path, mini_batch)
    for record in STEP["steps"]:
        stats = trainer.step(QUERIES, RESPONSES, [torch.tensor(score) for score in record["given"]])
        for own, theirs in NAMES.items():
            assert stats[own] == pytest.approx(record["stats"][theirs], rel=2e-3, abs=2e-5), own
        assert trainer.kl_control.coefficient == pytest.approx(record["coefficient"], rel=1e-5)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("mini_batch", [4, 2])
def test_tokens_that_are_masked_are_as_good_as_absent(mini_batch, tmp_path):
    """A masked end: the score is on the last token that counts, and what stands behind it changes nothing."""
    tails = [torch.tensor(tail) for tail in ([5, 7], [9, 3], [3, 3], [2, 9])]

    def stats(name, responses, masks):
        trainer = recorded(tmp_path / name, mini_batch)
        found = [trainer.step(QUERIES, responses, [1.0, -0.5, 2.0, 0.25], masks) for _ in range(2)][-1]
        return {name: value for name, value in found.items() if not name.startswith("completions/")}

    longer = [torch.cat(pair) for pair in zip(RESPONSES, tails, strict=True)]
    masks = [torch.arange(len(ids)) < len(ids) - 2 for ids in longer]
    plain, masked = stats("plain", RESPONSES, None), stats("masked", longer, masks)
    assert masked == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert stats("all", longer, None)["objective/kl"] != pytest.approx(plain["objective/kl"], rel=1e-2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"queries": QUERIES[:3]}, r"3 queries, 4 responses, 4 scores: give 4 of each"),
        ({"scores": [1.0]}, r"4 queries, 4 responses, 1 scores"),
        ({"queries": torch.zeros(4, 3, dtype=torch.long)}, "queries is a Tensor: give a list of tensors"),
        ({"responses": [*RESPONSES[:3], [1, 2]]}, r"responses\[3\] is a list: give tokens"),
        ({"responses": [*RESPONSES[:3], torch.zeros(2)]}, r"responses\[3\] is a tensor \[2\]"),
        ({"responses": [*RESPONSES[:3], torch.zeros(0, dtype=torch.long)]}, r"responses\[3\] is a tensor \[0\]"),
        ({"scores": [1.0, 2.0, torch.zeros(2), 1.0]}, r"scores\[2\] is a tensor \[2\]: give one number"),
        ({"scores": 1.0}, r"scores is one number: give a list"),
        ({"scores": torch.tensor(1.0)}, r"scores is one number: give a list"),
        ({"scores": [1.0, 2.0, "good", 1.0]}, r"scores\[2\] is a str"),
        ({"scores": [1.0, float("inf"), 0.0, 1.0]}, r"scores\[1\] is inf"),
        ({"response_masks": [torch.ones(1)] * 4}, r"response_masks\[0\] is \[1\]: give a tensor \[4\]"),
        ({"response_masks": [torch.zeros(len(ids)) for ids in RESPONSES]}, r"response_masks\[0\] leaves no token"),
    ],
)
def test_what_step_is_given_wrong(changed, said, stepper):
    given = {"queries": QUERIES, "responses": RESPONSES, "scores": [1.0] * 4, **changed}
    with pytest.raises(UserError, match=said):
        stepper.step(**given)


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("stepper"))


def test_generate(stepper):
    texts = stepper.generate(QUERIES, max_new_tokens=3)
    assert [ids[: len(query)].tolist() for ids, query in zip(texts, QUERIES, strict=True)] == STEP["queries"]
    assert all(len(query) < len(ids) <= len(query) + 3 for ids, query in zip(texts, QUERIES, strict=True))
    own, other = stepper.generate(
        QUERIES, return_prompt=False, generate_ref_response=True, do_sample=False, max_new_tokens=8, batch_size=2
    )
    assert len(own) == len(other) == 4 and [a.tolist() for a in own] != [b.tolist() for b in other]
    with torch.no_grad():
        first = stepper.model(QUERIES[0][None]).logits[0, -1].argmax()
    assert own[0][0] == first
    alone = stepper.generate(QUERIES[0], max_new_tokens=2, eos_token_id=-1)
    assert alone.shape == (1, len(QUERIES[0]) + 2)
    lengths = iter([1, 2])
    assert max(map(len, stepper.generate(QUERIES, lambda: next(lengths), batch_size=2, return_prompt=False))) <= 2
    with pytest.raises(UserError, match="penalty_alpha"):
        stepper.generate(QUERIES, penalty_alpha=0.6)
    with pytest.raises(UserError, match=r"query_tensor\[0\] is a str"):
        stepper.generate(["text"])


def test_train_needs_what_may_be_left_out(stepper, tmp_path):
    with pytest.raises(UserError, match="train_dataset is missing"):
        stepper.train()
    with pytest.raises(UserError, match="train_dataset is missing"):
        _ = stepper.dataloader
    args = PPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2)
    trainer = PPOTrainer(causal(seed=1), args=args, processing_class=tokenizer(), train_dataset=[{"prompt": "a"}])
    with pytest.raises(UserError, match="There is no reward: give reward_funcs or reward_model"):
        trainer.train()


def test_a_loop_over_the_prompts_learns(tiny, tmp_path):
    """Rows of tokens, as scripts for trl's step have them; and text beside them."""
    from tiny_online import even
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(tiny("lm"))
    rows = [{"input_ids": text(row["prompt"])["input_ids"], "number": row["number"]} for row in questions(8)]
    args = PPOConfig(
        output_dir=str(tmp_path), learning_rate=2e-2, vf_coef=0.5, ppo_epochs=2, init_kl_coef=0.01, batch_size=8,
        mini_batch_size=4, gradient_accumulation_steps=2, response_length=6,
    )  # fmt: skip
    trainer = PPOTrainer(str(tiny("lm")), args=args, train_dataset=rows)
    means, errors = [], []
    for _ in range(16):
        for batch in trainer.dataloader:
            assert sorted(batch) == ["input_ids", "number", "prompt", "query"]
            at = batch["number"].index(3)
            assert batch["input_ids"][at].tolist() == rows[3]["input_ids"]
            assert batch["query"][at] == questions(8)[3]["prompt"]
            answers = trainer.generate(batch["input_ids"], return_prompt=False)
            scores = [float(score) for score in even(answers)]
            stats = trainer.step(batch["input_ids"], answers, scores)
            means.append(sum(scores) / 8)
            errors.append(stats["value/error"])
            assert stats["objective/scores"] == pytest.approx(means[-1])
            trainer.log_stats(stats, batch, scores)
    logged = trainer.state.log_history[-1]
    assert logged["env/reward_mean"] == pytest.approx(means[-1]) and logged["step"] == trainer.state.global_step
    assert sum(means[-4:]) / 4 > sum(means[:4]) / 4 + 0.1
    assert sum(errors[-4:]) < sum(errors[:4])


def test_steps_of_a_round_are_not_sorted_by_length(tmp_path, monkeypatch):
    """Each optimizer step has the rows that were handed over in its place; and a model need not name its ending."""
    trainer = recorded(tmp_path, mini_batch=2)
    trainer.model.generation_config.eos_token_id = None
    seen, plain = [], trainer.micro_batch
    monkeypatch.setattr(trainer, "micro_batch", lambda buffer, rows: seen.append(rows) or plain(buffer, rows))
    trainer.args.gradient_accumulation_steps = 1
    long_first = sorted(RESPONSES, key=len, reverse=True)
    assert len(long_first[0]) > len(long_first[-1])
    trainer.step(QUERIES, long_first, np.ones(4, dtype=np.float32))
    assert [sorted(rows) for rows in seen] == [[0, 1], [2, 3]] * 2
