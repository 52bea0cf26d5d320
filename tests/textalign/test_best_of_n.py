"""Best of n: one prefill, the best really is the best, draws that follow the seed, and errors in one line."""

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shared.errors import UserError
from shared.rewards.combine import RewardSet
from textalign import BestOfNSampler, LengthSampler
from textalign.best_of_n import Candidate, best_of_n_kl, chances_of_best
from textalign.best_of_n_run import main, table

TEXTS = ["What colour?", "Is the circle red?"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.fixture(scope="module")
def parts(tiny):
    folder = tiny("lm")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def share_of_e(texts):
    return [text.count("e") / len(text) for text in texts]


def by_tokens(completion_ids, **_):
    return [sum(ids) / len(ids) for ids in completion_ids]


def answer(parts, reward=by_tokens, queries=TEXTS, given=None, **options):
    sampler = BestOfNSampler(*parts, reward, **{"seed": 3, "sample_size": 5, **options})
    return sampler.candidates(queries, **{"max_new_tokens": 6, **(given or {})})


def test_prompts_run_once_together_and_the_model_is_left_as_it_was(parts):
    model, _ = parts
    calls, widths = [], []
    sampler = BestOfNSampler(*parts, lambda texts: calls.append(len(texts)) or share_of_e(texts), seed=1)
    sampler.generate(TEXTS, max_new_tokens=1)  # the first use of a model is compared with its own generate
    model.train()
    state = torch.get_rng_state()
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    calls.clear()
    sampler.generate(TEXTS, max_new_tokens=4)
    hook.remove()
    assert widths[0][0] == 2 and widths[0][1] > 1  # both prompts, once
    assert all(width == 1 and rows <= 8 for rows, width in widths[1:]) and len(widths) <= 4
    assert calls == [8] and model.training and torch.equal(state, torch.get_rng_state())
    model.eval()


def test_the_best_come_first(parts):
    found = answer(parts)
    for each in found:
        scores = [candidate.score for candidate in each]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
        for candidate in each:
            assert candidate.score == pytest.approx(sum(candidate.ids) / len(candidate.ids))
            assert candidate.rewards == {"by_tokens": candidate.score}
    best = BestOfNSampler(*parts, by_tokens, seed=3, sample_size=5, n_candidates=2).generate(TEXTS, max_new_tokens=6)
    assert best == [[candidate.text for candidate in each[:2]] for each in found]
    assert all(text.startswith(query) for query, texts in zip(TEXTS, best, strict=True) for text in texts)


def test_queries_of_all_forms_are_answered_alike(parts):
    _, tokenizer = parts
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = answer(parts)
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for queries in (ids, [torch.tensor(row) for row in ids], padded):
        assert answer(parts, queries=queries) == expected
    assert answer(parts, queries=ids[0]) == answer(parts, queries=TEXTS[0])


def test_draws_follow_the_seed_and_not_max_rows(parts):
    lengths = {"length_sampler": LengthSampler(2, 6), "given": {"max_new_tokens": None}}
    random.seed(0)
    first = answer(parts, **lengths)
    random.seed(1)
    assert answer(parts, **lengths) == first == answer(parts, max_rows=5, **lengths)
    assert answer(parts, seed=4, **lengths) != first
    assert max(len(candidate.ids) for each in first for candidate in each) <= 5
    sampler = BestOfNSampler(*parts, by_tokens, seed=3, length_sampler=4)
    assert sampler.generate(TEXTS) != sampler.generate(TEXTS)  # further draws, not the same again


def test_shorter_lengths_cut_what_longer_ones_give(parts):
    lengths = iter([2, 6])
    short, long = answer(parts, length_sampler=lambda: next(lengths), given={"max_new_tokens": None})
    whole = answer(parts, length_sampler=6, given={"max_new_tokens": None})
    assert {tuple(each.ids) for each in short} == {tuple(each.ids[:2]) for each in whole[0]}
    assert long == whole[1] and not any(each.finished for each in short if len(each.ids) == 2 and each.ids[1] > 4)


def test_rewards_of_every_kind(parts):
    seen = {}

    def reward(prompts, completions, word):
        seen.update(prompts=prompts, completions=completions, word=word)
        return [float(len(each[0]["content"])) for each in completions]

    rewards = RewardSet([reward, by_tokens], weights=[1, 0])
    sampler = BestOfNSampler(*parts, rewards, sample_size=2, seed=1)
    found = sampler.candidates(CHATS, max_new_tokens=4, columns={"word": ["a", "b"]})
    assert seen["word"] == ["a", "a", "b", "b"] and seen["prompts"] == [chat for chat in CHATS for _ in range(2)]
    for each in found:
        assert [candidate.score for candidate in each] == [float(len(candidate.text)) for candidate in each]
        assert all(candidate.rewards["by_tokens"] > 0 for candidate in each)


def test_settings_of_generate(parts):
    config = GenerationConfig(min_length=-1, top_k=1, do_sample=True, pad_token_id=0, eos_token_id=-1)
    found = answer(parts, generation_config=config)
    assert all(len({tuple(candidate.ids) for candidate in each}) == 1 for each in found)  # the likeliest, always
    assert all(len(candidate.ids) == 6 and not candidate.finished for each in found for candidate in each)
    stop = found[0][0].response[1]
    for candidate in answer(parts, generation_config=config, given={"stop_strings": stop})[0]:
        assert candidate.finished and stop in candidate.response and len(candidate.ids) < 6


@pytest.mark.parametrize(
    ("options", "queries", "given", "said"),
    [
        ({"sample_size": 2, "n_candidates": 3}, TEXTS, {}, "n_candidates 3 is more than sample_size 2"),
        ({"sample_size": 0}, TEXTS, {}, "have to be 1 or more"),
        ({}, [], {}, "There are no queries"),
        ({}, [[5], []], {}, "Query 1 is empty"),
        ({}, [[1.5]], {}, r"Query 0 is '\[1.5\]'"),
        ({}, TEXTS, {"do_sample": False}, "would be the same"),
        ({}, TEXTS, {"num_beams": 2}, "num_beams is 2"),
        ({}, TEXTS, {"typical_p": 0.5}, "typical_p: no setting of best of n"),
        ({}, TEXTS, {"max_new_tokens": 10**6}, "positions left"),
        ({}, TEXTS, {"columns": {"word": ["a"]}}, "1 values for 2 queries"),
        ({"reward": lambda texts: [1.0]}, TEXTS, {}, "it returned 1 values for 10 rows"),
        ({"reward": lambda texts: [math.nan, *[1.0] * 9]}, TEXTS, {}, "1 of 10 answers have no score"),
    ],
)
def test_errors(parts, options, queries, given, said):
    with pytest.raises(UserError, match=said) as error:
        answer(parts, queries=queries, given=given, **options)
    assert "\n" not in str(error.value)


def test_how_far_best_of_n_goes():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(1.386294 - 0.75)
    # of 4 samples, 6 pairs: the first is the best of 3 of them, the second of 2, the third of 1
    assert chances_of_best(4, 2) == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    group = [Candidate("", "", [], score, {"r": score, "m": -score}, True) for score in (9.0, 3.0, 2.0, 0.0)]
    lines = table([group], [1, 2, 4]).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["1", "0.00", "3.500", "3.500", "-3.500"],
        ["2", "0.19", "5.833", "5.833", "-5.833"],
        ["4", "0.64", "9.000", "9.000", "-9.000"],
    ]


def test_the_script_writes_rows_to_train_on(tiny, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out" / "best.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "solution": "e"}) + "\n" for text in TEXTS))
    words = ["--model_name_or_path", str(tiny("lm")), "--dataset_name", str(rows), "--sample_size", "4"]
    words += [
        "--reward_funcs",
        "exact_match_reward",
        "--max_new_tokens",
        "4",
        "--n_candidates",
        "2",
        "--batch_size",
        "1",
    ]
    main([*words, "--output_file", str(out)])
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == TEXTS
    for row in written:
        assert len(row["candidates"]) == 2 and row["completion"] == row["candidates"][0]["completion"]
    assert "best of 1 " in capsys.readouterr().out
    with pytest.raises(UserError, match="it is there already"):
        main([*words, "--output_file", str(out)])
