"""Critics as trainers make, save and restore them: kinds by name, and a file of their own beside the model's.

What they are, and where they stand: shared.policies.critic.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, set_seed

from shared.errors import UserError
from shared.policies.base import CRITIC
from shared.policies.critic import AdapterCritic, Critic, SeparateCritic, critic_of
from shared.policies.score import head_of, inner_model
from shared.runtime.models import without_dropout
from shared.trainers.keeping import preserved_randomness
from shared.trainers.reference import unwrapped
from shared.trainers.reference_adapter import (
    adapter_in_use,
    adapter_tensors,
    add_frozen_adapter,
    check_can_be_switched,
    gathered,
    trained_adapter,
)
from shared.trainers.tensor_files import read_tensors, write_tensors

CRITIC_FILE = "critic.safetensors"
OTHERWISE = (
    "holds another critic than this run's. Give the value_model options of the run that wrote it, which run.yaml "
    "beside it holds; or move the file away to begin with a new critic."
)


def critic_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of the critic in a policy's model, by its names in a file; empty where there is none.

    Args:
        model: the policy's, wrapped or not.
    """
    model = unwrapped(model)
    critic = critic_of(model)
    if critic is None:
        return {}
    found: dict[str, Tensor] = {name: each for name, each in critic.named_parameters() if each.requires_grad}
    if critic.kind == "adapter":
        found |= {f"adapter.{name}": each for name, each in adapter_tensors(model, CRITIC).items()}
    return found


def save_critic(model: nn.Module, folder: Path, *, writes: bool) -> None:
    """Write what is trained of a model's critic into a folder, beside the model; all processes call it together."""
    critic = critic_of(unwrapped(model))
    said = {"kind": critic.kind}
    if critic.kind == "separate" and not hasattr(critic.model, "peft_config"):
        said["config"] = critic.model.config.to_json_string()
    write_tensors(critic_tensors(model), folder / CRITIC_FILE, writes=writes, metadata=said)


def load_critic(model: nn.Module, folder: Path) -> None:
    """Put a folder's critic into the model's; all processes call it together.

    Raises:
        UserError: the folder has none, or another.
    """
    path = folder / CRITIC_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CRITIC_FILE}: it was not written by a trainer with a critic.")
    if critic_said(folder).get("kind") != critic_of(unwrapped(model)).kind:
        raise UserError(f"{path} {OTHERWISE}")
    read_tensors(critic_tensors(model), path, otherwise=OTHERWISE)


def critic_said(model: Any) -> dict[str, str]:
    """What the critic's file in a model's folder says of it: its kind, and where it is a model its configuration.

    Args:
        model: the folder; anything else has no such file.
    """
    path = Path(model) / CRITIC_FILE if isinstance(model, str | Path) else None
    if path is None or not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def shared_critic(model: nn.Module) -> Critic:
    """A head on the policy's own states."""
    return Critic(_width(model))


def adapter_critic(model: Any, *, seed: int) -> AdapterCritic:
    """A head and an adapter, like the policy's, on the policy's frozen base.

    Args:
        model: a PEFT model, which gets the adapter; it is trained, and not saved with the model.
        seed: draws the adapter.

    Raises:
        UserError: the model has no adapter, or one that cannot be switched.
    """
    check_adapter_critic(model, None)
    check_can_be_switched(model, trains_nothing_else=True)
    config = copy.deepcopy(model.peft_config[trained_adapter(model)])
    config.modules_to_save = None  # for the head that writes tokens, which a critic has no use for
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others take the base's weights apart a second time
    with preserved_randomness():
        set_seed(seed)
        add_frozen_adapter(model, CRITIC, config)
    for tensor in adapter_tensors(model, CRITIC).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
            tensor.data = tensor.data.float()
    inner = inner_model(model)
    return AdapterCritic(_width(model), functools.partial(adapter_in_use, inner, CRITIC))


def check_adapter_critic(model: Any, peft_config: Any) -> None:
    """Raise UserError where no adapter is trained that a critic's could stand beside; `model` may be a name."""
    if peft_config is None and not hasattr(model, "peft_config"):
        raise UserError(
            "value_model adapter: a critic's adapter stands beside the policy's on a frozen base, and here the whole "
            "model is trained. Give peft_config (--use_peft), or value_model shared or separate."
        )


def separate_critic(model: nn.Module, *, dropout: bool) -> SeparateCritic:
    """A critic that is a model with a score head of its own, trained in float32.

    Args:
        model: see SeparateCritic; a frozen one is trained whole, a PEFT model by its adapter and head.
        dropout: whether it keeps its dropout.
    """
    critic = SeparateCritic(model)
    if not hasattr(model, "peft_config"):
        model.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if not dropout:
        without_dropout(model)
    return critic


def critic_like(model: nn.Module) -> nn.Module:
    """A score model with the body of a whole language model, as it is, and a head that gives 0.

    Raises:
        UserError: transformers has no such class, or the model has an adapter.
    """
    config = copy.deepcopy(inner_model(model).config)
    if hasattr(model, "peft_config") or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            "value_model separate: what the critic is to begin as is not known. Name a model with "
            "value_model_name_or_path, or give one as value_model."
        )
    made = saved_critic(config)
    body, own = (getattr(each, each.base_model_prefix) for each in (model, made))
    _copy(dict(body.named_parameters()), dict(own.named_parameters()))
    _copy(dict(body.named_buffers()), dict(own.named_buffers()))
    return made


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """All of them by name, also where ZeRO-3 has cut them up."""
    for name, tensor in target.items():
        with gathered(source[name]), gathered(tensor, write=True):
            tensor.copy_(source[name])


def saved_critic(config: Any) -> nn.Module:
    """A score model by its configuration, or that as JSON, whose weights are yet to come; its head gives 0."""
    if isinstance(config, str):
        from transformers import AutoConfig

        told = json.loads(config)
        config = AutoConfig.for_model(told.pop("model_type"), **told)
    config.num_labels = 1
    with preserved_randomness():
        made = AutoModelForSequenceClassification.from_config(config)
    head = head_of(made)
    for parameter in head.parameters():
        with torch.no_grad(), gathered(parameter, write=True):
            parameter.zero_()
    return made


def _width(model: nn.Module) -> int:
    """Of the last states."""
    return inner_model(model).get_output_embeddings().in_features
