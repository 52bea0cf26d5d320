"""What every text trainer does before it trains: tokenizer, checked rows, tokens, and at last the model.

The order is that of cost: what is wrong with options or rows is said before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from shared.data.rows import Rows
from shared.data.schema import Kind
from shared.data.tokenise import Tokeniser, tokenise, tokenise_stream
from shared.errors import UserError
from shared.runtime.adapters import attach_adapter
from shared.runtime.models import Head, load_model, load_processor
from shared.runtime.report import SampleRow
from shared.trainers.answers import Answer
from shared.trainers.base import AlignTrainer
from shared.trainers.config import AlignConfig
from shared.trainers.datasets import check_evaluation, check_steps, checked_rows, kind_of
from textalign.options import TextOptions

HUB_OPTIONS = ("revision", "trust_remote_code")


@dataclass
class TextRun:
    """The text side of a run, before its model is loaded.

    Attributes:
        model_name: for titles and messages.
        tokenizer: with a token to pad with, and the chat template that the options ask for.
        kind: what the rows are.
        tokeniser: how they became tokens.
        train: token rows (a TokenTable, or a stream).
        held_out: token rows, or several sets of them by name; None where there are none.
        questions: the held-out rows as they were given, to be answered by generation.
        left_out: training rows that are not used -> why.
        notes: what tokenising did to the rows, a text for each set of them.
    """

    model_name: str
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    tokeniser: Tokeniser
    train: Any
    held_out: Any
    questions: Rows | dict[str, Rows] | None
    left_out: dict[int, str]
    notes: list[str]

    def encode_prompts(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Left-padded prompts of rows as `generate` takes them, and their recorded answers."""
        asked = [self.tokeniser.ask(row) for row in rows]
        width = max(len(each.prompt_ids) for each in asked)
        ids = torch.full((len(asked), width), self.tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        for at, each in enumerate(asked):
            ids[at, width - len(each.prompt_ids) :] = torch.as_tensor(each.prompt_ids)
            attention[at, width - len(each.prompt_ids) :] = 1
        return {"input_ids": ids, "attention_mask": attention}, [each.answer or "" for each in asked]

    def tell(self, trainer: AlignTrainer) -> None:
        """Put what was done to the rows into the trainer's report."""
        trainer.row_notes = dict(self.left_out)
        trainer.report.notes += self.notes

    def prompt(self, row: dict[str, Any]) -> str:
        """The question of a row as its author wrote it: a text, or the last thing that the user says."""
        given = row.get("prompt")
        if isinstance(given, str):
            return given
        said = [turn["content"] for turn in given or () if turn.get("role") == "user"]
        if not said:
            return self.tokeniser.ask(row).prompt_text
        if isinstance(said[-1], str):
            return said[-1]
        return "".join(part.get("text") or "" for part in said[-1])

    def sample(self, answer: Answer) -> SampleRow:
        """An answer as the run report shows it."""
        question = self.tokeniser.ask(answer.row).prompt_text
        columns = {name: answer.row[name] for name in ("kind",) if name in answer.row}
        return SampleRow([], question, answer.recorded, after=answer.text, columns=columns)


def prepare_text(
    model: str | nn.Module,
    args: AlignConfig,
    *,
    config_class: type,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    allowed: Collection[Kind],
    tokenising: Callable[[Kind], dict[str, Any]],
) -> TextRun:
    """Load the tokenizer, check the rows and turn them into tokens.

    Args:
        model: name of the model, or the model.
        args: the trainer's options.
        config_class: what `args` must be.
        train_dataset, eval_dataset: as the trainer takes them.
        processing_class: the tokenizer (a processor's tokenizer is used); None: the model's own.
        allowed: the kinds of data that the trainer takes.
        tokenising: kind -> what Tokeniser takes besides the tokenizer and the options in TextOptions.

    Raises:
        UserError, DataError: options, columns or rows that cannot be used.
    """
    if not isinstance(args, config_class):
        raise UserError(
            f"args is a {type(args).__name__}; give a {config_class.__name__}, which takes the same options."
        )
    check_evaluation(args, eval_dataset)
    kind = kind_of(train_dataset, allowed)
    tokenizer = load_tokenizer(model, args, processing_class)
    tokeniser = Tokeniser(
        tokenizer,
        kind,
        **{
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "on_bad_row": args.on_bad_row,
            **tokenising(kind),
        },
    )
    train, held_out = checked_rows(train_dataset, eval_dataset, kind, args)
    notes: list[str] = []
    left_out = {row: f"left out: {why}" for row, why in getattr(train, "left_out", {}).items()}

    def tokens(rows: Any, what: str) -> Any:
        if not isinstance(rows, Rows):
            return tokenise_stream(rows, tokeniser)
        table, summary = tokenise(rows, tokeniser, num_proc=args.dataset_num_proc, what=what)
        notes.append(summary.text(what))
        if args.should_log:
            print(notes[-1], flush=True)
        if rows is train:
            left_out.update({row: f"left out: {why}" for row, why in summary.left_out.items()})
        return table

    train_tokens = tokens(train, "train")
    check_steps(args, train_tokens)
    if isinstance(held_out, dict):
        held_out_tokens = {name: tokens(rows, name) for name, rows in held_out.items()}
    else:
        held_out_tokens = None if held_out is None else tokens(held_out, "eval")
    return TextRun(_name(model), tokenizer, kind, tokeniser, train_tokens, held_out_tokens, held_out, left_out, notes)


def _name(model: str | nn.Module) -> str:
    return model if isinstance(model, str) else model.config._name_or_path or type(model).__name__


def _hub_options(args: TextOptions) -> dict[str, Any]:
    options = args.model_init_kwargs or {}
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def load_tokenizer(model: str | nn.Module, args: TextOptions, given: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template and the special tokens that the options ask for.

    Raises:
        UserError: it cannot be found, or a token or template that is asked for does not exist.
    """
    if given is None:
        name = _name(model) if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise UserError("processing_class is missing: this model does not say where its tokenizer is.")
        given = load_processor(name, **_hub_options(args))
    tokenizer = getattr(given, "tokenizer", given)
    if tokenizer is not given and not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = getattr(given, "chat_template", None)
    if args.chat_template_path is not None:
        _take_template(tokenizer, args.chat_template_path)
    for role in ("eos_token", "pad_token"):
        if (token := getattr(args, role)) is not None:
            if token not in tokenizer.get_vocab():
                raise UserError(f"--{role} {token}: not a token of this tokenizer. Name one of its vocabulary.")
            setattr(tokenizer, role, token)
    if tokenizer.eos_token is None:
        raise UserError("The tokenizer has no token that ends a text: name one of its vocabulary with --eos_token.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks tell padding from text, not the token
    return tokenizer


def _take_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Use the chat template in a Jinja file, or that of another tokenizer with the special tokens it needs."""
    if Path(path).suffix in (".jinja", ".j2"):
        if not Path(path).is_file():
            raise UserError(f"--chat_template_path {path}: there is no such file.")
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    source = load_processor(path)
    template = getattr(source, "chat_template", None)
    if not template:
        raise UserError(f"--chat_template_path {path}: this tokenizer has no chat template.")
    source = getattr(source, "tokenizer", source)
    known = set(tokenizer.get_vocab())
    added = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    needed = [token for token in added if token.content in template or token.content == source.eos_token]
    tokenizer.add_tokens(needed, special_tokens=True)
    tokenizer.chat_template = template
    if source.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = source.eos_token


def load_text_model(
    model: str | nn.Module,
    args: AlignConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    head: Head = "causal-lm",
    peft_config: Any = None,
    **options: Any,
) -> nn.Module:
    """The model to train: loaded where it is given by name, fitted to the tokenizer, with its adapter.

    Args:
        model, args, tokenizer, peft_config: the trainer's.
        head: which of transformers' heads.
        options: more for `from_pretrained`.

    Raises:
        UserError: see shared.runtime.models.load_model and shared.runtime.adapters.attach_adapter.
    """
    set_seed(args.seed)  # weights that are drawn here are alike in all processes
    if isinstance(model, str):
        init = {**(args.model_init_kwargs or {}), **options}
        model = load_model(model, head=head, frozen=peft_config is not None, seed=args.seed, **init)
    fit_to_tokenizer(model, tokenizer)
    adapter = {"path": peft_config} if isinstance(peft_config, str) else {"config": peft_config}
    model = attach_adapter(model, **adapter, checkpointing=bool(args.activation_checkpointing))
    if getattr(args, "disable_dropout", False):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def fit_to_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings for tokens that were added, and the special tokens' numbers in the model's configuration."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings = inner.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    if known is not None and len(tokenizer) > known:
        inner.resize_token_embeddings(len(tokenizer))
    config = inner.config.get_text_config()
    for each in {id(c): c for c in (config, inner.config)}.values():
        each.pad_token_id = tokenizer.pad_token_id
        each.eos_token_id = _with_eos(each.eos_token_id, tokenizer.eos_token_id)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = _with_eos(generation.eos_token_id, tokenizer.eos_token_id)


def _with_eos(known: int | list[int] | None, eos: int) -> int | list[int]:
    """Models that end a text with several tokens keep them all."""
    if known is None or known == eos:
        return eos
    if isinstance(known, list):
        return known if eos in known else [eos, *known]
    return eos
