"""From a spec to a reward: names, calls, dotted paths, models, judges, and what is said of the rest."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import shared.builtin
from shared.errors import UserError
from shared.rewards.base import FunctionReward, Sample
from shared.rewards.combine import RewardSet
from shared.rewards.judges import EndpointJudge
from shared.rewards.loading import REWARDS, check_reward, load_reward, load_rewards
from shared.rewards.models import RewardModel

ROOT = Path(__file__).resolve().parents[2]
ROWS = [Sample("p", "<think>a</think> 7", {"completion_ids": [1] * 9, "solution": "7"})]

OWN = """
def length(completions, scale=1, **columns):
    return [scale * len(completion) for completion in completions]

def make(offset):
    return lambda completions, **columns: [offset] * len(completions)

class Counts:
    def __init__(self, of):
        self.of = of

    def __call__(self, completions, **columns):
        return [completion.count(self.of) for completion in completions]

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory, which is not on the path."""
    (tmp_path / "own_rewards_of_test.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield "own_rewards_of_test"
    sys.modules.pop("own_rewards_of_test", None)


@pytest.mark.parametrize(
    "spec, name, value",
    [
        ("think_format_reward", "think_format_reward", 1.0),
        ("reasoning_accuracy_reward", "reasoning_accuracy_reward", 1.0),
        ("get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)", "soft_overlong_punishment_reward",
         -0.75),
        ("get_repetition_penalty_reward()", "repetition_penalty_reward", 1 / 7 - 1),
        ("reasoning_accuracy_reward(reasoning_delimiters=['<end>'])", "reasoning_accuracy_reward", 0.0),
    ],
)  # fmt: skip
def test_built_in_rewards_by_name_and_call(spec, name, value):
    reward = load_reward(spec)
    assert reward.__name__ == name and reward(ROWS, {}).tolist() == pytest.approx([value])


def test_functions_by_dotted_path(own):
    rows = [Sample("p", "banana")]
    for spec, value in {
        f"{own}.length": 6.0,
        f"{own}.length(scale=2)": 12.0,
        f"{own}.make(offset=0.5)": 0.5,
        f"{own}.Counts(of='an')": 2.0,
    }.items():
        assert load_reward(spec)(rows, {}).tolist() == [value], spec


def test_callables_and_rewards():
    def plain(completions):
        return [1.0] * len(completions)

    reward = load_reward(plain)
    assert isinstance(reward, FunctionReward) and reward(ROWS, {}).tolist() == [1.0]
    assert load_reward(reward) is reward


def test_every_registered_name_is_in_the_module_that_it_comes_from():
    for name, function in REWARDS.items():
        assert function.__name__ == name and function.__doc__


def test_a_rule_loads_no_model_library():
    code = (
        "import sys; from shared.rewards.loading import load_reward; load_reward('accuracy_reward'); "
        "load_reward('get_repetition_penalty_reward()'); load_reward(lambda completions: completions); "
        "print({'torch', 'transformers', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def scored(tiny, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny("lm"), num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny("lm"))
    model.save_pretrained(tmp_path / "scored")
    tokenizer.save_pretrained(tmp_path / "scored")
    return tmp_path / "scored", model, tokenizer


def test_reward_models_by_folder_built_in_name_and_module(scored, monkeypatch):
    folder, model, tokenizer = scored
    rows = [Sample("What colour is the circle ?", " red", {"kind": "colour"}), Sample("Describe", " blue square", {})]
    expected = RewardModel(model, tokenizer)([row.prompt for row in rows], [row.output for row in rows])
    monkeypatch.setitem(shared.builtin.MODELS, "builtin/scored", folder)
    for spec, name in ((str(folder), "scored"), (folder, "scored"), ("builtin/scored", "scored")):
        reward = load_reward(spec, device="cpu")
        assert reward.__name__ == name and reward(rows, {}).tolist() == pytest.approx(expected, abs=1e-5)
    rewards = RewardSet([model, "think_format_reward"], processing_classes=[tokenizer, None])
    assert rewards(rows).values[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_models_are_loaded_whole_where_the_policy_is_sharded(scored, monkeypatch):
    from transformers.integrations import deepspeed

    class Zero3:
        def is_zero3(self):
            raise AssertionError("the reward model would be sharded")

    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", Zero3)  # called, it gives the configuration
    for spec in (str(scored[0]), f"sentiment-analysis:{scored[0]}"):
        assert load_reward(spec, device="cpu")([Sample("", " red")], {}).isfinite().all()
    assert deepspeed._hf_deepspeed_config_weak_ref is Zero3


def test_a_failing_row_of_a_reward_model_is_named(scored):
    _, model, tokenizer = scored
    rows = [
        Sample("Describe", " red", {"__row__": 3}),
        Sample([{"role": "nobody", "content": "a"}], "b", {"__row__": 4}),
    ]
    with pytest.raises(UserError, match=r"Reward LlamaForSequenceClassification failed on row 4 \('b'\): (?!row)"):
        RewardSet(model, processing_classes=tokenizer)(rows)


def test_judges(monkeypatch):
    monkeypatch.setenv("KEY", "k")
    reward = load_reward(
        "judge:http://localhost:1/v1|org/model|api_key_env=KEY|high=5|max_tokens=9|prompt={completion}"
    )
    judge = reward.function
    assert isinstance(judge, EndpointJudge) and reward.concurrent and reward.__name__ == "judge_model"
    assert judge.url == "http://localhost:1/v1/chat/completions" and judge.model == "org/model"
    assert (judge.high, judge.api_key_env, judge.prompt, judge.options) == (
        5,
        "KEY",
        "{completion}",
        {"max_tokens": 9},
    )


@pytest.mark.parametrize(
    "spec, words",
    [
        ("acuracy_reward", "There is no reward 'acuracy_reward'; there are: .* Did you mean accuracy_reward"),
        ("get_cosine_scaled_reward", r"makes a reward of its arguments: get_cosine_scaled_reward\(max_len: int"),
        ("get_cosine_scaled_reward()", "missing a required argument|missing 1 required"),
        ("get_cosine_scaled_reward(max=3)", "unexpected keyword argument 'max'; it takes get_cosine_scaled_reward"),
        ("get_cosine_scaled_reward(max_len=0)", "max_len is 0"),
        ("get_cosine_scaled_reward(100)", "expected name\\(argument=value"),
        ("get_cosine_scaled_reward(max_len=len('a'))", "expected name\\(argument=value"),
        ("get_cosine_scaled_reward(max_len=", "There is no reward"),
        ("no_such_package.f", "No module named 'no_such_package'"),
        ("shared.rewards.rules.nothing", "the module shared.rewards.rules has no nothing"),
        ("shared.rewards.rules.PARSING_SECONDS", "is int, which cannot be called"),
        ("./missing/model", "no such folder"),
        ("", "names nothing"),
        (".", "names nothing"),
        ("my_rewards.py", "is a file: name a function in it by its dotted path, my_rewards.FUNCTION"),
        ("./my_rewards.py", "by its dotted path, my_rewards.FUNCTION"),
        ("rewards/mine.py:f", "by its dotted path, rewards.mine.f"),
        ("my_rewards:f", "by its dotted path, my_rewards.f"),
        ("judge:http://localhost:1|m|model=n", "model is given twice"),
        ("judge:http://localhost:1|m|timeout=abc", "timeout is 'abc'"),
        ("a/b/c", "no such folder"),
        ("builtin/missing", "no built-in model 'builtin/missing'"),
        ("sentiment-analysis:", "expected sentiment-analysis:MODEL"),
        ("sentiment-analysis:owner/name:", "expected sentiment-analysis:MODEL"),
        ("judge:http://localhost:1", "expected judge:URL|MODEL"),
        ("judge:http://localhost:1|m|fast", "'fast' is no name=value"),
        (3, "give a function"),
        (RewardModel, "give a function"),
    ],
)
def test_what_is_no_reward_is_told_before_a_model_loads(spec, words):
    with pytest.raises(UserError, match=words):
        check_reward(spec)
    with pytest.raises(UserError, match=words):
        load_rewards(["/no/such/model" if spec == "a/b/c" else "think_format_reward", spec])


@pytest.mark.parametrize(
    "source, words",
    [
        ("x = 1\ndef f(:\n", r"SyntaxError: .* \(broken_rewards_of_test.py, line 2\)"),
        ("import json\n\njson.nothing\ndef f(): pass", r"AttributeError: .* \(broken_rewards_of_test.py, line 3\)"),
        ("import json\njson.loads('x')", r"JSONDecodeError: .* \(broken_rewards_of_test.py, line 2\)"),
        ("from json import nothing", r"ImportError: .* \(broken_rewards_of_test.py, line 1\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_line(source, words, tmp_path, monkeypatch):
    (tmp_path / "broken_rewards_of_test.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be imported: " + words):
        check_reward("broken_rewards_of_test.f")


def test_a_module_without_its_tokenizer_is_refused(scored):
    _, model, _ = scored
    with pytest.raises(UserError, match="has no tokenizer: give it in reward_processing_classes"):
        load_reward(type(model)(model.config.__class__(**{**model.config.to_dict(), "_name_or_path": ""})))
    with pytest.raises(UserError, match="is no transformers model"):
        load_reward(torch.nn.Linear(1, 1), processing_class=scored[2])


def test_a_loaded_model_brings_the_tokenizer_of_its_folder(scored, tmp_path):
    folder, model, tokenizer = scored
    rows = [Sample("Describe", " red"), Sample("Describe", " blue")]
    alone = type(model).from_pretrained(folder)
    assert load_reward(alone)(rows, {}).tolist() == load_reward(alone, processing_class=tokenizer)(rows, {}).tolist()
    alone.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(UserError, match="no tokenizer at .*gone, from where .*reward_processing_classes"):
        load_reward(alone)
