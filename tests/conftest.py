"""What all tests share: a quiet, offline CPU, and tiny models that are built once a session."""

import os
from pathlib import Path

# Read when torch starts: without it two busy cores spend most of a step waiting for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny("qwen2_vl")` is the folder of the tiny model of that family; `tiny("lm")` that of the text-only one."""
    from tiny import build_lm, build_vlm

    built = {}

    def get(name: str) -> Path:
        if name == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            built[name] = build_lm(directory) if name == "lm" else build_vlm(name, directory)
        return built[name]

    return get
