"""Models with a score head, as trainers take them: the right kind, a head that is new, and adapters that train it."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from shared.errors import UserError
from shared.hub import require_available
from shared.policies.score import HEADS, head_of, inner_model
from shared.runtime.models import load_config

ADVICE = (
    "Merge the adapter into its model first (merge_and_unload) and give peft_config for a new one, which trains the "
    "score head too."
)
KINDS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def check_scorer(model: str | nn.Module, task: str, labels: int, **hub: Any) -> None:
    """Raise UserError where a model cannot be trained to score; of a name the configuration alone is read.

    Args:
        model: name of any model with such a head or to be given one, or a loaded model that has it.
        task: a key of KINDS.
        labels: the outputs of the head.
        hub: revision and trust_remote_code of a model that is given by name.
    """
    if isinstance(model, str):
        config = load_config(model, **hub)
        kind = (config.architectures or [""])[0]
        fits = "Classification" not in kind or (kind.endswith(KINDS[task]) and config.num_labels == labels)
        named = repr(model)
    else:
        config, kind = model.config, type(inner_model(model)).__name__
        fits = head_of(model) is not None and kind.endswith(KINDS[task]) and config.num_labels == labels
        named = "The model"
    if not fits:
        outputs = f" with {config.num_labels} labels" if "Classification" in kind else ""
        raise UserError(
            f"{named} is a {kind}{outputs}, but this trainer needs a {KINDS[task].removeprefix('For')} model with "
            f"{labels} label(s). Give the name of a language model, which gets a new head, or load one with "
            f"AutoModel{KINDS[task]}.from_pretrained(..., num_labels={labels})."
        )


def scoring_adapter(peft_config: Any, task: str) -> Any:
    """A PEFT configuration whose adapter trains the score head too, and is loaded with it; anything else as it is.

    Args:
        peft_config: a configuration, the path of an adapter to go on with, or None.
        task: SEQ_CLS or TOKEN_CLS.

    Raises:
        UserError: the adapter to go on with is one for another task.
    """
    if peft_config is None:
        return None
    if isinstance(peft_config, str):
        if Path(peft_config).is_dir() and not (Path(peft_config) / "adapter_config.json").is_file():
            return peft_config  # said when it is loaded
        require_available(peft_config, file="adapter_config.json", what="adapter")
        from peft import PeftConfig

        given = _task(PeftConfig.from_pretrained(peft_config))
        if given != task:
            raise UserError(f"The adapter {peft_config} is one for {given}, this trainer's is {task}. {ADVICE}")
        return peft_config
    given = _task(peft_config)
    changed = copy.deepcopy(peft_config)  # peft writes into it
    changed.task_type = task
    if hasattr(changed, "modules_to_save"):
        changed.modules_to_save = sorted({*(changed.modules_to_save or ()), *HEADS})
    if given not in (None, task):
        print(f"The adapter's task is {task}, not {given}: its score head must be trained and saved.", flush=True)
    return changed


def _task(config: Any) -> str | None:
    return getattr(config.task_type, "value", config.task_type)


def check_head_is_trained(model: nn.Module) -> None:
    """Raise UserError where an adapter leaves the score head as it was drawn."""
    if not any(parameter.requires_grad for parameter in head_of(model).parameters()):
        raise UserError(f"The adapter does not train the score head, so no score could be learnt. {ADVICE}")


def pad_apart(tokenizer: PreTrainedTokenizerBase, never: Collection[int] = ()) -> None:
    """Pad with a token that ends no text, where the tokenizer has one.

    transformers reads a row's score at its last token that is not the pad token: padded with the token that ends a
    text, it would not look at the end of an answer, which tells a finished one from one that was cut.

    Args:
        tokenizer: is changed.
        never: numbers of tokens that are not to be padded with, such as those that hold an image's place.
    """
    if tokenizer.pad_token_id not in {tokenizer.eos_token_id, *never}:
        return
    template = str(tokenizer.chat_template or "")
    in_use = {tokenizer.eos_token, tokenizer.bos_token}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in [tokenizer.unk_token, *special]:
        free = token is not None and token not in in_use and token not in template
        if free and tokenizer.convert_tokens_to_ids(token) not in never:
            tokenizer.pad_token = token
            return


class _NewHead(logging.Filter):
    """Holds back transformers' report of a load in which nothing but a head was missing, or left over."""

    EXPECTED = re.compile(rf"({'|'.join([*HEADS, 'lm_head'])})\.")

    def __init__(self) -> None:
        super().__init__()
        self.drawn = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        keys = [
            line for line in text.splitlines() if re.search(r"\|\s*(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", line)
        ]
        expected = bool(keys) and all(self.EXPECTED.match(line.strip()) for line in keys)
        self.drawn = self.drawn or any("MISSING" in line for line in keys)
        return not expected


@contextlib.contextmanager
def new_head_expected(seed: int) -> Iterator[None]:
    """While a model is loaded: that it has no score head yet is no cause for a warning; what was done is told.

    Args:
        seed: what a head is drawn from, to be told.
    """
    loader, head = logging.getLogger("transformers.modeling_utils"), _NewHead()
    loader.addFilter(head)
    try:
        yield
    finally:
        loader.removeFilter(head)
    if head.drawn:
        print(f"The model has no score head yet: one is drawn (seed {seed}).", flush=True)
