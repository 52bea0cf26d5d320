"""`trialign`: what it lists, how options are read wherever they stand, and how launches are built and end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.runtime import cli, launch, launcher
from shared.runtime.commands import COMMANDS, resolve, with_defaults
from shared.runtime.launcher import PROFILES, LaunchOptions
from shared.runtime.run import read_options

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "datasets", "accelerate"}
NAMES = list(COMMANDS)
MODEL = ["--model_name_or_path", "some/model", "--dataset_name", "some/data"]


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)


def program(*words, **kwargs):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "shared.runtime.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


def told(*words, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def read(*words, name="sft-vlm"):
    return read_options(name, [*MODEL, *words])


def test_help_lists_every_command_in_a_line(capsys):
    status, out, err = told("--help", capsys=capsys)
    assert status == 0 and not err
    for name, row in COMMANDS.items():
        assert f"  {name} " in out and row.summary in out
    assert max(map(len, out.splitlines())) <= 120


def test_nothing_heavy_is_loaded_for_help_or_a_typo():
    code = (
        "import sys, time\nfrom shared.runtime import cli\n"
        "for words in (['--help'], ['dpo', '--help'], ['dop'], ['sft-vlm', '--learning_rat', '1']):\n"
        "    try: cli.main(words)\n    except SystemExit: pass\n"
        f"print('loaded', sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("loaded []\n"), done.stdout[-300:]


def test_help_and_a_typo_are_quick(tmp_path):
    for words, status, limit in ((["--help"], 0, 0.5), (["sft-vlm", "--learning_rat", "1"], 2, 2.0)):
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            assert program(*words, cwd=tmp_path).returncode == status
            seconds.append(time.monotonic() - start)
        assert min(seconds) < 2 * limit, seconds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dop"], "dop: unknown command. Did you mean dpo? (trialign --help lists all)"),
        (["sft_vlm"], "sft_vlm: unknown command. Did you mean sft-vlm? (trialign --help lists all)"),
        (["sft-vlm", "--learning_rat", "1"], "--learning_rat: unknown option. Did you mean --learning_rate? (--help"),
        (["sft-vlm", "--num_proceses", "2"], "--num_proceses: unknown option. Did you mean --num_processes? (--help"),
        (["--learning_rate", "1", "sft-vlm"], "--learning_rate: must stand behind the command."),
        (["--num_processes", "2"], "there is no command."),
        (["sft-vlm", "--num_processes", "0"], "num_processes 0: must be at least 1."),
        (["sft-vlm", "--accelerate_config", "zerro2"], "accelerate_config zerro2: neither a file nor one of fsdp1"),
        (["sft-vlm", "--config_file", "nowhere.yaml"], "config_file nowhere.yaml: no such file."),
        (["sft-vlm", "--load_in_4bit"], "load_in_4bit: quantised weights cannot be trained themselves."),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "visible_devices", lambda: 0)
    status, out, err = told(*words, capsys=capsys)
    assert status == 2 and not out
    assert err.startswith(f"error: {message}") and err.count("\n") == 1, err


def test_a_wrong_profile_names_the_right_one():
    with pytest.raises(UserError, match="Did you mean zero2?"):
        LaunchOptions(accelerate_config="zerro2").named_file()


def test_version_and_no_word_at_all(capsys):
    assert told("--version", capsys=capsys)[:2] == (0, "trialign 0.1.0\n")
    assert told(capsys=capsys)[0] == 2


def test_a_reader_that_has_read_enough_is_no_error():
    line = f"set -o pipefail; {shlex.quote(sys.executable)} -m shared.runtime.cli sft-vlm --help | head -1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("usage: trialign sft-vlm") and not done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_row_resolves(name):
    row = COMMANDS[name]
    options, config, trainer = map(resolve, (row.options, row.config, row.trainer))
    assert issubclass(config, options) and hasattr(trainer, "train")
    assert "model_init_kwargs" in {item.name for item in fields(config)}
    assert config.run_name_stem == (row.stem or row.script)
    assert (ROOT / "scripts" / f"{row.script}.py").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_the_common_options(name):
    words = "--use_peft --lora_r 4 --lora_alpha 8 --lora_task_type CAUSAL_LM --push_to_hub --report_to tensorboard"
    options, asked = read(*words.split(), "--num_processes", "2", name=name)
    assert options.values["lora_r"] == 4 and options.values["report_to"] == ["tensorboard"]
    assert options.values["push_to_hub"] is True and options.values["lora_task_type"] == "CAUSAL_LM"
    assert asked.num_processes == 2 and "num_processes" not in options.to_yaml()


def test_a_row_may_have_its_own_default():
    for name, task in (("reward", "SEQ_CLS"), ("prm", "TOKEN_CLS"), ("dpo", "CAUSAL_LM")):
        options, _ = read("--use_peft", name=name)
        assert options.build(COMMANDS[name].groups[0]).lora_task_type == task
        assert "lora_task_type" not in options.values  # not given, so never "without effect"
        read(name=name)
    group = COMMANDS["reward"].groups[0]
    assert group is COMMANDS["reward"].groups[0] and group().lora_r == 16
    read("--lora_r", "4", name="ddpo")  # an adapter is trained there without being asked for
    with_list = with_defaults(group, {"lora_target_modules": ["all-linear"]})
    assert with_list().lora_target_modules is not with_list().lora_target_modules


@pytest.mark.parametrize(
    "words",
    [
        ["--num_processes", "2", "--config", "run.yaml", "dpo"],
        ["dpo", "--config", "run.yaml", "--num_processes=2"],
        ["--num-processes=2", "dpo", "--config", "run.yaml"],
        ["dpo", "--config", "launch.yaml"],
        ["--num_processes", "2", "dpo", "--config", "four.yaml"],
    ],
)
def test_launcher_options_may_stand_anywhere(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "model_name_or_path: some/model\ndataset_name: some/data\nbeta: 0.3\n"
    for name, more in (("run", ""), ("launch", "num_processes: 2\n"), ("four", "num_processes: 4\n")):
        (tmp_path / f"{name}.yaml").write_text(text + more)
    name, rest = cli.split(words)
    options, asked = read_options(name, rest)
    assert (name, asked.num_processes, options.values["beta"]) == ("dpo", 2, 0.3)


def words_of(devices: int, **given) -> dict[str, str] | None:
    words = LaunchOptions(**given).words(devices)
    return None if words is None else dict(zip(words[::2], words[1::2], strict=True))


def profile(name: str) -> str:
    return str(PROFILES / f"{name}.yaml")


def test_one_process_needs_no_launcher():
    assert words_of(0) is None and words_of(1) is None
    assert words_of(8, num_processes=1) is None
    assert words_of(1, accelerate_config="single_gpu") is None


def test_without_a_profile_the_machine_decides():
    common = {"--main_process_port": "0"}
    assert words_of(4) == {"--config_file": profile("multi_gpu"), "--num_processes": "4", **common}
    assert words_of(4, num_processes=2)["--num_processes"] == "2"
    assert words_of(0, num_processes=2) == {"--config_file": profile("multi_cpu"), "--num_processes": "2", **common}


def test_a_profile_gets_one_process_for_each_gpu():
    assert words_of(4, accelerate_config="zero3")["--num_processes"] == "4"
    assert words_of(4, accelerate_config="zero3", num_processes=2)["--num_processes"] == "2"
    assert "--num_processes" not in words_of(0, accelerate_config="zero3")  # as the file says
    assert words_of(1, accelerate_config="fsdp2")["--config_file"] == profile("fsdp2")


def test_a_file_of_the_users_is_handed_over_as_it_is(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("distributed_type: MULTI_GPU\n")
    for name in ("config_file", "accelerate_config"):
        assert words_of(4, **{name: str(file)}) == {"--config_file": str(file)}
    with pytest.raises(UserError, match="give one of them"):
        LaunchOptions(accelerate_config="zero2", config_file=str(file))


def test_several_machines():
    given = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    words = words_of(4, **given)
    assert words["--num_processes"] == "8" and words["--machine_rank"] == "1"
    assert (words["--main_process_ip"], words["--main_process_port"]) == ("10.0.0.1", "29500")
    with pytest.raises(UserError, match="num_machines 2: main_process_ip is missing"):
        LaunchOptions(**given | {"main_process_ip": None})
    with pytest.raises(UserError, match="num_processes 3: not a multiple of num_machines 2"):
        LaunchOptions(**given, num_processes=3)


def test_the_processes_know_what_was_asked_for(monkeypatch):
    line = [*LaunchOptions(num_processes=2, accelerate_config="zero2").words(0), "--module", "m", "--cpu"]
    monkeypatch.setenv(launch.LAUNCHED, json.dumps(line))
    request = launch.launch_request()
    assert (request.processes, request.engine, request.cpu) == (2, "DEEPSPEED", False)


@pytest.fixture
def run(monkeypatch):
    """`trialign …` with training and launching written down instead of done."""
    done = []
    monkeypatch.setattr("shared.runtime.run.train", lambda row, options: done.append(("train", row.script)))
    monkeypatch.setattr(launcher, "start", lambda words, command: done.append((words, command)) or 7)
    monkeypatch.setattr(launcher, "visible_devices", lambda: 2)

    def call(*words):
        done.clear()
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        return ended.value.code, *done

    return call


def test_a_command_trains_here_or_is_launched_with_all_its_words(run, monkeypatch):
    assert run("sft-vlm", *MODEL, "--num_processes", "1") == (0, ("train", "sft_vlm"))
    assert run("sft-vlm", *MODEL, "--use_cpu") == (0, ("train", "sft_vlm"))
    status, (words, command) = run("--accelerate_config", "zero1", "sft-vlm", *MODEL)
    assert status == 7 and words[:2] == ["--config_file", profile("zero1")] and "2" in words
    assert command == ["sft-vlm", "--accelerate_config", "zero1", *MODEL]
    monkeypatch.setenv(launch.LAUNCHED, "[]")
    assert run(*command) == (0, ("train", "sft_vlm"))  # in a process that was launched


def test_a_failure_is_told_once(capsys):
    for code, status, said in (
        (2, 2, ""),
        (130, 130, ""),
        (1, 1, "error: process 1 ended with status 1; the reason stands above.\n"),
        (-signal.SIGKILL, 137, "error: process 1 was ended by SIGKILL. The machine may have run out of memory.\n"),
    ):
        assert launcher._status(code, "process 1") == status
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["env"], ["data", "builtin/digits"]])
def test_what_is_shown_without_training(words, capsys):
    status, out, _ = told(*words, capsys=capsys)
    expected = (
        r"transformers +\d.*devices" if words == ["env"] else r"builtin/digits: builtin; [\d,]+ rows.*messages.*"
    )
    assert status == 0 and re.search(expected, out, re.DOTALL), out
    assert told("data", "builtin/digit", capsys=capsys)[0] == 2


QUICK = [
    "--dataset_name",
    "builtin/shapes",
    "--max_train_rows",
    "16",
    "--eval_answers",
    "0",
    "--output_dir",
    "out",
    "--disable_tqdm",
]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "file"])
def test_two_processes_train_wherever_it_was_said(place, tmp_path):
    (tmp_path / "run.yaml").write_text("num_processes: 2\n" if place == "file" else "seed: 3\n")
    two = ["--num_processes", "2"]
    (tmp_path / "shared").mkdir()  # a folder of that name in the user's must not pass for the package
    (tmp_path / "shared" / "__init__.py").write_text("")
    words = ["sft-vlm", "--config", "run.yaml", *QUICK, "--max_steps", "1"]
    words = [*two, *words] if place == "before" else words
    trialign = [sys.executable, "-P", "-m", "shared.runtime.cli", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(trialign, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not passed to" not in done.stderr and done.stdout.count("Saved model: out") == 1
    assert json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert "num_processes" not in (tmp_path / "out" / "run.yaml").read_text()


@pytest.mark.slow
def test_a_users_error_in_two_processes_is_one_line_and_status_2(tmp_path):
    done = program(
        "sft-vlm", "--num_processes", "2", "--dataset_name", "nowhere.jsonl", "--output_dir", tmp_path / "o"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


@pytest.mark.slow
def test_an_interrupt_saves_and_ends_with_130(tmp_path):
    words = [*QUICK, "--max_steps", "5000", "--save_steps", "2", "--num_processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "shared.runtime.cli", "sft-vlm", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    running = subprocess.Popen(line, env=environment, cwd=tmp_path, **pipes)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "out" / "checkpoint-2" / "complete.json").exists():
            assert running.poll() is None and time.monotonic() < end, running.stdout.read()[-3000:]
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        printed = running.communicate(timeout=120)[0]
    finally:
        running.kill()
    assert running.returncode == 130 and "Traceback" not in printed and "saved. Go on with" in printed, printed[-2000:]
