"""Group-relative policy gradients on images, videos and text: GRPO and its family.

Each prompt's images and videos are processed once and seen once for the whole group, in writing and in the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from shared.data.rows import Rows
from shared.data.schema import Kind
from shared.errors import UserError
from shared.objectives.policy_gradient import PolicyGradient
from shared.trainers.config import AlignConfig
from shared.trainers.datasets import check_evaluation
from shared.trainers.online_config import OnlineConfig
from shared.trainers.reference_checks import check_reference_used
from shared.trainers.rewarding import check_best_metric, refuse_unknown, rewards_of, tell_doubts
from shared.trainers.token_policy_gradient import TokenPolicyGradientTrainer, objective_of
from shared.trainers.token_rollouts import engine_of, sampling_of, token_parts
from visionalign.families import placeholder_ids
from visionalign.online_options import VLMGRPOOptions
from visionalign.preparing import left_out_notes, load_vlm, prepare_rows, prepare_vlm, shards_the_model
from visionalign.prompting import VLMPrompts, prompt_collator
from visionalign.referenced import VLMReference


@dataclass
class VLMGRPOConfig(OnlineConfig, VLMGRPOOptions, AlignConfig):
    """Options of VLMGRPOTrainer: VLMGRPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "grpo_vlm"

    def _check_options(self) -> None:
        super()._check_options()
        if self.use_vllm:
            raise UserError(
                "use_vllm: a server's completions endpoint takes tokens alone, no images. Leave it out: completions "
                "are written in this process."
            )


class VLMGRPOTrainer(VLMReference, TokenPolicyGradientTrainer):
    """Group relative policy optimisation and its family on images and text.

    Shao et al. 2024, arXiv:2402.03300; `args.recipe` names presets of the others.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        reward_funcs: as textalign.GRPOTrainer; functions see the images too, in the prompts and as a column.
        args: options; the defaults where None.
        train_dataset: rows with `images` (or `image`), `videos` (or `video`) and a `prompt`, a text or a list of
            messages; their other columns go to the rewards.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's processor; loaded beside a model that is given by name.
        reward_processing_classes: tokenizers of reward models that are given as such, one a reward.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        ref_model: the reference that β holds the policy near to, a model or its name; see textalign.GRPOTrainer.

    Raises:
        UserError: a text-only model, options that cannot be followed, rewards that are not known.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: VLMGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        **unknown: Any,
    ):
        refuse_unknown(type(self).__name__, unknown)
        args = VLMGRPOConfig.of(args)
        longest = sampling_of(args)["train"].max_new_tokens
        objective: PolicyGradient = objective_of(args, max_actions=longest)
        check_reference_used(args, ref_model)
        if args.beta:
            self.take_reference(model, ref_model, args, train_dataset=train_dataset, peft_config=peft_config)
        check_evaluation(args, eval_dataset)
        run = prepare_vlm(model, args, processing_class)
        self.model_name, self.loaded_from = run.model_name, model if isinstance(model, str) else None
        _, train, held_out = prepare_rows(train_dataset, eval_dataset, {Kind.PROMPT_ONLY}, args)
        encoder = VLMPrompts(prompt_collator(run, args), args.max_prompt_length, needs_image=shards_the_model())
        if isinstance(train, Rows):
            encoder.prompts([train[at] for at in range(min(2, len(train)))])  # a mistake in every row shows here
        rewards = rewards_of(reward_funcs, args, train, processing_classes=reward_processing_classes)
        tell_doubts(args, len(rewards.names))
        check_best_metric(self, args, rewards.names, held_out)
        init = {} if quantization_config is None else {"quantization_config": quantization_config}
        model = load_vlm(model, args, peft_config=peft_config, **init)
        suppressed = placeholder_ids(run.processor, model.config, family=run.family)
        engine = engine_of(args, encoder.tokenizer, suppressed=suppressed)
        policy, actor = token_parts(model, args, encoder, engine)
        super().__init__(
            model,
            args,
            policy=policy,
            actor=actor,
            rewards=rewards,
            objective=objective,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=run.processor,
            callbacks=callbacks,
            optimizers=optimizers,
            ref_model=self.reference_given,
        )
        self.row_notes = left_out_notes(train)

    def title(self) -> str:
        return f"Vision-language GRPO: {self.model_name}"
