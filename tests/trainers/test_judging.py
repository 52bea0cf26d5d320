"""Judges: what they are given, what they measure, and which of two answers is better by them."""

import pytest

from shared.errors import UserError
from shared.trainers.judging import figure_of, load_judges, score, win_rate

ROWS = [{"shapes": ["circle"], "other": 1}, {"shapes": ["square", "circle"], "other": 2}]


def test_a_judge_of_two_arguments_sees_no_columns():
    assert score(lambda prompt, answer: len(prompt + answer), ["a", "bc"], ["d", ""], ROWS) == [2.0, 2.0]


def test_further_arguments_are_columns_of_the_row():
    def judge(prompt, answer, shapes, *, weight=10, other=0):
        return len(shapes) + weight + other

    assert score(judge, ["p", "p"], ["a", "a"], ROWS) == [12.0, 14.0]


def test_a_column_that_there_is_not():
    def judge(prompt, answer, shapes, colours):
        return 0

    with pytest.raises(UserError, match="judge takes colours, which"):
        score(judge, ["p"], ["a"], ROWS)


def test_what_is_no_function_and_what_is_no_number():
    with pytest.raises(UserError, match="judge is a int"):
        load_judges([len, 5])
    for value in (None, float("nan")):
        with pytest.raises(UserError, match="on answer 0|for answer 0"):
            score(lambda prompt, answer, value=value: value, ["p"], ["a"])


def test_several_judges_measure_several_things():
    def first(prompt, answer):
        return 0

    def second(prompt, answer):
        return 1

    second.figure = "rate"
    assert [figure_of(judge) for judge in load_judges([first, second])] == ["judge_score", "rate"]
    assert load_judges(None) == [] and load_judges("math.hypot")[0](3, 4) == 5
    with pytest.raises(UserError, match="figure"):
        load_judges([first, first])


def test_less_may_be_better():
    assert win_rate([1, 0, 0], [0, 1, 0]) == win_rate([1, 0, 0], [0, 1, 0], lower_is_better=True) == 0.5
    assert win_rate([0, 0], [1, 1], lower_is_better=True) == 1.0
    assert win_rate([0, 0], [1, 1]) == 0.0
