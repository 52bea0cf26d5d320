"""The benchmark of the vision trainers runs, compares like with like and says what it measured."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = {"vocab": 64, "image_tokens": 64, "batch": 2, "rows": 4, "question": 3, "answer": 4, "pixels": 40, "threads": 1}


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def bench(**options):
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    return subprocess.run(
        [sys.executable, SCRIPTS / "bench_vlm.py", *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_smallest_settings_are_measured(tmp_path):
    output = tmp_path / "out.json"
    done = bench(**TINY, case="sft-cached dpo", family="llava", blocks=2, output=output)
    assert done.returncode == 0, done.stderr
    cached, dpo = json.loads(output.read_text())
    assert (cached["case"], dpo["case"], dpo["by"], dpo["family"]) == ("sft-cached", "dpo", "ours", "llava")
    for each in (cached, dpo):
        assert 0 < each["data"] < each["seconds"] and each["model_cpu"] > 0 and each["mib"] > 0
        assert each["time_ratios"] == [1, 1] and each["setup_cpu_seconds"] > 0
    assert dpo["logps/chosen differs by"] == 0 and "logps/chosen differs by" not in cached
    assert "Medians of 2 blocks; 1 of" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rows": 3}, "multiple of --batch 2"), ({"image_tokens": 25}, "square of a divisor"), ({"blocks": 0}, "blocks")],
)
def test_settings_that_cannot_be_are_an_error(options, said):
    done = bench(**{**TINY, **options})
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_without_options_the_middle_and_its_neighbours_are_measured(module):
    options = {"all": False, "case": None, "family": None, "vocab": None, "image_tokens": None, "rows": 4, "batch": 4}
    settings = module("bench_vlm").settings_of(SimpleNamespace(**options))
    assert [tuple(each.values()) for each in settings[::3]] == [
        ("sft", "llava", 32_000, 256),
        ("sft", "llava", 512, 256),
        ("sft", "llava", 32_000, 64),
        ("sft", "qwen2_vl", 32_000, 256),
        ("sft", "idefics3", 32_000, 64),
    ]
    assert [each["case"] for each in settings[:3]] == ["sft", "sft-cached", "dpo"] and len(settings) == 15
    named = module("bench_vlm").settings_of(SimpleNamespace(**{**options, "case": ["dpo"], "image_tokens": [64, 144]}))
    assert [tuple(each.values()) for each in named] == [("dpo", "llava", 32_000, 64), ("dpo", "llava", 32_000, 144)]


@pytest.mark.parametrize(
    ("family", "seen"), [("llava", (336, 336)), ("qwen2_vl", (64, 14 * 14 * 6)), ("idefics3", (256, 256))]
)
def test_a_picture_has_as_many_tokens_as_asked_for(family, seen, module, tmp_path):
    bench_vlm = module("bench_vlm")
    _, processor = bench_vlm.MAKE[family](bench_vlm.build_tokenizer(family, 64), 16)
    (path,) = bench_vlm.save_pictures(1, 40, tmp_path)
    text = f"<user>{bench_vlm.PLACE[family]}w20 w21"
    inputs = processor(images=[Image.open(path)], text=[text], return_tensors="pt")
    place = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert (inputs["input_ids"] == place).sum() == 16
    assert inputs["pixel_values"].shape[-2:] == seen


def test_ratios_are_medians_of_the_blocks_of_a_turn(module):
    def blocks(*seconds):
        return [{"seconds": each, "cpu_seconds": 2 * each, "mib": 10 * each} for each in seconds]

    told = {"ours": blocks(1, 2, 4), "trl": blocks(3, 4, 8)}
    figure = module("bench_sides").figure_of("trl", told, SimpleNamespace(block_steps=2, blocks=3, threads=1))
    assert figure["time_ratios"] == [3, 2, 2] and figure["time_ratio"] == figure["cpu_ratio"] == 2
    assert (figure["seconds"], figure["cpu_seconds"], figure["mib"], figure["memory_ratio"]) == (2, 4, 80, 2)


def test_sides_that_compute_other_numbers_are_not_compared(module):
    check_same = module("bench_sides").check_same
    first = {"ours": [{}, {"loss": 2.0}], "trl": [{}, {"loss": 2.1}]}
    assert check_same(first, {"loss": 0.1})["loss"] == pytest.approx(0.1 / 2.1)
    with pytest.raises(AssertionError, match="loss differs: ours 2.0, trl 2.1"):
        check_same(first, {"loss": 0.01})
