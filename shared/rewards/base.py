"""One interface for all rewards: what is scored, what scores it, and the adapter for the field's plain functions.

Deliberately not here: several rewards together, timeouts and what happens when one fails (combine.py), and how a
reward is named (loading.py). Importing this module does not import torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 3.4028234e38  # of float32
GIVEN = {"prompts", "completions", "log_extra", "log_metric"}  # what a function may take with every call
OF_IMAGES = {"images", "metadata", "prompt_metadata"}  # and, where images were made
BESIDE = {"completion_ids", "log_extra", "log_metric", "trainer_state", "group_size", "mode"}  # what is no column
OF_CALLS = {"group_size", "mode"}  # names that columns and held arguments may have too: those come first


@dataclass(frozen=True)
class Sample:
    """One output of a policy, with all that a reward may look at.

    Attributes:
        prompt: a string or a list of messages.
        output: a string, a list of messages (`[{"role": "assistant", "content": ...}]`), or an image, a float tensor
            `(3, H, W)` in [0, 1].
        columns: the other columns of the prompt's row; of token models also `completion_ids` (list of int). Columns
            that begin with `__` are the suite's own and are not handed to functions.
    """

    prompt: Any
    output: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


class Reward(Protocol):
    """Scores samples.

    A reward with a true attribute `concurrent` waits for something else, such as a server: a RewardSet runs it in a
    thread beside the others, and its timeout applies. One with a true attribute `differentiable` returns a tensor that
    keeps the gradient of the images that are the samples' outputs.
    """

    __name__: str

    def __call__(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> Tensor:
        """The samples' scores, (B,); NaN where the reward does not apply.

        Args:
            samples: B samples.
            context: `log_extra(column, values)` and `log_metric(name, value)`, and what the trainer gives:
                `trainer_state`; `group_size`, how many samples in a row are of one prompt; `mode`, what is sampled
                for: `train`, `eval`, or `greedy`, the most likely answers before and after training, one a prompt.

        Raises:
            RowErrors: some rows have no score; the others' scores come along.
        """


class RowErrors(UserError):
    """A reward that knows which rows it failed on, and has the others' scores.

    Args:
        values: one a row: a number, or None where the reward does not apply or failed.
        errors: place of the row in the call -> what went wrong.
    """

    def __init__(self, values: Sequence[Any], errors: Mapping[int, Exception]):
        first = min(errors)
        super().__init__(f"{len(errors)} of {len(values)} rows have no score; the first, {first}: {errors[first]}")
        self.values, self.errors = list(values), dict(errors)


class WrongCount(UserError):
    """What a function returned is not one value a row, so that no value can be told to be of a row."""


class FunctionReward:
    """A function in the field's usual signature as a reward: `f(prompts, completions, **columns)`.

    It is called with keywords, and gets those that its signature takes, or all where it has `**kwargs`: `prompts`,
    `completions`, `completion_ids`, each column of the rows as a list, `trainer_state`, `log_extra(column, values)`,
    `log_metric(name, value)`, and `group_size` and `mode` (see Reward) where no column is called so. It returns a
    number for each row; None and NaN mean that it does not apply to the row. It may be async.

    Where images were made, `images` (and `completions`) are those: a tensor `(B, 3, H, W)` in [0, 1], a list of
    tensors where sizes differ, or a list of PIL images for a function with the attribute `takes = "pil"`. `metadata`
    is a dict of each row's columns, where no column is called so. The function may return `(numbers, metadata)`: what
    metadata holds for each row is shown beside the samples.

    Args:
        function: the function, or any object that can be called like one. One with a true attribute `remote` waits for
            a server, and is run in a thread beside other rewards.
        name: how it is called in logs; None: the function's own name.

    Attributes:
        differentiable: whether the function keeps the gradient of the images, as its attribute of that name says;
            None: it does not say.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.__name__ = name or name_of(function)
        self.is_async = _is_async(function)
        self.concurrent = self.is_async or bool(_attribute(function, "remote"))
        self.takes_pil = _attribute(function, "takes") == "pil"
        waits = self.concurrent or self.takes_pil
        self.differentiable: bool | None = False if waits else _attribute(function, "differentiable")
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # some that are written in C do not tell
            parameters = [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
        self._takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self._held = set(getattr(function, "keywords", ())) if isinstance(function, partial) else set()
        named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        self._takes = {each.name for each in named}
        self._needs = [each.name for each in named if each.default is each.empty]
        self._needs += [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]

    def check(self, columns: Collection[str]) -> None:
        """Raise UserError where the function needs something that is neither a column nor given with every call.

        Args:
            columns: the names of the rows' columns, and of what the trainer gives beside them.
        """
        missing = [name for name in self._needs if name not in GIVEN and name not in columns]
        if missing:
            listed = sorted(name for name in columns if not name.startswith("__"))
            own = ", ".join(name for name in listed if name not in BESIDE) or "none"
            beside = ", ".join(name for name in listed if name in BESIDE)
            raise UserError(
                f"Reward {self.__name__} takes {missing[0]!r}, and the rows have no such column; there are: {own}. "
                "Rename the column or the function's argument." + (f" Every call has {beside} too." if beside else "")
            )

    def __call__(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> Tensor:
        found = self.returned(samples, context)
        if inspect.isawaitable(found):
            from shared.rewards.background import wait_for

            found = wait_for(found)
        return as_values(without_metadata(found, len(samples), context), len(samples))

    async def call_async(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> Tensor:
        """As a call, of an async function, in the event loop that runs."""
        found = await self.returned(samples, context)
        return as_values(without_metadata(found, len(samples), context), len(samples))

    def returned(self, samples: Sequence[Sample], context: Mapping[str, Any], images: Tensor | None = None) -> Any:
        """What the function itself returns.

        Args:
            samples, context: as of a call.
            images: `(B, 3, H, W)` in place of the samples' outputs, such as with a gradient.
        """
        return self.function(**self._arguments(samples, context, images))

    def _arguments(
        self, samples: Sequence[Sample], context: Mapping[str, Any], images: Tensor | None
    ) -> dict[str, Any]:
        names = dict.fromkeys(name for sample in samples for name in sample.columns if not name.startswith("__"))
        shows = images is not None or made_images(samples)
        self.check([*names, *context, *(OF_IMAGES if shows else ())])
        given = {name: [sample.columns.get(name) for sample in samples] for name in names}
        given |= {name: value for name, value in context.items() if name not in given or name not in OF_CALLS}
        given["prompts"] = [sample.prompt for sample in samples]
        given["completions"] = [sample.output for sample in samples]
        if shows:
            rows = [
                {name: value for name, value in sample.columns.items() if not name.startswith("__")}
                for sample in samples
            ]
            given = {"metadata": rows, "prompt_metadata": rows, **given}
            given["images"] = given["completions"] = self._shown(samples) if images is None else images
        given = {name: value for name, value in given.items() if name not in OF_CALLS or name not in self._held}
        return given if self._takes_all else {name: given[name] for name in given if name in self._takes}

    def _shown(self, samples: Sequence[Sample]) -> Any:
        """The images that were made, as the function takes them."""
        import torch

        from shared.rewards.pictures import to_pil, to_tensor

        if self.takes_pil:
            return [to_pil(sample.output) for sample in samples]
        images = [to_tensor(sample.output) for sample in samples]
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def made_images(samples: Sequence[Sample]) -> bool:
    """Whether what was made are images."""
    return bool(samples) and all(
        hasattr(sample.output, "detach") or hasattr(sample.output, "convert") for sample in samples
    )


def without_metadata(found: Any, count: int, context: Mapping[str, Any]) -> Any:
    """What a function returned, without the metadata of the form `(numbers, metadata)`, which goes to `log_extra`.

    Args:
        found: what was returned.
        count: B.
        context: as a Reward takes it.
    """
    if not (isinstance(found, tuple) and len(found) == 2 and hasattr(found[0], "__len__")):
        return found
    values, metadata = found
    if getattr(values, "ndim", 1) == 0:  # two rows' numbers, each a tensor
        return found
    if isinstance(metadata, (list, tuple)) and metadata and all(isinstance(each, Mapping) for each in metadata):
        names = dict.fromkeys(name for each in metadata for name in each)
        metadata = {name: [each.get(name) for each in metadata] for name in names}
    log = context.get("log_extra")
    if log is not None and isinstance(metadata, Mapping):
        for name, column in metadata.items():
            if isinstance(column, (list, tuple)) and len(column) == count:
                log(name, column)
    return values


def as_values(found: Any, count: int) -> Tensor:
    """What a reward returned as a tensor (B,) of float32, NaN where it was None or NaN.

    Args:
        found: a list, tuple, array or tensor.
        count: B.

    Raises:
        WrongCount: it is not one value a row.
        RowErrors: a value is infinite, or no number.
    """
    import torch

    if hasattr(found, "detach"):
        found = found.detach().cpu()
    if getattr(found, "ndim", 1) != 1:
        raise WrongCount(f"it returned a {_kind_of_array(found)}; expected one number for each row, ({count},)")
    if hasattr(found, "tolist"):
        found = found.tolist()
    if not isinstance(found, (list, tuple)):
        raise WrongCount(f"it returned {_kind(found)}; expected a list of one number or None for each row, {count}")
    if len(found) != count:
        raise WrongCount(f"it returned {len(found)} values for {count} rows; expected one for each")
    values, errors = [], {}
    for at, raw in enumerate(found):
        value, problem = _number(raw)
        values.append(value)
        if problem:
            errors[at] = UserError(problem)
    if errors:
        raise RowErrors(values, errors)
    return torch.tensor(values, dtype=torch.float32)


def name_of(function: Any) -> str:
    """How a function is called: by its name, a partial one by that of the whole, an object by its class."""
    whole = function
    while not hasattr(whole, "__name__") and hasattr(whole, "func"):
        whole = whole.func
    return getattr(whole, "__name__", type(whole).__name__).strip("<>")


def text_of(output: Any) -> str:
    """What an output says: itself, or the texts of its messages."""
    if isinstance(output, str):
        return output
    contents = [message.get("content") or "" for message in output]
    parts = [[{"text": content}] if isinstance(content, str) else content for content in contents]
    return "".join(part.get("text") or "" for content in parts for part in content)


def _number(raw: Any) -> tuple[float, str | None]:
    """A value and what is wrong with it; NaN where it does not apply."""
    if raw is None:
        return math.nan, None
    if isinstance(raw, (str, bytes)):
        return math.nan, f"it gave {raw[:60]!r}, which is no number"
    try:
        value = float(raw.detach() if hasattr(raw, "detach") else raw)
    except OverflowError:
        return math.nan, "it gave a number that is too large"
    except (TypeError, ValueError, RuntimeError):  # a tensor of several values raises RuntimeError
        return math.nan, f"it gave {_kind(raw)}, which is no number"
    if abs(value) > LARGEST:
        return math.nan, f"it gave {value}, which is not finite"
    return value, None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def _kind_of_array(found: Any) -> str:
    return f"{type(found).__name__} of shape {tuple(found.shape)}"


def _whole(function: Any) -> Any:
    """What a partial function is a part of."""
    while hasattr(function, "func") and not hasattr(function, "__code__"):
        function = function.func
    return function


def _attribute(function: Any, name: str) -> Any:
    return getattr(function, name, getattr(_whole(function), name, None))


def _is_async(function: Any) -> bool:
    function = _whole(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
