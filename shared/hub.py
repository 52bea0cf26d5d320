"""Whether a hub id can be had at all, asked once: the hub's own client retries for half a minute before it says so."""

from __future__ import annotations

import os
from pathlib import Path

from shared.errors import UserError


def require_available(
    name: str, *, file: str, what: str, repo_type: str = "model", revision: str | None = None
) -> None:
    """Raise UserError unless `name` is a local folder, is in the hub's cache, or the hub can be reached.

    Args:
        name: a folder or a hub id.
        file: a file that every such repository has: in the cache it proves that the id was had before.
        what: what the name stands for, for the message ("model", "processor", "data set").
        repo_type: "model" or "dataset".
        revision: branch, tag or commit.

    Raises:
        UserError: the name is a path that does not exist, or the hub cannot be reached and holds no copy here.
    """
    if Path(name).exists():
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{what} {name!r}: no such folder or file. Give an existing path or a hub id (owner/name).")

    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision, repo_type=repo_type)
    if isinstance(cached, str):
        return
    offline = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else _unreachable(constants.ENDPOINT)
    if offline:
        raise UserError(
            f"{what} {name!r} is not a local path and not in the hub's cache on this machine, and the hub cannot be "
            f"asked for it ({offline}). Check the name and the network, or give the path of a local copy."
        )


def _unreachable(endpoint: str) -> str | None:
    from huggingface_hub.utils import get_session, httpx

    timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10))
    try:
        get_session().head(endpoint, timeout=timeout)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None
