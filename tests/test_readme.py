"""What the README shows is true: its code runs, its commands parse, its files and names exist."""

import re
import shlex
from pathlib import Path

import pytest

from shared.runtime.commands import COMMANDS
from shared.runtime.run import read_options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {f"scripts/{row.script}.py": name for name, row in COMMANDS.items()}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Each command line that runs a script or `trialign NAME`: that name, the words before it and those behind it."""
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                at = next((i for i, word in enumerate(words) if word.startswith("scripts/")), None)
                if at is None and "trialign" in [Path(word).name for word in words[:1]]:
                    at = next((i for i, word in enumerate(words) if word in COMMANDS), None)
                if at is not None:
                    yield pytest.param(words[at], words[:at], words[at + 1 :], id=part.strip()[:60])


@pytest.mark.parametrize(("run", "before", "options"), list(commands()))
def test_commands_parse(run, before, options, tmp_path, monkeypatch):
    if run.startswith("scripts/"):
        assert (ROOT / run).is_file()
        if "--config_file" in before:
            assert (ROOT / before[before.index("--config_file") + 1]).is_file()
        before = []
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("dataset_name: path/to/data\n")
    name = SCRIPTS.get(run, run)
    if name in COMMANDS:
        read_options(name, [*before[1:], *options])


def test_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared_names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), shared_names)  # the blocks build on each other
    assert (tmp_path / "out" / "report" / "index.html").is_file()


def test_what_is_named_exists():
    for path in re.findall(r"`((?:scripts|shared|docs|tests|visionalign)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    profiles = {path.stem for path in (ROOT / "shared" / "runtime" / "profiles").glob("*.yaml")}
    scaling = README[README.index("## Scaling") : README.index("## Troubleshooting")]
    assert profiles <= set(re.findall(r"`(\w+)`", scaling))


def test_the_two_commands_are_one_line_each():
    for name in ("run", "test"):
        block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
        assert block and len(block[1].strip().splitlines()) == 1


def test_messages_that_the_readme_explains_are_those_of_the_code():
    code = "".join(p.read_text(encoding="utf-8") for d in ("shared", "visionalign") for p in (ROOT / d).rglob("*.py"))
    explained = (
        "holds another run",
        "The launcher was asked for",
        "which would cut into",
        "no chat template",
        "teach no end",
        "rows of the {what} data cannot be used",
        "chosen and rejected are the same",
        "cannot run a prompt once for its group",
    )
    for words in explained:
        assert words.replace("{what}", "train") in README and words in code, words
