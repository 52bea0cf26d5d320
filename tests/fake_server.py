"""A local server that speaks as much of vLLM's HTTP interface as the suite uses, around a tiny model on the CPU.

    with FakeServer(folder) as server:
        ServerGenerator(server.url, tokenizer, sync_dir=...)

It keeps vLLM's habits that a client can trip over: a group of greedy completions is refused, settings that are left
out come from the model's own defaults, answers of earlier weights stay in the prefix cache until it is reset, what
needs development mode or dynamic adapters is not found without it. `routes` answers other paths, for tests of other
clients.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

DEFAULTS = {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.1}


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class FakeServer:
    """A server on a free port of this machine, while it is entered as a context.

    Args:
        folder: a causal language model with its tokenizer; None: only `routes` answer.
        name: what `/v1/models` lists.
        dev_mode: answer `/collective_rpc`, `/reset_prefix_cache` and `/server_info`.
        adapters: answer `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.
        logprobs_mode: `raw_logprobs` or `processed_logprobs`.
        max_model_len: tokens.
        routes: path -> function of the request's body that gives a JSON answer, or raises Refused.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        name: str = "tiny",
        dev_mode: bool = True,
        adapters: bool = False,
        logprobs_mode: str = "processed_logprobs",
        max_model_len: int = 512,
        routes: dict[str, Callable[[Any], Any]] | None = None,
    ):
        self.name, self.logprobs_mode, self.max_model_len = name, logprobs_mode, max_model_len
        self.requests: list[tuple[str, Any]] = []  # path and body of all that came
        self.headers: list[dict[str, str]] = []
        # what the next requests of a path get instead: a status, "drop" (closed connection), or seconds of delay
        self.failures: dict[str, list[int | str | float]] = {}
        self.routes: dict[str, Callable[[Any], Any]] = {"/health": lambda body: None, **(routes or {})}
        self.adapters: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._cache: dict[str, list[dict]] = {}
        self._server: ThreadingHTTPServer | None = None
        if folder is None:
            return
        from transformers import AutoTokenizer

        self.folder = Path(folder)
        self.model = _load(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.routes |= {"/v1/models": self._models, "/tokenize": self._tokenize, "/v1/completions": self._complete}
        if dev_mode:
            self.routes |= {
                "/server_info": self._info, "/collective_rpc": self._rpc, "/reset_prefix_cache": self._reset
            }  # fmt: skip
        if adapters:
            self.routes |= {"/v1/load_lora_adapter": self._load_lora, "/v1/unload_lora_adapter": self._unload_lora}

    @property
    def url(self) -> str:
        """Where the server is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = False  # what is still being answered is waited for when the server closes
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def seen(self, path: str) -> list[Any]:
        """The bodies of the requests to a path, in order."""
        return [body for each, body in self.requests if each.partition("?")[0] == path]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON for a request; None for a connection that is to be dropped."""
        self.requests.append((path, body))
        path = path.partition("?")[0]
        if self.failures.get(path):
            failure = self.failures[path].pop(0)
            if failure == "drop":
                return 0, None
            if isinstance(failure, int):
                return failure, {"error": {"message": "made to fail"}}
            time.sleep(failure)
        if path not in self.routes:
            return 404, {"detail": "Not Found"}
        try:
            with self._lock:
                return 200, self.routes[path](body)
        except Refused as error:
            return error.status, {"error": {"message": str(error)}}

    def _models(self, body: Any) -> dict:
        base = {"id": self.name, "parent": None, "max_model_len": self.max_model_len}
        return {"data": [base, *({"id": name, "parent": self.name} for name in self.adapters)]}

    def _tokenize(self, body: dict) -> dict:
        ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        return {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len}

    def _info(self, body: Any) -> dict:
        return {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}}

    def _rpc(self, body: dict) -> dict:
        if body["method"] != "reload_weights":
            raise Refused(500, f"no method {body['method']}")
        path = Path(body.get("kwargs", {}).get("weights_path", self.folder))
        if not list(path.glob("*.safetensors")):
            raise Refused(500, f"no weights in {path}")
        self.model = _load(path)
        return {"results": [None]}

    def _reset(self, body: Any) -> dict:
        self._cache.clear()
        return {"success": True}

    def _load_lora(self, body: dict) -> str:
        from peft import PeftModel

        if body["lora_name"] in self.adapters:
            raise Refused(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        self.adapters[body["lora_name"]] = PeftModel.from_pretrained(_load(self.folder), body["lora_path"]).eval()
        return "Success"

    def _unload_lora(self, body: dict) -> str:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Refused(404, "no such adapter")
        return "Success"

    def _complete(self, body: dict) -> dict:
        if body["model"] != self.name and body["model"] not in self.adapters:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        body = {**DEFAULTS, "n": 1, "max_tokens": 16, "seed": None, "stop": [], "stop_token_ids": [], **body}
        if body["temperature"] == 0 and body["n"] > 1:
            raise Refused(400, "n must be 1 when using greedy sampling")
        choices = []
        for prompt in body["prompt"]:
            key = json.dumps([prompt, {name: value for name, value in body.items() if name != "prompt"}])
            if key not in self._cache or body["temperature"] > 0:
                self._cache[key] = self._rows(self.adapters.get(body["model"], self.model), prompt, body)
            choices += self._cache[key]
        # out of order: a client has to read the index
        return {"choices": [{**choice, "index": index} for index, choice in enumerate(choices)][::-1]}

    def _rows(self, model: Any, prompt: list[int], body: dict) -> list[dict]:
        """`n` completions of one prompt, by plain forward passes over the whole row."""
        rows = []
        for index in range(body["n"]):
            random = torch.Generator()
            random.seed() if body["seed"] is None else random.manual_seed(body["seed"] + index)
            rows.append(self._row(model, prompt, body, random))
        return rows

    @torch.no_grad()
    def _row(self, model: Any, prompt: list[int], body: dict, random: torch.Generator) -> dict:
        from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

        ends = {model.generation_config.eos_token_id, *body["stop_token_ids"]}
        ids, values, reason = [], [], "length"
        while len(ids) < body["max_tokens"] and reason == "length":
            row = torch.tensor([prompt + ids])
            raw = logits = model(input_ids=row).logits[:, -1].float()
            logits = RepetitionPenaltyLogitsProcessor(body["repetition_penalty"])(row, logits)
            if body["temperature"] > 0:
                logits = logits / body["temperature"]
                logits = MinPLogitsWarper(body["min_p"])(row, logits) if body["min_p"] else logits
                logits = TopKLogitsWarper(body["top_k"])(row, logits) if body["top_k"] else logits
                logits = TopPLogitsWarper(body["top_p"])(row, logits)
                token = int(torch.multinomial(logits.softmax(-1)[0], 1, generator=random))
            else:
                token = int(logits.argmax())
            told = raw if self.logprobs_mode == "raw_logprobs" else logits
            ids.append(token)
            values.append(float(told.log_softmax(-1)[0, token]))
            if token in ends or any(stop in self.tokenizer.decode(ids) for stop in body["stop"]):
                reason = "stop"
        choice = {"text": self.tokenizer.decode(ids), "finish_reason": reason}
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": values}
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
        return choice


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            server.headers.append(dict(self.headers))
            status, answer = server.answer(self.path, body)
            if status == 0:
                return
            data = b"" if answer is None else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:  # the client did not wait
                pass

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
