"""The built-in rules: trl's values, numbers decided without mathematics as with it, threads, bad arguments."""

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.rewards import rules
from shared.rewards.rules import (
    accuracy_reward,
    exact_match_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

ROOT = Path(__file__).resolve().parents[2]
ORACLE = json.loads((ROOT / "tests/oracles/trl-rewards-1.16.0.json").read_text(encoding="utf-8"))


def chat(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("name, function", [("accuracy", accuracy_reward), ("reasoning", reasoning_accuracy_reward)])
def test_accuracy_is_the_fields(name, function):
    pairs, values = ORACLE[name]["pairs"], ORACLE[name]["values"]
    texts, solutions = [text for text, _ in pairs], [solution for _, solution in pairs]
    assert {0.0, 1.0, None} == set(values)
    assert function(chat(texts), solutions) == values
    assert function(completions=texts, solution=solutions, prompts=None) == values


def test_format_is_the_fields():
    record = ORACLE["format"]
    assert think_format_reward(chat(record["texts"])) == think_format_reward(record["texts"]) == record["values"]
    assert {0.0, 1.0} == set(record["values"])


@pytest.mark.parametrize(
    "name, make", [("repetition", get_repetition_penalty_reward), ("overlong", get_soft_overlong_punishment)]
)
def test_rewards_of_tokens_are_the_fields(name, make):
    for case in ORACLE[name]:
        assert make(**case["options"])(completion_ids=ORACLE["ids"], prompts=None) == case["values"]


def test_cosine_scaled_reward_is_the_fields():
    for case in ORACLE["cosine"]:
        reward = get_cosine_scaled_reward(**case["options"])
        count = len(ORACLE["ids"])
        found = reward([case["completion"]] * count, [case["solution"]] * count, ORACLE["ids"])
        assert found == (case["values"] if None in case["values"] else pytest.approx(case["values"], abs=1e-12))


def test_by_hand():
    assert get_repetition_penalty_reward(ngram_size=2)([[5, 5, 5, 5, 5]]) == [-0.75]  # 4 pairs, 1 kind
    assert get_soft_overlong_punishment(100, 20)([[1] * 90, [1] * 80, [1] * 101]) == [-0.5, 0.0, -1.0]
    half = get_cosine_scaled_reward(100)([r"\boxed{7}", r"\boxed{8}"], ["7", "7"], [[1] * 50, [1] * 50])
    assert half == pytest.approx([0.75, -0.75])


@pytest.mark.parametrize(
    "text, solution, value",
    [(" 7\n", "7", 1.0), ("7.0", "7", 1.0), ("-7", "7", 0.0), ("0.30", "0.3", 1.0), ("7 8", "7", 0.0), ("7", 7, 1.0),
     (r"\frac{1}{3}", r"\frac{1}{3}", 1.0), ("cat", "cat", None), ("9" * 5000, "7", 0.0)],
)  # fmt: skip
def test_a_completion_that_is_nothing_but_the_solution_is_right(text, solution, value):
    assert accuracy_reward([text], [solution]) == [value]


def test_numbers_are_decided_as_mathematics_decides_them():
    """Whatever numbers alone settle, math-verify settles in the same way."""
    from math_verify import parse, verify

    draw = random.Random(0)
    numbers = ["0", "1", "7", "12", "50", "100", "1000", "-3", "007", "9" * 20, "0.5", "7.0", "-0", "0.30"]
    words = [
        "the answer is ",
        "Answer: ",
        "= ",
        "3 ",
        " cm",
        "%",
        " percent",
        " and 8",
        ", 9",
        "\n",
        "-",
        "x = ",
        "]",
        "{",
    ]
    decided = 0
    for _ in range(400):
        around = ["".join(draw.choices(words, k=draw.randint(0, 2))) for _ in range(2)]
        inside = draw.choice(numbers)
        answer = rf"{around[0]}\boxed{{{inside}}}{around[1]}" if draw.random() < 0.7 else inside.join(around)
        solution = draw.choice([inside, draw.choice(numbers)])
        quick = rules._by_numbers(answer.strip(), solution)
        if quick is None or rules.NUMBER.fullmatch(answer.strip()):
            continue
        decided += 1
        extraction = {"extraction_config": [rules._extraction()], "extraction_mode": "first_match"}
        assert quick == float(verify(parse(solution), parse(answer.strip(), **extraction))), (answer, solution)
    assert decided > 150


def test_simple_numbers_do_not_load_mathematics():
    code = (
        "import sys; from shared.rewards.rules import accuracy_reward as a; "
        r"print(a(['7', 'it is 8', r'so \boxed{7}.', r'\boxed{8}'], ['7'] * 4), "
        "{'sympy', 'math_verify', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[1.0, 0.0, 1.0, 0.0] set()"


def test_accuracy_works_in_a_thread(caplog):
    rules._parsed.cache_clear()
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(accuracy_reward([r"\boxed{\frac{2}{6}}", r"\boxed{2}"], [r"$\frac{1}{3}$"] * 2))
    )
    thread.start()
    thread.join()
    assert found == [1.0, 0.0] and not caplog.records


def test_the_answer_follows_the_last_delimiter():
    text = r"a <end> \boxed{3} </think> \boxed{7}"
    assert reasoning_accuracy_reward([text] * 2, ["7", "3"], reasoning_delimiters=["<end>", "</think>"]) == [1.0, 0.0]
    with pytest.raises(UserError, match="reasoning_delimiters"):
        reasoning_accuracy_reward([text], ["7"], reasoning_delimiters=[])


def test_solutions_are_logged_where_that_is_asked():
    logged = {}
    accuracy_reward(["7", "8"], ["7", "7"], log_extra=logged.__setitem__)
    assert logged == {"solution": ["7", "7"]}


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: get_cosine_scaled_reward(max_len=0), "max_len is 0"),
        (lambda: get_repetition_penalty_reward(ngram_size=0), "ngram_size is 0"),
        (lambda: get_repetition_penalty_reward(max_penalty=1.0), "max_penalty is 1.0"),
        (lambda: get_soft_overlong_punishment(0, 0), "max_completion_len is 0"),
        (lambda: get_soft_overlong_punishment(10, -1), "soft_punish_cache is -1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_exact_match_is_word_for_word_but_for_space_around():
    completions = ["top left", " top left\n", "left", [{"role": "assistant", "content": "3"}]]
    assert exact_match_reward(completions, ["top left", "top left", "top left", 3]) == [1.0, 1.0, 0.0, 1.0]
