"""Completions from sharded weights are those of the whole model, and training goes on as if there had been none."""

import json

import pytest
import torch
from generation_worker import PROMPTS, completions, one_of_two
from tiny_text import build_causal
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The model's folder, its size and, of one process, the completions of both ranks' prompts."""
    source = build_causal("qwen2", tmp_path_factory.mktemp("causal"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    made = [completions(model, tokenizer, lengths) for lengths in PROMPTS]
    return source, sum(p.numel() for p in model.parameters()), made


def assert_same(found, expected):
    for made, own in zip(found, expected, strict=True):
        assert made["ids"] == own["ids"]
        flat = [[value for row in each["logp"] for value in row] for each in (made, own)]
        assert flat[0] == pytest.approx(flat[1], abs=1e-3)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_sharded_weights_complete_as_whole_ones(engine, alone, tmp_path, monkeypatch):
    source, elements, expected = alone
    assert len({len(row) for each in expected for row in each[1]["ids"]}) > 2  # rows of different length
    for name, value in {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    torch.multiprocessing.spawn(one_of_two, (engine, str(source), str(tmp_path)), nprocs=2)
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same(facts["whole"], expected[rank])
        assert_same(facts["layer by layer"], expected[rank])
        assert facts["with"][0] == facts["without"][0] and facts["with"][0][0] > facts["with"][0][-1]
        assert_same(facts["with"][1], facts["without"][1])
        assert max(facts["elements here"]) < 0.51 * elements  # after generation with whole weights, and layer by layer
