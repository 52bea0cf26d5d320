"""The rules of the command line and of YAML files, one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import pytest

from shared.errors import UserError
from shared.runtime.options import Option, option
from shared.runtime.parser import OptionError, Parsed, parse_arguments
from shared.runtime.training_fields import training_options
from shared.runtime.usage import format_help


@dataclass
class Things:
    """Things of every type.

    More text that the help does not show.
    """

    beta: float = option(0.1, "How far the policy may go.")
    steps: int = option(3, "How often.")
    name: str = option("x", "What it is called.")
    place: str | None = option(None, "Where it is.")
    on: bool = option(False, "Whether it is on.")
    maybe: bool | None = option(None, "Whether it may be on.")
    mode: Literal["no", "steps", "epoch"] = option("no", "When.")
    words: list[str] = option(["a"], "Some words.")
    weights: list[float] | None = option(None, "Some numbers.")
    either: str | list[str] | None = option(None, "One word or several.")
    extra: dict[str, Any] | None = option(None, "More settings.")
    path_or_last: bool | str | None = option(None, "A path, or the last one.")
    count: int | None = option(None, "How many.", needs="on")


@dataclass
class Trained:
    """Trained things."""

    training_arguments: ClassVar[bool] = True
    logging_steps: float = option(10, "Log every so many steps.")


def parse(*argv: str, groups=(Things,), **options) -> Parsed:
    return parse_arguments(groups, argv, **options)


def fault(*argv: str, groups=(Things,)) -> str:
    with pytest.raises(OptionError) as caught:
        parse(*argv, groups=groups)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--beta", "1e-5"], {"beta": 1e-5}),
        (["--beta=2"], {"beta": 2.0}),
        (["--steps", "-1"], {"steps": -1}),
        (["--place", "none"], {"place": None}),
        (["--name", "none"], {"name": "none"}),
        (["--name=--x y"], {"name": "--x y"}),
        (["--name="], {"name": ""}),
        (["--on"], {"on": True}),
        (["--on", "false"], {"on": False}),
        (["--on=True"], {"on": True}),
        (["--no_on"], {"on": False}),
        (["--no-maybe"], {"maybe": False}),
        (["--maybe", "none"], {"maybe": None}),
        (["--mode", "no"], {"mode": "no"}),
        (["--words", "b", "c"], {"words": ["b", "c"]}),
        (["--words", "b", "--on", "--words", "c", "d"], {"words": ["b", "c", "d"], "on": True}),
        (["--weights", "1", "2.5"], {"weights": [1.0, 2.5]}),
        (["--weights", "none"], {"weights": None}),
        (["--either", "b"], {"either": "b"}),
        (["--either", "b", "c"], {"either": ["b", "c"]}),
        (["--extra", '{"a": 1e-5, "b": {"c": [1]}}'], {"extra": {"a": 1e-5, "b": {"c": [1]}}}),
        (["--path-or-last"], {"path_or_last": True}),
        (["--path_or_last", "out/checkpoint-3"], {"path_or_last": "out/checkpoint-3"}),
        (["--path_or_last", "no"], {"path_or_last": "no"}),
    ],
)
def test_words_become_values_of_the_options_type(argv, values):
    parsed = parse(*argv)
    assert parsed.values == values
    assert {name: type(value) for name, value in parsed.values.items()} == {
        name: type(value) for name, value in values.items()
    }
    assert set(parsed.sources.values()) == {"command line"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bet", "1"], "--bet: unknown option. Did you mean --beta? (--help lists all)"),
        (["--no_om"], "--no_om: unknown option. Did you mean --no_on? (--help lists all)"),
        (["--no_beta"], "--no_beta: unknown option. Did you mean --beta? (--help lists all)"),
        (["--zzz", "1"], "--zzz: unknown option. (--help lists all)"),
        (["--mode", "epohc"], "--mode epohc: not one of no, steps, epoch. Did you mean epoch?"),
        (["--steps", "3.5"], "--steps 3.5: not a whole number"),
        (["--steps", "many"], "--steps many: not a whole number"),
        (["--beta", "many"], "--beta many: not a number"),
        (["--beta", "nan"], "--beta nan: not a number"),
        (["--weights", "1", "x"], "--weights x: not a number"),
        (["--on", "maybe"], "--on maybe: not true or false"),
        (["--no_on", "false"], "--no_on: takes no value, but false was given"),
        (["--beta"], "--beta: needs a value"),
        (["--words", "--on"], "--words: needs a value"),
        (["--beta", "1", "--beta", "2"], "--beta: given twice"),
        (["--on", "--no_on"], "--no_on: given twice"),
        (["--extra", "[1]"], '--extra [1]: not a JSON object such as {"key": 1}'),
        (["stray", "--on"], "stray: stray word. Options are written --name value (--help lists all)"),
        (["--name", "b", "c"], "c: stray word. Options are written --name value (--help lists all)"),
        (["--count", "3"], "--count: has no effect without on. Add --on, or --no_on to keep it unused"),
        (["--config"], "--config: give one YAML file"),
        (["--local_world", "3"], "--local_world: unknown option. (--help lists all)"),
    ],
)
def test_a_fault_is_told_with_what_to_do(argv, message):
    assert fault(*argv) == message


def test_all_faults_are_told_at_once():
    assert fault("--bet", "1", "--steps", "x", "--on", "--mode", "never").splitlines() == [
        "--bet: unknown option. Did you mean --beta? (--help lists all)",
        "--steps x: not a whole number",
        "--mode never: not one of no, steps, epoch",
    ]


def test_a_broken_json_word_says_where():
    assert fault("--extra", "{a: 1}").startswith("--extra {a: 1}: not a JSON object (Expecting property name")


@pytest.mark.parametrize("argv", [["--count", "3", "--on"], ["--count", "3", "--no_on"]])
def test_an_option_may_stand_beside_its_switch_on_or_off(argv):
    assert parse(*argv).values["count"] == 3


@pytest.mark.parametrize("argv", [["--local_rank=1"], ["--local-rank", "1"]])
def test_what_older_launchers_add_is_ignored(argv):
    assert parse(*argv, "--on").values == {"on": True}


YAML = """\
beta: 1e-5        # YAML 1.1 takes this for a string
steps: 4
mode: no          # and this for a truth value
on: yes
name: 2024-01-01
place: null
maybe:
words: [b, c]
weights:
  - 1
  - 2e-1
either: one
extra: {a: 1e-5, b: {c: [1, no]}}
"""


def test_yaml_words_are_read_by_the_options_type(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    parsed = parse("--config", str(file))
    assert parsed.values == {
        "beta": 1e-5,
        "steps": 4,
        "mode": "no",
        "on": True,
        "name": "2024-01-01",
        "place": None,
        "maybe": None,
        "words": ["b", "c"],
        "weights": [1.0, 0.2],
        "either": "one",
        "extra": {"a": 1e-5, "b": {"c": [1, False]}},
    }
    assert set(parsed.sources.values()) == {str(file)}


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("beta: 0.5\nwords: [b, c]\non: true\n")
    parsed = parse("--words", "d", f"--config={file}", "--no_on")
    assert parsed.values == {"beta": 0.5, "words": ["d"], "on": False}
    assert parsed.sources == {"beta": str(file), "words": "command line", "on": "command line"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on: true\n\nbeat: 1\n", "{file}, line 3: beat: unknown option. Did you mean beta?"),
        ("on: true\nsteps: many\n", "{file}, line 2: steps: 'many' is not a whole number"),
        ("mode: epohc\n", "{file}, line 1: mode: 'epohc' is not one of no, steps, epoch. Did you mean epoch?"),
        ("steps:\n", "{file}, line 1: steps: empty, but must be a whole number"),
        ("steps: [1, 2]\n", "{file}, line 1: steps: '1 2' is several values, but must be a whole number"),
        (
            "steps: {a: 1}\n",
            "{file}, line 1: steps: '{{…}}' is a mapping, but must be a whole number (options are not nested)",
        ),
        ("model:\n  beta: 1\n", "{file}, line 1: model: unknown option. Did you mean mode?"),
        ("words: [[a]]\n", "{file}, line 1: a list must hold plain values"),
        ("beta: 1\nbeta: 2\n", "{file}, line 2: beta: given twice"),
        ("- beta\n", "{file}: must be a mapping of option names to values (`name: value` on each line)"),
        ("beta: [1\n", "{file}, line 2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("count: 3\n", "{file}, line 1: count: has no effect without on. Add --on, or --no_on to keep it unused"),
    ],
)
def test_a_fault_in_the_file_names_file_line_and_key(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert fault("--config", str(file)) == message.format(file=file)


def test_faults_of_both_sources_are_told_together(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: x\n")
    assert fault("--bet", "1", "--config", str(file)).count("\n") == 1


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    assert fault("--config", "nowhere.yaml") == "nowhere.yaml: cannot be read (No such file or directory)"
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00")
    assert fault("--config", str(file)) == f"{file}: not a text file in UTF-8"


def test_an_empty_file_gives_nothing(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing yet\n")
    assert parse("--config", str(file)).values == {}


def test_a_recipe_stands_below_everything_that_is_given(tmp_path):
    config, recipe = tmp_path / "run.yaml", tmp_path / "recipe.yaml"
    config.write_text("beta: 0.5\n")
    recipe.write_text("beta: 0.7\nsteps: 7\nname: r\non: true\ncount: 2\n")
    seen = []
    parsed = parse("--config", str(config), "--steps", "9", recipe=lambda values: seen.append(values) or recipe)
    assert seen == [{"beta": 0.5, "steps": 9}]
    assert parsed.values == {"beta": 0.5, "steps": 9, "name": "r", "on": True, "count": 2}
    assert parsed.sources["steps"] == "command line"
    assert parsed.sources["beta"] == str(config)
    assert parsed.sources["name"] == str(recipe)
    assert parse("--on", recipe=lambda values: None).values == {"on": True}


def test_the_saved_configuration_can_be_fed_back(tmp_path):
    argv = ["--beta", "1e-5", "--place", "none", "--on", "--words", "no", "1", "--extra", '{"a": 1e-7, "b": "no"}']
    first = parse(*argv, "--either", "b", "--count", "3", "--mode", "no", "--weights", "1e-9")
    file = tmp_path / "saved.yaml"
    file.write_text(first.to_yaml())
    assert parse("--config", str(file)).values == first.values
    assert parse().to_yaml() == ""


def test_access_tokens_are_not_saved():
    parsed = parse("--hub_token", "secret", "--seed", "1", groups=(Trained,))
    assert parsed.values["hub_token"] == "secret"
    assert parsed.to_yaml() == "seed: 1\n"


def test_build_fills_the_groups_own_class_and_keeps_defaults():
    built = parse("--beta", "0.5", groups=(Things, Trained)).build(Things)
    assert built == Things(beta=0.5)
    assert Things().words == ["a"] and Things().words is not Things().words


def test_build_hands_the_groups_values_to_another_class():
    class Settings:
        def __init__(self, **values):
            self.values = values
            if values.get("max_steps") == 0:
                raise ValueError("max_steps must not be 0")

    parsed = parse("--beta", "0.5", "--learning_rate", "1e-3", "--logging-steps", "5", groups=(Things, Trained))
    assert parsed.build(Trained, Settings).values == {"learning_rate": 1e-3, "logging_steps": 5.0}
    with pytest.raises(UserError, match="^max_steps must not be 0$"):
        parse("--max_steps", "0", groups=(Trained,)).build(Trained, Settings)


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--lr_scheduler_type", "cosine"], {"lr_scheduler_type": "cosine"}),
        (["--eval_strategy", "no"], {"eval_strategy": "no"}),
        (["--optim", "adamw_torch"], {"optim": "adamw_torch"}),
        (["--lr_scheduler_kwargs", '{"min_lr": 1e-5}'], {"lr_scheduler_kwargs": {"min_lr": 1e-5}}),
        (["--deepspeed", "zero3.json"], {"deepspeed": "zero3.json"}),
        (["--fsdp"], {"fsdp": True}),
        (["--debug", "underflow_overflow"], {"debug": ["underflow_overflow"]}),
        (["--save_steps", "0.1"], {"save_steps": 0.1}),
        (["--include_num_input_tokens_seen", "no"], {"include_num_input_tokens_seen": "no"}),
    ],
)
def test_the_training_arguments_are_options_too(argv, values):
    assert parse(*argv, groups=(Trained,)).values == values


def test_faults_in_training_arguments():
    message = fault("--lr_scheduler_type", "cosin", "--learning_rat", "1", "--optim", "adam", groups=(Trained,))
    unknown, scheduler, optim = message.splitlines()
    assert unknown == "--learning_rat: unknown option. Did you mean --learning_rate? (--help lists all)"
    assert scheduler.startswith("--lr_scheduler_type cosin: not one of linear, cosine, ")
    assert scheduler.endswith(". Did you mean cosine?")
    assert optim.startswith("--optim adam: not one of adamw_torch, ")
    # A configuration object has no written form.
    assert fault("--parallelism_config", "x", groups=(Trained,)).startswith("--parallelism_config: unknown option")


def test_the_source_of_transformers_is_read_right():
    from transformers import TrainingArguments

    found = training_options()
    real = {item.name: item for item in fields(TrainingArguments)}
    assert list(found) == list(real)
    for name, item in found.items():
        default = real[name].default
        if isinstance(default, bool | int | float) and not isinstance(default, str):
            assert item.default == default, name
        assert item.help, name


def test_help_and_parsing_load_no_heavy_library_and_are_quick():
    code = """
import contextlib, io, json, sys, time
start = time.process_time()
from shared.runtime.arguments import AlignOptions, DataArguments, ModelArguments
from shared.runtime.parser import parse_arguments
groups = (ModelArguments, DataArguments, AlignOptions)
parse_arguments(groups, ["--dataset_name", "x", "--learning_rate", "1e-5"]).build(ModelArguments)
text = io.StringIO()
try:
    with contextlib.redirect_stdout(text):
        parse_arguments(groups, ["--help"], prog="sft.py", description="Train it.")
except SystemExit as end:
    status = end.code
heavy = [name for name in ("torch", "transformers", "numpy", "datasets") if name in sys.modules]
seconds = time.process_time() - start
print(json.dumps({"heavy": heavy, "seconds": seconds, "status": status, "text": text.getvalue()}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["heavy"] == []
    assert result["seconds"] < 1
    assert result["status"] == 0
    text = result["text"]
    assert text.startswith("usage: sft.py [--config run.yaml]")
    assert "\nTrain it.\n" in text
    assert "--learning_rate NUMBER  [5e-05]" in text
    assert "Training (transformers.TrainingArguments)" in text
    assert "local_rank" not in text
    assert text.count("--logging_steps ") == 1


def test_help_lists_every_option_with_type_default_and_choices(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--on", "--help", "--nonsense")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Things of every type.\n" in text and "More text" not in text
    for head in (
        "--beta NUMBER  [0.1]",
        "--steps INTEGER  [3]",
        "--on  [false]",
        "--mode CHOICE  [no]",
        "--words TEXT ...  [a]",
        "--weights NUMBER ...  [none]",
        "--extra JSON  [none]",
        "--path_or_last [TEXT]  [none]",
    ):
        assert f"  {head}\n" in text
    assert "When. One of: no, steps, epoch." in text


def test_help_shows_a_per_cent_sign_once():
    text = format_help([("", {"slow": Option("slow", int, 1, "About 20%% slower.")})], "x", None)
    assert "About 20% slower." in text
