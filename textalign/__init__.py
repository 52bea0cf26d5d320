"""Trainers for text language models."""

import shared

if getattr(shared, "SUITE", None) != "trialign":
    raise ImportError(
        f"textalign needs the package 'shared' that is installed with it, but Python found another one first: "
        f"{list(getattr(shared, '__path__', ['?']))}. Rename that folder or start from another one."
    )

__getattr__, __dir__, __all__ = shared.lazy_exports(
    __name__,
    {
        "BCOConfig": "textalign.kto",
        "BCOTrainer": "textalign.kto",
        "BestOfNSampler": "textalign.best_of_n",
        "CPOConfig": "textalign.cpo",
        "CPOTrainer": "textalign.cpo",
        "DPOConfig": "textalign.dpo",
        "DPOTrainer": "textalign.dpo",
        "GKDConfig": "textalign.distillation",
        "GKDTrainer": "textalign.distillation",
        "GRPOConfig": "textalign.policy_gradient",
        "GRPOTrainer": "textalign.policy_gradient",
        "KTOConfig": "textalign.kto",
        "KTOTrainer": "textalign.kto",
        "LengthSampler": "textalign.best_of_n",
        "NashMDConfig": "textalign.online_preference",
        "NashMDTrainer": "textalign.online_preference",
        "ORPOConfig": "textalign.cpo",
        "ORPOTrainer": "textalign.cpo",
        "OnlineDPOConfig": "textalign.online_preference",
        "OnlineDPOTrainer": "textalign.online_preference",
        "PPOConfig": "textalign.ppo",
        "PPOTrainer": "textalign.ppo",
        "PRMConfig": "textalign.prm",
        "PRMTrainer": "textalign.prm",
        "RLOOConfig": "textalign.policy_gradient",
        "RLOOTrainer": "textalign.policy_gradient",
        "RewardConfig": "textalign.reward",
        "RewardTrainer": "textalign.reward",
        "SFTConfig": "textalign.sft",
        "SFTTrainer": "textalign.sft",
        "XPOConfig": "textalign.online_preference",
        "XPOTrainer": "textalign.online_preference",
        "BasePairwiseJudge": "shared.rewards.pairwise",
        "HfPairwiseJudge": "shared.rewards.pairwise_endpoint",
        "OpenAIPairwiseJudge": "shared.rewards.pairwise_endpoint",
        "DatasetMixtureConfig": "textalign.compat",
        "HfArgumentParser": "textalign.compat",
        "ModelConfig": "textalign.compat",
        "ScriptArguments": "textalign.compat",
        "TrlParser": "textalign.compat",
        "get_kbit_device_map": "textalign.compat",
        "get_peft_config": "textalign.compat",
        "get_quantization_config": "textalign.compat",
        "get_dataset": "textalign.compat",
        "create_reference_model": "shared.runtime.references",
    },
)
