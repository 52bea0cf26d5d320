"""What a text trainer does before it writes completions itself: tokenizer, checked rows, and rows as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.data.collators import left_padded
from shared.data.rows import ROW, Rows
from shared.data.schema import Kind, column_names
from shared.data.tokenise import Tokeniser
from shared.errors import DataError, UserError
from shared.runtime.models import load_config, position_limit
from shared.trainers.datasets import check_evaluation, check_steps, checked_rows, kind_of
from shared.trainers.token_rollouts import Prompt, PromptsOnce
from textalign.preparing import TextRun, hub_options, load_tokenizer, name_of

NOT_COLUMNS = ("prompt", "completion", "messages", "conversations")  # not handed to rewards beside the prompt
TOKEN_COLUMNS = ("input_ids", "attention_mask")
PROMPT_IDS = "__prompt_ids"  # the column of prompts that are given as tokens


class TextPrompts(PromptsOnce):
    """Rows as prompts of a text model; a PromptEncoder.

    Args:
        run: with its tokeniser.
        longest: prompts lose their beginning beyond so many tokens; None: no cut.
    """

    beyond: ClassVar[dict[str, int]] = {}

    def __init__(self, run: TextRun, longest: int | None):
        super().__init__()
        self.run, self.tokenizer, self.longest = run, run.tokenizer, longest

    def made(self, row: dict[str, Any]) -> tuple[Prompt, str | None]:
        ids = row[PROMPT_IDS] if PROMPT_IDS in row else self.run.tokeniser.ask(row).prompt_ids
        if not ids:
            raise DataError(f"row {row.get(ROW, 0)}: prompt is empty, so there is nothing to go on from")
        if self.longest is None or len(ids) <= self.longest:
            return Prompt(torch.as_tensor(ids)), None
        note = f"prompt cut from {len(ids)} tokens to its last {self.longest}"
        return Prompt(torch.as_tensor(ids[-self.longest :])), note

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return left_padded([prompt.ids for prompt in prompts], self.tokenizer.pad_token_id)

    def asked(self, row: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return row["prompt"], {name: value for name, value in row.items() if name not in NOT_COLUMNS}

    def shown(self, row: Mapping[str, Any]) -> tuple[list[Any], str]:
        return [], self.run.prompt(dict(row))


def prepare_prompts(
    model: str | nn.Module, args: Any, *, train_dataset: Any, eval_dataset: Any, processing_class: Any
) -> tuple[TextRun, TextPrompts]:
    """Load the tokenizer and check the rows; `run.train` and `run.held_out` are rows of prompts.

    Args:
        model: name of the model, or the model.
        args: the trainer's options, SamplingOptions among them.
        train_dataset, eval_dataset, processing_class: as the trainer takes them.

    Raises:
        UserError, DataError: options, columns or rows that cannot be used.
    """
    if not isinstance(model, (str, nn.Module)):
        raise UserError(f"model is a {type(model).__name__}: give its name or folder as a string, or a loaded model.")
    check_evaluation(args, eval_dataset)
    kind = kind_of(train_dataset, {Kind.PROMPT_ONLY})
    longest = _room(model, args)
    tokenizer = load_tokenizer(model, args, processing_class)
    template_kwargs = args.chat_template_kwargs
    tokeniser = Tokeniser(tokenizer, kind, template_kwargs=template_kwargs, on_bad_row=args.on_bad_row)
    run = TextRun(name_of(model), tokenizer, kind, tokeniser, longest)
    encoder = TextPrompts(run, longest)
    run.train, run.held_out = checked_rows(train_dataset, eval_dataset, kind, args)
    if isinstance(run.train, Rows):
        run.left_out = {row: f"left out: {why}" for row, why in run.train.left_out.items()}
        encoder.prompts([run.train[at] for at in range(min(2, len(run.train)))])
    else:
        check_steps(args, run.train)
    return run, encoder


def _room(model: str | nn.Module, args: Any) -> int | None:
    """How long a prompt may be, so that prompt and completion fit into the model's positions.

    Raises:
        UserError: the longest completion leaves no room for a prompt.
    """
    config = load_config(model, **hub_options(args)) if isinstance(model, str) else model.config
    positions = position_limit(config)
    if positions is None:
        return args.max_prompt_length
    lengths = {
        "max_completion_length": (args.generation_kwargs or {}).get("max_new_tokens", args.max_completion_length),
        "max_new_tokens": args.max_new_tokens or 0,
    }
    longest = max(lengths, key=lengths.__getitem__)
    room, asked = positions - lengths[longest], args.max_prompt_length
    if room < 1 or (asked is not None and asked > room):
        what = f"{longest} {lengths[longest]}" + ("" if asked is None else f" and max_prompt_length {asked}")
        raise UserError(f"{what}: this model has {positions} positions, for prompt and completion together.")
    return room if asked is None else asked


def prompts_are_tokens(rows: Any) -> bool:
    """Whether rows hold their prompts as `input_ids` and not as `prompt`; False for what is no data set."""
    if rows is None or isinstance(rows, (str, dict)):
        return False
    names = set(column_names(rows)) if hasattr(rows, "__len__") else set(next(iter(rows), {}))
    return "input_ids" in names and not names & {"prompt", "messages", "conversations"}


def with_texts(rows: Any, tokenizer: Any) -> Any:
    """Rows of tokens with the prompts' texts beside them; any other rows as they are.

    Args:
        rows: with `input_ids`, and an `attention_mask` where they are padded.
        tokenizer: reads the tokens.
    """
    if not prompts_are_tokens(rows):
        return rows

    def with_text(row: Mapping[str, Any]) -> dict[str, Any]:
        ids = torch.as_tensor(row["input_ids"])
        ids = ids[torch.as_tensor(row["attention_mask"]).bool()] if "attention_mask" in row else ids
        others = {name: value for name, value in row.items() if name not in TOKEN_COLUMNS}
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return {**others, "prompt": text, PROMPT_IDS: ids.tolist()}

    if isinstance(rows, (list, tuple)):
        return [with_text(row) for row in rows]
    return rows.map(with_text, remove_columns=[name for name in column_names(rows) if name in TOKEN_COLUMNS])
