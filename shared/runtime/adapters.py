"""PEFT adapters: from options to a model with a LoRA adapter, new or continued."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.hub import require_available
from shared.runtime.arguments import ModelArguments

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


def lora_config(args: ModelArguments) -> LoraConfig | None:
    """The LoRA configuration that the options ask for; None without `--use_peft`.

    Sources: LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353), rsLoRA (Kalajdzievski
    2023, arXiv:2312.03732).
    """
    if not args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=args.lora_task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_pattern(args.lora_target_modules),
        exclude_modules=_pattern(args.lora_exclude_modules),
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        bias="none",
    )


def _pattern(names: list[str] | None) -> list[str] | str | None:
    """One word with regular-expression signs, or "all-linear", is a pattern; anything else a list of module names."""
    if names and len(names) == 1 and (names[0] == ALL_LINEAR or any(sign in names[0] for sign in "*^$|\\(")):
        return names[0]
    return names


def _with_targets(config: Any, model: PreTrainedModel) -> Any:
    """PEFT knows which modules to adapt for some language models; all linear layers for a model that it does not know.

    Adapting every linear layer is what QLoRA (Dettmers et al. 2023, arXiv:2305.14314) found to match full training.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    named = not isinstance(config, LoraConfig) or config.target_modules or config.target_parameters
    if named or model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        return config
    config = copy.copy(config)
    config.target_modules = ALL_LINEAR
    return config


def training_tokens(config: Any, model: PreTrainedModel, ids: Sequence[int]) -> Any:
    """An adapter's configuration that also trains what the model has of some tokens, in its embeddings and its head.

    Args:
        config: a PEFT configuration, the path of an adapter to go on with, or None.
        model: the base model.
        ids: tokens that the base model was not trained on.

    Returns:
        A copy of a LoRA configuration; anything else as it is, with a warning that these tokens are not learnt.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        logger.warning(
            "The adapter does not say whether it trains the embeddings of %d new tokens (%s). Where it does not, they "
            "stay as they were drawn: use a LoraConfig, or train the whole model.",
            len(ids),
            ", ".join(map(str, ids)),
        )
        return config
    config = copy.copy(config)
    named = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    places = [model.get_input_embeddings(), model.get_output_embeddings()]
    known = config.trainable_token_indices or {}
    if not isinstance(known, dict):
        known = {named[id(places[0])]: known}
    whole = set(config.modules_to_save or ())
    if not isinstance(config.target_modules, str):
        whole |= set(config.target_modules or ())
    names = [named[id(place)] for place in places if place is not None]
    wanted = {name: sorted({*known.get(name, ()), *ids}) for name in names if name not in whole}
    config.trainable_token_indices = {**known, **wanted} or None
    return config


def attach_adapter(
    model: PreTrainedModel, config: Any = None, path: str | None = None, *, checkpointing: bool = False
) -> Any:
    """Put a new adapter on the model, or go on training one that was saved.

    Args:
        model: the base model, quantised or not.
        config: a PEFT configuration for a new adapter.
        path: folder or hub id of an adapter to continue; it keeps its own configuration.
        checkpointing: whether activations will be recomputed, which needs inputs with gradient under a frozen base.

    Returns:
        The PEFT model, with the adapter's weights in float32 and trainable; the model itself where neither is given.

    Raises:
        UserError: the adapter's targets match no module, the folder holds no adapter, or it is no configuration.
    """
    for module in model.modules():
        # bitsandbytes re-packs 4-bit weights on the processor at the first evaluation, and cannot train them then
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if config is None and path is None:
        return model
    from peft import PeftConfig

    if config is not None and not isinstance(config, PeftConfig):
        raise UserError(
            f"peft_config is a {type(config).__name__}: give a PEFT configuration such as peft.LoraConfig(r=16), or "
            "the folder or hub id of an adapter to go on with."
        )
    if hasattr(model, "peft_config"):
        raise UserError("The model has an adapter already: leave peft_config out to train it, or give the base model.")
    import torch
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if path is not None:
        require_available(path, file="adapter_config.json", what="adapter")
        if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
            raise UserError(f"--adapter_name_or_path {path}: no adapter_config.json in this folder.")
        adapted = PeftModel.from_pretrained(model, path, is_trainable=True)
    else:
        try:
            adapted = get_peft_model(model, _with_targets(config, model))
        except ValueError as error:  # peft names the modules that it looked for
            raise UserError(f"LoRA cannot be put on this model: {error}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def merge_adapter(adapter: str, folder: str) -> None:
    """Write the language model that an adapter and its base are together, with the tokenizer, for transformers alone.

    Args:
        adapter: folder or hub id; its base is loaded whole, in the type that it was saved in.
        folder: is made.

    Raises:
        UserError: the adapter or its base cannot be loaded.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    require_available(adapter, file="adapter_config.json", what="adapter")
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise UserError(f"The adapter {adapter} cannot be merged: {str(error).strip().splitlines()[0]}") from error
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
