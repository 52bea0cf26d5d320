"""The run report: what lands in report.json and index.html, and what must never land there."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from enum import StrEnum
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from shared.runtime import report as report_module
from shared.runtime.report import RunReport, SampleRow, before_after_table, environment, peak_memory
from shared.runtime.report_curves import Axis, group_metrics, smooth
from shared.runtime.report_pictures import data_uri
from shared.runtime.report_text import format_bytes, format_duration, format_number

LOG = [
    {"loss": 3.0, "learning_rate": 1e-3, "epoch": 0.1, "step": 10},
    {"loss": 2.0, "learning_rate": 9e-4, "epoch": 0.2, "step": 20},
    {"eval_loss": 2.5, "eval_runtime": 1.0, "eval_samples_per_second": 8.0, "epoch": 0.2, "step": 20},
    {"loss": 1.5, "learning_rate": 8e-4, "epoch": 0.2, "step": 20},
    {"train_runtime": 9.0, "train_loss": 2.2, "total_flos": 1e9, "epoch": 0.2, "step": 20},
]


def written(report: RunReport) -> tuple[str, dict]:
    page = report.write()
    return page.read_text(encoding="utf-8"), json.loads((page.parent / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    return RunReport(tmp_path / "out" / "report", title="a run", config={"learning_rate": 1e-3})


def test_json_holds_the_figures(report: RunReport) -> None:
    report.before = {"accuracy/colour": 0.16}
    report.after = {"accuracy/colour": np.float32(1.0)}
    report.throughput = {"samples_per_second": 200.0}
    report.peak_memory = {"process": 2.0**30}
    report.notes = ["3 rows were skipped"]
    report.status = "interrupted"
    report.samples = [SampleRow([Image.new("RGB", (4, 4))], "which?", "red", None, "blue", {"kind": "colour"})]
    page, figures = written(report)
    assert figures["before"] == {"accuracy/colour": 0.16}
    assert figures["after"] == {"accuracy/colour": 1.0}
    assert figures["throughput"] == {"samples_per_second": 200.0}
    assert figures["peak_memory"] == {"process": 2**30}
    assert figures["config"] == {"learning_rate": 1e-3}
    assert figures["status"] == "interrupted"
    assert figures["title"] == "a run"
    assert figures["notes"] == ["3 rows were skipped"]
    assert figures["environment"]["python"] == environment()["python"]
    assert figures["samples"] == [
        {
            "images": 1,
            "question": "which?",
            "answer": "red",
            "before": None,
            "after": "blue",
            "columns": {"kind": "colour"},
        }
    ]
    for text in ("16.0 %", "100.0 %", "+84.0 points", "1.00 GiB", "interrupted", "3 rows were skipped"):
        assert text in page


def test_an_empty_report_can_be_written(report: RunReport) -> None:
    page, figures = written(report)
    assert figures["curves"] == {} and figures["samples"] == []
    assert "a run" in page


def test_curves_from_a_log_where_a_resumed_run_repeats_a_step(report: RunReport) -> None:
    report.add_curves([{"loss": 99.0, "step": 1}])
    report.add_curves(LOG)
    _, figures = written(report)
    assert figures["curves"] == {
        "loss": {"step": [10, 20], "value": [3.0, 1.5]},
        "learning_rate": {"step": [10, 20], "value": [1e-3, 8e-4]},
        "eval_loss": {"step": [20], "value": [2.5]},
    }


def test_training_and_evaluation_share_a_chart() -> None:
    metrics = "learning_rate loss eval_loss eval_accuracy/shape eval_accuracy/colour rewards/accuracies"
    assert group_metrics(metrics.split()) == {
        "loss": ["loss", "eval_loss"],
        "accuracy": ["eval_accuracy/shape", "eval_accuracy/colour"],
        "rewards/accuracies": ["rewards/accuracies"],
        "learning_rate": ["learning_rate"],
    }


def test_nan_is_null_in_json_and_counted_on_the_page(report: RunReport) -> None:
    report.before = {"loss": math.nan}
    report.add_curves([{"loss": v, "step": s} for s, v in enumerate([1.0, math.nan, math.inf, -math.inf, 2.0])])
    report.config = {"limit": math.inf}
    page, figures = written(report)
    assert figures["before"] == {"loss": None}
    assert figures["config"] == {"limit": None}
    assert figures["curves"]["loss"]["value"] == [1.0, None, None, None, 2.0]
    assert "3 values were NaN or infinite and left out (first at step 1)" in page
    drawing = re.search(r'<svg class="chart".*?</svg>', page)[0]
    assert not re.search(r"nan|inf", re.sub(r"<title>.*?</title>", "", drawing))


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0], [-3.0, -3.0], [1e-12, 2e-12], [1e300, -1e300], [1e99, -1e99], [1e-320, 0.0], [1e9, 1e9 + 1e-6]],
)
def test_any_finite_values_can_be_drawn(report: RunReport, values: list[float]) -> None:
    report.add_curves([{"loss": value, "step": step} for step, value in enumerate(values)])
    page, _ = written(report)
    assert "loss" in page


def test_an_axis_has_round_ticks_around_its_values() -> None:
    axis = Axis.over([0.13, 0.97])
    assert axis.ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert [axis.label(tick) for tick in axis.ticks] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    small = Axis.over([0.0, 2e-4])
    assert small.exponent == -4
    assert [small.label(tick) for tick in small.ticks] == ["0.0", "0.5", "1.0", "1.5", "2.0"]
    assert Axis.over([1, 3], whole=True).ticks == [1, 2, 3]


def test_smoothing_is_a_centred_mean() -> None:
    assert smooth([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])


def test_a_long_curve_keeps_its_spike_and_a_small_page(report: RunReport) -> None:
    values = [1.0] * 50_000
    values[31_234] = 50.0
    report.add_curves([{"loss": value, "step": step} for step, value in enumerate(values)])
    page, figures = written(report)
    assert len(figures["curves"]["loss"]["value"]) == 50_000
    assert len(page) < 120_000
    raw = re.search(r'class="line raw[^"]*" d="M([^"]*)"', page)[1]
    heights = [float(point.split()[1]) for point in raw.split("L")]
    assert max(heights) - min(heights) > 100  # SVG units: the spike spans the chart


def test_rare_evaluations_are_in_the_table_of_numbers(report: RunReport) -> None:
    log = [{"loss": 1.0, "step": step} for step in range(1000)]
    report.add_curves([*log, {"eval_loss": 0.4321, "step": 333}])
    page, _ = written(report)
    assert '<th scope="row">333</th><td>1</td><td>0.4321</td>' in page


def test_texts_are_escaped_and_the_page_needs_nothing_from_outside(report: RunReport) -> None:
    attack = "<script>alert('1')</script>"
    report.title = report.status = attack
    report.notes = [attack]
    report.before = report.after = report.throughput = report.peak_memory = {attack: 0.5}
    report.config = {attack: attack}
    report.units = {attack: attack}
    report.add_curves([{attack: 1.0, "step": 1}])
    report.samples = [SampleRow([], attack, attack, attack, attack, {attack: attack})]
    page, figures = written(report)
    assert figures["samples"][0]["after"] == attack

    tags: list[str] = []
    links: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            links.extend(value or "" for name, value in attrs if name in {"src", "href", "srcset"})

    Reader().feed(page)
    assert "table" in tags and "svg" in tags
    assert not {"script", "link", "iframe"} & set(tags)
    assert links == []
    assert "url(" not in page and "http:" not in page and "https:" not in page


def test_secrets_and_the_home_folder_stay_out(report: RunReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    report.config = {
        "hub_token": "s3cret",
        "token": None,
        "wandb_api_key": "s3cret",
        "Password": "s3cret",
        "model_init_kwargs": {"auth_token": "s3cret", "scorers": [{"key": "s3cret"}]},
        "proxy": "ftp://me:s3cret@host/x",
        "eos_token": "<end>",
        "max_new_tokens": 8,
        "output_dir": Path("/home/someone/out"),
        "cache": "/home/someone-else",
    }
    page, figures = written(report)
    assert "s3cret" not in page and "s3cret" not in json.dumps(figures)
    config = figures["config"]
    assert config["hub_token"] == config["wandb_api_key"] == config["Password"] == "***"
    assert config["model_init_kwargs"] == {"auth_token": "***", "scorers": [{"key": "***"}]}
    assert config["token"] is None
    assert config["proxy"] == "ftp://***@host/x"
    assert config["eos_token"] == "<end>"
    assert config["max_new_tokens"] == 8
    assert config["output_dir"] == "~/out"
    assert config["cache"] == "/home/someone-else"


def test_config_values_of_other_types_become_text(report: RunReport) -> None:
    class Loss(StrEnum):
        NLL = "nll"

    report.config = {"loss": Loss.NLL, "kinds": {"b", "a"}, "sizes": (1, 2), "type": complex(1, 2), 3: np.int64(4)}
    page, figures = written(report)
    assert figures["config"] == {"loss": "nll", "kinds": ["a", "b"], "sizes": [1, 2], "type": "(1+2j)", "3": 4}
    assert "nll" in page


def test_writing_again_replaces_both_files_and_leaves_nothing_else(
    report: RunReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write()
    report.status = "failed"
    _, figures = written(report)
    assert figures["status"] == "failed"
    assert sorted(os.listdir(report.directory)) == ["index.html", "report.json"]

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    report.status = "finished"
    monkeypatch.setattr(report_module.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write()
    assert sorted(os.listdir(report.directory)) == ["index.html", "report.json"]
    assert json.loads((report.directory / "report.json").read_text(encoding="utf-8"))["status"] == "failed"


def test_a_broken_character_does_not_lose_the_report(report: RunReport) -> None:
    report.samples = [SampleRow([], "which?", "é 日本", "\ud83d", "é 日本")]
    page, figures = written(report)
    assert "é 日本" in page
    assert figures["samples"][0]["answer"] == "é 日本"


def test_answers_are_marked_by_glyph(report: RunReport) -> None:
    report.samples = [SampleRow([], "which?", "Red", "blue", " red\n"), SampleRow([], "free?", "", "a", "b")]
    page, _ = written(report)
    assert page.count("✗ blue") == 1
    assert page.count("✓  red") == 1
    assert "✓ b" not in page and "✗ a" not in page


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((48, 48), (144, 144)),
        ((8, 6), (144, 108)),
        ((100, 50), (100, 50)),
        ((1024, 512), (256, 128)),
        ((2000, 1), (256, 1)),
    ],
)
def test_pictures_are_embedded_in_a_size_that_can_be_seen(
    report: RunReport, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    report.samples = [SampleRow([Image.new("RGB", size, "red")], "which?", "red")]
    page, _ = written(report)
    data = re.search(r'src="data:image/png;base64,([^"]+)"', page)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == shown
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_any_mode_of_picture_can_be_embedded(mode: str) -> None:
    assert data_uri(Image.new(mode, (16, 16))).startswith("data:image/png;base64,")


def test_enlarging_does_not_blur_and_leaves_the_picture_alone() -> None:
    image = Image.new("RGB", (2, 1), "black")
    image.putpixel((1, 0), (255, 255, 255))
    enlarged = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1])))
    assert image.size == (2, 1)
    assert {colour for _, colour in enlarged.convert("RGB").getcolors()} == {(0, 0, 0), (255, 255, 255)}


def test_a_photograph_stays_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    smooth_noise = Image.fromarray(noise).resize((64, 64)).resize((800, 600))
    address = data_uri(smooth_noise)
    assert address.startswith("data:image/jpeg;base64,") and len(address) < 40_000


def test_table_text() -> None:
    table = before_after_table(
        {"accuracy/colour": 0.16, "eval_loss": 2.5, "gone": 1.0},
        {"accuracy/colour": 1.0, "eval_loss": 0.25, "accuracy/digit": 0.5},
        title="Held-out answers",
    )
    assert table.splitlines() == [
        "Held-out answers",
        "what             before    after        change",
        "---------------  ------  -------  ------------",
        "accuracy/colour  16.0 %  100.0 %  +84.0 points",
        "eval_loss           2.5     0.25         -2.25",
        "gone                  1        -             -",
        "accuracy/digit        -   50.0 %             -",
    ]
    assert table.isascii()


def test_table_of_nothing_and_of_nan() -> None:
    assert before_after_table({}, {}).endswith("(nothing was measured)")
    assert before_after_table({"accuracy": math.nan}, {"accuracy": 0.5}).splitlines()[-1].split() == [
        "accuracy",
        "nan",
        "50.0",
        "%",
        "-",
    ]
    assert before_after_table({"accuracy": 0.5}, {"accuracy": 0.5}).endswith("0.0 points")


def test_wording_of_numbers() -> None:
    assert [format_number(v) for v in (0, -2.0, 1234.6, 0.55129, 2e-5)] == ["0", "-2", "1,235", "0.5513", "2e-05"]
    assert [format_duration(v) for v in (4.2, 112.4, 3600 * 3 + 425)] == ["4.2 s", "1 min 52 s", "3 h 07 min"]
    assert [format_bytes(v) for v in (2**20, 812 * 2**20, 1.25 * 2**30)] == ["1.0 MiB", "812 MiB", "1.25 GiB"]


def test_environment_names_versions_and_nobody() -> None:
    facts = environment()
    assert {"python", "platform", "cpu_count", "transformers"} <= facts.keys()
    home = str(Path.home())
    assert len(home) < 3 or not any(home in str(value) for value in facts.values())


def test_gpus_are_named_and_measured_if_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 3,
        get_device_name=lambda device: ["A", "A", "B"][device],
        max_memory_allocated=lambda device: [0, 5, 7][device],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    facts, peaks = environment(), peak_memory()
    assert facts["gpus"] == "2 × A, 1 × B"
    assert facts["cuda"] == "13.0"
    assert {place: size for place, size in peaks.items() if place != "process"} == {"cuda:1": 5, "cuda:2": 7}


def test_peak_memory_is_this_process_and_not_its_launcher() -> None:
    held = bytearray(200 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    assert peak_memory()["process"] > 200 * 2**20
    code = (
        "from shared.runtime.report import peak_memory; import sys;"
        "assert not {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules);"
        "print(peak_memory()['process'])"
    )
    root = Path(report_module.__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 2**20 < float(child.stdout) < 150 * 2**20


def test_the_reference_column_is_there_where_a_row_has_one(report: RunReport) -> None:
    report.samples = [SampleRow([], "which?", "", None, "blue")]
    assert "reference" not in written(report)[0]
    report.samples.append(SampleRow([], "2 + 2?", "4", "It is 5.", "4", verbatim=False))
    page, _ = written(report)
    assert '<th scope="col">reference</th>' in page
    assert page.count('class="answer right"') == 1 and 'class="answer wrong"' not in page
    report.samples[-1].verbatim = True
    assert written(report)[0].count('class="answer wrong"') == 1
