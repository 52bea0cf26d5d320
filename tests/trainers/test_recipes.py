"""Presets: each has its paper's numbers, what is given wins, and options that fail together are told."""

import pytest

import textalign
from shared.errors import UserError
from shared.runtime.parser import parse_arguments
from shared.trainers.recipes import RECIPES, doubtful, with_recipe
from textalign.online_options import GRPOOptions

# name -> options as the papers have them
NUMBERS = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "kl_estimator": "k3", "epsilon": 0.2, "scale_rewards": "group"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "dynamic_sampling": True,
             "mask_truncated_completions": True, "beta": 0.0},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3,
              "epsilon_high": 2.5e-3},
    "vespo": {"loss_type": "vespo", "importance_sampling_level": "token"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"},
    "high_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.2, "epsilon_high": 0.28},
    "two_sided": {"delta": 4.0, "epsilon": 0.2},
}  # fmt: skip


def config(folder, **options):
    return textalign.GRPOConfig(output_dir=str(folder), **options)


def test_all_recipes_are_checked():
    assert NUMBERS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recipe_gives_its_numbers_and_no_warning(name, tmp_path):
    args = config(tmp_path, recipe=name)
    for option, value in NUMBERS[name].items():
        assert getattr(args, option) == value, option
    assert doubtful(args, rewards=2) == []


def test_what_is_given_wins_over_a_recipe(tmp_path):
    args = config(tmp_path, recipe="dapo", epsilon_high=0.5, dynamic_sampling=False)
    assert (args.epsilon_high, args.dynamic_sampling) == (0.5, False)
    assert args.mask_truncated_completions


def test_a_recipe_on_the_command_line(tmp_path):
    def args(*words, yaml=None):
        if yaml is not None:
            (tmp_path / "run.yaml").write_text(yaml)
            words = ("--config", str(tmp_path / "run.yaml"), *words)
        words = (*words, "--output_dir", str(tmp_path / "out"))
        return parse_arguments([GRPOOptions], words).build(GRPOOptions, textalign.GRPOConfig)

    plain = args("--recipe", "gspo")
    assert (plain.importance_sampling_level, plain.epsilon) == ("sequence", 3e-4)
    assert args("--recipe", "gspo", "--epsilon", "0.001").epsilon == 1e-3
    assert args("--recipe", "gspo", yaml="epsilon: 0.002\n").epsilon == 2e-3
    mixed = args(yaml="recipe: dapo\nepsilon_high: 0.3\n")
    assert (mixed.dynamic_sampling, mixed.epsilon_high) == (True, 0.3)


def test_an_unknown_recipe(tmp_path):
    with pytest.raises(UserError, match=r"recipe 'gpso' is not known. Did you mean gspo\? There are: grpo, gspo"):
        config(tmp_path, recipe="gpso")
    with pytest.raises(UserError, match="recipe 3 is not known. There are"):
        with_recipe({"recipe": 3})
    assert with_recipe({"epsilon": 0.1}) == {"epsilon": 0.1}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"importance_sampling_level": "sequence", "num_iterations": 2}, "ratio of a sample hardly leaves 1"),
        ({"epsilon": 1e-3}, "nearly every token is clipped"),
        ({"loss_type": "dr_grpo"}, "scale_rewards none goes with it"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "cuts every sample"),
        ({"loss_type": "luspo"}, "goes with importance_sampling_level sequence"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "has one reward"),
        ({"epsilon_high": 0.1}, "takes entropy away"),
        ({"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False}, "holds nothing"),
        ({"temperature": 0.1}, "hardly differ"),
        ({"temperature": 0.0}, "hardly differ"),
        ({"num_generations": 2}, "noisy baseline"),
    ],
)
def test_doubtful_mixes_are_told(options, told, tmp_path):
    found = doubtful(config(tmp_path, **options), rewards=1)
    assert len(found) == 1 and told in found[0], found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance_sampling_level": "sequence"},  # one update a round: the ratio is 1
        {"loss_type": "cispo"},
        {"beta": 0.1, "kl_estimator": "k1"},
        {"num_generations": 2, "scale_rewards": False},
    ],
)
def test_sound_mixes_are_not(options, tmp_path):
    assert doubtful(config(tmp_path, **options), rewards=1) == []
