"""New weights for a vLLM server: written to a folder that both sides see, then loaded on request."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError
from shared.http import JsonClient, ServerError
from shared.runtime.servers_weights import write_adapter, write_weights

WEIGHTS = ("full", "lora")


class WeightSync:
    """What one process sends to one server.

    Every version has a folder and a name of its own, which no other run shares: a server may keep what it read of a
    path, and its prefix cache tells adapters apart by name alone.

    Args:
        client: the server.
        served: the name of the model that it started with.
        command: what starts a server that takes new weights, for errors.
        folder: where weights are written.
        server_folder: the same folder as the server sees it; None: by the same name.
        weights: one of WEIGHTS.
        dtype: of the floating-point weights in the files of `full`; None: the model's.
    """

    def __init__(
        self,
        client: JsonClient,
        served: str,
        command: str,
        *,
        folder: Path,
        server_folder: str | None = None,
        weights: str = "full",
        dtype: torch.dtype | None = None,
    ):
        if weights not in WEIGHTS:
            raise UserError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}.")
        self._client, self._served, self._command = client, served, command
        self._folder = folder.absolute()
        self._server_folder = PurePosixPath(server_folder) if server_folder else self._folder
        self._weights, self._dtype = weights, dtype
        self._run, self._version, self._last = uuid.uuid4().hex[:8], 0, None

    def send(self, model: Any, state_dict: Mapping[str, Tensor] | None = None) -> str:
        """Write the weights and have the server load them; the name of the model to ask for from now on.

        Raises:
            UserError: they cannot be written as a server needs them, or it does not take them.
        """
        self._version += 1
        folder = self._folder / f"policy-{self._run}-{self._version:06d}"
        folder.mkdir(parents=True)
        try:
            if self._weights == "lora":
                written = write_adapter(model, folder, state_dict=state_dict)
            else:
                written = write_weights(model, folder, state_dict=state_dict, dtype=self._dtype)
            path = str(self._server_folder / written.relative_to(self._folder))
            served = self._load_adapter(folder.name, path) if self._weights == "lora" else self._reload(path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self._last is not None:
            shutil.rmtree(self._last, ignore_errors=True)
        self._last = folder
        return served

    def _reload(self, path: str) -> str:
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}, path, once=True)
        # keys and values of earlier weights must not be used again
        answer = self._ask("/reset_prefix_cache?reset_running_requests=true", {}, path)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self._client.url} kept its prefix cache: are there other users of this server?")
        return self._served

    def _load_adapter(self, name: str, path: str) -> str:
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, path, once=True)
        if self._last is not None:
            self._ask("/v1/unload_lora_adapter", {"lora_name": self._last.name}, path)
        return name

    def _ask(self, where: str, body: dict[str, Any], path: str, *, once: bool = False) -> Any:
        try:
            return self._client.post(where, body, retries=0 if once else None)
        except ServerError as error:
            if error.status is None:
                raise
            if error.status == 404:
                raise ServerError(
                    f"{error}. It takes no new weights unless started with: {self._command}", 404
                ) from error
            raise ServerError(
                f"{error}. It must be able to read {path}; reload_weights must take a weights_path (vLLM of 2026 or "
                "later), and an adapter's rank must be within --max-lora-rank.",
                error.status,
            ) from error
