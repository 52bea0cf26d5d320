"""What is asked of an inference server before it is used: whether it is there, and serves what is trained."""

from __future__ import annotations

import time
from typing import Any

from shared.errors import UserError
from shared.http import JsonClient, ServerError

PROBE = (
    "The quick brown fox: 3 + 4 = 7, naïve café\n"  # a text on which two tokenizers are unlikely to agree by chance
)
NOT_OFFERED = (403, 404, 405)  # statuses of a path that a server does not have


def serve_command(model: str = "MODEL", *, weights: str = "full", port: int = 8000) -> str:
    """The command that starts a vLLM server which takes new weights as `ServerGenerator(weights=…)` sends them."""
    shown = f"vllm serve {model} --port {port} --logprobs-mode processed_logprobs"
    if weights == "lora":
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {shown} --enable-lora --max-lora-rank 64"
    return f"VLLM_SERVER_DEV_MODE=1 {shown}"


def served_model(client: JsonClient, wanted: str | None, command: str, *, wait: float = 0.0) -> tuple[str, int | None]:
    """Name and longest row (tokens; None: not told) of the served model.

    Args:
        wanted: the model's name; None: the only one.
        command: what starts a server, for the error.
        wait: seconds for a server that is still starting.

    Raises:
        UserError: no server is there, or not one with this model.
    """
    until = time.monotonic() + wait
    while True:
        try:
            answer = client.get("/v1/models", timeout=min(client.timeout, 30.0), retries=0)
            break
        except ServerError as error:
            if time.monotonic() >= until or (error.status is not None and error.status < 500):
                raise ServerError(f"{error}. Is a server running? Start it with: {command}", error.status) from error
        time.sleep(min(1.0, client.backoff))
    cards = answer.get("data", []) if isinstance(answer, dict) else []
    found = {card["id"]: card for card in cards if not card.get("parent")}  # an adapter has a parent
    if wanted is None and len(found) == 1:
        wanted = next(iter(found))
    if wanted not in found:
        raise UserError(
            f"{client.url} serves {', '.join(sorted(found)) or 'no model'}"
            + (", and no model was named: give model=." if wanted is None else f", not {wanted}.")
        )
    return wanted, found[wanted].get("max_model_len")


def logprobs_mode_of(client: JsonClient) -> str | None:
    """How the server was told to compute log-probs; None where it does not say (it does in development mode)."""
    answer = _optional(client.get, "/server_info?config_format=json")
    for key in ("vllm_config", "model_config"):
        answer = answer.get(key) if isinstance(answer, dict) else None
    return answer.get("logprobs_mode") if isinstance(answer, dict) else None


def check_tokenizer(client: JsonClient, served: str, tokenizer: Any) -> None:
    """Compare the server's tokens for a short text with the policy's, where it offers `/tokenize`.

    Raises:
        UserError: they differ.
    """
    body = {"model": served, "prompt": PROBE, "add_special_tokens": False}
    answer = _optional(client.post, "/tokenize", body)
    if not isinstance(answer, dict) or "tokens" not in answer:
        return
    mine = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if answer["tokens"] != mine:
        raise UserError(
            f"{client.url} serves {served} with another tokenizer than the policy's: {PROBE!r} is "
            f"{answer['tokens'][:8]}… there and {mine[:8]}… here. Serve the model that is trained."
        )


def _optional(ask: Any, *request: Any) -> Any:
    try:
        return ask(*request)
    except ServerError as error:
        if error.status in NOT_OFFERED:
            return None
        raise
