"""Trainers for diffusion models."""

import shared

if getattr(shared, "SUITE", None) != "trialign":
    raise ImportError(
        f"diffusionalign needs the package 'shared' that is installed with it, but Python found another one first: "
        f"{list(getattr(shared, '__path__', ['?']))}. Rename that folder or start from another one."
    )

__getattr__, __dir__, __all__ = shared.lazy_exports(
    __name__,
    {
        "AlignPropConfig": "diffusionalign.alignprop",
        "AlignPropTrainer": "diffusionalign.alignprop",
        "DDPOConfig": "diffusionalign.ddpo",
        "DDPOTrainer": "diffusionalign.ddpo",
        "DiffusionDPOConfig": "diffusionalign.preference",
        "DiffusionDPOTrainer": "diffusionalign.preference",
        "DiffusionNFTConfig": "diffusionalign.nft",
        "DiffusionNFTTrainer": "diffusionalign.nft",
        "FlowGRPOConfig": "diffusionalign.flow_grpo",
        "FlowGRPOTrainer": "diffusionalign.flow_grpo",
    },
)
