"""Draws follow the distribution that the settings describe, and completions end where they should."""

import math

import pytest
import torch
from tiny import build_tokenizer

from shared.errors import UserError
from shared.runtime.generation_sampling import Drawer, Sampling, StopStrings, invert, lengths_by_ends

LOGITS = torch.tensor([2.0, 1.0, 0.5, -0.5, 1.5, -3.0])
SEEN = torch.tensor([True, False, False, True, False, True])
DRAWS = 20_000
DEVIATIONS = 27.9  # of chi-square with 5 degrees of freedom, passed once in 26,000 times


def normed(weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights / weights.sum()


def e(*logits):
    return [math.exp(each) for each in logits]


# sorted by probability the tokens are 0 4 1 2 3 5
EXACT = {
    "plain": (Sampling(), e(2, 1, 0.5, -0.5, 1.5, -3)),
    "temperature": (Sampling(temperature=0.5), e(4, 2, 1, -1, 3, -6)),
    "top_k": (Sampling(top_k=3), [*e(2, 1), 0, 0, *e(1.5), 0]),
    # their shares are 0.43 0.26 0.16 0.10 0.04 0.003: the first two make 0.69, the first three 0.84
    "top_p": (Sampling(top_p=0.75), [*e(2, 1), 0, 0, *e(1.5), 0]),
    "min_p": (Sampling(min_p=0.5), [*e(2), 0, 0, 0, *e(1.5), 0]),
    "penalty": (Sampling(repetition_penalty=2.0), e(1, 1, 0.5, -1, 1.5, -6)),
    # halved: 0.5 0.5 0.25 -0.5 0.75 -3, of which 0.75 0.5 0.5 are the largest; the last two together pass 0.3 + 0.3
    "all": (
        Sampling(temperature=2.0, repetition_penalty=2.0, top_k=3, top_p=0.99, min_p=0.1),
        [*e(0.5, 0.5), 0, 0, *e(0.75), 0],
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_frequencies_are_the_probabilities(name):
    sampling, weights = EXACT[name]
    uniforms = torch.rand(2, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logp = Drawer(sampling).draw(LOGITS.expand(2, -1), uniforms, SEEN.expand(2, -1))
    counts = torch.bincount(tokens.flatten(), minlength=6).double()
    expected = normed(weights) * 2 * DRAWS
    assert not counts[expected == 0].any()
    kept = expected > 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < DEVIATIONS
    # whatever was filtered: of the whole distribution
    whole = (LOGITS / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(logp, whole[tokens], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_the_filtered_distribution_is_transformers_own(name):
    from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
    from transformers.generation.utils import GenerationMixin

    sampling, weights = EXACT[name]
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    chain = GenerationMixin()._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    penalty = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.repetition_penalty == 1:
        penalty = []
    scores = LogitsProcessorList([*penalty, *chain])(SEEN.nonzero().T, LOGITS[None].clone())
    torch.testing.assert_close(scores.softmax(-1)[0].double(), normed(weights), rtol=1e-5, atol=1e-7)


def test_suppressed_tokens_are_not_drawn_but_count():
    uniforms = torch.rand(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(), Sampling(temperature=0)):
        tokens, logp = Drawer(sampling, {0, 4, 999}).draw(LOGITS[None], uniforms)
        assert set(tokens.unique().tolist()) <= {1, 2, 3, 5}
        torch.testing.assert_close(logp, LOGITS.log_softmax(-1)[tokens])
    assert tokens.unique().tolist() == [1]


def test_greedy_takes_the_penalty_but_no_temperature():
    tokens, logp = Drawer(Sampling(temperature=0, repetition_penalty=2.0, top_k=1)).draw(
        LOGITS[None], torch.zeros(1, 1, dtype=torch.float64), SEEN[None]
    )
    assert tokens.item() == 4  # 2.0 is halved to below 1.5
    torch.testing.assert_close(logp[0, 0], LOGITS.log_softmax(-1)[4])


def test_inversion_over_many_blocks():
    """The token is the first whose running sum passes the share; also at the ends, and past zeros at a block's end."""
    weights = torch.zeros(1, 1000)
    weights[0, [3, 255, 256, 700]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    shares = torch.tensor([[0.0, 0.05, 0.1, 0.29, 0.3, 0.59, 0.6, 0.999, 1 - 2**-53]], dtype=torch.float64)
    assert invert(weights, shares)[0].tolist() == [3, 3, 255, 255, 256, 256, 700, 700, 700]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 1000, generator=generator)
    shares = torch.rand(3, 5000, dtype=torch.float64, generator=generator)
    running = weights.double().cumsum(-1)
    plain = (running[:, None] <= (shares * running[:, -1:])[..., None]).sum(-1)
    assert (invert(weights, shares) == plain).float().mean() > 0.999


def test_weights_that_are_no_numbers_give_a_token_all_the_same():
    weights = torch.full((2, 300), math.nan)
    weights[0] = 0
    tokens = invert(weights, torch.tensor([[0.0, 0.9]] * 2, dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 300)).all()


def test_seen_tokens_are_the_real_ones():
    ids, mask = torch.tensor([[0, 0, 2, 4], [1, 2, 2, 3]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    seen = Drawer(Sampling()).seen(ids, mask, 6)
    assert [row.nonzero().flatten().tolist() for row in seen] == [[2, 4], [1, 2, 3]]


def test_rows_end_at_their_first_end_token():
    tokens = torch.tensor([[5, 7, 5, 9], [9, 5, 7, 7], [5, 5, 5, 5]])
    lengths, finished = lengths_by_ends(tokens, torch.tensor([7, 9]))
    assert lengths.tolist() == [2, 1, 4] and finished.tolist() == [True, True, False]


def test_the_token_that_completes_a_stop_string():
    tokenizer = build_tokenizer(["<|end|>"], bos=None, eos="<|end|>", pad="<|pad|>")
    text = "the red square; the blue circle" + " x" * 20 + " the end"
    ids = tokenizer(text)["input_ids"]
    prefixes = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]

    def first(*stop):
        return next(n for n, prefix in enumerate(prefixes) if any(each in prefix for each in stop))

    for stop in (("red squ",), (" blue", "; th"), ("the end",)):
        for every in (1, 3, len(ids)):
            stops, found, checked = StopStrings(tokenizer, stop), None, 0
            for written in [*range(every, len(ids), every), len(ids)]:
                (found,) = stops.ends(torch.tensor([ids[:written]]), checked)
                checked = written
                if found is not None:
                    break
            assert found == first(*stop), (stop, every)
    (end,) = StopStrings(tokenizer, ["<|end|>"]).ends(torch.tensor([[*ids, tokenizer.eos_token_id, 40]]), 0)
    assert end == len(ids) + 1
    assert StopStrings(tokenizer, ["nowhere"]).ends(torch.tensor([ids]), 0) == [None]
    assert StopStrings(tokenizer, ["nowhere"]).ends(torch.zeros(0, 5, dtype=torch.long), 0) == []
    assert not StopStrings(tokenizer, ())


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("min_p", 2.0),
     ("repetition_penalty", 0.0), ("stop", "text"), ("stop", ("",))],
)  # fmt: skip
def test_values_out_of_range(name, value):
    with pytest.raises(UserError, match=name):
        Sampling(**{name: value})
