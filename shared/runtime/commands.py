"""The commands: one row a trainer. `trialign NAME` and the script of that trainer run what the row names.

A new trainer joins by one row. Classes are named by dotted path and imported when the command runs, so the list of
commands costs nothing to show, and a misspelt option is told before any heavy library is loaded.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cached_property
from typing import Any, get_type_hints

from shared.errors import UserError
from shared.runtime.arguments import DataArguments, ModelArguments


@dataclass(frozen=True)
class Command:
    """What a command trains with. A class is written "module:Name".

    Args:
        options: the trainer's own options, a torch-free dataclass.
        config: the class that they become, together with transformers.TrainingArguments.
        trainer: the trainer.
        script: names scripts/NAME.py, which runs it, and the built-in recipe that it follows when no model is named.
        summary: one line for the list of commands.
        defaults: option -> default where it differs from the one that the dataclass declares.
        stem: the config's run_name_stem, which names the folder of a run that is given none; None: as the script.
    """

    options: str
    config: str
    trainer: str
    script: str
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    stem: str | None = None

    @cached_property
    def groups(self) -> tuple[type, type, type]:
        """The dataclasses of the command's options: model, data, the trainer's own."""
        model, data, own = ModelArguments, DataArguments, resolve(self.options)
        return tuple(with_defaults(group, self.defaults) for group in (model, data, own))


# An adapter is what diffusion models are fine-tuned with unless --no_use_peft asks for the whole denoiser.
LORA: Mapping[str, Any] = {"use_peft": True, "lora_dropout": 0.0, "lora_task_type": None}

COMMANDS: dict[str, Command] = {
    "sft": Command(
        options="textalign.sft_options:SFTOptions",
        config="textalign.sft:SFTConfig",
        trainer="textalign.sft:SFTTrainer",
        script="sft",
        summary="Fine-tune a language model on text, conversations, or prompts and completions.",
    ),
    "sft-gemma3": Command(
        options="textalign.sft_options:SFTOptions",
        config="textalign.sft:SFTConfig",
        trainer="textalign.sft:SFTTrainer",
        script="sft_gemma3",
        summary="Fine-tune Gemma 3: sft, which trains a small Gemma where no model is named.",
        stem="sft",
    ),
    "dpo": Command(
        options="textalign.preference_options:DPOOptions",
        config="textalign.dpo:DPOConfig",
        trainer="textalign.dpo:DPOTrainer",
        script="dpo",
        summary="Learn from pairs of a chosen and a rejected answer, against a reference model (the DPO family).",
    ),
    "cpo": Command(
        options="textalign.preference_options:CPOOptions",
        config="textalign.cpo:CPOConfig",
        trainer="textalign.cpo:CPOTrainer",
        script="cpo",
        summary="Learn from pairs without a reference model (CPO, SimPO, AlphaPO).",
    ),
    "orpo": Command(
        options="textalign.preference_options:ORPOOptions",
        config="textalign.cpo:ORPOConfig",
        trainer="textalign.cpo:ORPOTrainer",
        script="orpo",
        summary="Fine-tune on the chosen answers and away from the rejected ones in one stage (ORPO).",
    ),
    "kto": Command(
        options="textalign.preference_options:KTOOptions",
        config="textalign.kto:KTOConfig",
        trainer="textalign.kto:KTOTrainer",
        script="kto",
        summary="Learn from single answers marked good or bad (KTO).",
    ),
    "bco": Command(
        options="textalign.preference_options:BCOOptions",
        config="textalign.kto:BCOConfig",
        trainer="textalign.kto:BCOTrainer",
        script="bco",
        summary="Learn from single answers marked good or bad, as a binary classifier does (BCO).",
    ),
    "reward": Command(
        options="textalign.reward_options:RewardOptions",
        config="textalign.reward:RewardConfig",
        trainer="textalign.reward:RewardTrainer",
        script="reward_modeling",
        summary="Train a reward model on pairs of a chosen and a rejected answer.",
        defaults={"lora_task_type": "SEQ_CLS"},
    ),
    "prm": Command(
        options="textalign.reward_options:PRMOptions",
        config="textalign.prm:PRMConfig",
        trainer="textalign.prm:PRMTrainer",
        script="prm",
        summary="Train a process reward model on answers whose steps are marked right or wrong.",
        defaults={"lora_task_type": "TOKEN_CLS"},
    ),
    "grpo": Command(
        options="textalign.online_options:GRPOOptions",
        config="textalign.policy_gradient:GRPOConfig",
        trainer="textalign.policy_gradient:GRPOTrainer",
        script="grpo",
        summary="Learn from rewards of the model's own answers, compared in groups (GRPO and its family).",
    ),
    "rloo": Command(
        options="textalign.online_options:RLOOOptions",
        config="textalign.policy_gradient:RLOOConfig",
        trainer="textalign.policy_gradient:RLOOTrainer",
        script="rloo",
        summary="Learn from rewards of the model's own answers, each against the others of its prompt (RLOO).",
    ),
    "rloo-tldr": Command(
        options="textalign.online_options:RLOOOptions",
        config="textalign.policy_gradient:RLOOConfig",
        trainer="textalign.policy_gradient:RLOOTrainer",
        script="rloo_tldr",
        summary="Summaries by RLOO: rloo, which writes summaries of posts where no model is named.",
        stem="rloo",
    ),
    "online-dpo": Command(
        options="textalign.online_preference_options:OnlineDPOOptions",
        config="textalign.online_preference:OnlineDPOConfig",
        trainer="textalign.online_preference:OnlineDPOTrainer",
        script="dpo_online",
        summary="Learn from pairs of the model's own answers, of which rewards or a judge prefer one (online DPO).",
    ),
    "xpo": Command(
        options="textalign.online_preference_options:XPOOptions",
        config="textalign.online_preference:XPOConfig",
        trainer="textalign.online_preference:XPOTrainer",
        script="xpo",
        summary="Learn from pairs of an own answer and the reference's, with a bonus for exploration (XPO).",
    ),
    "nash-md": Command(
        options="textalign.online_preference_options:NashMDOptions",
        config="textalign.online_preference:NashMDConfig",
        trainer="textalign.online_preference:NashMDTrainer",
        script="nash_md",
        summary="Learn which own answers are preferred to those of a mixture with the reference (Nash-MD).",
    ),
    "ppo": Command(
        options="textalign.ppo_options:PPOOptions",
        config="textalign.ppo:PPOConfig",
        trainer="textalign.ppo:PPOTrainer",
        script="ppo",
        summary="Learn from rewards of the model's own answers with a value function that judges each token (PPO).",
    ),
    "ppo-tldr": Command(
        options="textalign.ppo_options:PPOOptions",
        config="textalign.ppo:PPOConfig",
        trainer="textalign.ppo:PPOTrainer",
        script="ppo_tldr",
        summary="Summaries by PPO: ppo, which writes summaries of posts where no model is named.",
        stem="ppo",
    ),
    "ppo-multi-adapter": Command(
        options="textalign.ppo_options:PPOOptions",
        config="textalign.ppo:PPOConfig",
        trainer="textalign.ppo:PPOTrainer",
        script="ppo_multi_adapter",
        summary="PPO with policy, critic and reward as adapters on one base, a small one where no model is named.",
        stem="ppo",
    ),
    "detoxification": Command(
        options="textalign.ppo_options:PPOOptions",
        config="textalign.ppo:PPOConfig",
        trainer="textalign.ppo:PPOTrainer",
        script="detoxification",
        summary="Teach a model to be less rude: ppo, which takes a small rude one where no model is named.",
        stem="ppo",
    ),
    "gkd": Command(
        options="textalign.distillation_options:GKDOptions",
        config="textalign.distillation:GKDConfig",
        trainer="textalign.distillation:GKDTrainer",
        script="gkd",
        summary="Distil a larger model into a smaller one, on the data's answers and on its own (GKD).",
    ),
    "sft-vlm": Command(
        options="visionalign.options:VLMSFTOptions",
        config="visionalign.sft:VLMSFTConfig",
        trainer="visionalign.sft:VLMSFTTrainer",
        script="sft_vlm",
        summary="Fine-tune a vision-language model on conversations about images.",
    ),
    "sft-vlm-gemma3": Command(
        options="visionalign.options:VLMSFTOptions",
        config="visionalign.sft:VLMSFTConfig",
        trainer="visionalign.sft:VLMSFTTrainer",
        script="sft_vlm_gemma3",
        summary="Fine-tune Gemma 3 on one image or several: sft-vlm, with a small Gemma 3 where no model is named.",
        stem="sft_vlm",
    ),
    "sft-vlm-smol": Command(
        options="visionalign.options:VLMSFTOptions",
        config="visionalign.sft:VLMSFTConfig",
        trainer="visionalign.sft:VLMSFTTrainer",
        script="sft_vlm_smol_vlm",
        summary="Fine-tune SmolVLM on one image or several: sft-vlm, with a small SmolVLM where no model is named.",
        stem="sft_vlm",
    ),
    "sft-video": Command(
        options="visionalign.options:VLMSFTOptions",
        config="visionalign.sft:VLMSFTConfig",
        trainer="visionalign.sft:VLMSFTTrainer",
        script="sft_video_llm",
        summary="Fine-tune a vision-language model on conversations about videos: sft-vlm, with a small video model.",
        stem="sft_vlm",
    ),
    "reward-vlm": Command(
        options="visionalign.reward_options:VLMRewardOptions",
        config="visionalign.reward:VLMRewardConfig",
        trainer="visionalign.reward:VLMRewardTrainer",
        script="reward_vlm",
        summary="Train a reward model on pairs of a chosen and a rejected answer about images.",
        defaults={"lora_task_type": "SEQ_CLS"},
    ),
    "dpo-vlm": Command(
        options="visionalign.preference_options:VLMDPOOptions",
        config="visionalign.preference:VLMDPOConfig",
        trainer="visionalign.preference:VLMDPOTrainer",
        script="dpo_vlm",
        summary="Learn from pairs of a chosen and a rejected answer about images, against a reference model.",
    ),
    "grpo-vlm": Command(
        options="visionalign.online_options:VLMGRPOOptions",
        config="visionalign.policy_gradient:VLMGRPOConfig",
        trainer="visionalign.policy_gradient:VLMGRPOTrainer",
        script="grpo_vlm",
        summary="Learn from rewards of a vision-language model's own answers, compared in groups.",
    ),
    "ddpo": Command(
        options="diffusionalign.options:DDPOOptions",
        config="diffusionalign.ddpo:DDPOConfig",
        trainer="diffusionalign.ddpo:DDPOTrainer",
        script="ddpo",
        summary="Learn from rewards of a diffusion model's own pictures, a denoising step as the action (DDPO).",
        defaults=LORA,
    ),
    "flow-grpo": Command(
        options="diffusionalign.options:FlowGRPOOptions",
        config="diffusionalign.flow_grpo:FlowGRPOConfig",
        trainer="diffusionalign.flow_grpo:FlowGRPOTrainer",
        script="flow_grpo",
        summary="Learn from rewards of a flow-matching model's own pictures, compared in groups (Flow-GRPO).",
        defaults=LORA,
    ),
    "alignprop": Command(
        options="diffusionalign.alignprop_options:AlignPropOptions",
        config="diffusionalign.alignprop:AlignPropConfig",
        trainer="diffusionalign.alignprop:AlignPropTrainer",
        script="alignprop",
        summary="Train a diffusion model on the gradient of a differentiable reward (AlignProp, DRaFT, ReFL).",
        defaults=LORA,
    ),
    "diffusion-dpo": Command(
        options="diffusionalign.preference_options:DiffusionDPOOptions",
        config="diffusionalign.preference:DiffusionDPOConfig",
        trainer="diffusionalign.preference:DiffusionDPOTrainer",
        script="diffusion_dpo",
        summary="Train a diffusion model on pairs of a preferred and another picture (Diffusion-DPO and its family).",
        defaults=LORA,
    ),
    "diffusion-nft": Command(
        options="diffusionalign.nft_options:DiffusionNFTOptions",
        config="diffusionalign.nft:DiffusionNFTConfig",
        trainer="diffusionalign.nft:DiffusionNFTTrainer",
        script="diffusion_nft",
        summary="Train a diffusion model on rewards of its own pictures by the forward process (DiffusionNFT).",
        defaults=LORA,
    ),
}


def command(name: str, others: Iterable[str] = ()) -> Command:
    """The command of this name; `others` are words that may stand in its place, for the hint.

    Raises:
        UserError: there is none.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    meant = difflib.get_close_matches(name.lower().replace("_", "-"), [*COMMANDS, *others], n=1, cutoff=0.5)
    hint = f" Did you mean {meant[0]}?" if meant else ""
    raise UserError(f"{name}: unknown command.{hint} (trialign --help lists all)")


def resolve(path: str) -> Any:
    """What "module:Name" stands for, imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def with_defaults(group: type, defaults: Mapping[str, Any]) -> type:
    """The dataclass with other defaults for those of its fields that are named; itself where there are none."""
    hints = get_type_hints(group)
    changed = []
    for item in fields(group):
        if item.name in defaults:
            value = defaults[item.name]
            made = {"default_factory": lambda v=value: type(v)(v)} if isinstance(value, list) else {"default": value}
            changed.append((item.name, hints[item.name], field(**made, metadata=item.metadata)))
    if not changed:
        return group
    return make_dataclass(group.__name__, changed, bases=(group,), namespace={"__doc__": group.__doc__})
