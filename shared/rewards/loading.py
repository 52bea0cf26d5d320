"""From what a user names or hands over to a reward.

Importing this module imports neither torch nor transformers, and nor does loading a rule or a function.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared.builtin import adapter_path, is_builtin, model_path
from shared.errors import UserError
from shared.rewards import rules
from shared.rewards.base import FunctionReward, Reward
from shared.rewards.places import place_of
from shared.rewards.spec_options import endpoint_of, spec_options

# Name -> function, or what makes one from arguments (`get_...`).
REWARDS: dict[str, Callable[..., Any]] = {
    "accuracy_reward": rules.accuracy_reward,
    "exact_match_reward": rules.exact_match_reward,
    "reasoning_accuracy_reward": rules.reasoning_accuracy_reward,
    "think_format_reward": rules.think_format_reward,
    "get_cosine_scaled_reward": rules.get_cosine_scaled_reward,
    "get_repetition_penalty_reward": rules.get_repetition_penalty_reward,
    "get_soft_overlong_punishment": rules.get_soft_overlong_punishment,
}
# Rewards of generated images, by rule; looked up when they are asked for, so that no torch is loaded before.
IMAGE_RULES: dict[str, str] = {
    name: f"shared.rewards.images.{name}"
    for name in (
        "jpeg_compressibility_reward",
        "jpeg_incompressibility_reward",
        "brightness_reward",
        "colourfulness_reward",
        "colour_reward",
    )
} | {name: f"shared.builtin.pictures_judge.{name}" for name in ("right_colour", "right_form", "right_picture")}
# Rewards of generated images that are, or need, a model: `NAME`, `NAME:MODEL`, `NAME:MODEL|HEAD`, and `|name=value`.
IMAGE_MODELS: dict[str, str] = {
    "clip": "shared.rewards.image_models.CLIPScore",
    "aesthetic": "shared.rewards.image_models.AestheticScore",
    "pickscore": "shared.rewards.image_models.PickScore",
    "hpsv2": "shared.rewards.image_models.HPSv2",
    "imagereward": "shared.rewards.image_models.ImageRewardScore",
    "ocr": "shared.rewards.ocr.OCRReward",
}
# Those of both that have a gradient to the image.
DIFFERENTIABLE = (
    "brightness_reward", "colourfulness_reward", "colour_reward",
    "clip", "aesthetic", "pickscore", "hpsv2", "imagereward",
)  # fmt: skip
CLASSIFIERS = ("sentiment-analysis:", "text-classification:")
JUDGE = "judge:"
ADAPTER = "adapter:"
# these are not imported by this package: they are named, as a user's would be
SEEING = "visionalign.rewards.VLMRewardModel"
OF_POLICY = "shared.trainers.reward_adapter.AdapterReward"


def load_reward(spec: Any, *, processing_class: Any = None, device: Any = None) -> Reward:
    """Make a reward of what names one.

    Args:
        spec: one of
            - a function `f(prompts, completions, **columns)`, sync or async, or an object that is called like one;
            - a name of `REWARDS`, or the dotted path of a function: `my_package.my_module.my_function`; both may be
              called with literal keyword arguments, `get_soft_overlong_punishment(max_completion_len=256,
              soft_punish_cache=32)`, which are handed to a factory, and held for the function otherwise;
            - the folder, hub id (`owner/name`) or built-in name of a reward model, also one that sees, or of a
              process-reward model;
            - `sentiment-analysis:MODEL` or `sentiment-analysis:MODEL:LABEL`, a classifier, whose label (the positive
              one where none is named) is rewarded with its chance; `text-classification:` is the same;
            - `adapter:PATH`, an adapter that RewardTrainer saved, run on the base model of the policy that an online
              trainer trains by another adapter; more of AdapterReward's arguments follow as `|name=value`;
            - of generated images a name of `IMAGE_RULES`; or one of `IMAGE_MODELS`, alone for its public weights, or
              with others: `clip:MODEL`, `aesthetic:MODEL|HEAD`; more of its arguments follow as `|name=value`, as in
              `pickscore|dtype=bfloat16`;
            - `judge:URL|MODEL`, a model behind an OpenAI-compatible endpoint; more of EndpointJudge's arguments follow
              as `|name=value`;
            - a loaded reward model or classifier, with its tokenizer or processor as `processing_class` or, where that
              is None, beside the weights that it was loaded from;
            - a transformers pipeline for text classification;
            - a Reward, which is returned as it is.
        processing_class: the tokenizer of a model, or the processor of one that sees.
        device: where a model that is given by name is put.

    Raises:
        UserError: there is no such reward, or it cannot be loaded.
    """
    return _plan(spec, processing_class, device)()


def load_rewards(specs: Sequence[Any], *, processing_classes: Any = None, device: Any = None) -> list[Reward]:
    """`load_reward` of each; all are looked up before the first model is loaded.

    Args:
        specs: K of them.
        processing_classes: one a reward, None where it has none; or None.
        device: as of `load_reward`.

    Raises:
        UserError: as of `load_reward`; or there are not K processing classes.
    """
    given = list(processing_classes) if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    if processing_classes is None:
        given *= len(specs)
    if len(given) != len(specs):
        raise UserError(
            f"There are {len(given)} reward_processing_classes for {len(specs)} rewards: give one for each, None "
            "where a reward is no model."
        )
    plans = [_plan(spec, tokenizer, device) for spec, tokenizer in zip(specs, given, strict=True)]
    return [make() for make in plans]


def check_reward(spec: Any) -> None:
    """Raise UserError where `load_reward` would for a reason that is known without loading a model."""
    _plan(spec, None, None)


def _plan(spec: Any, processing_class: Any, device: Any) -> Callable[[], Reward]:
    """How the reward is made, after all checks that are cheap."""
    if isinstance(spec, (str, os.PathLike)):
        return _plan_named(str(spec).strip(), processing_class, device)
    if _is_a(spec, "torch.nn.modules", "Module"):
        return partial(_of_model, spec, processing_class)
    if _is_a(spec, "transformers.pipelines", "Pipeline"):
        return partial(_of_pipeline, spec)
    if inspect.isclass(spec) or not callable(spec):
        raise UserError(f"A reward is {spec!r}: give a function, an object that can be called, or a name.")
    return partial(_of_callable, spec)


def _plan_named(spec: str, processing_class: Any, device: Any) -> Callable[[], Reward]:
    if spec in REWARDS:
        if spec.startswith("get_"):
            raise UserError(f"{spec} makes a reward of its arguments: {spec}{_signature(REWARDS[spec])}.")
        return partial(_of_callable, REWARDS[spec])
    if spec in IMAGE_RULES:
        return lambda: FunctionReward(imported(IMAGE_RULES[spec]))
    for prefix in CLASSIFIERS:
        if spec.startswith(prefix):
            named, *rest = (part.strip() for part in spec.split("|"))
            options = {"device": device, **spec_options(spec, rest)}
            return partial(_of_classifier, *_model_and_label(named, prefix), processing_class, options)
    if spec.startswith(JUDGE):
        return partial(FunctionReward, _judge(spec))
    if spec.startswith(ADAPTER):
        return _adapter(spec, processing_class)
    if re.split(r"[:|]", spec)[0].strip() in IMAGE_MODELS:
        return _image_model(spec, processing_class, device)
    if spec in ("", ".", ".."):
        raise UserError(f"The reward {spec!r} names nothing: give a name such as accuracy_reward.")
    if dotted := _dotted(spec):
        raise UserError(f"reward {spec!r} is a file: name a function in it by its dotted path, {dotted}.")
    if not Path(spec).is_dir():
        if spec.rstrip().endswith(")") and "(" in spec:
            return _called(spec)
        if "/" not in spec:
            return partial(_of_callable, imported(spec))
    _check_model(spec)
    return partial(_of_named_model, spec, processing_class, device)


def _dotted(spec: str) -> str | None:
    """How a function is named where a file is: `my_rewards.py`, `my_rewards.py:f`, `my_rewards:f`; None: not so."""
    found = re.fullmatch(r"(?:\./)?([\w/]+)(\.py)?(?::(\w+))?", spec)
    if found is None or not (found[2] or found[3]) or (found[3] and not found[2] and "/" in found[1]):
        return None
    return f"{found[1].replace('/', '.')}.{found[3] or 'FUNCTION'}"


def _of_callable(function: Any) -> Reward:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some that are written in C do not tell
        names = []
    return function if names[:2] == ["samples", "context"] else FunctionReward(function)


def _of_named_model(name: str, processing_class: Any, device: Any) -> Reward:
    from shared.rewards.models import RewardModel, base_config

    place = str(model_path(name)) if is_builtin(name) else name
    if processing_class is None and _may_see(base_config(place)):
        processing_class = _processor_at(place)
    scorer = imported(SEEING) if _sees(processing_class) else RewardModel
    return FunctionReward(scorer(name, processing_class, device=device))


def _may_see(config: Any) -> bool:
    return getattr(config, "vision_config", None) is not None


def _sees(processing_class: Any) -> bool:
    """Whether it processes images or videos too: a model that could see may have been trained on text alone."""
    return hasattr(processing_class, "image_processor") or hasattr(processing_class, "video_processor")


def _of_classifier(name: str, label: str | None, processing_class: Any, options: dict[str, Any]) -> Reward:
    from shared.rewards.classifiers import ClassifierReward

    return FunctionReward(ClassifierReward(name, processing_class, **{"label": label, **options}))


def _of_model(model: Any, processing_class: Any) -> Reward:
    from shared.rewards.classifiers import ClassifierReward
    from shared.rewards.models import RewardModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    labels = getattr(getattr(inner, "config", None), "num_labels", None)
    if labels is None:
        raise UserError(f"The reward {type(model).__name__} is no transformers model: wrap it in a function.")
    if processing_class is None:
        processing_class = _processor_beside(inner)
    if _may_see(inner.config) and _sees(processing_class):
        return FunctionReward(imported(SEEING)(model, processing_class))
    classifies = type(inner).__name__.endswith("ForSequenceClassification") and labels > 1
    return FunctionReward((ClassifierReward if classifies else RewardModel)(model, processing_class))


def _processor_beside(model: Any) -> Any:
    """The tokenizer, of a model that sees the processor, that stands where a model was loaded from."""
    from transformers import AutoTokenizer

    place, problem = getattr(model.config, "_name_or_path", ""), ""
    if place:
        try:
            return _processor_at(place) if _may_see(model.config) else AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, KeyError) as error:
            problem = f" at {place}, from where it was loaded ({str(error).strip().splitlines()[0]})"
    raise UserError(
        f"The reward {type(model).__name__} has no tokenizer{problem}: give it in reward_processing_classes."
    )


def _processor_at(place: str) -> Any:
    """The processor of a model that may see, or the tokenizer where it was saved with that alone."""
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return AutoProcessor.from_pretrained(place)
    except (OSError, ValueError):
        return AutoTokenizer.from_pretrained(place)


def _of_pipeline(pipeline: Any) -> Reward:
    from shared.rewards.classifiers import ClassifierReward

    if pipeline.task not in ("text-classification", "sentiment-analysis"):
        raise UserError(
            f"The reward is a pipeline for {pipeline.task}; only one for text-classification gives scores."
        )
    return FunctionReward(ClassifierReward(pipeline.model, pipeline.tokenizer))


def _check_model(name: str) -> None:
    if is_builtin(name):
        model_path(name)
    elif not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"reward model {name!r}: no such folder. Give an existing folder or a hub id (owner/name).")


def _model_and_label(spec: str, prefix: str) -> tuple[str, str | None]:
    model, label = spec.removeprefix(prefix), None
    if ":" in model and not Path(model).is_dir():
        model, _, label = model.rpartition(":")
    if not model or label == "":
        raise UserError(f"reward {spec!r}: expected {prefix}MODEL or {prefix}MODEL:LABEL.")
    _check_model(model)
    return model, label


def _image_model(spec: str, processing_class: Any, device: Any) -> Callable[[], Reward]:
    """The reward of images that a name of IMAGE_MODELS makes, which may load a model, of what follows the name."""
    name, mark, rest = re.fullmatch(r"(\w+)\s*([:|]?)(.*)", spec, re.DOTALL).groups()
    parts = [part.strip() for part in rest.split("|")] if mark else []
    places = [part for part in parts if "=" not in part]
    most = {"aesthetic": 2, "imagereward": 2}.get(name, 1)
    if not all(places) or len(places) > most or (not places and name == "imagereward"):
        form = f"{name}:MODEL|HEAD" if most > 1 else f"{name}:ENGINE" if name == "ocr" else f"{name}:MODEL"
        raise UserError(f"reward {spec!r}: expected {form}, and more arguments as |name=value.")
    options = spec_options(spec, [part for part in parts if "=" in part])
    if taken := {"model", "head", "engine"} & options.keys():
        raise UserError(f"reward {spec!r}: give {min(taken)} by its place, not by its name.")
    if name != "ocr":
        for model in places[:1]:
            _check_model(model)
        options = {"device": device, "processor": processing_class, **options}
    return lambda: FunctionReward(imported(IMAGE_MODELS[name])(*places, **options))


def _judge(spec: str) -> Any:
    from shared.rewards.judges import EndpointJudge

    url, model, options = endpoint_of(spec, JUDGE)
    return EndpointJudge(url, model, **options)


def _adapter(spec: str, processing_class: Any) -> Callable[[], Reward]:
    """The reward that an adapter on the policy's base is, which is loaded when it is made."""
    path, *rest = (part.strip() for part in spec.removeprefix(ADAPTER).split("|"))
    if not path:
        raise UserError(f"reward {spec!r}: expected {ADAPTER}PATH, and more arguments as |name=value.")
    options = spec_options(spec, rest)
    if is_builtin(path):
        adapter_path(path)
    else:
        _check_model(path)

    def make() -> Reward:
        try:
            return imported(OF_POLICY)(path, processing_class, **options)
        except TypeError as error:
            raise UserError(f"reward {spec!r}: {error}.") from error

    return make


def _called(spec: str) -> Callable[[], Reward]:
    """The reward that a factory's call makes, or a function with arguments held for it; a class is called later."""
    form = f"reward {spec!r}: expected name(argument=value, ...) with numbers, texts or lists for values"
    try:
        call = ast.parse(spec, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise UserError(f"{form}.")
        name = ast.unparse(call.func)
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{form}.") from error
    function = REWARDS.get(name) or imported(IMAGE_RULES.get(name, name))
    try:
        inspect.signature(function).bind_partial(**arguments)
        if inspect.isclass(function):  # it may load a model
            return lambda: _of_callable(function(**arguments))
        made = partial(function, **arguments) if _is_reward(function) else function(**arguments)
    except TypeError as error:
        raise UserError(f"reward {spec!r}: {error}; it takes {name}{_signature(function)}.") from error
    if not callable(made):
        raise UserError(f"reward {spec!r} made {type(made).__name__} {made!r}, which is no function.")
    return partial(_of_callable, made)


def _is_reward(function: Any) -> bool:
    """Whether a function takes samples itself, and is not what makes one that does."""
    names = inspect.signature(function).parameters
    return bool({"prompts", "completions", "completion_ids", "samples", "images"} & set(names))


def imported(path: str) -> Callable[..., Any]:
    """What a dotted path names, which can be called; modules of the working directory are found too.

    Raises:
        UserError: there is no such thing.
    """
    module, _, name = path.rpartition(".")
    if not module:
        names = [*REWARDS, *IMAGE_RULES, *IMAGE_MODELS]
        close = difflib.get_close_matches(path, names, n=2, cutoff=0.5)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(
            f"There is no reward {path!r}; there are: {', '.join(REWARDS)}; of generated images "
            f"{', '.join([*IMAGE_RULES, *IMAGE_MODELS])}. Others are named by their dotted path "
            f"(package.module.function), a reward model by its folder or hub id (owner/name).{hint}"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"reward {path!r}: {error}. Give the dotted path of a function.") from error
    except Exception as error:  # a user's module may raise anything
        said = error.msg if isinstance(error, SyntaxError) else error
        told = f"{type(error).__name__}: {said} {place_of(error)}".strip()
        raise UserError(f"reward {path!r}: the module {module} cannot be imported: {told}.") from error
    if not hasattr(holder, name):
        raise UserError(f"reward {path!r}: the module {module} has no {name}.")
    found = getattr(holder, name)
    if not callable(found):
        raise UserError(f"reward {path!r} is {type(found).__name__}, which cannot be called: name a function.")
    return found


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).split(" -> ")[0].replace("'", "")


def _is_a(spec: Any, module: str, name: str) -> bool:
    """Whether it is of a class of that name, told without importing the library: nothing is, before that is loaded."""
    return any(each.__name__ == name and each.__module__.startswith(module) for each in type(spec).__mro__)
