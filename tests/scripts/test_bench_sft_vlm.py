"""The benchmark runs, compares like with like and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_sft_vlm.py"


def bench(**options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=300)


def test_the_smallest_setting_is_measured(tmp_path):
    output = tmp_path / "out.json"
    done = bench(vocab=0, batch_sizes=2, images=2, blocks=2, block_samples=4, threads=1, output=output)
    assert done.returncode == 0, done.stderr
    (figure,) = json.loads(output.read_text())
    assert (figure["vocab"], figure["images"], figure["batch"], figure["blocks"]) == (0, 2, 2, 2)
    assert len(figure["speed_ratios"]) == 2 and 0.1 < figure["speed_ratio"] < 10
    assert figure["trainer_mib"] > 0 and figure["bare_mib"] > 0
    assert "Medians of 2 blocks; 1 of" in done.stdout


def test_settings_that_do_not_fit_are_an_error():
    done = bench(vocab=1_000_000, batch_sizes=8, images=1, max_logits=10)
    assert done.returncode == 2 and "--max_logits" in done.stderr and "Traceback" not in done.stderr
