"""Trainers for vision-language models."""

import shared

if getattr(shared, "SUITE", None) != "trialign":
    raise ImportError(
        f"visionalign needs the package 'shared' that is installed with it, but Python found another one first: "
        f"{list(getattr(shared, '__path__', ['?']))}. Rename that folder or start from another one."
    )

__getattr__, __dir__, __all__ = shared.lazy_exports(
    __name__,
    {
        "VLMDPOConfig": "visionalign.preference",
        "VLMDPOTrainer": "visionalign.preference",
        "VLMGRPOConfig": "visionalign.policy_gradient",
        "VLMGRPOTrainer": "visionalign.policy_gradient",
        "VLMRewardConfig": "visionalign.reward",
        "VLMRewardModel": "visionalign.rewards",
        "VLMRewardTrainer": "visionalign.reward",
        "VLMSFTConfig": "visionalign.sft",
        "VLMSFTTrainer": "visionalign.sft",
        "VLMCollator": "visionalign.collators",
        "VLMPairCollator": "visionalign.pairs",
        "family_of": "visionalign.families",
    },
)
