"""The run that all launches are compared with."""

import json

import pytest
from launching import PYTHON, WORKER, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the launches write; `base` is a saved model."""
    from shared.builtin.models import load_model, load_processor

    made = tmp_path_factory.mktemp("engines")
    load_model("builtin/vlm-small", seed=42).save_pretrained(made / "base")
    load_processor("builtin/vlm-small").save_pretrained(made / "base")
    return made


@pytest.fixture(scope="session")
def alone(folder):
    """What the worker's tasks give in one process."""
    (folder / "alone").mkdir()
    done = run(*PYTHON, WORKER, folder / "alone", "engine", "adapter", "evaluation", "brief")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "alone" / "facts.json").read_text())
