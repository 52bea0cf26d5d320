"""Pictures in the run report: the same prompts over the steps, before and after, rollouts; and on resume."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from shared.runtime.report import RolloutRow, RolloutTable, RunReport, SampleRow, rollout_text
from shared.runtime.report_grid import MOST_COLUMNS
from shared.runtime.report_pictures import Picture

PROMPTS = ["a red circle", "a <b>cat</b>"]


def plain(colour, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def drawn(prompt: str = PROMPTS[0], group: int = 0, colour="red", **given) -> RolloutRow:
    fields = {"rewards": {"colour_reward": 0.5, "brightness": 0.25}, "reward": 0.75, "advantage": 1.5}
    row = RolloutRow([], prompt, "", tokens=None, finished=None, group=group, **(fields | given))
    row.output_images = [plain(colour)]
    return row


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    return RunReport(tmp_path / "report", title="a run")


def written(report: RunReport) -> tuple[str, dict]:
    page = report.write()
    return page.read_text(encoding="utf-8"), json.loads((page.parent / "report.json").read_text(encoding="utf-8"))


def test_the_grid_has_a_row_a_prompt_and_a_column_a_step(report: RunReport) -> None:
    report.add_pictures(0, PROMPTS, [plain("red"), plain("blue")], [0.25, None])
    report.add_pictures(20, PROMPTS, [plain("lime"), plain("white")], [0.5, math.nan])
    page, figures = written(report)
    assert figures["grid"] == {
        "prompts": PROMPTS,
        "columns": [
            {"step": 0, "label": "", "rewards": [0.25, None]},
            {"step": 20, "label": "", "rewards": [0.5, None]},
        ],
    }
    section = page[page.index("<h2>Pictures</h2>") : page.index("Environment")]
    assert re.findall(r'<th scope="col">([^<]*)</th>', section) == ["before", "step 20"]
    assert "a &lt;b&gt;cat&lt;/b&gt;" in section and "<b>" not in section
    assert re.findall(r'<div class="value( last)?">([^<]*)</div>', section) == [("", "0.25"), (" last", "0.5")]
    assert section.count("<img ") == 4


def test_pictures_png_shows_all_cells_enlarged_unblurred(report: RunReport) -> None:
    report.add_pictures(0, PROMPTS, [plain("red", 32), plain("blue", 32)])
    report.add_pictures(20, PROMPTS, [plain("lime", 32), plain((9, 9, 9), 32)])
    report.write()
    picture = Image.open(report.directory / "pictures.png")
    counts = {colour: count for count, colour in picture.getcolors(1 << 16)}
    side = 4 * 32  # the largest whole factor that fits 144
    for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0), (9, 9, 9)):
        assert counts[colour] == side * side
    left = [
        min(x for x in range(picture.width) if picture.getpixel((x, 60)) == colour)
        for colour in ((255, 0, 0), (0, 255, 0))
    ]
    assert left[1] - left[0] > side  # columns stand side by side
    assert "its reward" not in (report.directory / "index.html").read_text()


def test_a_long_prompt_does_not_widen_the_picture(report: RunReport) -> None:
    report.add_pictures(0, ["a cat " * 200], [plain("red")])
    report.write()
    assert Image.open(report.directory / "pictures.png").width < 200


def test_of_many_steps_the_first_the_newest_and_an_even_choice_stay(report: RunReport) -> None:
    for step in range(0, 401, 5):
        report.add_pictures(step, PROMPTS, [plain("red"), plain("blue")])
    steps = [column.step for column in report.grid.columns]
    assert len(steps) == MOST_COLUMNS and (steps[0], steps[-1]) == (0, 400)
    gaps = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    assert max(gaps) <= 2.5 * 400 / (MOST_COLUMNS - 1)


def test_other_prompts_begin_a_new_grid_and_a_wrong_count_is_refused(report: RunReport) -> None:
    report.add_pictures(0, PROMPTS, [plain("red"), plain("blue")])
    report.add_pictures(20, ["a dog"], [plain("red")], label="kept: step 10")
    assert [column.heading for column in report.grid.columns] == ["kept: step 10"]
    with pytest.raises(ValueError, match="1 pictures for 2 prompts"):
        report.add_pictures(30, PROMPTS, [plain("red")])


def test_a_resumed_run_shows_the_pictures_from_before_it(report: RunReport, tmp_path: Path) -> None:
    for step, colour in ((0, "red"), (20, "lime"), (40, "blue")):
        report.add_pictures(step, PROMPTS, [plain(colour), plain("white")], [step / 40, None])
        report.add_rollouts(RolloutTable(step + 1, [drawn(colour=colour), drawn(PROMPTS[1], 1, advantage=None)]))
    sample = SampleRow([], "a red circle", "", after="colour 0.5", after_images=[plain("red", 300)])
    report.before, report.samples = {"reward": 0.5}, [sample.as_before()]
    report.write()
    resumed = RunReport(tmp_path / "resumed", title="a run")
    resumed.recall(report.directory, up_to=20)
    assert resumed.grid.prompts == PROMPTS and resumed.grid.columns == report.grid.columns[:2]
    assert [table.step for table in resumed.rollouts] == [1]
    assert resumed.rollouts[0].rows[0].output_images == [Picture.of(plain("red"))]
    assert resumed.rollouts[0].rows[1].advantage is None
    assert resumed.before == {"reward": 0.5}
    now = SampleRow([], "a red circle", "", after="colour 0.75", after_images=[plain("blue")])
    resumed.samples = [now.since(resumed.samples[0])]
    page, _ = written(resumed)
    assert "300×300 pixels" in page and "colour 0.5<" in page and "colour 0.75<" in page
    resumed.add_pictures(40, PROMPTS, [plain("cyan"), plain("white")])
    assert [column.step for column in resumed.grid.columns] == [0, 20, 40]
    assert resumed.grid.columns[-1].pictures[0].image().convert("RGB").getpixel((0, 0)) == (0, 255, 255)


def test_a_report_whose_pictures_are_gone_or_newer_is_taken_without_them(report: RunReport, tmp_path: Path) -> None:
    report.add_pictures(0, PROMPTS, [plain("red"), plain("white")])
    report.add_rollouts(RolloutTable(1, [drawn()]))
    report.write()
    older = (report.directory / "report.json").read_text()
    for step in range(5, 100, 5):
        report.add_pictures(step, PROMPTS, [plain("red"), plain("white")])
    report.write()
    (report.directory / "report.json").write_text(older)  # killed between two files
    resumed = RunReport(tmp_path / "resumed", title="a run")
    resumed.recall(report.directory)
    assert [column.step for column in resumed.grid.columns] == [0]
    (report.directory / "pictures.json").unlink()
    resumed = RunReport(tmp_path / "resumed", title="a run")
    resumed.recall(report.directory)
    assert resumed.grid.columns == [] and resumed.rollouts[0].rows[0].output_images == []
    assert "<h2>Rollouts</h2>" in written(resumed)[0]


def test_before_and_after_stand_side_by_side(report: RunReport) -> None:
    report.samples = [
        SampleRow(
            [], "a red circle", "", after="colour 0.75", after_images=[plain("blue")], columns={"kind": "circle"}
        )
    ]
    page, figures = written(report)
    section = page[page.index("<h2>Samples</h2>") :]
    assert re.findall(r"<figcaption>(\w+)</figcaption>(<img|<p class=\"muted\">–)", section) == [
        ("before", '<p class="muted">–'),
        ("after", "<img"),
    ]
    assert "kind: circle" in section and "<table" not in section[: section.index("</section>")]
    assert figures["samples"][0]["after"] == "colour 0.75"


def test_rollouts_show_pictures_with_their_rewards_and_no_tokens(report: RunReport) -> None:
    rows = [drawn(), drawn(colour="blue", advantage=-1.5, extra={"seen": "<i>"}), drawn(PROMPTS[1], 1)]
    report.add_rollouts(RolloutTable(5, rows))
    page, figures = written(report)
    first = figures["rollouts"][0]["prompts"][0]["completions"][0]
    assert first["images"] == 1 and first["tokens"] is None and first["advantage"] == 1.5
    section = page[page.index("<h2>Rollouts</h2>") :]
    assert "3 pictures of 2 prompts" in section and section.count("<figure>") == 3
    assert '<span>colour</span><span class="">0.5</span>' in section
    assert '<span>advantage</span><span class="down">-1.5</span>' in section
    assert "&lt;i&gt;" in section and "token" not in section and "ended" not in section


def test_a_reward_without_parts_or_advantages_is_shown_alone(report: RunReport) -> None:
    rows = [drawn(rewards={"colour_reward": 0.75}, advantage=None) for _ in range(2)]
    report.add_rollouts(RolloutTable(5, rows))
    section = written(report)[0]
    section = section[section.index('class="drawn"') :]
    assert re.findall(r"<span>(\w+)</span>", section[: section.index("</div>")]) == ["reward"] * 2


def test_the_terminal_gets_no_pictures_and_no_arrays() -> None:
    table = RolloutTable(5, [drawn(), drawn(reward=None, advantage=-0.5), drawn(PROMPTS[1], 1)])
    assert rollout_text(table, width=80).splitlines() == [
        "Rollouts at step 5 (mean reward of those shown 0.75)",
        "a red circle",
        "  picture   colour  brightness     reward  advantage",
        "  1 of 2       0.5        0.25       0.75       +1.5",
        "  2 of 2       0.5        0.25          -       -0.5",
        "a <b>cat</b>",
        "  picture   colour  brightness     reward  advantage",
        "  1 of 1       0.5        0.25       0.75       +1.5",
    ]


def test_one_picture_a_prompt_is_shown_beside_the_others(report: RunReport) -> None:
    table = RolloutTable(5, [drawn(advantage=None), drawn(PROMPTS[1], 1, advantage=None)])
    assert rollout_text(table, width=60).splitlines()[1:] == [
        "  picture of                   colour  brightness     reward",
        "  a red circle                    0.5        0.25       0.75",
        "  a <b>cat</b>                    0.5        0.25       0.75",
    ]
    report.add_rollouts(table)
    section = written(report)[0]
    section = section[section.index("<h2>Rollouts</h2>") :]
    assert section.count('class="drawn"') == 1 and section.count("<figure>") == 2
    assert '<div class="of">a &lt;b&gt;cat&lt;/b&gt;</div>' in section
