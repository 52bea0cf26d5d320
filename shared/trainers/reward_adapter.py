"""A reward model that is an adapter, on the policy's own base: `adapter:PATH` in reward_funcs.

With `peft_config` RewardTrainer saves an adapter and a score head. Where the policy is trained by an adapter on the
same base, both can share it: the reward's adapter stands beside the policy's, frozen, and no second base is loaded
(the multi-adapter PPO of TRL). The score head stays outside of the model. Neither is trained, given to an optimizer,
or saved with the policy.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.builtin import adapter_path, is_builtin, model_path
from shared.errors import UserError
from shared.hub import require_available
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating
from shared.policies.score import HEADS, ScorePolicy, inner_model
from shared.rewards.answer_tokens import AnswerTokens, in_batches
from shared.rewards.base import Sample
from shared.runtime.fsdp import reshard
from shared.trainers.reference import unwrapped
from shared.trainers.reference_adapter import (
    adapter_in_use,
    adapter_tensors,
    add_frozen_adapter,
    trained_adapter,
    trained_outside,
)

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer

HEAD = re.compile(rf"base_model\.model\.({'|'.join(HEADS)})\.(weight|bias)")
LAYER = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?[AB](\.weight)?")
WHOLE = "name its folder alone, PATH without `adapter:`, which loads it with a base of its own"


class AdapterReward:
    """Scores answers by the policy's frozen base model under an adapter that RewardTrainer saved.

    The scores are those of shared.rewards.models.RewardModel, which loads the adapter with a base of its own. It has
    to be joined to the trainer of a policy first; an online trainer does that.

    Args:
        path: folder, hub id or built-in name of an adapter for sequence classification with one label.
        tokenizer: the reward's own, loaded beside the adapter where None.
        base: what the adapter's base is called now, where that is not what it was in its training.
        batch_size: rows that are scored at once.
        max_length: longer rows are cut as in training; None: no cut.
        template_kwargs: more variables for the chat template.
        revision: branch, tag or commit of the adapter.

    Raises:
        UserError: there is no such adapter, or it is one for something else.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any = None,
        *,
        base: str | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
        revision: str | None = None,
    ):
        from transformers import AutoTokenizer

        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1.")
        self.path, self.batch_size, self.__name__ = path, batch_size, Path(path).name
        path = str(adapter_path(path)) if is_builtin(path) else path
        self.config, self.weights = _load(path, revision)
        self.base = base or self.config.base_model_name_or_path
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, revision=revision)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path}: the reward's tokenizer is not beside its adapter; RewardTrainer saves it."
            ) from error
        self.answers = AnswerTokens(tokenizer, max_length=max_length, template_kwargs=template_kwargs)
        self._trainer: OnlineTrainer | None = None

    def check_policy(self, model: str | nn.Module, args: Any, *, has_adapter: bool) -> None:
        """Say before a model is loaded what `join` would say.

        Args:
            model: the policy's model or its name.
            args: the trainer's options.
            has_adapter: whether an adapter is trained on it.

        Raises:
            UserError: a policy that cannot carry the adapter.
        """
        if not has_adapter:
            raise UserError(
                f"{self._said}: the policy has no adapter. Training the whole model changes the base that the reward "
                f"was trained on: give peft_config (--use_peft), or {WHOLE}."
            )
        name = model if isinstance(model, str) else getattr(inner_model(model).config, "_name_or_path", "")
        if name and _place(name) != _place(self.base):
            raise UserError(
                f"{self._said} was trained on {self.base}, and the policy is {name}. Train the policy by an adapter "
                f"on the same base; or, where it has only been moved, say so: adapter:{self.path}|base={name}."
            )
        if getattr(args, "async_reward_computation", False):
            raise UserError(
                f"{self._said} is run on the policy's own model, which cannot write and score at the same time: leave "
                f"async_reward_computation out, or {WHOLE}."
            )

    def join(self, trainer: OnlineTrainer, model: nn.Module, args: Any) -> None:
        """Put the adapter beside the one that is trained; to be called before the trainer prepares the model.

        Args:
            trainer: whose model, as its engine wraps it, is run.
            model: the policy's model.
            args: the trainer's options.

        Raises:
            UserError: as `check_policy`; the adapter does not fit the model.
        """
        self.check_policy(model, args, has_adapter=hasattr(model, "peft_config"))
        inner = inner_model(model)
        if getattr(inner.config, "vision_config", None) is not None or inner.get_output_embeddings() is None:
            raise UserError(
                f"{self._said} is for language models, and the policy is a {type(inner).__name__}: {WHOLE}."
            )
        body = getattr(inner, inner.base_model_prefix)  # what is beside it, such as a critic, no score depends on
        if outside := trained_outside(model, body):
            raise UserError(
                f"{self._said}: the policy trains weights outside of its adapter, {outside[0]} for one, which changes "
                f"the base that the reward was trained on. Train the adapter alone (LoRA: bias='none'), or {WHOLE}."
            )
        tokens = len(self.answers.tokenizer)
        if tokens > inner.get_input_embeddings().num_embeddings:
            raise UserError(f"{self._said} has a tokenizer of {tokens} tokens, more than the policy knows: {WHOLE}.")
        self.adapter = next(name for at in range(99) if (name := f"reward_{at}") not in model.peft_config)
        self.head = self._put(model)
        self.policy = ScorePolicy(model, head=self.head, pad=self.answers.tokenizer.pad_token_id, share_prefix=False)
        if not self.policy.taught:
            raise UserError(f"{self._said}: a {type(inner).__name__} cannot be given another head: {WHOLE}.")
        self._trainer = trainer

    def _put(self, model: Any) -> nn.Linear:
        """Load the adapter into the model; gives its score head."""
        from peft import set_peft_model_state_dict

        head = {found[2]: value for key, value in self.weights.items() if (found := HEAD.fullmatch(key))}
        body = {key: value for key, value in self.weights.items() if not HEAD.fullmatch(key)}
        config = copy.deepcopy(self.config)
        config.task_type = model.peft_config[trained_adapter(model)].task_type
        config.modules_to_save = sorted(set(config.modules_to_save or ()) - set(HEADS)) or None
        # by their names: a pattern that was meant for another class of model may match more here
        config.target_modules = {found[1] for key in body if (found := LAYER.fullmatch(key))} or config.target_modules
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.init_lora_weights = True  # others take the base's weights apart
        try:
            add_frozen_adapter(model, self.adapter, config)
            outcome = set_peft_model_state_dict(model, body, adapter_name=self.adapter)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{self._said} does not fit the policy: {str(error).strip().splitlines()[0]}") from error
        if outcome.unexpected_keys or len(adapter_tensors(model, self.adapter)) != len(body):
            raise UserError(f"{self._said} does not fit the policy: it is for a model with other modules.")
        labels, width = head["weight"].shape
        made = nn.Linear(width, labels, bias="bias" in head)
        made.load_state_dict({name: value.float() for name, value in head.items()})
        return made.requires_grad_(False)

    def __call__(self, samples: Sequence[Sample], context: Mapping[str, Any]) -> Tensor:
        """The samples' scores `(B,)`; see shared.rewards.base.Reward."""
        if self._trainer is None:
            raise UserError(
                f"{self._said} is run on the policy of an online trainer, and there is none here: {WHOLE}."
            )
        prompts, completions = [sample.prompt for sample in samples], [sample.output for sample in samples]
        rows = self.answers.rows(self.__name__, prompts, completions)
        scores = in_batches(rows, lambda row: len(row["input_ids"]), self._scores, self.batch_size)
        return torch.tensor(scores, dtype=torch.float32)

    @torch.no_grad()
    def _scores(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        model, device = self._trainer.model_wrapped, self._trainer.args.device
        ids, attention = self.answers.padded(rows)
        batch = GroupedBatch.of_rows(ids, attention=attention, mask=attention).to(device)
        self.head.to(device)
        with evaluating(model), adapter_in_use(unwrapped(model), self.adapter):
            scores = self.policy.rewards(model, batch).tolist()
        reshard(self._trainer.model)
        return scores

    @property
    def _said(self) -> str:
        return f"The reward adapter {self.path}"


def _load(path: str, revision: str | None) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's configuration and weights; raises UserError where it is no reward of this kind."""
    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights

    said = f"The reward adapter {path}"
    require_available(path, file="adapter_config.json", what="reward adapter", revision=revision)
    hub = {} if revision is None else {"revision": revision}
    try:
        config = PeftConfig.from_pretrained(path, **hub)
        task = getattr(config.task_type, "value", config.task_type)
        if task != "SEQ_CLS" or not isinstance(config, LoraConfig):
            kind = type(config).__name__.removesuffix("Config")
            raise UserError(
                f"{said} is a {kind} for {task}: it has to be a LoRA for SEQ_CLS, as RewardTrainer saves where it "
                "is given peft_config."
            )
        if config.bias != "none":
            raise UserError(f"{said} has biases of its own (bias={config.bias!r}), which change the base: {WHOLE}.")
        weights = load_peft_weights(path, device="cpu", **hub)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{said} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    heads = [value for key, value in weights.items() if HEAD.fullmatch(key) and value.dim() == 2]
    if len(heads) != 1 or heads[0].shape[0] != 1:
        found = f"{heads[0].shape[0]} labels" if len(heads) == 1 else "no score head"
        raise UserError(f"{said} has {found}: it has to score by one linear head with one label.")
    return config, weights


def _place(name: str) -> str:
    """What a model's name stands for: built-in names and folders by where they are."""
    place = str(model_path(name)) if is_builtin(name) else name
    return str(Path(place).resolve()) if Path(place).exists() else place
