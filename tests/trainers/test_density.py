"""The density ratio weighs bad rows by how likely their prompts are among the good rows' prompts."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BatchEncoding

from shared.errors import UserError
from shared.trainers.density import DensityRatio


def tokenizer(texts, padding, truncation, return_tensors):
    """Numbers in words: "3" is [3]; the embedding is that number."""
    ids = torch.tensor([[int(word) for word in text.split()] for text in texts])
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def embed(input_ids, attention_mask):
    return (input_ids * attention_mask).float() / 10


def made(**changed):
    return DensityRatio(embed, tokenizer, accelerator=Accelerator(cpu=True), **{"batch_size": 2, **changed})


PROMPTS = [str(n) for n in range(40)]
GOOD = [n < 20 for n in range(40)]  # good rows ask with small numbers


def test_bad_rows_with_good_rows_prompts_count_more():
    ratio = made(min_density_ratio=0.1, max_density_ratio=5.0)
    ratio.fit(PROMPTS, GOOD)
    asked = ["0", "18", "21", "39", "39", "0"]
    weights = ratio.weights(asked, [False, False, False, False, True, True])
    assert weights.dtype == np.float32 and weights.shape == (6,)
    assert weights[0] == 5.0 and weights[3] == np.float32(0.1)  # the bounds
    assert 5 > weights[1] > 1 > weights[2] > 0.1
    assert weights[4] == weights[5] == 1.0  # good rows


def test_the_weight_is_the_odds():
    ratio = made(min_density_ratio=0.0, max_density_ratio=100.0)
    ratio.weight, ratio.bias = torch.tensor([2.0]), torch.tensor(-1.0)
    p = 1 / (1 + np.exp(-(2 * 0.7 - 1)))
    assert ratio.weights(["7"], [False])[0] == pytest.approx(p / (1 - p), rel=1e-6)


def test_kinds_are_sampled_alike():
    """Far more good rows than bad ones do not make each prompt look good."""
    ratio = made(max_density_ratio=100.0, min_density_ratio=0.0)
    prompts = [str(n % 4) for n in range(400)]
    ratio.fit(prompts, [n >= 40 for n in range(400)])
    assert ratio.weights(["0", "1", "2", "3"], [False] * 4) == pytest.approx(1.0, abs=0.5)


def test_a_prompt_is_embedded_once():
    seen = []

    def counting(input_ids, attention_mask):
        seen.extend(input_ids[:, 0].tolist())
        return embed(input_ids, attention_mask)

    ratio = made()
    ratio.embedding_func = counting
    ratio.weight, ratio.bias = torch.tensor([1.0]), torch.tensor(0.0)
    ratio.weights(["3", "4", "3", "5"], [False, False, False, True])
    assert sorted(seen) == [3, 4]


def test_a_sample_is_drawn_alike_each_time():
    first, second = made(prompt_sample_size=5), made(prompt_sample_size=5)
    first.fit(PROMPTS, GOOD)
    second.fit(PROMPTS, GOOD)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_what_cannot_be_used_is_said():
    with pytest.raises(UserError, match="same label"):
        made().fit(PROMPTS, [True] * 40)
    with pytest.raises(UserError, match="prompt_sample_size is 0"):
        made(prompt_sample_size=0)
    with pytest.raises(UserError, match="min_density_ratio is 3"):
        made(min_density_ratio=3.0, max_density_ratio=2.0)
    flat = made()
    flat.embedding_func = lambda input_ids, attention_mask: embed(input_ids, attention_mask).sum(1)
    with pytest.raises(UserError, match=r"gave \(2,\) for 2 prompts"):
        flat.fit(PROMPTS, GOOD)
