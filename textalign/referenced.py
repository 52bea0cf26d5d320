"""The reference of a text trainer: options checked first, loaded to fit the tokenizer, run beforehand where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.errors import UserError
from shared.runtime.models import load_config, load_model
from shared.trainers.keeping import preserved_randomness
from shared.trainers.preference import PreferenceTrainer
from shared.trainers.reference import Cached, FrozenCopy, Reference, check_engine
from shared.trainers.reference_cache import precompute, weights_of_model, weights_of_name
from shared.trainers.reference_checks import check_reference_asked, check_run_beforehand
from shared.trainers.reference_options import ReferenceModelOptions
from shared.trainers.referenced import Referenced
from textalign.preparing import HUB_OPTIONS, TextRun, fit_to_tokenizer


class TextReference(Referenced):
    """What a text trainer with a reference adds to a trainer whose constructor makes its reference."""

    args: Any
    run: TextRun
    reference_given: Any
    tokens_at_first: int

    def take_reference(
        self, model: Any, ref_model: Any, args: ReferenceModelOptions, *, train_dataset: Any, peft_config: Any
    ) -> None:
        """Check what is asked for, and remember it; to be called before rows are read and the model is loaded.

        Raises:
            UserError: see check_reference.
        """
        ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        check_reference(model, ref_model, args, train_dataset=train_dataset, has_adapter=has_adapter)
        self.reference_given = ref_model
        self.tokens_at_first = tokens_known(model, args)  # a model that is given is changed where tokens are added

    def load_reference(self, name: str, **options: Any) -> nn.Module:
        return load_reference_model(name, self.args, self.run.tokenizer, **options)

    def fit_reference(self, ref_model: str | nn.Module | None) -> None:
        if ref_model is None:
            return
        check_tokens_known(tokens_known(ref_model, self.args), self.tokens_at_first, self.run.tokenizer)
        if not isinstance(ref_model, str):
            fit_given_reference(ref_model, self.args, self.run.tokenizer)

    def reference_of(self, ref_model: str | nn.Module | None) -> Reference:
        """The reference; run beforehand where the options say so."""
        args = self.args
        if not _beforehand(args):
            return super().reference_of(ref_model)
        known = self.tokens_at_first if ref_model is None else tokens_known(ref_model, args)
        check_engine(self.accelerator, load_in_8bit=args.ref_load_in_8bit)
        self.fit_reference(ref_model)
        all_known = known >= len(self.run.tokenizer)
        made = lambda beforehand: self.made_reference(ref_model, beforehand=beforehand)  # noqa: E731
        run_beforehand(self, ref_model, made, name=self.loaded_from, all_known=all_known)
        return Cached()


def _beforehand(args: ReferenceModelOptions) -> bool:
    """Whether the reference is run once, before training; of an online trainer's rows there are none to run it on."""
    return bool(getattr(args, "precompute_ref_log_probs", False))


def check_reference(
    model: str | nn.Module,
    ref_model: str | nn.Module | None,
    args: ReferenceModelOptions,
    *,
    train_dataset: Any,
    has_adapter: bool,
) -> None:
    """Say what is wrong with the options of a reference, before rows are read and weights are loaded.

    Args:
        model: the policy's model or its name.
        ref_model: the reference model or its name; None: the model as it is at the start.
        args: the trainer's options.
        train_dataset: the rows as the trainer is given them.
        has_adapter: whether an adapter is trained on the model.

    Raises:
        UserError: options out of range or that exclude each other; a reference model that is not there.
    """
    check_reference_asked(model, ref_model, args, has_adapter=has_adapter, beforehand=_beforehand(args))
    if _beforehand(args):
        check_run_beforehand(train_dataset, args.precompute_ref_batch_size)
    if isinstance(ref_model, str):
        _config_of(ref_model, args)


def tokens_known(model: str | nn.Module, args: ReferenceModelOptions) -> int:
    """How many tokens a model has embeddings for; of a model given by name nothing but its configuration is read."""
    if isinstance(model, str):
        return _config_of(model, args).get_text_config().vocab_size
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


def run_beforehand(
    trainer: PreferenceTrainer,
    ref_model: str | nn.Module | None,
    made: Callable[[bool], Reference],
    *,
    name: str | None,
    all_known: bool,
) -> None:
    """Put the reference's log-probabilities beside a trainer's rows; nothing is loaded where they are known already.

    Args:
        trainer: with its model, rows and collator.
        ref_model: the reference model or its name; None: the model as it is.
        made: makes the reference, to be run beforehand or, where its argument is False, to stand by itself.
        name: what the policy's model was loaded from; None for a model given as such.
        all_known: whether policy and reference have their embeddings from where they were loaded: those that are
            drawn depend on the seed.
    """
    args, model = trainer.args, trainer.model
    zero3 = is_deepspeed_zero3_enabled()  # a model that is cut up runs in its engine alone
    quantised = getattr(model, "is_quantized", False)
    if not zero3 and not quantised:
        model.to(args.device)
    own = ref_model is None
    source = ref_model if isinstance(ref_model, str) else name if own else None
    named = all_known and not args.ref_load_in_8bit and not (own and (quantised or hasattr(model, "peft_config")))
    weights = None
    if source is not None and named:
        init = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in ("dtype", "torch_dtype")}
        held = _types_of(model) if own and not zero3 else _type_when_loaded(source, trainer)
        weights = weights_of_name(source, dtype=held, **init)
    reference: Reference | Callable[[], Reference] = lambda: made(not zero3)  # noqa: E731
    if weights is None:
        reference = made(not zero3)
        weights = weights_of_model(reference.model if isinstance(reference, FrozenCopy) else model, reference)
    options = {
        "weights": weights,
        "model": model,
        "accelerator": trainer.accelerator,
        "batch_size": args.precompute_ref_batch_size or args.per_device_train_batch_size,
    }
    collator, held_out = trainer.data_collator, trainer.eval_dataset
    trainer.train_dataset = precompute(reference, trainer.train_dataset, collator, **options)
    if isinstance(held_out, dict):
        trainer.eval_dataset = {
            what: precompute(reference, rows, collator, what=what, **options) for what, rows in held_out.items()
        }
    elif held_out is not None:
        trainer.eval_dataset = precompute(reference, held_out, collator, what="eval", **options)


def _config_of(name: str, args: ReferenceModelOptions) -> Any:
    init = args.model_init_kwargs or {}
    return load_config(name, **{option: init[option] for option in HUB_OPTIONS if option in init})


def _types_of(model: nn.Module) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def _type_when_loaded(name: str, trainer: PreferenceTrainer) -> str:
    """The type that a frozen model's weights are held in; "auto" where its configuration does not say."""
    half = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    if half and trainer.accelerator.distributed_type == "DEEPSPEED":
        return half  # whatever it was loaded in
    init = trainer.args.model_init_kwargs or {}
    asked = init.get("torch_dtype", init.get("dtype", "auto"))
    if asked == "auto":
        asked = getattr(_config_of(name, trainer.args), "dtype", None) or "auto"
    return str(asked).removeprefix("torch.")
