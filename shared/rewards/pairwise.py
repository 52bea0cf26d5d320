"""Judges that say which of two answers is better: rewards compared, functions, and models behind an endpoint.

To a trainer a judge is a reward of samples that stand two by two: what it gives an answer is how likely that one is to
be preferred to the other. So a RewardSet runs it, with its timeout and its care for what fails.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from shared.errors import UserError
from shared.rewards import background
from shared.rewards.base import FunctionReward, Reward, RowErrors, Sample, WrongCount, as_values, name_of, text_of
from shared.rewards.judges import request_text
from shared.rewards.loading import ADAPTER, JUDGE, imported, load_reward
from shared.rewards.spec_options import endpoint_of

RANKS = "0 or 1, the number of the better answer, or -1 where it does not know"


class BasePairwiseJudge(ABC):
    """A judge of pairs; a subclass fills in `judge`.

    One whose `judge` takes `return_scores` too is asked with it for chances in place of numbers. One with a true
    attribute `remote` waits for a server, and is run in a thread beside other rewards.
    """

    @abstractmethod
    def judge(self, prompts: list[str], completions: list[list[str]], shuffle_order: bool = True) -> list[int]:
        """Which answer is the better one.

        Args:
            prompts: P texts.
            completions: P pairs of texts.
            shuffle_order: show the judge the answers in random order, against a leaning to one place.

        Returns:
            P numbers: 0 or 1, the place of the better answer, or -1 where that is not known. With return_scores, where
            it is taken: the chance, from 0 to 1, that the first one is better; None where that is not known.
        """
        raise NotImplementedError


class FunctionJudge:
    """A function `f(prompts, pairs)` as a judge; it returns what `BasePairwiseJudge.judge` does.

    Args:
        function: with `return_scores` among its arguments, it is asked for chances.
    """

    def __init__(self, function: Callable[..., Any]):
        self.judge, self.__name__ = function, name_of(function)
        self.remote = bool(getattr(function, "remote", False))


class RewardJudge(BasePairwiseJudge):
    """The answer of the greater reward is the better one; by how much says how likely, `σ(r_a - r_b)`.

    That is the model of Bradley and Terry, which reward models are trained with.

    Args:
        reward: what shared.rewards.loading.load_reward takes.
    """

    def __init__(self, reward: Any, *, processing_class: Any = None, device: Any = None):
        self.reward: Reward = load_reward(reward, processing_class=processing_class, device=device)
        self.__name__ = name_of(self.reward)
        self.remote = bool(getattr(self.reward, "concurrent", False))

    def judge(
        self,
        prompts: list[Any],
        completions: list[list[Any]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[Any]:
        samples = [Sample(prompt, each) for prompt, pair in zip(prompts, completions, strict=True) for each in pair]
        quiet = {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
        found = self.chances(samples, {**quiet, "group_size": 2, "mode": "eval"})
        chances = [None if math.isnan(chance) else chance for chance in found]
        return chances if return_scores else [rank_of(chance) for chance in chances]

    def chances(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> list[float]:
        """P chances of samples that stand two by two; NaN where the reward does not apply to both."""
        rewards = as_values(self.reward(samples, context), len(samples)).double()
        return (rewards[0::2] - rewards[1::2]).sigmoid().tolist()


class PairErrors(RowErrors):
    """A judge that knows which pairs it failed on, and has the others' verdicts; as RowErrors, of pairs."""


class PairReward:
    """A judge as a reward of samples that stand two by two: of each how likely it is preferred to the other.

    NaN where the judge does not know. Answers that are the same are as good as each other; the judge is not asked.
    Outside of training the likelier one is the better one: 1, and 0 for the other.

    Args:
        judge: with a method `judge`, see BasePairwiseJudge.
    """

    __name__ = "win_rate"

    def __init__(self, judge: Any):
        self.judge = judge
        self.concurrent = bool(getattr(judge, "remote", False)) or inspect.iscoroutinefunction(judge.judge)

    def check(self, columns: Collection[str]) -> None:
        """Raise UserError where the judge is a reward that takes what is no column; see FunctionReward.check."""
        if isinstance(self.judge, RewardJudge) and isinstance(self.judge.reward, FunctionReward):
            self.judge.reward.check(columns)

    def __call__(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> list[float | None]:
        """See Reward; `context["group_size"]` is 2.

        Raises:
            RowErrors: the judge failed on some pairs, or gave what is no verdict; both samples of a pair are named.
            WrongCount: it did not give one verdict a pair.
        """
        pairs = [samples[at : at + 2] for at in range(0, len(samples), 2)]
        chances: list[float | None] = [0.5] * len(pairs)
        asked = [at for at, (one, other) in enumerate(pairs) if one.output != other.output]
        errors: dict[int, Exception] = {}
        if asked:
            given, failed = self._judged([pairs[at] for at in asked], context)
            errors = {asked[at]: error for at, error in failed.items()}
            for at, chance in zip(asked, given, strict=True):
                chances[at] = chance if context.get("mode") == "train" else _certain(chance)
        values = [value for chance in chances for value in (chance, None if chance is None else 1 - chance)]
        if errors:
            raise RowErrors(values, {2 * at + member: error for at, error in errors.items() for member in (0, 1)})
        return values

    def _judged(
        self, pairs: Sequence[Sequence[Sample]], context: Mapping[str, Any]
    ) -> tuple[list[float | None], dict[int, Exception]]:
        """The chance of each pair's first answer, and the pairs that the judge failed on."""
        try:
            return self._chances(pairs, context)
        except (PairErrors, WrongCount):
            raise
        except Exception as error:  # a user's judge may raise anything
            if len(pairs) == 1:
                return [None], {0: error}
            found = [self._judged([pair], context) for pair in pairs]
            errors = {at: failed[0] for at, (_, failed) in enumerate(found) if failed}
            return [chances[0] for chances, _ in found], errors or dict.fromkeys(range(len(pairs)), error)

    def _chances(
        self, pairs: Sequence[Sequence[Sample]], context: Mapping[str, Any]
    ) -> tuple[list[float | None], dict[int, Exception]]:
        judge, scores = self.judge, "return_scores" in inspect.signature(self.judge.judge).parameters
        if isinstance(judge, RewardJudge):
            given = judge.chances([sample for pair in pairs for sample in pair], context)
            return _read(given, len(pairs), scores=True)
        prompts = [request_text(pair[0].prompt) for pair in pairs]
        texts = [[text_of(sample.output) for sample in pair] for pair in pairs]
        options = _taken(judge.judge, shuffle_order=True, return_scores=True)
        try:
            given = judge.judge(prompts, texts, **options)
            if inspect.isawaitable(given):
                given = background.wait_for(given)
        except PairErrors as error:
            chances, _ = _read(error.values, len(pairs), scores=scores)
            return chances, dict(error.errors)
        return _read(given, len(pairs), scores=scores)


def load_judge(spec: Any, *, device: Any = None) -> Any:
    """Make a judge of what names one.

    Args:
        spec: one of
            - an object with a method `judge`, see BasePairwiseJudge, which is returned as it is;
            - a function `f(prompts, pairs)`, so called or with the arguments `shuffle_order` or `return_scores`, that
              returns the number of each pair's better answer;
            - any other function, which is a reward: the answer of the greater one is better;
            - the dotted path of one of these, or of a class of such objects that is called without arguments;
            - `judge:URL|MODEL`, a model behind an OpenAI-compatible endpoint; more of EndpointPairwiseJudge's
              arguments follow as `|name=value`; `openai` and `hf` are OpenAIPairwiseJudge and HfPairwiseJudge;
            - any other name of a reward: see shared.rewards.loading.load_reward.
        device: where a reward model that is given by name is put.

    Raises:
        UserError: there is no such judge, or it cannot be loaded.
    """
    if isinstance(spec, str):
        spec = spec.strip()
        if spec == "pair_rm":
            raise UserError(
                "judge pair_rm: that model is not run here. Give a reward model (folder, hub id), or judge:URL|MODEL."
            )
        if spec.startswith(ADAPTER):
            raise UserError(
                f"judge {spec}: an adapter is run on the policy, as a reward. Give it as reward_funcs, and no judge: "
                "the completion of the greater reward is then the better one."
            )
        if spec in ("openai", "hf") or spec.startswith(JUDGE):
            return _endpoint(spec)
        if not spec.replace(".", "").isidentifier() or "." not in spec:
            return RewardJudge(spec, device=device)
        spec = imported(spec)
    if inspect.isclass(spec):
        if not hasattr(spec, "judge"):
            raise UserError(f"judge {spec.__name__}: has no method judge. Subclass BasePairwiseJudge.")
        spec = spec()
    if callable(getattr(spec, "judge", None)):
        return spec
    if not callable(spec):
        raise UserError(f"judge is a {type(spec).__name__}: give an object with a method judge, a function or a name.")
    return FunctionJudge(spec) if _takes_pairs(spec) else RewardJudge(spec, device=device)


def _endpoint(spec: str) -> Any:
    from shared.rewards.pairwise_endpoint import EndpointPairwiseJudge, HfPairwiseJudge, OpenAIPairwiseJudge

    if spec in ("openai", "hf"):
        return OpenAIPairwiseJudge() if spec == "openai" else HfPairwiseJudge()
    url, model, options = endpoint_of(spec, JUDGE)
    return EndpointPairwiseJudge(url, model, **options)


def _takes_pairs(function: Any) -> bool:
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C do not tell
        return False
    return bool({"pairs", "shuffle_order", "return_scores"} & set(names))


def _taken(function: Any, **options: bool) -> dict[str, bool]:
    """Those options that a judge takes."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def rank_of(chance: float | None) -> int:
    """The number of the better answer, where the first is so by that chance; -1 where neither is."""
    return -1 if chance is None or chance == 0.5 else int(chance < 0.5)


def _certain(chance: float | None) -> float | None:
    return chance if chance is None or chance == 0.5 else float(chance > 0.5)


def _read(given: Any, count: int, *, scores: bool) -> tuple[list[float | None], dict[int, Exception]]:
    """What a judge gave, as chances, and the pairs of which it gave what is no verdict."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    if not isinstance(given, (list, tuple)) or len(given) != count:
        what = (
            f"{len(given)} verdicts" if isinstance(given, (list, tuple)) else f"{type(given).__name__} {given!r:.60}"
        )
        raise WrongCount(f"the judge gave {what} for {count} pairs; expected a list of one for each")
    chances: list[float | None] = []
    errors: dict[int, Exception] = {}
    for at, value in enumerate(given):
        if hasattr(value, "item"):
            value = value.item()
        known = value is not None and value == value
        if scores and known and (isinstance(value, (bool, str)) or not 0 <= value <= 1):
            errors[at] = UserError(f"the judge gave {value!r}, where a chance from 0 to 1 is expected")
        elif not scores and known and (isinstance(value, bool) or value not in (-1, 0, 1)):
            errors[at] = UserError(f"the judge gave {value!r}, where a number is expected: {RANKS}")
        unknown = not known or at in errors or (not scores and value == -1)
        chances.append(None if unknown else float(value) if scores else 1.0 - value)
    return chances, errors
