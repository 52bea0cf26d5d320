"""The online trainers under every engine: two processes train what one trains, and their own samples teach them."""

import json
from pathlib import Path

import pytest
from launching import PYTHON, profile, run

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("online_worker.py")
COMPARED = ["grpo", "rloo", "bonus", "idle", "split", "adapter", "vision", "mixed", "ppo", "ppo_adapter", "judged"]
ENGINES = {
    "multi_cpu": [*COMPARED, "ppo_steps", "learns", "dynamic", "resumed"],
    "zero2": ["grpo", "vision", "learns", "ppo_adapter"],
    "zero3": ["grpo", "rloo", "split", "judged", "vision", "ppo", "learns", "dynamic", "resumed", "ppo_resumed"],
    "fsdp2": [
        "grpo", "rloo", "bonus", "adapter", "judged", "vision", "ppo", "learns", "dynamic", "resumed", "ppo_resumed",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tiny import build_lm, build_vlm

    folder = tmp_path_factory.mktemp("models")
    build_lm(folder / "lm")
    build_vlm("llava", folder / "llava")
    build_judge(folder / "lm", folder / "judge")
    return folder


def build_judge(base, folder):
    """A reward model as an adapter, as RewardTrainer saves it; nobody has trained it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **options)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def launched(folder, launch, models, tasks):
    done = run(*launch, WORKER, folder, models, *tasks, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    return launched(tmp_path_factory.mktemp("alone"), PYTHON, models, [*COMPARED, "ppo_steps"])


@pytest.fixture(scope="module", params=ENGINES)
def together(request, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return launched(folder, profile(request.param), models, ENGINES[request.param])


def task(facts, name):
    if name not in facts:
        pytest.skip("not run under this engine")
    return facts[name]


def test_two_processes_train_what_one_trains(together, alone):
    for name in set(together) & set(COMPARED):
        found, expected = together[name], alone[name]
        assert len(found["losses"]) == 6 and max(map(abs, expected["losses"])) > 1e-3, name
        for figure in ("losses", "norms", "rewards", "kl", "value_errors"):
            assert found[figure] == pytest.approx(expected[figure], rel=5e-4, abs=2e-5), (name, figure)
        assert found["held_out"] == pytest.approx(expected["held_out"], rel=1e-3, abs=1e-4), name
        assert found["ranks agree"], name


def test_steps_by_hand_are_those_of_one_process(together, alone):
    for found, expected in zip(task(together, "ppo_steps")["stats"], alone["ppo_steps"]["stats"], strict=True):
        assert found == pytest.approx(expected, rel=5e-4, abs=2e-5)


def test_own_samples_teach(together):
    found = task(together, "learns")
    assert found["ranks agree"]
    assert sum(found["rewards"][-3:]) / 3 > sum(found["rewards"][:3]) / 3 + 0.15


def test_processes_that_miss_unlike_numbers_of_groups(together):
    found = task(together, "dynamic")
    one, other = found["calls"]
    assert one == other and len(set(one)) > 1, "processes draw equally many, some of them for company"
    assert found["cursors"][0] == found["cursors"][1] and found["ranks agree"]
    assert len(found["losses"]) == 5


@pytest.mark.parametrize("name", ["resumed", "ppo_resumed"])
def test_a_round_goes_on_in_each_process(name, together):
    found = task(together, name)
    assert found["exact"] and found["ranks agree"]
    assert found["cursor"] == 6, "two of a round's passes, of four micro-batches each, end at 8"
    assert found["first prompts"][0] != found["first prompts"][1]
    assert found["drawn"][0] != found["drawn"][1]
