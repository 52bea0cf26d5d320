"""Completions from sharded weights are those of the whole model, and training goes on as if there had been none."""

import json
from pathlib import Path

import pytest
import torch
from generation_worker import PROMPTS, completions, loss_of
from launching import profile, run
from tiny_text import build_causal
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("generation_worker.py")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The model's folder and, of one process, the completions for both ranks' prompts before and after training."""
    source = build_causal("qwen2", tmp_path_factory.mktemp("causal"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [completions(model, tokenizer, lengths) for lengths in PROMPTS]
    losses = []
    for _ in range(3):
        of_ranks = [loss_of(model, rank) for rank in range(2)]
        (sum(of_ranks) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in of_ranks])
    after = [completions(model, tokenizer, lengths) for lengths in PROMPTS]
    return source, sum(p.numel() for p in model.parameters()), before, losses, after


def assert_same(found, expected):
    for made, own in zip(found, expected, strict=True):
        assert made["ids"] == own["ids"]
        flat = [[value for row in each["logp"] for value in row] for each in (made, own)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-3)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_sharded_weights_complete_as_whole_ones(engine, alone, tmp_path):
    source, elements, before, losses, after = alone
    assert len({len(row) for each in before for row in each[1]["ids"]}) > 2  # rows of different length
    done = run(*profile(engine), WORKER, tmp_path, source)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same(facts["whole"], before[rank])
        assert_same(facts["layer by layer"], before[rank])
        assert facts["losses"] == pytest.approx([step[rank] for step in losses], rel=1e-4)
        assert facts["elements here"] < 0.51 * elements
        assert_same(facts["afterwards"], after[rank])
