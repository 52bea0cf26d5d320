"""A trained reward model as a reward function: `f(prompts, completions, **columns) -> list[float]`.

What is scored is written and tokenised as in training, through shared.data. Deliberately not here: training such
models (textalign.reward, textalign.prm), judges that answer in words, and rewards by rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.builtin import is_builtin, model_path
from shared.builtin.models import whole_layers
from shared.errors import UserError
from shared.rewards.answer_tokens import AnswerTokens, in_batches

HEADS = {"ForSequenceClassification": 1, "ForTokenClassification": 2}  # kind of model -> outputs of its head
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}  # by PEFT's name
HUB_OPTIONS = ("revision", "token", "trust_remote_code")
ADVICE = (
    "Train a reward model first (RewardTrainer, PRMTrainer; of answers about images VLMRewardTrainer), and name the "
    "folder that it was saved to."
)
STEPS = {"last": lambda chances: chances[-1], "min": min, "mean": lambda chances: sum(chances) / len(chances)}


class ModelReward:
    """Base of the rewards that are a model: loaded whole by name, put on its device at the first call, run in batches.

    Args:
        model: hub id, folder or built-in name, or a loaded model.
        processor: the model's tokenizer or processor; None: the one beside a model that is given by name.
        batch_size: rows that are scored at once.
        device: where a model that is given by name is put; None: the accelerator that is current at the first call.
        options: more for `from_pretrained`.

    Raises:
        UserError: a batch of no row, or no processor; whatever `load` raises.
    """

    needs = "tokenizer"  # the argument's name
    differentiable = False  # has no gradient to an image that it scores

    def __init__(
        self,
        model: str | nn.Module,
        processor: Any,
        *,
        batch_size: int,
        device: torch.device | str | None,
        options: dict[str, Any],
    ):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1.")
        self.batch_size, self.device, self._placed = batch_size, device, not isinstance(model, str)
        self.__name__ = Path(model).name if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            with whole_layers():
                name = str(model_path(model)) if is_builtin(model) else model
                model, processor = self.load(name, processor, options)
        if processor is None:
            raise UserError(f"{self.needs} is missing: give the one that belongs to the model.")
        self.model, self.processor = model.eval(), processor

    def load(self, name: str, processor: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        """The model, and its processor where none is given; raises UserError."""
        raise NotImplementedError

    def in_batches(
        self,
        rows: Sequence[Any],
        length: Callable[[Any], int],
        score: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        batch_size: int | None = None,
    ) -> list[Any]:
        """See the function; `batch_size` None: that of the reward."""
        return in_batches(rows, length, score, batch_size or self.batch_size)

    def place(self) -> torch.device:
        """Where the model is; put there at the first call, when each process has taken its device."""
        if not self._placed:
            self._placed = True
            self.model.to(self.device or current_device())
        return next(self.model.parameters()).device


class RewardModel(ModelReward):
    """Scores answers by a reward model, or by a process-reward model.

    A reward model gives its score; a process-reward model the chance, between 0 and 1, that a step is right: of the
    last step, of the worst one, or the mean over all. Steps are what the separator divides a completion into.

    Args:
        model: hub id, folder or built-in name of a model with a score head, or of an adapter trained on one; or a
            loaded model.
        tokenizer: the model's; loaded beside a model that is given by name.
        batch_size: rows that are scored at once.
        max_length: longer rows are cut as in training; None: no cut.
        steps: `last`, `min` or `mean`; of a process-reward model.
        step_separator: as in training; of a process-reward model.
        template_kwargs: more variables for the chat template.
        device: where a model that is given by name is put; None: the accelerator that is current at the first call.
        options: more for `from_pretrained`, such as `dtype` or `revision`.

    Raises:
        UserError: the model cannot be loaded, or has no score head.

    Example:
        >>> reward = RewardModel("runs/reward_modeling")  # doctest: +SKIP
        >>> reward(["What is 2 + 2?"], [" 4"])  # doctest: +SKIP
        [3.1]
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        steps: Literal["last", "min", "mean"] = "last",
        step_separator: str = "\n",
        template_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ):
        if steps not in STEPS:
            raise UserError(f"steps is {steps!r}; allowed: {', '.join(STEPS)}.")
        super().__init__(model, tokenizer, batch_size=batch_size, device=device, options=options)
        self.tokenizer = self.processor
        self.by_step = kind_of_scorer(self.model).endswith("ForTokenClassification")
        self.answers = AnswerTokens(
            self.tokenizer,
            step_separator=step_separator if self.by_step else None,
            max_length=max_length,
            template_kwargs=template_kwargs,
        )
        tell_padding(self.model, self.tokenizer)
        self.steps = steps

    def load(self, name: str, processor: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        return load_scorer(name, processor, options)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """Scores of completions.

        Args:
            prompts, completions: strings, or lists of messages, which the chat template writes.
            columns: the rows' other columns; not looked at.

        Raises:
            UserError: images are to be scored.
            DataError: a row that cannot be written or read, named by its place.
        """
        rows = self.answers.rows(self.__name__, prompts, completions)
        return self.in_batches(rows, lambda row: len(row["input_ids"]), self._scores)

    @torch.no_grad()
    def _scores(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        device = self.place()
        ids, attention = self.answers.padded(rows)
        logits: Tensor = self.model(input_ids=ids.to(device), attention_mask=attention.to(device)).logits.float()
        if not self.by_step:
            return logits.squeeze(1).tolist()
        chances = logits.softmax(-1)[..., 1].cpu()
        choose = STEPS[self.steps]
        return [choose(chances[at, torch.as_tensor(row["step_ends"])].tolist()) for at, row in enumerate(rows)]


def current_device() -> torch.device:
    """The accelerator that this process has taken, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


def kind_of_scorer(model: nn.Module) -> str:
    """The class of a model with a score head. Raises UserError where it gives no reward."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(inner).__name__
    labels = next((labels for name, labels in HEADS.items() if kind.endswith(name)), None)
    if labels is None:
        raise UserError(f"The reward is a {kind}, which gives no score. {ADVICE}")
    if inner.config.num_labels != labels:
        raise UserError(
            f"A {kind} with {inner.config.num_labels} labels is no reward model. A reward model has one label "
            "(ForSequenceClassification), a process-reward model two (ForTokenClassification). A classifier is named "
            "sentiment-analysis:MODEL:LABEL."
        )
    return kind


def tell_padding(model: nn.Module, tokenizer: Any) -> None:
    """Put the pad token into the model's configuration: by it transformers finds where a row is scored."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def base_config(name: str, **hub: Any) -> Any:
    """The configuration of a model or, of an adapter, that of the model under it.

    Args:
        name: hub id or folder.
        hub: revision, token and trust_remote_code.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    with _loading(name):
        if find_adapter_config_file(name, **hub) is not None:
            from peft import PeftConfig

            adapter = PeftConfig.from_pretrained(name, **hub)
            name, hub = adapter.base_model_name_or_path, {**hub, "revision": adapter.revision}
        return AutoConfig.from_pretrained(name, **hub)


def load_scorer(name: str, processor: Any, options: dict[str, Any], *, auto: str = "AutoTokenizer") -> tuple[Any, Any]:
    """A whole model, or an adapter over its base, and the tokenizer or processor that was saved with it.

    Args:
        name: hub id or folder.
        processor: None: it is loaded.
        options: more for `from_pretrained`.
        auto: transformers' automatic class of the processor.

    Raises:
        UserError: it cannot be loaded, or gives no score.
    """
    import transformers
    from transformers.utils import find_adapter_config_file

    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    with _loading(name):
        processor = processor or getattr(transformers, auto).from_pretrained(name, **hub)
        if find_adapter_config_file(name, **hub) is not None:
            return _load_adapter(name, processor, options, hub), processor
        config = transformers.AutoConfig.from_pretrained(name, **hub)
        kind = next((kind for kind in HEADS if (config.architectures or [""])[0].endswith(kind)), None)
        if kind is None:
            raise UserError(f"{name} is a {(config.architectures or ['model'])[0]}, which gives no score. {ADVICE}")
        scorers = getattr(transformers, f"AutoModel{kind}")
        if type(config) not in scorers._model_mapping and getattr(config, "vision_config", None) is not None:
            raise UserError(
                f"{name} sees images: load it with visionalign.rewards.VLMRewardModel, or give its name as a reward."
            )
        return scorers.from_pretrained(name, **{"dtype": "auto", **options}), processor


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"reward model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _load_adapter(name: str, processor: Any, options: dict[str, Any], hub: dict[str, Any]) -> nn.Module:
    import transformers
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(name, **hub)
    kind = TASKS.get(getattr(config.task_type, "value", config.task_type) or "")
    if kind is None:
        raise UserError(
            f"{name} is an adapter for {config.task_type}, which gives no score; allowed: {', '.join(TASKS)}."
        )
    auto = getattr(transformers, f"AutoModel{kind}")
    own = {name: value for name, value in options.items() if name != "revision"}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the base has no score head: the adapter brings it
    try:
        base = auto.from_pretrained(
            config.base_model_name_or_path,
            revision=config.revision,
            num_labels=HEADS[kind],
            **{"dtype": "auto", **own},
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    tokenizer = getattr(processor, "tokenizer", processor)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(base, name, **hub)
