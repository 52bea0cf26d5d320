"""Loading models and processors: type, attention, quantisation and placement, with errors that a user can act on.

What family a model belongs to and what it needs of its data is not known here: see visionalign.families.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from shared.builtin import is_builtin
from shared.errors import UserError
from shared.hub import require_available
from shared.runtime.arguments import ModelArguments
from shared.runtime.launch import engine_asked, has_accelerator
from shared.runtime.scorers import register_scorer

Head = Literal["image-text-to-text", "causal-lm", "sequence-classification", "token-classification"]
HEADS = {
    "image-text-to-text": "AutoModelForImageTextToText",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


HUB_OPTIONS = ("revision", "trust_remote_code")  # of from_pretrained's arguments, those that configurations need too
POSITIONS = re.compile(r"pos|wpe")  # in the names of tables with a vector for each position


def model_init_kwargs(args: ModelArguments) -> dict[str, Any]:
    """What `load_model` takes besides the name, from the options."""
    kwargs: dict[str, Any] = {
        "revision": args.model_revision,
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.load_in_4bit or args.load_in_8bit:
        kwargs["quantization_config"] = _quantization(args)
    return kwargs


def _quantization(args: ModelArguments):
    import torch
    from transformers import BitsAndBytesConfig

    skipped = None
    if args.lora_modules_to_save:  # trained in full, so not quantised; nor is the head, which no default spares then
        skipped = [rf"(.*\.)?{re.escape(name)}(\.|$)" for name in sorted({"lm_head", *args.lora_modules_to_save})]
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    compute = args.bnb_4bit_compute_dtype or (args.dtype if args.dtype != "auto" else "bfloat16")
    storage = torch.float32 if engine_asked("FSDP") and not has_accelerator() else None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute),
        bnb_4bit_quant_storage=storage or getattr(torch, compute),
    )


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False):
    """A model's configuration, before any weight is read.

    Raises:
        UserError: the id is unknown, the hub cannot be reached, or the folder holds no model.
    """
    from transformers import AutoConfig

    if is_builtin(name):
        from shared.builtin import model_path

        name = str(model_path(name))
    require_available(name, file="config.json", what="model", revision=revision)
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"model {name!r} is an adapter: name its base model, and the adapter with adapter_name_or_path."
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_cannot_load("model", name, error)) from error


def position_limit(config: Any) -> int | None:
    """The most tokens that a row may have, where a model's positions are a table; None where they are computed.

    Args:
        config: a transformers configuration.
    """
    text = config.get_text_config()
    size = getattr(text, "max_position_embeddings", None) or 0
    if size < 1 or getattr(text, "rope_parameters", None):
        return None
    import torch
    from transformers import MODEL_MAPPING
    from transformers.integrations import is_deepspeed_zero3_enabled

    # ZeRO-3 cuts layers up as they are made, also such as are made to be looked at
    if type(text) not in MODEL_MAPPING or is_deepspeed_zero3_enabled():
        return None
    with torch.device("meta"):  # only the model itself tells: some have a number, and no positions at all
        model = MODEL_MAPPING[type(text)](text)
    tables = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    tables |= dict(model.named_buffers())
    sizes = {len(table) for name, table in tables.items() if POSITIONS.search(name) and table.dim() == 2}
    return size if sizes & set(range(size, size + 4)) else None  # some leave the first places of the table free


def load_processor(name: str, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any):
    """A model's processor (or tokenizer), as AutoProcessor finds it.

    Raises:
        UserError: as `load_config`.
    """
    from transformers import AutoProcessor

    if is_builtin(name):
        from shared.builtin import model_path

        name = str(model_path(name))
    require_available(name, file="config.json", what="processor", revision=revision)
    try:
        return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(_cannot_load("processor", name, error)) from error


def load_model(
    name: str,
    *,
    head: Head,
    frozen: bool = False,
    dtype: Any = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: Any = None,
    seed: int = 0,
    **options: Any,
):
    """Load a model for training.

    Args:
        name: hub id, folder, or a built-in name (whose weights are drawn from `seed`, alike in every process).
        head: which of transformers' automatic classes.
        frozen: whether the loaded weights stay as they are (an adapter is trained on top). With `dtype="auto"` frozen
            weights keep the type of their checkpoint; weights that are trained are held in float32, because half
            precision loses small updates, and the matrix products run in half precision by autocast.
        dtype: "auto", or a torch type or its name.
        revision: branch, tag or commit.
        attn_implementation: "eager", "sdpa", "flash_attention_2", …; None lets transformers choose.
        trust_remote_code: run code that comes with the model. Off by default.
        quantization_config: a transformers quantisation configuration.
        seed: draws the weights of a built-in model, and of a head that the checkpoint does not have.
        options: anything else that `from_pretrained` takes, such as `num_labels`.

    Raises:
        UserError: unknown id, no network, a model without such a head, an attention that is not installed, options
            that the model does not take.
    """
    import torch
    import transformers
    from transformers.integrations import is_deepspeed_zero3_enabled

    if head == "sequence-classification":
        register_scorer(type(load_config(name, revision=revision, trust_remote_code=trust_remote_code)))
    if is_builtin(name):
        from shared.builtin.models import load_model as load_builtin

        return load_builtin(name, seed=seed, head=head, **options)
    auto = getattr(transformers, HEADS[head])
    dtype = options.pop("torch_dtype", dtype)  # its older name
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if dtype == "auto" and not frozen and quantization_config is None:
        dtype = torch.float32
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
        if not is_deepspeed_zero3_enabled():  # which places the weights itself, and takes no other word for it
            options.setdefault("device_map", {"": _device()})
    require_available(name, file="config.json", what="model", revision=revision)
    try:
        return auto.from_pretrained(
            name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(_cannot_load("model", name, error)) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"model_init_kwargs: the model's class does not take all of them ({error}).") from error


def _device() -> Any:
    """Where a quantised model is put: it cannot be moved later."""
    import torch

    if not has_accelerator() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return "cpu"
    return torch.device(torch.accelerator.current_accelerator().type, int(os.environ.get("LOCAL_RANK", 0)))


def _cannot_load(what: str, name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "" if Path(name).exists() else " Check the spelling; a gated or private model needs a login first."
    return f"{what} {name!r} cannot be loaded: {first}{hint}"


def precision_report(model, mixed_precision: str) -> str:
    """One line: the types that weights are held in and the type of the arithmetic.

    Args:
        model: the model.
        mixed_precision: accelerate's name of it: no, bf16, fp16 or fp8.
    """
    held = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    names = {"bf16": "bfloat16", "fp16": "float16"}
    arithmetic = names.get(mixed_precision, mixed_precision) + " (autocast)" if mixed_precision != "no" else "the same"
    return f"precision: weights in {', '.join(held)}; arithmetic in {arithmetic}"


def parameter_report(model) -> str:
    """One line: how many parameters are trained, of how many, and in which types they are held."""
    trained: dict[str, int] = {}
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # 4-bit weights are packed: their own shape is another
        count = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += count
        if parameter.requires_grad:
            kind = str(parameter.dtype).removeprefix("torch.")
            trained[kind] = trained.get(kind, 0) + count
    count = sum(trained.values())
    kinds = ", ".join(f"{n:,} in {kind}" for kind, n in trained.items())
    return f"{count:,} of {total:,} parameters are trained ({count / max(total, 1):.2%}; {kinds})"


def without_dropout(model: Any) -> None:
    """No dropout anywhere, an adapter's neither: attention layers hold their own rate as a number."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Loading and saving take no bar of their own beside the training's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
