"""What the README shows is true: its code runs, its commands parse, its files and names exist."""

import re
import shlex
from pathlib import Path

import pytest

from shared.builtin import recipe
from shared.runtime.arguments import DataArguments, ModelArguments
from shared.runtime.parser import parse_arguments
from visionalign.options import VLMSFTOptions

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GROUPS = {"scripts/sft_vlm.py": [ModelArguments, DataArguments, VLMSFTOptions]}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part)
                script = next((word for word in words if word.startswith("scripts/")), None)
                if script is not None:
                    yield pytest.param(script, words, id=part.strip()[:60])


@pytest.mark.parametrize(("script", "words"), list(commands()))
def test_commands_parse(script, words, tmp_path, monkeypatch):
    assert (ROOT / script).is_file()
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model_name_or_path: builtin/vlm-small\ndataset_name: builtin/digits\n")
    if script in GROUPS:
        parsed = parse_arguments(GROUPS[script], words[words.index(script) + 1 :], recipe=recipe("sft_vlm"))
        parsed.build(ModelArguments)
        parsed.build(DataArguments)


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
    for words in ("holds another run", "The launcher was asked for", "which would cut into", "no chat template"):
        assert words in README and words in code
