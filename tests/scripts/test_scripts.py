"""Every script: the commands in its docstring are right, and it runs its row of the table."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from shared.runtime.commands import COMMANDS
from shared.runtime.run import read_options

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> Path:
    return ROOT / "scripts" / f"{COMMANDS[name].script}.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_that_it_shows_are_right(name, tmp_path, monkeypatch):
    text = ast.get_docstring(ast.parse(script(name).read_text()))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip().startswith("accelerate")]
    assert len(lines) >= 4 and any("--use_peft" in line for line in lines) and f"`trialign {name}`" in text
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model_name_or_path: some/model\ndataset_name: some/data\n")
    for line in lines:
        words = shlex.split(line)
        at = words.index(f"scripts/{script(name).name}")
        for path in re.findall(r"shared/\S+\.yaml", " ".join(words[:at])):
            assert (ROOT / path).is_file()
        if "--model_name_or_path" in words or "--config" in words:
            options, _ = read_options(name, words[at + 1 :])
            assert options.values["dataset_name"]


@pytest.mark.parametrize("name", COMMANDS)
def test_without_arguments_it_trains_a_built_in_model(name):
    options, _ = read_options(name, [])
    assert options.values["model_name_or_path"].startswith("builtin/")
    assert all(data.startswith("builtin/") for data in options.values["dataset_name"])


@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs_its_row(name, monkeypatch, tmp_path):
    done = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shared.runtime.run.train", lambda row, options: done.append(row))
    monkeypatch.setattr(sys, "argv", ["x.py", "--model_name_or_path", "some/model", "--dataset_name", "some/data"])
    runpy.run_path(str(script(name)), run_name="__main__")
    assert done == [COMMANDS[name]]


def test_the_launchers_options_are_not_the_scripts(monkeypatch, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("dataset_name: builtin/digits\nnum_processes: 2\n")
    monkeypatch.setattr(sys, "argv", ["sft_vlm.py", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script("sft-vlm")), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: num_processes: for the launcher, not for the script.")
    assert "trialign sft-vlm" in said
