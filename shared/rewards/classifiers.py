"""A classifier of texts as a reward: how sure it is of one of its labels, such as that a review is positive.

Deliberately not here: models with a score head of their own (models.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.hub import require_available
from shared.rewards.base import text_of
from shared.rewards.models import HUB_OPTIONS, ModelReward

POSITIVE = ("positive", "pos", "label_1", "1")  # names of the label that is meant where none is given, in any case
OUTPUTS = ("prob", "logit")
SCORED = ("auto", "completion", "both")


class ClassifierReward(ModelReward):
    """Scores answers by the chance that a classifier gives a label, or by its log-odds.

    Args:
        model: hub id, folder or built-in name of a model for sequence classification; or a loaded one.
        tokenizer: the model's; loaded beside a model that is given by name.
        label: name or number of the label; None: of two labels the positive one, of one label that.
        output: `prob`, between 0 and 1; or `logit`, its log-odds, which do not flatten out where the classifier is
            sure.
        scored: `completion`, `both` (prompt and completion joined, messages on lines of their own), or `auto`: both
            where they are strings, which continue each other; the completion alone where they are messages.
        batch_size: texts that are scored at once.
        max_length: tokens; of longer texts the end is kept. None: what the model can take.
        device: where a model that is given by name is put; None: the accelerator that is current at the first call.
        options: more for `from_pretrained`, such as `dtype` or `revision`.

    Raises:
        UserError: the model cannot be loaded, or has no such label.

    Example:
        >>> reward = ClassifierReward("lvwerra/distilbert-imdb")  # doctest: +SKIP
        >>> reward(["The film was"], [" a joy."])  # doctest: +SKIP
        [0.98]
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        label: str | int | None = None,
        output: Literal["prob", "logit"] = "prob",
        scored: Literal["auto", "completion", "both"] = "auto",
        batch_size: int = 32,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ):
        for name, value, allowed in (("output", output, OUTPUTS), ("scored", scored, SCORED)):
            if value not in allowed:
                raise UserError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")
        super().__init__(model, tokenizer, batch_size=batch_size, device=device, options=options)
        if label is not None:  # rewards of several labels are told apart
            self.__name__ += f":{label}"
        model, self.tokenizer = self.model, copy.deepcopy(self.processor)
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id  # by it transformers finds where a row is scored
        self.label = _label(model.config, label)
        self.output, self.scored = output, scored
        self.max_length = max_length or _limit(model.config, self.tokenizer)

    def load(self, name: str, processor: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        return _load(name, processor, options)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Scores of completions.

        Args:
            prompts, completions: strings, or lists of messages.
            columns: the rows' other columns; not looked at.
        """
        texts = [self._text(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        return self.in_batches(texts, len, self._scores)

    def _text(self, prompt: Any, completion: Any) -> str:
        strings = isinstance(prompt, str) and isinstance(completion, str)
        if self.scored == "completion" or (self.scored == "auto" and not strings):
            return text_of(completion)
        if strings:
            return prompt + completion
        turns = [*([prompt] if isinstance(prompt, str) else [[message] for message in prompt]), completion]
        return "\n".join(text_of(turn) for turn in turns)

    @torch.no_grad()
    def _scores(self, texts: Sequence[str]) -> list[float]:
        device = self.place()
        # a tokenizer without special tokens makes no token of an empty text, and a model needs one
        texts = [text or self.tokenizer.pad_token for text in texts]
        batch = self.tokenizer(
            texts,
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
        )
        logits = self.model(**batch.to(device)).logits.float()
        return self._chosen(logits).tolist()

    def _chosen(self, logits: Tensor) -> Tensor:
        """The label's scores (B,) from the logits (B, labels)."""
        own = logits[:, self.label]
        alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        if not alone:
            others = torch.arange(logits.shape[1], device=logits.device) != self.label
            own = own - logits[:, others].logsumexp(1)
        return own if self.output == "logit" else own.sigmoid()


def _load(name: str, tokenizer: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    require_available(name, file="config.json", what="classifier", revision=options.get("revision"))
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        kind = (config.architectures or ["model"])[0]
        if not kind.endswith("ForSequenceClassification"):
            raise UserError(f"{name} is a {kind}, which has no labels: name a model for sequence classification.")
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, **hub)
        return AutoModelForSequenceClassification.from_pretrained(name, **{"dtype": "auto", **options}), tokenizer
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"classifier {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _label(config: Any, label: str | int | None) -> int:
    names = [str(config.id2label[at]) for at in range(config.num_labels)]
    if label is None:
        if len(names) == 1:
            return 0
        found = [at for word in POSITIVE[: 4 if len(names) == 2 else 2] for at, name in enumerate(names)
                 if name.lower() == word]  # fmt: skip
    else:
        found = [at for at, name in enumerate(names) if name == str(label)]
        found = found or [at for at, name in enumerate(names) if name.lower() == str(label).lower()]
        if not found and str(label).isdecimal() and int(label) < len(names):
            found = [int(label)]
    if not found:
        what = "none of them is named positive" if label is None else f"there is no {label!r}"
        raise UserError(f"The classifier's labels are {', '.join(names)}; {what}. Say which label is rewarded.")
    return found[0]


def _limit(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that the classifier takes; None where neither model nor tokenizer says."""
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    known = [limit for limit in limits if limit and 0 < limit < 1_000_000]
    return min(known) if known else None
