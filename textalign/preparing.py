"""What every text trainer does before it trains: tokenizer, checked rows, tokens, and at last the model.

The order is that of cost: what is wrong with options or rows is said before any weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from shared.data.collators import left_padded
from shared.data.rows import Rows
from shared.data.schema import Kind
from shared.data.tokenise import Tokeniser, TokenSummary, tokenise, tokenise_stream
from shared.data.tokens import TokenTable
from shared.errors import UserError
from shared.runtime.adapters import attach_adapter, training_tokens
from shared.runtime.models import (
    HUB_OPTIONS,
    Head,
    load_config,
    load_model,
    load_processor,
    position_limit,
    without_dropout,
)
from shared.runtime.report import SampleRow
from shared.trainers.answers import Answer
from shared.trainers.config import AlignConfig
from shared.trainers.datasets import check_evaluation, check_steps, checked_rows, held_out_rows, kind_of
from shared.trainers.offline import OfflineTrainer
from textalign.options import TextOptions


@dataclass
class TextRun:
    """The text side of a run, before its model is loaded.

    Attributes:
        model_name: for titles and messages.
        tokenizer: with a token to pad with, and the chat template that the options ask for.
        kind: what the rows are.
        tokeniser: how held-out rows become tokens.
        longest_prompt: prompts to be answered lose their beginning beyond so many tokens; None: no cut.
        train: token rows (a TokenTable, or a stream).
        held_out: token rows, or several sets of them by name; None where there are none.
        questions: the held-out rows that are used, as they were given, to be answered by generation.
        left_out: training rows that are not used -> why.
        notes: what tokenising did to the rows, a text for each set of them.
    """

    model_name: str
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    tokeniser: Tokeniser
    longest_prompt: int | None = None
    train: Any = None
    held_out: Any = None
    questions: Rows | dict[str, Rows] | None = None
    left_out: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def encode_prompts(self, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Left-padded prompts of rows as `generate` takes them, and their recorded answers.

        Raises:
            UserError: no prompt fits before an answer of `max_new_tokens`.
        """
        if self.longest_prompt is not None and self.longest_prompt < 1:
            raise UserError(
                "max_new_tokens: so long an answer leaves no position for a prompt in this model. Give fewer, or "
                "answer no rows (eval_answers 0)."
            )
        asked = [self.tokeniser.ask(row, self.longest_prompt) for row in rows]
        inputs = left_padded([each.prompt_ids for each in asked], self.tokenizer.pad_token_id)
        return inputs, [each.answer or "" for each in asked]

    def tell(self, trainer: OfflineTrainer) -> None:
        """Put what was done to the rows into the trainer's report, and let it evaluate other rows of their kind."""
        trainer.row_notes = dict(self.left_out)
        trainer.report.notes += self.notes
        trainer.read_held_out = partial(self.read_held_out, args=trainer.args)

    def read_held_out(self, rows: Any, args: AlignConfig) -> TokenTable:
        """Tokens of held-out rows that came later."""
        rows = held_out_rows(rows, self.kind, args, "eval", text_field=self.tokeniser.writer.text_field)
        return self.tokens(rows, self.tokeniser, args, "eval")[0]

    def tokens(self, rows: Rows, tokeniser: Tokeniser, args: Any, what: str) -> tuple[TokenTable, TokenSummary]:
        """Rows as tokens; what was done to them is printed and noted."""
        table, summary = tokenise(rows, tokeniser, num_proc=args.dataset_num_proc, what=what)
        self.notes.append(summary.text(what))
        if args.should_log:
            print(self.notes[-1], flush=True)
        return table, summary

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
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    allowed: Collection[Kind],
    tokenising: Callable[[Kind], dict[str, Any]],
    held_out_tokenising: Callable[[Kind], dict[str, Any]] | None = None,
    text_field: str = "text",
) -> TextRun:
    """Load the tokenizer, check the rows and turn them into tokens.

    Args:
        model: name of the model, or the model.
        args: the trainer's options.
        train_dataset, eval_dataset: as the trainer takes them.
        processing_class: the tokenizer (a processor's tokenizer is used); None: the model's own.
        allowed: the kinds of data that the trainer takes.
        tokenising: kind -> what Tokeniser takes besides the tokenizer and the options in TextOptions.
        held_out_tokenising: the same of held-out rows, where they become tokens otherwise.
        text_field: the column of plain text.

    Raises:
        UserError, DataError: options, columns or rows that cannot be used.
    """
    if not isinstance(model, (str, nn.Module)):
        raise UserError(f"model is a {type(model).__name__}: give its name or folder as a string, or a loaded model.")
    check_evaluation(args, eval_dataset)
    kind = kind_of(train_dataset, allowed, text_field=text_field)
    longest_prompt = _fit_to_positions(model, args)
    tokenizer = load_tokenizer(model, args, processing_class)

    def tokeniser(told: Callable[[Kind], dict[str, Any]]) -> Tokeniser:
        options = {"max_length": args.max_length, "truncation_mode": args.truncation_mode, "text_field": text_field}
        return Tokeniser(tokenizer, kind, **{**options, "on_bad_row": args.on_bad_row, **told(kind)})

    run = TextRun(name_of(model), tokenizer, kind, tokeniser(held_out_tokenising or tokenising), longest_prompt)
    train, held_out = checked_rows(train_dataset, eval_dataset, kind, args, text_field=text_field)
    if isinstance(train, Rows):
        run.train, summary = run.tokens(train, tokeniser(tokenising), args, "train")
        run.left_out = {row: f"left out: {why}" for row, why in {**train.left_out, **summary.left_out}.items()}
    else:
        run.train = tokenise_stream(train, tokeniser(tokenising))
    check_steps(args, run.train)
    if held_out is not None:
        sets = held_out if isinstance(held_out, dict) else {"eval": held_out}
        tables = {name: run.tokens(rows, run.tokeniser, args, name)[0] for name, rows in sets.items()}
        used = {name: Rows(sets[name].dataset, table.rows.tolist()) for name, table in tables.items()}
        several = isinstance(held_out, dict)
        run.held_out, run.questions = (tables, used) if several else (tables["eval"], used["eval"])
    return run


def _fit_to_positions(model: str | nn.Module, args: Any) -> int | None:
    """Keep rows within the positions that the model has; returns how long a prompt to be answered may be.

    Raises:
        UserError: longer rows are asked for.
    """
    config = load_config(model, **hub_options(args)) if isinstance(model, str) else model.config
    positions = position_limit(config)
    if positions is None:
        return args.max_length
    if args.max_length is None or args.max_length > positions:
        if args.max_length not in (None, type(args).max_length):
            raise UserError(f"max_length {args.max_length}: this model has {positions} positions. Give {positions}.")
        args.max_length = positions
        if args.should_log:
            print(f"max_length is {positions}: the model has no more positions.", flush=True)
    return min(args.max_length, positions - args.max_new_tokens)


def name_of(model: str | nn.Module) -> str:
    return model if isinstance(model, str) else model.config._name_or_path or type(model).__name__


def hub_options(args: TextOptions) -> dict[str, Any]:
    options = args.model_init_kwargs or {}
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def load_tokenizer(model: str | nn.Module, args: TextOptions, given: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with the template and the special tokens that the options ask for.

    Raises:
        UserError: it cannot be found, or a token or template that is asked for does not exist.
    """
    if given is None:
        name = name_of(model) if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise UserError("processing_class is missing: this model does not say where its tokenizer is.")
        given = load_processor(name, **hub_options(args))
    tokenizer = getattr(given, "tokenizer", given)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"processing_class is a {type(given).__name__}: give the tokenizer, AutoTokenizer.from_pretrained(...)."
        )
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
    # places that a model keeps free for tokens are as untrained as those that it has to be given
    taken = [tokenizer.convert_tokens_to_ids(token.content) for token in needed]
    tokenizer.taken_over = [*getattr(tokenizer, "taken_over", ()), *taken]
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
        UserError: options of loading, for a model that is loaded; see shared.runtime.models.load_model and
            shared.runtime.adapters.attach_adapter.
    """
    set_seed(args.seed)  # weights that are drawn here are alike in all processes
    if isinstance(model, str):
        init = {**(args.model_init_kwargs or {}), **options}
        model = load_model(model, head=head, frozen=peft_config is not None, seed=args.seed, **init)
    else:
        _refuse_loading(args, options)
    new = fit_to_tokenizer(model, tokenizer)
    if new and (peft_config is not None or hasattr(model, "peft_config")):
        peft_config = training_tokens(peft_config, model, new)
    adapter = {"path": peft_config} if isinstance(peft_config, str) else {"config": peft_config}
    model = attach_adapter(model, **adapter, checkpointing=bool(args.activation_checkpointing))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "No weight of the model is trained. Load its adapter to be trained (PeftModel.from_pretrained(…, "
            "is_trainable=True)), or give the base model and the adapter's folder as peft_config."
        )
    if getattr(args, "disable_dropout", False):
        without_dropout(model)
    return model


def _refuse_loading(args: Any, options: dict[str, Any]) -> None:
    """Raise UserError where it is said how to load a model that is loaded."""
    given = set() if hasattr(args, "ref_model_name_or_path") else set(args.model_init_kwargs or {}) - {*HUB_OPTIONS}
    if given:
        raise UserError(f"model_init_kwargs: {', '.join(sorted(given))} cannot be followed: the model is loaded.")
    if options.get("quantization_config") is not None:
        raise UserError("quantization_config: the model is loaded. Give it to from_pretrained, or give a name.")


def fit_to_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Embeddings for tokens that were added, and the special tokens' numbers in the model's configuration.

    Returns:
        The tokens that the model was not trained on, as far as is known.
    """
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings = inner.get_input_embeddings()
    known = getattr(embeddings, "num_embeddings", None)
    new = set(getattr(tokenizer, "taken_over", ()))
    if known is not None and len(tokenizer) > known:
        inner.resize_token_embeddings(len(tokenizer))
        new |= set(range(known, len(tokenizer)))
    config = inner.config.get_text_config()
    for each in {id(c): c for c in (config, inner.config)}.values():
        each.pad_token_id = tokenizer.pad_token_id
        each.eos_token_id = _with_eos(each.eos_token_id, tokenizer.eos_token_id)
    generation = getattr(inner, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = _with_eos(generation.eos_token_id, tokenizer.eos_token_id)
    return sorted(new)


def _with_eos(known: int | list[int] | None, eos: int) -> int | list[int]:
    """Models that end a text with several tokens keep them all."""
    if known is None or known == eos:
        return eos
    if isinstance(known, list):
        return known if eos in known else [eos, *known]
    return eos
