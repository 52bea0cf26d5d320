"""Completions from a vLLM server: a second engine for generation, in another process and on other devices.

What the server must be started with (`serve_command` in `servers_start` gives the line): `--logprobs-mode
processed_logprobs`, without which its log-probs are those of temperature 1; and for new weights either
`VLLM_SERVER_DEV_MODE=1`, which opens `/collective_rpc`, or `--enable-lora` with
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`. Both let whoever reaches the port change what is served: keep it on a private
network.

New weights go through files in a folder that both sides see. Deliberately not here: NCCL or CUDA handles into the
server, which need vLLM in this process too; images, which its completions endpoint does not take as tokens; starting
or stopping a server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError
from shared.http import JsonClient, ServerError
from shared.runtime.generation import Completions, Sampling
from shared.runtime.servers_start import check_tokenizer, logprobs_mode_of, serve_command, served_model
from shared.runtime.servers_sync import WEIGHTS, WeightSync

logger = logging.getLogger(__name__)

# inputs of a prompt without images; all but the first two follow from the tokens alone
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"})


class ServerGenerator:
    """A `Generator` over vLLM's `/v1/completions`, which is sent new weights by `update_weights`.

    Its log-probs come from other kernels than the trainer's (`exact` is False): the trainer computes its own, and may
    weigh by their ratio (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training"). That needs log-probs under softmax(logits / temperature) of the full vocabulary,
    which a server tells only in some settings; `Completions.logp` is None in the others, with one warning:

    - `--logprobs-mode processed_logprobs`: any temperature, but no top-k, top-p, min-p and repetition penalty;
    - `--logprobs-mode raw_logprobs` (vLLM's default): temperature 1 (or greedy) alone;
    - unknown, because neither `logprobs_mode` nor the server says it: where both of the above agree.

    Args:
        base_url: where the server is, such as `http://localhost:8000`.
        tokenizer: the policy's; the server's is compared with it, and its end-of-sequence token ends a completion.
        sync_dir: a folder for weights that the server can read too. Each update is written to a new sub-folder, and
            the one before is removed.
        server_sync_dir: the same folder as the server sees it, where that differs.
        weights: `full` (whole weights, adapters merged, by `reload_weights`) or `lora` (the adapter alone, for a PEFT
            model with plain LoRA whose base model is what the server was started with).
        dtype: of the floating-point weights that are written with `full`; None: the model's.
        model: the served model's name; None: the only one that the server lists.
        logprobs_mode: what the server was started with, for a server that does not tell; None: ask it.
        end_ids: tokens that end a completion, besides the tokenizer's and the model's.
        seeded: draw a seed for each prompt from `random`, so that a run can be repeated as far as the server's own
            numerics allow; this costs the server some speed.
        concurrency: requests under way at once; all prompts are sent at once, in so many parts.
        api_key: sent as a bearer token.
        timeout: seconds that one answer (a batch of completions, a reload) may take.
        retries: how often a request is repeated where the connection fails or the server is busy, with back-off.
        backoff: seconds before the first repetition; doubled each time.
        startup_timeout: seconds to wait for a server that is still starting.

    Raises:
        UserError: the server cannot be reached, or serves something else than the policy.
    """

    exact = False

    def __init__(
        self,
        base_url: str,
        tokenizer: Any,
        *,
        sync_dir: str | Path,
        server_sync_dir: str | None = None,
        weights: str = "full",
        dtype: torch.dtype | None = None,
        model: str | None = None,
        logprobs_mode: str | None = None,
        end_ids: Collection[int] = (),
        seeded: bool = False,
        concurrency: int = 64,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        backoff: float = 0.5,
        startup_timeout: float = 0.0,
    ):
        if weights not in WEIGHTS:
            raise UserError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}.")
        if concurrency < 1:
            raise UserError(f"concurrency={concurrency}: at least one request must be under way.")
        self._client = JsonClient(base_url, api_key=api_key, timeout=timeout, retries=retries, backoff=backoff)
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._seeded, self._concurrency, self._warned = seeded, concurrency, False
        command = serve_command(getattr(tokenizer, "name_or_path", "") or "MODEL", weights=weights)
        self._served, self._max_length = served_model(self._client, model, command, wait=startup_timeout)
        self._mode = logprobs_mode or logprobs_mode_of(self._client)
        check_tokenizer(self._client, self._served, tokenizer)
        self._sync = WeightSync(
            self._client,
            self._served,
            command,
            folder=Path(sync_dir),
            server_folder=server_sync_dir,
            weights=weights,
            dtype=dtype,
        )

    def generate(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        group_size: int,
        sampling: Sampling,
        *,
        random: torch.Generator | None = None,
    ) -> Completions:
        """`group_size` completions of each prompt, from the weights that the server holds.

        Args:
            model: the policy; only its generation configuration is read.
            inputs: left-padded `input_ids` `(P, L)` and `attention_mask`, without images.
            group_size: completions a prompt.
            sampling: how tokens are drawn.
            random: read for seeds where the engine is `seeded`.

        Raises:
            UserError: a prompt has images or does not fit, or the server fails.
        """
        if other := sorted(set(inputs) - TEXT_INPUTS):
            raise UserError(
                f"The prompts carry {', '.join(other)}, and a server's completions endpoint takes tokens alone: use "
                "the in-process engine for prompts with images."
            )
        mask = inputs["attention_mask"].bool()
        prompts = [row[kept].tolist() for row, kept in zip(inputs["input_ids"].cpu(), mask.cpu(), strict=True)]
        self._check_lengths(prompts, sampling.max_new_tokens)
        copies = 1
        if sampling.temperature == 0:  # vLLM refuses several greedy completions; they are all the same
            copies, group_size = group_size, 1
        body = self._request(model, group_size, sampling)
        parts = self._parts(prompts, random)
        pool = ThreadPoolExecutor(max_workers=self._concurrency)
        try:
            answers = list(pool.map(lambda part: self._complete({**body, **part}), parts))
        finally:
            pool.shutdown(cancel_futures=True)
        choices = [choice for answer in answers for choice in answer for _ in range(copies)]
        return self._completions(choices, sampling)

    def update_weights(
        self,
        model: Any,
        *,
        state_dict: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Let the server go on with the model's present weights. Every process calls this; the main one sends.

        Args:
            model: the policy, wrapped for training or not.
            state_dict: the whole weights (of all of the model, by its own names) where the processes hold shards
                (ZeRO-3, FSDP); or a function that gathers them, which is called on every process. Only the main
                process needs to get any.

        Raises:
            UserError: on every process, where the weights cannot be written or the server does not take them.
        """
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, extract_model_from_parallel

        if callable(state_dict):
            state_dict = state_dict()
        process = PartialState()
        process.wait_for_everyone()  # nobody asks for completions any more
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if process.is_main_process:
            try:
                outcome[0] = self._sync.send(extract_model_from_parallel(model), state_dict)
            except Exception as error:  # whatever it is, the other processes wait to hear of it
                failure, outcome[1] = error, str(error)
        if process.num_processes > 1:
            outcome = broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise UserError(f"The main process could not send new weights to the server: {outcome[1]}")
        self._served = outcome[0]

    def _check_lengths(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        longest = max(map(len, prompts), default=0)
        if self._max_length is not None and longest + new > self._max_length:
            raise UserError(
                f"A prompt of {longest} tokens and {new} new ones do not fit into the server's {self._max_length}: "
                "start it with a larger --max-model-len, or ask for shorter completions."
            )

    def _request(self, model: Any, group_size: int, sampling: Sampling) -> dict[str, Any]:
        """What all prompts share. Every setting is sent: the server would fill a gap from the model's own defaults."""
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {*(ends if isinstance(ends, list) else [ends]), self._tokenizer.eos_token_id, *self._end_ids}
        return {
            "model": self._served,
            "n": group_size,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(end for end in ends if end is not None),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def _parts(self, prompts: list[list[int]], random: torch.Generator | None) -> list[dict[str, Any]]:
        """The prompts in at most `concurrency` requests; one a request where each needs a seed of its own."""
        if self._seeded and random is not None:
            seeds = torch.randint(2**31, (len(prompts),), generator=random, device=random.device).tolist()
            return [{"prompt": [prompt], "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        size = -(-len(prompts) // self._concurrency)
        return [{"prompt": prompts[start : start + size]} for start in range(0, len(prompts), max(size, 1))]

    def _complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of one request, prompt by prompt."""
        answer = self._client.post("/v1/completions", body)
        choices = answer.get("choices", []) if isinstance(answer, dict) else []
        if len(choices) != len(body["prompt"]) * body["n"]:
            raise ServerError(
                f"{self._client.url} gave {len(choices)} completions for {len(body['prompt'])} prompts with "
                f"{body['n']} each."
            )
        for choice in choices:
            if choice.get("token_ids") is None:
                raise ServerError(
                    f"{self._client.url} does not give the tokens of its completions: it must be a vLLM server that "
                    "knows return_token_ids (0.10.2 or later)."
                )
            if choice.get("finish_reason") not in ("stop", "length"):
                raise ServerError(
                    f"{self._client.url} broke a completion off (finish_reason {choice.get('finish_reason')!r})."
                )
        return sorted(choices, key=lambda choice: choice["index"])

    def _completions(self, choices: list[dict[str, Any]], sampling: Sampling) -> Completions:
        ids = [torch.tensor(choice["token_ids"], dtype=torch.long) for choice in choices]
        finished = [choice["finish_reason"] == "stop" for choice in choices]
        logp = None
        if self._tells_logp(sampling):
            values = [(choice.get("logprobs") or {}).get("token_logprobs") or [] for choice in choices]
            if any(len(row) != len(each) or None in row for row, each in zip(values, ids, strict=True)):
                raise ServerError(f"{self._client.url} gave no log-prob for some of its tokens.")
            logp = [torch.tensor(row, dtype=torch.float32) for row in values]
        elif not self._warned:
            self._warned = True
            logger.warning(
                "The server's log-probs (logprobs mode %s) are not those of softmax(logits / temperature) with these "
                "sampling settings, so there is no importance correction: start it with --logprobs-mode "
                "processed_logprobs, and sample without top-k, top-p, min-p and repetition penalty.",
                self._mode or "unknown",
            )
        return Completions(ids=ids, logp=logp, finished=finished)

    def _tells_logp(self, sampling: Sampling) -> bool:
        whole = not sampling.top_k and sampling.top_p == 1 and not sampling.min_p and sampling.repetition_penalty == 1
        unscaled = sampling.temperature in (0, 1)
        told = {"processed_logprobs": whole, "raw_logprobs": unscaled, None: whole and unscaled}
        return told.get(self._mode, False)
