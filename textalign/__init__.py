"""Trainers for text language models."""

import shared

if getattr(shared, "SUITE", None) != "trialign":
    raise ImportError(
        f"textalign needs the package 'shared' that is installed with it, but Python found another one first: "
        f"{list(getattr(shared, '__path__', ['?']))}. Rename that folder or start from another one."
    )
