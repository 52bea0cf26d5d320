"""Rollouts in the run report: on the page, in report.json and back, in the terminal; and the curves of online runs."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from shared.runtime.report import RolloutRow, RolloutTable, RunReport, before_after_table, rollout_text
from shared.runtime.report_curves import Axis, chart, curves_from_log, group_metrics, unit_of, worth_drawing
from shared.runtime.report_pictures import Picture
from shared.runtime.report_text import compare, format_metric, is_share
from shared.runtime.rollout_tables import from_json


def row(completion: str = "7", prompt: str = "3 + 4?", **given) -> RolloutRow:
    fields = {"images": [], "rewards": {"accuracy_reward": 1.0}, "reward": 1.0, "advantage": 0.5, "tokens": 2}
    return RolloutRow(prompt=prompt, completion=completion, finished=True, **(fields | given))


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    return RunReport(tmp_path / "report", title="a run")


def written(report: RunReport) -> tuple[str, dict]:
    page = report.write()
    return page.read_text(encoding="utf-8"), json.loads((page.parent / "report.json").read_text(encoding="utf-8"))


def test_a_table_in_json_and_on_the_page(report: RunReport) -> None:
    image = Image.new("RGB", (48, 48), "red")
    rewards = {"accuracy_reward": 0.0, "format": None}
    wrong = row("8", images=[image], rewards=rewards, reward=0.0, advantage=-0.5, tokens=1234)
    wrong.finished = False
    report.add_rollouts(RolloutTable(40, [row(images=[image]), wrong, row("no", prompt="why?")]))
    page, figures = written(report)
    assert figures["rollouts"] == [
        {
            "step": 40,
            "prompts": [
                {
                    "prompt": "3 + 4?",
                    "images": 1,
                    "completions": [
                        {
                            "completion": "7",
                            "rewards": {"accuracy_reward": 1.0},
                            "reward": 1.0,
                            "advantage": 0.5,
                            "tokens": 2,
                            "finished": True,
                        },
                        {
                            "completion": "8",
                            "rewards": rewards,
                            "reward": 0.0,
                            "advantage": -0.5,
                            "tokens": 1234,
                            "finished": False,
                        },
                    ],
                },
                {
                    "prompt": "why?",
                    "images": 0,
                    "completions": [
                        {
                            "completion": "no",
                            "rewards": {"accuracy_reward": 1.0},
                            "reward": 1.0,
                            "advantage": 0.5,
                            "tokens": 2,
                            "finished": True,
                        }
                    ],
                },
            ],
        }
    ]
    section = page[page.index("<h2>Rollouts</h2>") :]
    assert section.count("3 + 4?") == 1 and section.count("<img ") == 1
    assert "48×48 pixels" in section
    assert '<td data-name="advantage" class="num up">+0.5</td>' in section
    assert '<td data-name="advantage" class="num down">-0.5</td>' in section
    assert '<td data-name="format" class="num">–</td>' in section
    assert '<td data-name="tokens" class="num">1,234</td>' in section
    assert section.count("✓") == 2 and section.count(">cut<") == 1
    assert "mean reward of those shown 0.6667, 3 completions of 2 prompts" in section


def test_a_page_without_rollouts_has_no_such_section(report: RunReport) -> None:
    page, figures = written(report)
    assert figures["rollouts"] == [] and "ollouts" not in page


def test_the_newest_step_comes_first_and_is_open(report: RunReport) -> None:
    for step in (5, 10, 15):
        report.add_rollouts(RolloutTable(step, [row()]))
    page, _ = written(report)
    assert re.findall(r"<details class=\"card rollouts\"( open)?><summary>Step (\d+)", page) == [
        (" open", "15"),
        ("", "10"),
        ("", "5"),
    ]


def test_of_many_tables_the_first_the_newest_and_an_even_choice_stay(report: RunReport) -> None:
    for step in range(1, 1001):
        report.add_rollouts(RolloutTable(step, [row()]))
    steps = [table.step for table in report.rollouts]
    assert len(steps) == 20 and steps == sorted(steps)
    assert steps[0] == 1 and steps[-10:] == list(range(991, 1001))
    gaps = [later - earlier for earlier, later in zip(steps[:10], steps[1:11], strict=True)]
    assert max(gaps) <= 4 * min(gaps[:-1])


def test_a_run_that_goes_back_replaces_what_it_samples_again(report: RunReport) -> None:
    for step in (10, 20, 30, 20):
        report.add_rollouts(RolloutTable(step, [row(str(len(report.rollouts)))]))
    assert [(table.step, table.rows[0].completion) for table in report.rollouts] == [(10, "0"), (20, "3")]


def test_tables_come_back_from_json_without_their_pictures(report: RunReport, tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    rows = [row(images=[image], advantage=math.nan, reward=None) for image in (red, red, blue, blue)]
    report.add_rollouts(RolloutTable(10, rows))
    report.add_rollouts(RolloutTable(20, [row("x")]))
    _, figures = written(report)
    whole, resumed = RunReport(tmp_path, title="a run"), RunReport(tmp_path / "resumed", title="a run")
    whole.recall(report.directory)
    assert [table.step for table in whole.rollouts] == [10, 20]
    resumed.recall(report.directory, up_to=10)
    assert [table.step for table in resumed.rollouts] == [10]
    assert [len(group) for group in resumed.rollouts[0].groups()] == [2, 2]  # though only the pictures told them apart
    assert math.isnan(resumed.rollouts[0].rows[0].advantage) and resumed.rollouts[0].rows[0].reward is None
    resumed.add_rollouts(RolloutTable(20, [row("x")]))
    _, again = written(resumed)
    for table in (figures["rollouts"][0], again["rollouts"][0]):
        for prompt in table["prompts"]:
            del prompt["images"]
    assert again["rollouts"] == figures["rollouts"]
    whole.recall(tmp_path / "nowhere")
    assert len(whole.rollouts) == 2


def test_rows_of_a_prompt_are_grouped_wherever_they_stand() -> None:
    red, same, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "red", "blue"))
    rows = [row("a", images=[red]), row("b", images=[blue]), row("c", images=[same]), row("d"), row("e", images=[red])]
    groups = RolloutTable(1, rows).groups()
    assert [[one.completion for one in group] for group in groups] == [["a", "c", "e"], ["b"], ["d"]]


def test_kept_pictures_are_small_and_leave_the_given_rows_alone(report: RunReport) -> None:
    image = Image.new("RGB", (1024, 512), "red")
    given = row(images=[image])
    report.add_rollouts(RolloutTable(1, [given, row(images=[image.copy()])]))
    kept = [one.images[0] for one in report.rollouts[0].rows]
    assert isinstance(kept[0], Picture) and kept[0] is kept[1] and len(kept[0].address) < 4000
    assert given.images == [image]
    assert "1024×512 pixels" in written(report)[0]


def test_a_large_table_is_cut_on_the_page_and_whole_in_json(report: RunReport) -> None:
    rows = [row("word " * 2000, prompt=f"prompt {p}") for p in range(12) for _ in range(20)]
    report.add_rollouts(RolloutTable(1, rows))
    page, figures = written(report)
    assert page.count("4 more completions in report.json") == 8
    assert page.count('data-name="completion"') == 8 * 16
    assert "4 more prompts in report.json" in page and "prompt 8" not in page
    assert "more characters in report.json" in page
    assert sum(len(prompt["completions"]) for prompt in figures["rollouts"][0]["prompts"]) == 240
    assert figures["rollouts"][0]["prompts"][0]["completions"][0]["completion"] == "word " * 2000


def test_texts_of_rollouts_are_escaped(report: RunReport) -> None:
    attack = "<script>alert('1')</script>"
    report.add_rollouts(RolloutTable(1, [row(attack, prompt=attack, rewards={attack: 1.0})]))
    page, _ = written(report)
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

    Reader().feed(page)
    assert "details" in tags and not {"script", "link", "iframe"} & set(tags)


def test_table_text_of_rollouts() -> None:
    rewards = {"accuracy_reward": 1.0, "format": None}
    cut = row("a\nb \x1b[31m" + "c" * 80 + " so 42", rewards=rewards, reward=None, advantage=-1.0, tokens=1024)
    cut.finished = False
    table = RolloutTable(40, [row(rewards=rewards), cut, row("", prompt="why?", images=[Image.new("RGB", (2, 2))])])
    assert rollout_text(table, width=90).splitlines() == [
        "Rollouts at step 40 (mean reward of those shown 1)",
        "3 + 4?",
        "  completion                         accuracy  format     reward  advantage  tokens  ended",
        "  7                                         1       -          1       +0.5       2    yes",
        r"  a\nb \x1b[31mccc…cccccccccc so 42         1       -          -         -1   1,024    cut",
        "[image] why?",
        "  completion                         accuracy  format     reward  advantage  tokens  ended",
        "  (empty)                                   1       -          1       +0.5       2    yes",
    ]


@pytest.mark.parametrize("width", [70, 100, 160])
def test_table_text_keeps_to_its_width(width: int) -> None:
    rewards = {f"a_rather_long_name_{i}": 0.123456 for i in range(8)}
    table = RolloutTable(1, [row("word " * 500, prompt="word " * 500, rewards=rewards)])
    title, *lines = rollout_text(table, width).splitlines()
    shown = lines[1].count("a_rather_lo…")
    assert all(len(line) <= width for line in lines)
    assert f"{8 - shown} of 8 parts of the reward not shown" in title if shown < 8 else "not shown" not in title
    assert (shown > 0) == (width > 70)


def test_wide_letters_keep_the_columns_in_line() -> None:
    plain, wide = rollout_text(RolloutTable(1, [row("7"), row("答案" * 40)]), 100).splitlines()[3:]
    assert len(wide) < len(plain)  # a wide letter takes two columns
    assert len(wide) + sum(letter in "答案" for letter in wide) == len(plain)


ONLINE = (
    "loss learning_rate reward reward_std rewards/accuracy_reward/mean rewards/accuracy_reward/std "
    "rewards/format/mean rewards/format/std frac_reward_zero_std completions/mean_length completions/max_length "
    "completions/clipped_ratio entropy kl clip_ratio/low_mean clip_ratio/region_mean time/generation time/rewards "
    "time/update tokens_per_second/generation tokens_per_second/update alarms/entropy eval_reward eval_pass@1 "
    "eval_pass@8 eval_accuracy/plus eval_rewards/format/mean"
)


def test_online_curves_are_grouped_with_the_reward_first() -> None:
    assert list(group_metrics(ONLINE.split()).items()) == [
        ("reward", ["reward", "eval_reward"]),
        ("pass@k", ["eval_pass@1", "eval_pass@8"]),
        (
            "rewards by part",
            ["rewards/accuracy_reward/mean", "rewards/format/mean", "eval_rewards/format/mean"],
        ),
        ("accuracy", ["eval_accuracy/plus"]),
        ("loss", ["loss"]),
        ("reward_std", ["reward_std"]),
        ("rewards by part, std", ["rewards/accuracy_reward/std", "rewards/format/std"]),
        ("frac_reward_zero_std", ["frac_reward_zero_std"]),
        ("completions/length", ["completions/mean_length", "completions/max_length"]),
        ("completions/clipped_ratio", ["completions/clipped_ratio"]),
        ("entropy", ["entropy"]),
        ("kl", ["kl"]),
        ("clip_ratio", ["clip_ratio/low_mean", "clip_ratio/region_mean"]),
        ("alarms", ["alarms/entropy"]),
        ("time", ["time/generation", "time/rewards", "time/update"]),
        ("tokens_per_second", ["tokens_per_second/generation", "tokens_per_second/update"]),
        ("learning_rate", ["learning_rate"]),
    ]
    assert list(group_metrics(["entropy", "loss", "eval_accuracy"])) == ["loss", "accuracy", "entropy"]


def test_speeds_of_phases_are_curves_and_those_of_evaluation_are_not() -> None:
    curves = curves_from_log([{"tokens_per_second/update": 5.0, "eval_samples_per_second": 1.0, "step": 1}])
    assert list(curves) == ["tokens_per_second/update"]


def test_every_online_name_can_be_drawn_with_its_unit() -> None:
    curves = curves_from_log([dict.fromkeys(ONLINE.split(), 0.25) | {"step": 1}])
    figures = {
        title: chart(title, curves, metrics, unit_of(title)) for title, metrics in group_metrics(list(curves)).items()
    }
    names = {title: re.search(r'y="13">([^<]*)<', figure)[1] for title, figure in figures.items()}
    assert {title: names[title] for title in ("time", "tokens_per_second", "completions/length", "pass@k")} == {
        "time": "seconds",
        "tokens_per_second": "tokens/s",
        "completions/length": "tokens",
        "pass@k": "%",
    }
    assert names["rewards by part"] == "rewards by part" and names["clip_ratio"] == "%"
    assert "<td>0.25 s</td>" in figures["time"] and "<td>25.0 %</td>" in figures["pass@k"]


def test_a_reward_that_is_alone_is_drawn_once() -> None:
    one, other = {"step": [1, 2], "value": [0.5, 1.0]}, {"step": [1, 2], "value": [0.5, 0.75]}
    alone = {"reward": one, "reward_std": other, "rewards/length/mean": one, "rewards/length/std": other}
    assert worth_drawing(alone | {"eval_reward": other, "eval_rewards/length/mean": other, "loss": one}) == [
        "reward",
        "reward_std",
        "eval_reward",
        "loss",
    ]
    assert worth_drawing({**alone, "rewards/length/mean": other}) == ["reward", "reward_std", "rewards/length/mean"]


def test_which_names_are_shares() -> None:
    shares = (
        "pass@1 eval_pass@8 pass@4/plus frac_reward_zero_std completions/clipped_ratio clip_ratio/low_mean accuracy "
        "exact_match_reward exact_match_reward/plus"
    )
    others = "reward rewards/accuracy_reward/mean eval_rewards/accuracy_reward/std kl bypass@1 sampling/ratio/mean"
    assert all(map(is_share, shares.split()))
    assert not any(map(is_share, others.split()))
    assert is_share("rewards/accuracies")


def test_a_rare_share_is_not_drawn_flat_on_the_floor() -> None:
    assert Axis.over([0.1, 0.4], share=True).high == pytest.approx(0.4)
    assert Axis.over([3.0, 4.0], share=True).low == 0
    assert Axis.over([0.0, 0.0], share=True).high == 100
    assert Axis.over([0.1, 60.0], share=True).high == 100
    assert format_metric("clip_ratio/low_mean", 0.0004) == "0.04 %"


def test_before_and_after_of_an_online_run() -> None:
    before = {"reward": 0.21, "pass@1": 0.18, "pass@8": 0.5, "accuracy": 0.2, "reward_std": 0.4}
    after = {"reward": 1.1, "pass@1": 0.7, "pass@8": 0.45, "accuracy": 0.72, "reward_std": 0.2}
    assert before_after_table(before, after).splitlines()[3:] == [
        "reward        0.21     1.1         +0.89",
        "pass@1      18.0 %  70.0 %  +52.0 points",
        "pass@8      50.0 %  45.0 %   -5.0 points",
        "accuracy    20.0 %  72.0 %  +52.0 points",
        "reward_std     0.4     0.2          -0.2",
    ]
    assert [one.better for one in compare(before, after)] == [True, True, False, True, None]


def test_what_rewards_noted_of_completions(report: RunReport) -> None:
    noted = row(extra={"answer": "<7>", "steps": "3"})
    table = RolloutTable(3, [noted, row("8", extra={"answer": "8"}), row("9")])
    report.add_rollouts(table)
    page, figures = written(report)
    kept = [each.get("extra") for each in figures["rollouts"][0]["prompts"][0]["completions"]]
    assert kept == [{"answer": "<7>", "steps": "3"}, {"answer": "8"}, None]
    assert [each.extra for each in from_json(figures["rollouts"])[0].rows] == [kept[0], kept[1], {}]
    assert '<th scope="col">answer</th><th scope="col">steps</th>' in page
    assert '<td data-name="answer"><div class="text short">&lt;7&gt;</div></td>' in page
    lines = rollout_text(table, width=80).splitlines()
    assert "    answer: <7>, steps: 3" in lines and "    answer: 8" in lines
    assert len(lines) == len(rollout_text(RolloutTable(3, [row(), row("8"), row("9")]), width=80).splitlines()) + 2
