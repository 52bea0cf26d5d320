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
        "VLMGRPOConfig": "visionalign.policy_gradient",
        "VLMGRPOTrainer": "visionalign.policy_gradient",
        "VLMSFTConfig": "visionalign.sft",
        "VLMSFTTrainer": "visionalign.sft",
        "VLMCollator": "visionalign.collators",
        "family_of": "visionalign.families",
    },
)
