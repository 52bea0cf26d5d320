"""Two processes under every engine train what one process trains, and resume bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from launching import WORKER, profile, run
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow

# Sums are taken in another order: float32 leaves some 1e-7 a step, and Adam's first steps widen that.
EXACT = 1e-4
ENGINES = {"multi_cpu": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
WRAPPERS = {
    "multi_cpu": "DistributedDataParallel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
    "fsdp2": "FSDPLlavaForConditionalGeneration",
}
TASKS = {
    "multi_cpu": ["engine", "adapter", "accumulation", "evaluation"],
    "zero2": ["engine", "evaluation"],
    "zero3": ["engine", "evaluation"],
    "fsdp2": ["engine", "evaluation"],
}


def launched(folder: Path, name: str, launch, tasks) -> dict:
    (folder / name).mkdir()
    done = run(*launch, WORKER, folder / name, *tasks)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / name / "facts.json").read_text())


@pytest.fixture(scope="module", params=ENGINES)
def together(request, folder):
    return request.param, launched(folder, request.param, profile(request.param), TASKS[request.param])


def numbers(facts):
    return {name: value for name, value in facts["metrics"].items() if name != "epoch"}


def test_an_engine_trains_what_one_process_trains(alone, together, folder):
    name, facts = together
    found, expected = facts["engine"], alone["engine"]
    assert (found["engine"], found["wrapper"], found["world"]) == (ENGINES[name], WRAPPERS[name], 2)
    assert expected["world"] == 1 and len(expected["losses"]) == 6
    assert found["losses"] == pytest.approx(expected["losses"], rel=EXACT)
    assert found["accuracies"] == pytest.approx(expected["accuracies"], rel=EXACT)
    assert numbers(found) == pytest.approx(numbers(expected), rel=EXACT)
    assert found["answers"] == expected["answers"] and len(found["answers"]) == 5
    assert found["ranks_agree"]
    assert len(set(found["rng_digests"])) == 2  # each process draws its own noise
    assert_weights_are_close(folder / name / "engine", folder / "alone" / "engine")
    assert found["resumed_from"] == 3 and found["resume_is_exact"]
    if name in ("zero3", "fsdp2"):
        assert found["elements_here"] < 0.51 * found["elements"]
        assert found["dtensors"] == (found["parameters"] if name == "fsdp2" else 0)
    else:
        assert found["elements_here"] == found["elements"]
    if "evaluation" in facts:
        found, expected = facts["evaluation"], alone["evaluation"]
        assert found["before"] == pytest.approx(expected["before"], rel=EXACT)
        assert found["losses"] == pytest.approx(expected["losses"], rel=EXACT)
        assert found["after"] == pytest.approx(expected["after"], rel=EXACT)
    if "accumulation" in facts:
        assert facts["accumulation"]["losses"] == pytest.approx(alone["engine"]["losses"], rel=EXACT)
    if "adapter" in facts:
        assert_adapter_loads_alone(facts, alone, folder / name / "adapter", folder / "base")


def assert_weights_are_close(left: Path, right: Path):
    """Both load with transformers alone. Adam divides by the gradient's size: tiny gradients give 1e-3 either way."""
    found, expected = (AutoModelForImageTextToText.from_pretrained(each).state_dict() for each in (left, right))
    assert found.keys() == expected.keys()
    apart = torch.cat([(found[name] - expected[name]).flatten().abs() for name in expected])
    assert apart.max() < 1e-2 and apart.quantile(0.99) < 1e-5


def assert_adapter_loads_alone(facts, alone, adapter: Path, base: Path):
    from peft import PeftModel

    found, expected = facts["adapter"], alone["adapter"]
    assert len(found["initial"]) == 2 and set(found["initial"]) == set(expected["initial"])
    assert found["moved"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.01)  # dropout draws other numbers
    assert not list(adapter.glob("model*.safetensors"))
    loaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    norm = sum(p.double().square().sum() for n, p in loaded.named_parameters() if "lora_" in n) ** 0.5
    assert norm.item() == pytest.approx(found["norm"], rel=1e-6)
