"""The options of scripts/best_of_n.py. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import UserError
from shared.runtime.options import option


@dataclass
class BestOfNOptions:
    """Best of n.

    Raises:
        UserError: something is missing, or numbers that cannot be meant.
    """

    model_name_or_path: str | None = option(
        None, "Model that answers: a hub id, a local folder (of an adapter too) or a built-in name."
    )
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Number type of the weights; auto: the one that they were saved in."
    )
    attn_implementation: str | None = option(
        None, "Attention kernel: eager, sdpa, flash_attention_2, … Unset: transformers chooses."
    )
    trust_remote_code: bool = option(False, "Run the Python code that comes with the model. Only where you trust it.")

    dataset_name: list[str] = option([], "Prompts: hub ids, local files or folders, built-in names.")
    dataset_config: str | None = option(None, "Configuration (subset) of a hub data set.")
    dataset_split: str = option(
        "test", "Split whose prompts are answered. test: the training split where there is no other."
    )
    dataset_columns: dict[str, str] | None = option(
        None, 'Columns that are called otherwise, as JSON: {"in the data": "here"}.'
    )
    max_rows: int | None = option(None, "Answer at most so many prompts.")

    reward_funcs: list[str] = option(
        [], "What scores the answers: names, dotted paths of functions, reward models; see GRPO's."
    )
    reward_weights: list[float] | None = option(
        None, "Weight of each reward in the score; one of weight 0 is measured alone. Unset: 1 each."
    )
    sample_size: int = option(16, "Answers that are sampled for each prompt.")
    n_candidates: int = option(1, "How many of them, the best, are written to output_file.")
    n_values: list[int] | None = option(
        None, "The n of the table. Unset: 1, 2, 4, … up to sample_size, and sample_size."
    )
    max_new_tokens: int = option(256, "Longest answer, in tokens.")
    temperature: float = option(1.0, "Divides the logits.")
    top_k: int = option(0, "Only the k most likely tokens; 0: all.")
    top_p: float = option(1.0, "Only the most likely tokens whose chances first add up to p.")
    min_p: float | None = option(None, "Only tokens at least this share as likely as the most likely one.")
    repetition_penalty: float = option(1.0, "Above 1, tokens that were there already get less likely.")
    stop_strings: list[str] = option([], "An answer ends where it holds one of these.")
    chat_template_kwargs: dict[str, Any] | None = option(None, "More variables for the chat template, as JSON.")
    seed: int = option(42, "Of all draws.")
    batch_size: int = option(32, "Prompts that are answered and scored at a time.")
    output_file: str | None = option(
        None, "JSON lines with each prompt, its best answer as completion, and the candidates with their scores."
    )

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "dataset_name", "reward_funcs"):
            if not getattr(self, name):
                raise UserError(
                    f"{name} is missing: with a model of your own give all three of model, data and reward."
                )
        for name in ("batch_size", "max_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1.")
        if self.n_values is None:
            powers = [2**power for power in range(self.sample_size.bit_length())]
            self.n_values = [*powers, *([self.sample_size] if self.sample_size not in powers else [])]
        if wrong := [n for n in self.n_values if not 1 <= n <= self.sample_size]:
            raise UserError(f"n_values has {wrong[0]}: give numbers from 1 to sample_size {self.sample_size}.")
