"""The three stages of StackLLaMA: each starts from what the one before left, and a table tells what they reached."""

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.builtin import RECIPES
from shared.errors import UserError
from shared.runtime.commands import COMMANDS
from shared.runtime.run import read_options, train
from textalign import stack_llama_run

ROOT = Path(__file__).resolve().parents[2]
FEW = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "max_train_rows": 64,
    "max_eval_rows": 8,
    "eval_steps": 1,
    "logging_steps": 1,
    "use_cpu": True,
}


@pytest.fixture
def recipes(tmp_path):
    """The built-in recipes, of two steps each."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in stack_llama_run.STAGES:
        options = yaml.safe_load((RECIPES / "stack_llama" / f"{name}.yaml").read_text())
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**options, **FEW}))
    return folder


@pytest.fixture
def here(monkeypatch):
    """Stages run in this process: what starts takes longer than what is tested."""

    def run(command, cwd, env):
        assert command[1:3] == ["-m", "shared.runtime.cli"] and str(ROOT) in env["PYTHONPATH"]
        with contextlib.chdir(cwd):
            train(COMMANDS[command[3]], read_options(command[3], command[4:])[0])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(stack_llama_run.subprocess, "run", run)


def test_a_stage_goes_on_from_the_one_before(recipes, here, tmp_path, capsys):
    folder = tmp_path / "out"
    stack_llama_run.main(["--recipes", str(recipes), "--output_dir", str(folder)])
    told = capsys.readouterr().out
    for stage, what in (("sft", "perplexity"), ("reward", "accuracy"), ("rl", "review_reward")):
        table = told[told.index(f"{stage}, on held-out rows") :].split("\n\n")[0]
        assert what in table and "before" in table
    for stage, base in (("reward", "sft-merged"), ("rl", "sft-merged")):
        config = json.loads((folder / stage / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == base
    merged, final = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("sft-merged", "final"))
    moved = [not torch.equal(a, b) for a, b in zip(merged.parameters(), final.parameters(), strict=True)]
    assert any(moved) and not all(moved), "the layers with an adapter, and no others"
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template


def test_what_is_merged_is_the_model_with_its_adapter(tiny, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    from shared.runtime.adapters import merge_adapter

    base = AutoModelForCausalLM.from_pretrained(tiny("lm"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny("lm")).save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "whole"))
    ids = torch.arange(5, 25)[None]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no such folder"):
        merge_adapter(str(tmp_path / "missing"), str(tmp_path / "x"))


def test_what_cannot_be_run(recipes, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no 'ppo'; there are sft, reward, rl"):
        stack_llama_run.main(["--stages", "ppo"])
    (recipes / "rl.yaml").unlink()
    with pytest.raises(UserError, match="there is no rl.yaml in this folder"):
        stack_llama_run.main(["--recipes", str(recipes), "--output_dir", str(tmp_path / "out")])
    failed = lambda command, **_: subprocess.CompletedProcess(command, 2)  # noqa: E731
    monkeypatch.setattr(stack_llama_run.subprocess, "run", failed)
    with pytest.raises(UserError, match="The stage reward failed, see above. Go on from it with --stages reward rl"):
        stack_llama_run.main(["--recipes", str(recipes), "--output_dir", str(tmp_path / "out"), "--stages", "reward"])


@pytest.mark.parametrize("folder", [RECIPES / "stack_llama", ROOT / "scripts" / "stack_llama"], ids=["small", "llama"])
def test_the_recipes_follow_each_other(folder):
    values = {}
    for stage, command in stack_llama_run.COMMANDS.items():
        values[stage] = read_options(command, ["--config", str(folder / f"{stage}.yaml")])[0].values
    assert [values[stage]["output_dir"] for stage in stack_llama_run.STAGES] == list(stack_llama_run.STAGES)
    assert values["reward"]["model_name_or_path"] == values["rl"]["model_name_or_path"] == "sft-merged"
    assert len({tuple(each["dataset_name"]) for each in values.values()}) == 1
    assert "adapter:reward" in values["rl"]["reward_funcs"] and all(each["use_peft"] for each in values.values())
