"""Judges of pairs: rewards compared, functions, objects, and a model behind an endpoint; and what they get wrong."""

import math

import pytest
import torch
from fake_server import FakeServer

import textalign
from shared.errors import UserError
from shared.rewards.base import RowErrors, Sample, WrongCount
from shared.rewards.combine import RewardSet
from shared.rewards.judges import JudgeError
from shared.rewards.pairwise import BasePairwiseJudge, PairReward, RewardJudge, load_judge
from shared.rewards.pairwise_endpoint import EndpointPairwiseJudge, HfPairwiseJudge, OpenAIPairwiseJudge, verdict_in

PROMPTS = ["Why?", "How?", "When?"]
PAIRS = [["long answer", "short"], ["no", "a longer one"], ["same", "same"]]
SAMPLES = [Sample(prompt, answer) for prompt, pair in zip(PROMPTS, PAIRS, strict=True) for answer in pair]


def length(completions, **_):
    return [len(completion) / 2 for completion in completions]


def longer(prompts, pairs):
    return [int(len(two) > len(one)) for one, two in pairs]


class Longer(BasePairwiseJudge):
    """It remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def judge(self, prompts, completions, shuffle_order=True):
        self.asked += zip(prompts, completions, strict=True)
        return longer(prompts, completions)


def values(judge, samples=SAMPLES, mode="train", **options):
    return RewardSet([PairReward(judge)], **options)(samples, group_size=2, mode=mode).values[:, 0].tolist()


def test_a_reward_compares_by_difference():
    judge = load_judge(length)
    assert judge.judge(PROMPTS, PAIRS) == [0, 1, -1]
    chance = 1 / (1 + math.exp(-3.0))  # 5.5 against 2.5
    assert judge.judge(PROMPTS, PAIRS, return_scores=True) == pytest.approx([chance, 1 / (1 + math.exp(5.0)), 0.5])
    assert values(judge)[:2] == pytest.approx([chance, 1 - chance])
    assert values(judge, mode="eval") == [1, 0, 0, 1, 0.5, 0.5], "the likelier one wins"
    missing = load_judge(lambda completions, **_: [None if text == "no" else 1.0 for text in completions])
    assert missing.judge(PROMPTS, PAIRS) == [-1, -1, -1]
    found = values(missing)
    assert found[:2] == [0.5, 0.5] and all(map(math.isnan, found[2:4]))


def test_a_reward_takes_the_rows_columns():
    def right(completions, solution, **_):
        return [float(text == told) for text, told in zip(completions, solution, strict=True)]

    samples = [Sample("1 + 1", text, {"solution": "2"}) for text in ("3", "2")]
    assert values(load_judge(right), samples, mode="eval") == [0, 1]


@pytest.mark.parametrize("spec", [longer, Longer(), Longer, "test_pairwise.longer", "test_pairwise.Longer"])
def test_functions_objects_and_their_paths(spec, monkeypatch):
    monkeypatch.syspath_prepend("tests/rewards")
    judge = load_judge(spec)
    assert judge.judge(PROMPTS[:2], PAIRS[:2]) == [0, 1]
    assert values(judge) == [1, 0, 0, 1, 0.5, 0.5]


def test_other_names():
    assert isinstance(load_judge("think_format_reward"), RewardJudge)
    assert load_judge("builtin/rm-reviews").__name__ == "rm-reviews"
    assert textalign.BasePairwiseJudge is BasePairwiseJudge


def test_judges_see_texts_and_are_not_asked_of_equals():
    judge = Longer()
    chat = [{"role": "user", "content": "Why?"}]
    asked = [Sample(chat, [{"role": "assistant", "content": text}]) for text in ("a", "bb", "c", "c")]
    assert values(judge, asked) == [0, 1, 0.5, 0.5]
    assert judge.asked == [("Why?", ["a", "bb"])]


def test_chances_where_a_judge_gives_them():
    def sure(prompts, pairs, return_scores=False):
        assert return_scores
        return torch.tensor([0.7, float("nan")])[: len(pairs)]

    found = values(load_judge(sure))
    assert found[:2] == pytest.approx([0.7, 0.3]) and all(map(math.isnan, found[2:4])) and found[4:] == [0.5, 0.5]
    assert values(load_judge(sure), mode="greedy")[:2] == [1, 0]


def test_an_async_judge():
    class Later(Longer):
        async def judge(self, prompts, completions, shuffle_order=True):
            return longer(prompts, completions)

    reward = PairReward(Later())
    assert reward.concurrent and values(reward.judge) == [1, 0, 0, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        ([0.7, 1], "0.7, where a number is expected: 0 or 1, the number of the better answer, or -1"),
        ([True, 0], "True, where a number is expected"),
        (["0", 1], "'0', where a number is expected"),
        ([2, 1], "2, where a number"),
    ],
)
def test_verdicts_that_are_none(verdicts, told):
    judge = load_judge(lambda prompts, pairs: verdicts)
    with pytest.raises(RowErrors, match=told):
        PairReward(judge)(SAMPLES, {"mode": "train"})
    found = values(judge, on_error="skip")
    assert all(map(math.isnan, found[:2])) and not math.isnan(found[2])


def test_chances_that_are_none():
    def wrong(prompts, pairs, return_scores=False):
        return [1.5, 0.2][: len(pairs)]

    with pytest.raises(UserError, match="win_rate failed on sample 0 .*1.5, where a chance from 0 to 1"):
        values(load_judge(wrong))


@pytest.mark.parametrize("given", [[1], None, 1, "01"])
def test_a_wrong_number_of_verdicts(given):
    with pytest.raises(WrongCount, match="for 2 pairs; expected a list of one for each"):
        PairReward(load_judge(lambda prompts, pairs: given))(SAMPLES, {"mode": "train"})


def test_a_judge_that_fails_on_some_pairs():
    def broken(prompts, pairs):
        if "How?" in prompts:
            raise KeyError("down")
        return longer(prompts, pairs)

    found = values(load_judge(broken), on_error="skip")
    assert found[:2] == [1, 0] and all(map(math.isnan, found[2:4]))
    with pytest.raises(UserError, match="Reward win_rate failed on sample 2 .*KeyError: 'down'"):
        values(load_judge(broken))


def test_what_is_no_judge():
    for spec, told in (
        (3, "judge is a int"),
        ("pair_rm", "not run here"),
        (dict, "judge dict: has no method judge. Subclass BasePairwiseJudge"),
        ("judge:http://localhost:1", r"expected judge:URL\|MODEL"),
        ("no.such.function", "no.such.function"),
    ):
        with pytest.raises(UserError, match=told):
            load_judge(spec)


# ---- Behind an endpoint --------------------------------------------------------------------------------------------


def served(reply):
    """A server that answers by `reply(what is asked)`."""

    def answer(body):
        content = body["messages"][-1]["content"]
        return {"choices": [{"message": {"content": reply(content)}, "finish_reason": "stop"}]}

    return FakeServer(routes={"/v1/chat/completions": answer})


def prefers_longer(content):
    first, second = content.split("Answer 0:\n")[1].split("\n\nEnd with")[0].split("\n\nAnswer 1:\n")
    return f"The better one is\n{int(len(second) > len(first))}"


def test_an_endpoint_judges_in_either_order():
    with served(prefers_longer) as server:
        judge = load_judge(f"judge:{server.url}|org/tiny|temperature=0.5|max_concurrency=2")
        assert judge.judge(PROMPTS[:2], PAIRS[:2]) == [0, 1]
        assert judge.judge(PROMPTS[:2], PAIRS[:2], shuffle_order=False, return_scores=True) == [1.0, 0.0]
        body = server.seen("/v1/chat/completions")[-1]
        assert body["model"] == "org/tiny" and body["temperature"] == 0.5
        assert values(judge) == [1, 0, 0, 1, 0.5, 0.5] and PairReward(judge).concurrent


def test_a_leaning_to_one_place():
    prompts, pairs = [f"p{at}" for at in range(40)], [["a", "b"]] * 40
    with served(lambda content: "0") as server:
        leaning = EndpointPairwiseJudge(server.url, "m")
        shuffled = leaning.judge(prompts, pairs)
        assert 8 < sum(shuffled) < 32 and leaning.judge(prompts, pairs) == shuffled, "the order follows from the texts"
        assert leaning.judge(prompts, pairs, shuffle_order=False) == [0] * 40
        both = EndpointPairwiseJudge(server.url, "m", both_orders=True)
        assert both.judge(["p"], [["a", "b"]]) == [-1] and both.judge(["p"], [["a", "b"]], return_scores=True) == [0.5]


def test_an_endpoint_that_fails_on_some():
    def some(content):
        return "neither" if "How?" in content else "1"

    with served(some) as server:
        judge = EndpointPairwiseJudge(server.url, "m", retries=0)
        with pytest.raises(RowErrors, match="1 of 2 rows have no score; the first, 1: the judge said neither 0 nor 1"):
            judge.judge(PROMPTS[:2], PAIRS[:2], shuffle_order=False)
        found = values(judge, on_error="skip")
        assert not math.isnan(found[0]) and all(map(math.isnan, found[2:4]))
        server.failures["/v1/chat/completions"] = [500, 500]
        with pytest.raises(UserError, match="500"):
            values(judge, SAMPLES[:2])


def test_prompts_of_its_own(monkeypatch):
    with served(lambda content: "0" if content == "Why? a | b" else "1") as server:
        judge = EndpointPairwiseJudge(
            server.url, "m", prompt="{prompt} {response0} | {response1}", system_prompt="Be fair"
        )
        assert judge.judge(["Why?"], [["a", "b"]], shuffle_order=False) == [0]
        assert server.seen("/v1/chat/completions")[0]["messages"][0] == {"role": "system", "content": "Be fair"}
        as_elsewhere = EndpointPairwiseJudge(server.url, "m", system_prompt="{prompt} {response0} | {response1}")
        assert as_elsewhere.judge(["Why?"], [["a", "b"]], shuffle_order=False) == [0]
    for prompt in ("{prompt} {response0}", "{response0} {response1} {colour}"):
        with pytest.raises(UserError, match="must have {response0} and {response1}"):
            EndpointPairwiseJudge("http://localhost:1", "m", prompt=prompt)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(UserError, match="OPENAI_API_KEY, which is not set"):
        OpenAIPairwiseJudge()
    assert HfPairwiseJudge("org/model").url == "https://router.huggingface.co/v1/chat/completions"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("1", 1),
        ("Answer 0 is short, answer 1 is right.\n\n**1**", 1),
        ("`0`.", 0),
        ("The better answer is 0.", 0),
        ("1\nbecause it is right", 1),
        ("[1]", 1),
        ("Answer_1, since 0.5 of the other is wrong", 1),
    ],
)
def test_verdicts_in_a_reply(reply, verdict):
    assert verdict_in(reply) == verdict


@pytest.mark.parametrize(
    "reply", ["", "10", "Both 0 and 1 are fine.", "0\nor\n1\nis better", "2", "-", "-1", "0.5", "1/10", "1st"]
)
def test_replies_without_a_verdict(reply):
    with pytest.raises(JudgeError):
        verdict_in(reply)


def test_a_reply_that_was_cut_off():
    assert verdict_in("1\nbecause", cut=True) == 1
    with pytest.raises(JudgeError, match="raise max_tokens"):
        verdict_in("Answer 0 is", cut=True)
