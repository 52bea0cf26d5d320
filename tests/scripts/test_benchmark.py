"""The benchmark over seeds: what it runs, runs again and leaves alone, what it makes of the reports, and Slurm."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FAKE = """
import json, os, sys, time
from pathlib import Path

words = sys.argv[1:]
options = dict(zip(words[::2], words[1::2]))
mode, seed, folder = options.get("--mode", "fine"), int(options["--seed"]), Path(options["--output_dir"])
resumed = "--resume_from_checkpoint" in options
calls = folder.parent / f"calls-{seed}"
first = not calls.exists()
with calls.open("a") as file:
    file.write(("on" if resumed else "new") + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "") + ";")
if mode == "flaky" and first or mode == "broken" and seed == 2:
    print("so far so good\\nout of luck")
    sys.exit(3)
if mode in ("slow", "done") and seed == 2 and not resumed and first:
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "complete.json").write_text("{}")
    if mode == "done":
        sys.exit(1)
    time.sleep(60)
if mode == "done" and resumed:
    sys.exit(2)
if mode == "meet":
    (folder.parent / f"here-{seed}").touch()
    until = time.monotonic() + 20
    while not all((folder.parent / f"here-{other}").exists() for other in (1, 2)):
        assert time.monotonic() < until
        time.sleep(0.01)
if mode != "silent":
    scale = float(options.get("--scale", 1))
    curve = {"step": [1, 2, 3], "value": [seed * scale, 10 * seed * scale, None if seed == 1 else 7.0]}
    report = {"status": "finished", "before": {"accuracy": 0.1}, "after": {"accuracy": 0.1 * seed, "loss": 2.0 * seed}}
    (folder / "report").mkdir(parents=True, exist_ok=True)
    report["curves"] = {"reward": curve, "own" + options.get("--scale", ""): curve}
    (folder / "report" / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Calls the benchmark in `tmp_path`, with a script that is quick to write its report."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPTS)
    import benchmark

    def call(*words, modes=("fine",), seeds=2):
        commands = [f"{mode}={sys.executable} -I -S fake.py --mode {mode}" for mode in modes]
        named = ["--command", *commands] if commands else []
        given = [*named, "--num-seeds", seeds, "--output-dir", "out", *words]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, given)])
        benchmark.main()

    return call


def written():
    return json.loads(Path("out/benchmark.json").read_text())["commands"]


def calls(mode, seed):
    """How each start was made, and with which GPUs."""
    path = Path(f"out/{mode}/calls-{seed}")
    return [tuple(each.split(" ")) for each in path.read_text().split(";")[:-1]] if path.exists() else []


# ---- What is run ----------------------------------------------------------------------------------------------------


def test_mean_and_spread_over_seeds(fake, capsys):
    fake(seeds=3)
    (each,) = written()
    assert (each["label"], each["seeds"]) == ("fine", [1, 2, 3])
    assert each["after"]["loss"] == {"mean": 4.0, "std": 2.0, "values": [2.0, 4.0, 6.0]}
    # of the third step seed 1 has no number, so it is left out for all
    assert each["curves"]["reward"] == {"step": [1, 2], "mean": [2.0, 20.0], "std": [1.0, 10.0]}
    said = capsys.readouterr().out
    assert "20.0 ± 10.0 %" in said and "10.0 ± 0.0 %" in said and "[3/3] fine, seed 3: finished" in said
    assert "reward (logged, steps 1 and 2)" in said and "20 ± 10" in said


def test_finished_runs_are_not_repeated(fake, capsys):
    fake()
    fake("--start_seed", 2)
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert [len(calls("fine", seed)) for seed in (1, 2, 3)] == [1, 1, 1]
    assert written()[0]["seeds"] == [2, 3]


def test_of_one_seed_there_is_no_spread(fake, capsys):
    fake(seeds=1)
    assert written()[0]["after"]["loss"]["std"] is None
    assert "±" not in capsys.readouterr().out.partition("\n")[2].replace("Mean ± standard", "")


def test_a_failure_is_reported_and_tried_once_more(fake, capsys):
    fake(modes=["flaky"])
    said = capsys.readouterr().out
    assert said.count("ended with status 3; tried once more") == 2 and "    out of luck\n" in said
    assert len(calls("flaky", 1)) == 2 and written()[0]["seeds"] == [1, 2]


def test_what_fails_twice_is_left_out_and_the_others_go_on(fake, capsys):
    with pytest.raises(SystemExit) as ended:
        fake(modes=["broken", "silent"], seeds=3)
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "broken, seed 2: ended with status 3; given up" in said and len(calls("broken", 2)) == 2
    assert "silent, seed 1: wrote no report/report.json" in said
    assert "4 of 6 runs are not finished" in said
    assert [each["seeds"] for each in written()] == [[1, 3], []]


def test_the_seeds_run_at_once_each_with_its_gpu(fake):
    fake("--workers", 2, "--gpus", "4", "7", modes=["meet"])
    assert sorted(calls("meet", 1) + calls("meet", 2)) == [("new", "4"), ("new", "7")]


def test_after_an_interrupt_it_goes_on(fake, tmp_path):
    command = f"slow={sys.executable} -I -S fake.py --mode slow"
    words = [sys.executable, SCRIPTS / "benchmark.py", "--command", command, "--num-seeds", "2", "--output-dir", "out"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not Path("out/slow/seed-2/checkpoint-1/complete.json").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "1 of 2 runs are finished. The same command makes the rest." in said
    fake(modes=["slow"])
    assert [how for how, _ in calls("slow", 1)] == ["new"] and [how for how, _ in calls("slow", 2)] == ["new", "on"]
    assert written()[0]["seeds"] == [1, 2]


def test_what_cannot_be_resumed_is_started_anew(fake):
    with pytest.raises(SystemExit):  # the first try leaves a checkpoint, which the second is refused
        fake(modes=["done"])
    fake(modes=["done"])
    assert [how for how, _ in calls("done", 2)] == ["new", "on", "on", "new"]


def test_a_run_that_is_under_way_is_left_alone(fake):
    fcntl = pytest.importorskip("fcntl")
    Path("out/fine").mkdir(parents=True)
    with Path("out/fine/seed-1.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="still under way"):
            fake()
    assert not calls("fine", 1)


def test_another_commands_run_is_not_overwritten_unasked(fake):
    fake()
    other = ["--command", f"fine={sys.executable} -I -S fake.py --scale 2"]
    with pytest.raises(UserError, match="holds the run of another command"):
        fake(*other, modes=[])
    with pytest.raises(UserError, match="holds the run of another command"):
        fake(*other, "--collect-only", modes=[])
    fake(*other, "--overwrite", modes=[])
    assert written()[0]["curves"]["reward"]["mean"] == [3.0, 30.0]


def test_files_of_others_are_never_removed(fake):
    Path("out/fine/seed-1").mkdir(parents=True)
    Path("out/fine/seed-1/thesis.txt").touch()
    with pytest.raises(UserError, match="of no benchmark"):
        fake()
    assert Path("out/fine/seed-1/thesis.txt").exists()


@pytest.mark.parametrize("words", [["--dry-run"], ["--workers", "0"]])
def test_a_dry_run_shows_the_commands(fake, capsys, words):
    fake(*words)
    assert "fake.py --mode fine --seed 2 --output_dir out/fine/seed-2" in capsys.readouterr().out
    assert not Path("out").exists()


def test_labels_are_given_or_found():
    sys.path.insert(0, str(SCRIPTS))
    try:
        from benchmark_runs import Command
    finally:
        sys.path.remove(str(SCRIPTS))
    assert Command.parse("env A=1 sh scripts/dpo.py --x=1") == Command(
        "dpo", ("env", "A=1", "sh", "scripts/dpo.py", "--x=1")
    )
    assert Command.parse("beta-0.1=sh 'a b'") == Command("beta-0.1", ("sh", "a b"))
    with pytest.raises(UserError, match="0 is no program.*env NAME=value"):
        Command.parse("CUDA_VISIBLE_DEVICES=0 python x.py")


# ---- Curves ---------------------------------------------------------------------------------------------------------


def scaled(*scales):
    commands = [f"s{scale}={sys.executable} -I -S fake.py --scale {scale}" for scale in scales]
    return ["--command", *commands]


def test_several_commands_in_one_picture(fake, capsys):
    pytest.importorskip("matplotlib")
    fake(*scaled(2, 3), "--metric", "own2", "--metric_of", "s3=own3", "--plot", "pictures/both.svg", modes=[])
    picture = Path("pictures/both.svg").read_text()
    assert picture.count('id="FillBetweenPolyCollection') == 2
    said = capsys.readouterr().out
    assert "own2 (logged" in said and "own3 (logged" in said and "3 ± 1.4" in said


def test_an_unknown_metric_lists_those_there_are(fake, capsys):
    with pytest.raises(UserError, match=r"s2 has no such curve. There are: reward, own2\.$"):
        fake(*scaled(2, 3), "--metric", "kl", modes=[])
    assert "15.0 ± 7.1 %" in capsys.readouterr().out and written()[1]["seeds"] == [1, 2]
    with pytest.raises(UserError, match="--metric own3: s2 has no"):
        fake(*scaled(2, 3), "--metric", "own3", "--collect-only", modes=[])


def test_without_matplotlib_it_says_so_before_anything_runs(fake, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        fake("--plot", "x.png")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-seeds", "0"], "--num-seeds 0: has to be at least 1"),
        (["--plot", "x.doc"], "has to end with one of .png"),
        (["--metric-of", "other=reward"], "the labels are fine"),
        (["--workers", "2", "--gpus", "0"], "--gpus names 1 for 2 workers"),
        (["--command", "fine=sh x"], "Two commands are called fine"),
        (["--command", "no-such-program x"], "no-such-program is no program"),
        (["--command", "sh 'x"], "No closing quotation"),
        (["--slurm-template-path", "none"], "No such file"),
        (["--output-dir", "fake.py"], "fake.py: File exists"),
    ],
)
def test_bad_input_is_one_line(fake, words, said):
    with pytest.raises(UserError, match=said) as error:
        fake(*words)
    assert "\n" not in str(error.value) and not calls("fine", 1)


# ---- Slurm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm that runs the tasks of an array at once; what is in `queue` is what squeue tells."""
    programs = {
        "sbatch": 'echo "$2" >> submitted; sed -n s/^.*--array=0-//p "$2" > last\n'
        'for task in $(seq 0 $(sed s/%.*// last)); do SLURM_ARRAY_TASK_ID=$task bash "$2" || :; done; echo "12;here"',
        "srun": 'exec "$@"',
        "squeue": "cat queue 2> none || { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }",
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


TEMPLATE = ["--slurm-template-path", SCRIPTS / "benchmark_template.slurm"]


def test_jobs_are_submitted_once_and_then_compared(fake, cluster, capsys):
    fake(*TEMPLATE, modes=["fine", "broken"])
    assert len(Path("submitted").read_text().split()) == 2 and not Path("out/benchmark.json").exists()
    assert [len(calls(*run)) for run in (("fine", 1), ("broken", 1), ("broken", 2))] == [1, 1, 2]

    Path("queue").write_text("1\n")  # the second task of each
    fake(*TEMPLATE, modes=["fine", "broken"])
    assert "broken, seed 2 is in the queue" in capsys.readouterr().out
    assert len(Path("submitted").read_text().split()) == 2

    Path("queue").unlink()
    with pytest.raises(SystemExit):
        fake("--collect-only", modes=["fine", "broken"])
    assert [each["seeds"] for each in written()] == [[1, 2], [1]]
    assert "    out of luck" in capsys.readouterr().out

    fake(*TEMPLATE, modes=["fine", "broken"])  # what failed, again
    assert "broken, seed 2 did not finish in job 12" in capsys.readouterr().out
    assert len(Path("submitted").read_text().split()) == 3 and len(calls("broken", 1)) == 1


def test_a_dry_run_writes_the_files_and_submits_none(fake, cluster, capsys):
    slurm = ["--slurm-gpus-per-task", 2, "--slurm-total-cpus", 13, "--slurm-ntasks", 2, "--slurm_nodes", 3]
    fake(*TEMPLATE, *slurm, "--start-seed", 4, "--dry-run", seeds=3)
    text = Path("out/fine/jobs.slurm").read_text()
    said = capsys.readouterr().out
    assert text in said and not Path("submitted").exists()
    lines = text.splitlines()
    for line in ("--array=0-2", "--gpus-per-task=2", "--cpus-per-gpu=4", "--ntasks=2", "--nodes=3"):
        assert f"#SBATCH {line}" in lines
    assert "seeds=(4 5 6)" in lines and "{{" not in text
    assert f"srun {shlex.quote(sys.executable)} -I -S fake.py --mode fine --seed $seed --output_dir /" in text


def test_workers_bound_the_tasks_at_once(fake):
    Path("own.slurm").write_text("{{array}} {{seeds}} {{command}} {{output_dir}}")
    fake("--slurm-template-path", "own.slurm", "--workers", 2, "--dry-run", seeds=5)
    assert Path("out/fine/jobs.slurm").read_text().startswith("0-4%2 (1 2 3 4 5) ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{array}} {{seeds}} {{command}}", r"\{\{output_dir\}\} is missing. A run is started by: srun"),
        ("{{colour}}", r"\{\{colour\}\} is unknown. Known: array, seeds"),
    ],
)
def test_a_template_that_cannot_work(fake, text, said):
    Path("own.slurm").write_text(text)
    with pytest.raises(UserError, match=said):
        fake("--slurm-template-path", "own.slurm")


def test_without_sbatch_the_file_is_there(fake):
    with pytest.raises(UserError, match="no sbatch here. .*jobs.slurm is written"):
        fake(*TEMPLATE)
    assert Path("out/fine/jobs.slurm").is_file()
