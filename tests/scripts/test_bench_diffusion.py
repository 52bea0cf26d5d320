"""The benchmarks and comparisons of diffusion training run, and say what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = {"rows": 2, "steps": 2, "group": 2, "threads": 1}


def script(name, **options):
    words = []
    for option, value in options.items():
        words += [f"--{option}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return subprocess.run([sys.executable, SCRIPTS / name, *words], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_smallest_setting_is_measured(tmp_path):
    output = tmp_path / "out.json"
    done = script("bench_diffusion.py", **TINY, case="ddpo", side="ours", blocks=1, output=output)
    assert done.returncode == 0, done.stderr
    (ours,) = json.loads(output.read_text())
    assert (ours["by"], ours["time_ratio"], ours["grad_norm differs by"]) == ("ours", 1, 0)
    assert 0 < ours["generation"] < ours["seconds"] and ours["mib"] > 0
    assert ours["sampling"] > ours["both"] < ours["training"]
    assert "Medians of 1 blocks; 1 of" in done.stdout


def test_sides_of_a_case_differ_in_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("sys.argv", ["bench", "--folded", "32"])
    import bench_diffusion as bench

    options = bench.arguments()
    first, *others = bench.settings_of(options)
    assert first == {"case": "ddpo", **bench.MIDDLE, "micro": 8} and len(others) == 13
    ddpo = bench.sides_of(first, options)
    assert list(ddpo) == ["ours", "trl", "folded", "fast"] and ddpo["ours"] == ddpo["trl"] == {"case": "ddpo"}
    assert ddpo["folded"]["pairs_at_once"] == ddpo["fast"]["pairs_at_once"] == 32
    options.side = ["trl"]
    aligned = bench.sides_of({**first, "case": "alignprop"}, options)
    assert list(aligned) == ["ours", "trl"] and aligned["trl"]["truncated_backprop_timestep"] == 5


class Improving:
    """A side whose pictures become better by .2 a block of 3 processor seconds."""

    def __init__(self, by, python, script, folder, threads):
        self.reward, self.ended = 0.1, False
        self.began = {"held_out": self.reward}
        self.told = json.loads((folder / "setting.json").read_text())
        assert (folder / "model" / "model_index.json").exists()
        made.append(self)

    def block(self):
        self.reward += 0.2
        return {"cpu_seconds": 3.0, "held_out": self.reward}

    def end(self):
        self.ended = True


made: list[Improving] = []


@pytest.mark.parametrize(("target", "most", "blocks"), [(0.6, 100, 3), (0.6, 5, 2)])
def test_a_side_goes_on_until_it_has_reached_the_reward_or_its_time_is_up(monkeypatch, target, most, blocks):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("sys.argv", ["bench", "--target", str(target), "--most_seconds", str(most), "--judged", "5"])
    import bench_diffusion_reward as bench

    monkeypatch.setattr(bench, "Side", Improving)
    figure = bench.figure_of("ddpo-fast", 3, bench.arguments())
    assert (figure["steps"], figure["pictures"]) == (2 * blocks, 2 * blocks * 64)
    assert (figure["cpu_seconds"], figure["before"], figure["reached"]) == (3 * blocks, 0.1, blocks == 3)
    assert figure["curve"] == [(3 * (at + 1), pytest.approx(0.1 + 0.2 * (at + 1))) for at in range(blocks)]
    told = made[-1].told
    assert made[-1].ended and told["seed"] == 3 and len(told["held_out"]) == 5
    assert told["sides"]["ddpo-fast"]["window_size"] == 2 and told["sides"]["ddpo-fast"]["case"] == "ddpo"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bench_diffusion.py", {"rows": 6}, "must be a multiple of --group 4"),
        ("bench_diffusion_reward.py", {"rows": 6}, "must be a multiple of --group and of --micro"),
    ],
)
def test_pictures_that_make_no_groups_are_an_error(name, options, words):
    done = script(name, **options)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_compared_runs_are_summed_up_and_plotted(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from compare_diffusion import plot, summary

    def run(name, seed, last):
        points = [{"step": at, "queries": 16 * at, "reward": 0.5 + at * last, "form": 0.9} for at in (0, 10)]
        return {"run": name, "seed": seed, "points": points, "diversity": [(5, 1.0), (10, 0.5)], "cpu_seconds": 1.0}

    curves = summary([run("group", 0, 0.01), run("group", 1, 0.03), run("raw", 0, 0.0), run("too_long", 0, 0.04)])
    assert list(curves) == ["group", "raw", "too_long"]
    assert curves["group"]["mean"] == pytest.approx([0.5, 0.7]) and curves["group"]["queries"] == [0, 160]
    plot(curves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
