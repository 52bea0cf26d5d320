"""The benchmarks of online training run, compare like with like and say what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = {"prompt": 8, "completion": 6, "group": 2, "vocab": 64, "rows": 4, "threads": 1}


def script(name, **options):
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    return subprocess.run([sys.executable, SCRIPTS / name, *words], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_smallest_setting_is_measured(tmp_path):
    output = tmp_path / "out.json"
    done = script("bench_online.py", **TINY, lengths="skewed", blocks=2, output=output)
    assert done.returncode == 0, done.stderr
    ours, floor = json.loads(output.read_text())
    assert (ours["by"], floor["by"]) == ("ours", "floor")
    assert (floor["prompt"], floor["group"], floor["lengths"], floor["blocks"]) == (8, 2, "skewed", 2)
    assert ours["time_ratio"] == 1 and len(floor["time_ratios"]) == 2 and 0.05 < floor["time_ratio"] < 20
    for each in (ours, floor):
        assert 0 < each["generation"] < each["seconds"] and each["update"] > 0 and each["mib"] > 0
        assert 4 <= each["tokens"] <= 24
    assert "Medians of 2 blocks; 1 of" in done.stdout


def test_rows_that_make_no_groups_are_an_error():
    done = script("bench_online.py", **{**TINY, "group": 8})
    assert done.returncode == 2 and "must be a multiple of --group 8" in done.stderr
    assert "Traceback" not in done.stderr


def test_learning_curves_are_summed_up(tmp_path):
    sys.path.insert(0, str(SCRIPTS))
    try:
        from learning_curves import summary
    finally:
        sys.path.remove(str(SCRIPTS))
    runs = [
        {"algorithm": "grpo", "by": by, "seed": seed, "cpu_seconds": 1.0, "accuracy": [[0, 0.5], [25, last]]}
        for by, seed, last in (("ours", 0, 0.6), ("trl", 0, 0.5), ("ours", 1, 0.8))
    ]
    ours, trl = summary(runs)
    assert (ours["by"], ours["seeds"], ours["steps"]) == ("ours", [0, 1], [0, 25])
    assert ours["mean"] == pytest.approx([0.5, 0.7]) and trl["mean"] == pytest.approx([0.5, 0.5])


@pytest.mark.slow
def test_learning_curves_are_made(tmp_path):
    pytest.importorskip("matplotlib")
    options = {"steps": 2, "every": 1, "batch": 16, "threads": 1, "seeds": 0, "algorithms": "rloo"}
    done = script("learning_curves.py", **options, folder=tmp_path / "runs", output=tmp_path / "curves")
    assert done.returncode == 0, done.stderr
    (curve,) = json.loads((tmp_path / "curves.json").read_text())["curves"]
    assert curve["steps"] == [0, 1, 2] and 0.3 < curve["accuracy"][0][0] < 0.7
    assert (tmp_path / "curves.png").stat().st_size > 1000
