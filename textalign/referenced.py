"""The reference of a text trainer: loaded to fit the tokenizer, whose tokens it has to know."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from shared.errors import UserError
from shared.runtime.models import load_model
from shared.trainers.keeping import preserved_randomness
from shared.trainers.reference_beforehand import config_of
from shared.trainers.reference_options import ReferenceModelOptions
from shared.trainers.referenced import Referenced
from textalign.preparing import TextRun, fit_to_tokenizer


class TextReference(Referenced):
    """What a text trainer with a reference adds to a trainer whose constructor makes its reference."""

    args: Any
    run: TextRun
    tokens_at_first: int

    def take_reference(self, model: Any, ref_model: Any, args: ReferenceModelOptions, **given: Any) -> None:
        super().take_reference(model, ref_model, args, **given)
        self.tokens_at_first = tokens_known(model, args)  # a model that is given is changed where tokens are added

    def load_reference(self, name: str, **options: Any) -> nn.Module:
        return load_reference_model(name, self.args, self.run.tokenizer, **options)

    def fit_reference(self, ref_model: str | nn.Module | None) -> None:
        if ref_model is None:
            return
        check_tokens_known(tokens_known(ref_model, self.args), self.tokens_at_first, self.run.tokenizer)
        if not isinstance(ref_model, str):
            fit_given_reference(ref_model, self.args, self.run.tokenizer)

    def reference_is_known(self, ref_model: str | nn.Module | None) -> bool:
        known = self.tokens_at_first if ref_model is None else tokens_known(ref_model, self.args)
        return known >= len(self.run.tokenizer)


def tokens_known(model: str | nn.Module, args: ReferenceModelOptions) -> int:
    """How many tokens a model has embeddings for; of a model given by name nothing but its configuration is read."""
    if isinstance(model, str):
        return config_of(model, args).get_text_config().vocab_size
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = getattr(inner.get_input_embeddings(), "num_embeddings", None)  # an engine may have cut up the weight
    return inner.config.get_text_config().vocab_size if known is None else known


def check_tokens_known(reference: int, policy: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a given reference model knows the tokenizer's tokens.

    Those that the policy itself has learnt nothing of yet, because a chat template brought them, are added to both.

    Args:
        reference, policy: how many tokens the two models had embeddings for as they were given.
        tokenizer: the run's.

    Raises:
        UserError: the reference lacks tokens that the policy has.
    """
    if reference < min(len(tokenizer), policy):
        raise UserError(
            f"The reference model has embeddings for {reference} tokens, the model for {policy}, and the tokenizer "
            f"has {len(tokenizer)}: the reference was made for another tokenizer. Give one with the model's own, or "
            "leave ref_model out: the model as it is at the start is then the reference."
        )


def load_reference_model(
    name: str, args: ReferenceModelOptions, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> nn.Module:
    """A reference model by its name, frozen; what of it is drawn is drawn as the policy's.

    Args:
        name: folder, hub id or built-in name.
        args: the trainer's options.
        tokenizer: the run's, whose added tokens are given embeddings.
        options: more for `from_pretrained`.

    Raises:
        UserError: as shared.runtime.models.load_model.
    """
    with preserved_randomness():
        set_seed(args.seed)
        init = {**(args.model_init_kwargs or {}), **options}
        model = load_model(name, head="causal-lm", frozen=True, seed=args.seed, **init)
        fit_to_tokenizer(model, tokenizer)
    return model


def fit_given_reference(model: nn.Module, args: ReferenceModelOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a reference model embeddings of the tokens that were added, drawn as the policy's."""
    with preserved_randomness():
        set_seed(args.seed)
        fit_to_tokenizer(model, tokenizer)
