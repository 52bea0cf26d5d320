"""Supervised losses of a token, from its log-probability alone.

Label smoothing is not here: it needs the log-probabilities of the whole vocabulary at each token.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def nll(logp: Tensor) -> Tensor:
    """Negative log-likelihood, `-logp`.

    Args:
        logp: any shape, log-probabilities of the target tokens.

    Returns:
        The loss of each token, same shape.
    """
    return -logp


def dft(logp: Tensor) -> Tensor:
    """Dynamic Fine-Tuning, `-sg(p) * logp` with p = exp(logp): the gradient of nll, scaled by the token's probability.

    Removes the inverse-probability weight that supervised fine-tuning has when it is read as a policy gradient
    (Wu et al. 2025, arXiv:2508.05629).

    Args:
        logp: any shape, log-probabilities of the target tokens.

    Returns:
        The loss of each token, same shape.
    """
    return -logp.detach().exp() * logp


SUPERVISED: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}


def supervised_loss(name: str) -> Callable[[Tensor], Tensor]:
    """The loss of that name.

    Raises:
        ValueError: no loss has that name.
    """
    if name not in SUPERVISED:
        raise ValueError(f"Unknown supervised loss {name!r}: choose one of {', '.join(SUPERVISED)}.")
    return SUPERVISED[name]
