"""The teacher of a text trainer: what is asked for checked before any weight is read, and the model loaded.

A divergence compares probabilities token by token: teacher and student need one tokenizer. Sizes do not tell, since
heads are padded and other tokenizers have as many tokens: the vocabularies are compared where both can be read.
"""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.builtin import is_builtin
from shared.errors import UserError
from shared.runtime.models import HUB_OPTIONS, load_config, load_model, load_processor, position_limit
from shared.trainers.distillation_options import DistillationOptions
from shared.trainers.keeping import preserved_randomness
from shared.trainers.reference_adapter import check_can_be_switched
from shared.trainers.reference_checks import is_inside

PADDING = 1024  # the most tokens by which heads of one tokenizer are taken to differ, where only sizes are known


class Teacher:
    """What a trainer is told of its teacher.

    Args:
        given: the model, its name, or None for `args.teacher_model_name_or_path`.
        args: the trainer's options.
        has_adapter: whether the student has an adapter, without which it can be its own teacher.
        student: the student's model or its name.

    Raises:
        UserError: no teacher, or options that cannot be followed for it; a model that is not there.
    """

    def __init__(self, given: Any, args: DistillationOptions, *, has_adapter: bool, student: Any):
        self.given = args.teacher_model_name_or_path if given is None else given
        self.init = dict(args.teacher_model_init_kwargs or {})
        self.bits = 8 if args.teacher_load_in_8bit else 4 if args.teacher_load_in_4bit else None
        self.trusts = {"trust_remote_code": (args.model_init_kwargs or {}).get("trust_remote_code", False)}
        self._check(args, has_adapter, student)
        self.config = self.given.config if isinstance(self.given, nn.Module) else None
        if isinstance(self.given, str):
            self.config = load_config(self.given, **self._hub_options)

    def _check(self, args: DistillationOptions, has_adapter: bool, student: Any) -> None:
        if not (self.given is None or isinstance(self.given, (str, nn.Module))):
            raise UserError(
                f"teacher_model is a {type(self.given).__name__}: give its name or folder, or a loaded model."
            )
        if self.given is None and not has_adapter:
            raise UserError(
                "There is no teacher: give teacher_model, or its name as teacher_model_name_or_path. A model with an "
                "adapter may go without: what it is without its adapter then teaches it."
            )
        if is_inside(self.given, student):
            raise UserError(
                "teacher_model is the model itself, which training changes. Give its name, so that it is loaded a "
                "second time; with an adapter leave teacher_model out: the model without it is then the teacher."
            )
        if args.teacher_load_in_8bit and args.teacher_load_in_4bit:
            raise UserError("teacher_load_in_8bit and teacher_load_in_4bit exclude each other: give one of them.")
        if is_deepspeed_zero3_enabled() and (self.bits or getattr(self.given, "is_quantized", False)):
            raise UserError("A teacher in 8 or 4 bits cannot be loaded under ZeRO-3: leave it whole, or use ZeRO-2.")
        if not isinstance(self.given, str):
            named = {
                "teacher_model_init_kwargs": self.init,
                "teacher_load_in_8bit": args.teacher_load_in_8bit,
                "teacher_load_in_4bit": args.teacher_load_in_4bit,
            }
            if told := [name for name, value in named.items() if value]:
                why = "the teacher is the student's own model" if self.given is None else "the teacher is loaded"
                raise UserError(f"{', '.join(told)} cannot be followed: {why}. Give the teacher by name.")

    @property
    def _hub_options(self) -> dict[str, Any]:
        return {**self.trusts, **{name: self.init[name] for name in HUB_OPTIONS if name in self.init}}

    @property
    def positions(self) -> int | None:
        """The most tokens of a row, where the teacher's positions are a table."""
        return None if self.config is None else position_limit(self.config)

    def check_tokens(self, tokenizer: PreTrainedTokenizerBase, own: int) -> None:
        """See that the teacher knows the student's tokens under the same numbers.

        Args:
            tokenizer: the run's.
            own: how many tokens the student has embeddings for.

        Raises:
            UserError: it does not.
        """
        if self.config is None:
            return
        known = self.config.get_text_config().vocab_size
        theirs = self._vocabulary()
        ask = "Distillation compares probabilities token by token: give a teacher with the student's own tokenizer."
        if theirs is not None:
            ours = tokenizer.get_vocab()
            other = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
            if other:
                number, token = other[0]
                there = f"number {theirs[token]} there" if token in theirs else "not there"
                raise UserError(
                    f"The teacher's tokenizer is another one: {len(other):,} of the student's {len(ours):,} tokens "
                    f"are not its own, {token!r} (number {number}, {there}) for one. {ask}"
                )
        elif abs(known - own) > PADDING:
            raise UserError(f"The teacher has {known:,} tokens and the student {own:,}. {ask}")
        if known < len(tokenizer):
            raise UserError(
                f"The teacher has embeddings for {known:,} tokens, and the student's tokenizer has "
                f"{len(tokenizer):,}, with those that a chat template brought. {ask}"
            )

    def _vocabulary(self) -> dict[str, int] | None:
        """The tokens of the teacher's tokenizer; None where it cannot be read."""
        name = self.given if isinstance(self.given, str) else getattr(self.config, "_name_or_path", "")
        if not name:
            return None
        try:
            found = load_processor(name, **self._hub_options)
        except UserError:  # a folder or a hub entry without one: sizes have to do
            return None
        return getattr(found, "tokenizer", found).get_vocab()

    def load(self, student: nn.Module, seed: int) -> nn.Module | None:
        """The teacher's model; None where it is the student without its adapter.

        Raises:
            UserError: it cannot be loaded as is asked, or that adapter cannot be switched off.
        """
        if self.given is None:
            check_can_be_switched(student, trains_nothing_else=True)
            return None
        if isinstance(self.given, nn.Module):
            return self.given
        with preserved_randomness():
            options = {"head": "causal-lm", "frozen": True, "seed": seed}
            if self.bits is None:
                return load_model(self.given, **options, **{**self.trusts, **self.init})
            init = {**self.trusts, **self.init, "quantization_config": _quantised(self.bits)}
            if not is_builtin(self.given):
                return load_model(self.given, **options, **init)
            with tempfile.TemporaryDirectory() as folder:  # transformers quantises what it loads from files
                load_model(self.given, **options).save_pretrained(folder)
                return load_model(folder, **options, **init)


def _quantised(bits: int) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
