"""Small models and data sets that every script can run on with no network.

A model is a directory with a configuration and a processor (or tokenizer). `builtin/vlm-small`, `builtin/lm-small` and
`builtin/gemma3-small` have *no weights*: they are drawn from a seed when the model is loaded
(`shared.builtin.models`), so there is nothing to download and training starts from nothing. The others are short
trainings of these, a start for the trainers that need a model that can already answer, or score:
`builtin/lm-small-sft` is made by `shared.builtin.make_lm`, the rest by `scripts/make_builtin_models.py`, and each has
a card. The text-to-image pipelines have weights too and are made by that script; each is in the folders that diffusers
saves. A data set is drawn or read when it is loaded. Importing this package loads neither torch nor datasets.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_HERE = Path(__file__).parent

# Name -> directory of the model.
MODELS: dict[str, Path] = {
    "builtin/vlm-small": _HERE / "vlm_small",
    "builtin/vlm-small-sft": _HERE / "vlm_small_sft",
    "builtin/vlm-small-draft": _HERE / "vlm_small_draft",
    "builtin/rm-shapes": _HERE / "rm_shapes",
    "builtin/lm-small": _HERE / "lm_small",
    "builtin/lm-small-sft": _HERE / "lm_small_sft",
    "builtin/lm-tldr-sft": _HERE / "lm_tldr_sft",
    "builtin/rm-reviews": _HERE / "rm_reviews",
    "builtin/lm-comments": _HERE / "lm_comments",
    "builtin/toxicity": _HERE / "toxicity",
    "builtin/gemma3-small": _HERE / "gemma3_small",
    "builtin/gemma3-vlm-small": _HERE / "gemma3_vlm_small",
    "builtin/smolvlm-small": _HERE / "smolvlm_small",
    "builtin/video-small": _HERE / "qwen2_vl_small",
}

# Name -> directory of the adapter, as PEFT saves it; its configuration names the built-in model under it.
ADAPTERS: dict[str, Path] = {"builtin/rm-reviews-adapter": _HERE / "rm_reviews_adapter"}

# Name -> directory of the text-to-image pipeline, as diffusers saves it.
PIPELINES: dict[str, Path] = {
    "builtin/sd-small": _HERE / "sd_small",
    "builtin/sd3-small": _HERE / "sd3_small",
}

# Name -> module and function `(split) -> datasets.Dataset`, imported when it is asked for.
DATASETS: dict[str, str] = {
    "builtin/shapes": "shared.builtin.shapes:load",
    "builtin/shapes-prompts": "shared.builtin.shapes:load_prompts",
    "builtin/shapes-simple": "shared.builtin.shapes:load_simple",
    "builtin/shapes-preference": "shared.builtin.shapes_preference:load",
    "builtin/picture-pairs": "shared.builtin.picture_pairs:load",
    "builtin/moving-shapes": "shared.builtin.moving_shapes:load",
    "builtin/picture-prompts": "shared.builtin.pictures:load_prompts",
    "builtin/picture-preferences": "shared.builtin.pictures:load_preferences",
    "builtin/digits": "shared.builtin.digits:load",
    "builtin/arithmetic": "shared.builtin.arithmetic:load",
    "builtin/arithmetic-prompts": "shared.builtin.arithmetic:load_prompts",
    "builtin/reviews": "shared.builtin.reviews:load",
    "builtin/reviews-preference": "shared.builtin.reviews:load_preference",
    "builtin/reviews-unpaired": "shared.builtin.reviews:load_unpaired",
    "builtin/reviews-graded": "shared.builtin.graded:load",
    "builtin/tldr": "shared.builtin.tldr:load",
    "builtin/tldr-prompts": "shared.builtin.tldr:load_prompts",
    "builtin/comments": "shared.builtin.comments:load",
    "builtin/comments-prompts": "shared.builtin.comments:load_prompts",
    "builtin/steps": "shared.builtin.steps:load",
    "builtin/docstrings": "shared.builtin.docstrings:load",
}

SPLITS = ("train", "test")
RECIPES = _HERE / "recipes"


def is_builtin(name: str) -> bool:
    """Whether `name` is in the built-in name space; a misspelt `builtin/…` is, so that it never goes to the hub."""
    return str(name).startswith("builtin/")


def model_path(name: str) -> Path:
    """Directory of the built-in model `name`: configuration, processor and, where it has been trained, weights.

    Raises:
        UserError: no built-in model has this name.
    """
    return MODELS[_known(name, MODELS, "model")]


def adapter_path(name: str) -> Path:
    """Directory of the built-in adapter `name`: weights, configuration and tokenizer.

    Raises:
        UserError: no built-in adapter has this name.
    """
    return ADAPTERS[_known(name, ADAPTERS, "adapter")]


def pipeline_path(name: str) -> Path:
    """Directory of the built-in text-to-image pipeline `name`, as `DiffusionPipeline.from_pretrained` takes it.

    Raises:
        UserError: no built-in pipeline has this name.
    """
    return PIPELINES[_known(name, PIPELINES, "pipeline")]


def load_dataset(name: str, split: str = "train") -> Dataset:
    """Load the built-in data set `name`.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test"; the two have no picture, problem, film, chain or module in common.

    Returns:
        A map-style `datasets.Dataset`; its columns stand with the function that `DATASETS` names. Questions with one
        right answer have a column `kind`, to report accuracy by.

    Raises:
        UserError: no built-in data set has this name, or the split is not one of the two.
    """
    module, function = DATASETS[_known(name, DATASETS, "data set")].split(":")
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; its splits are: {', '.join(SPLITS)}.")
    return getattr(importlib.import_module(module), function)(split)


def recipe(script: str) -> Callable[[Mapping[str, Any]], Path | None]:
    """The options a script starts from when it trains a built-in model, below everything that was given.

    Args:
        script: name of the script; its file is `recipes/<script>.yaml`.

    Returns:
        What `parse_arguments` takes: the given options -> the recipe's file, or None where another model is named.
    """

    def find(given: Mapping[str, Any]) -> Path | None:
        return RECIPES / f"{script}.yaml" if is_builtin(given.get("model_name_or_path") or "builtin/") else None

    return find


def _known(name: str, registry: dict, what: str) -> str:
    if name in registry:
        return name
    close = difflib.get_close_matches(str(name), registry, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UserError(f"There is no built-in {what} {name!r}; there are: {', '.join(registry)}.{hint}")
