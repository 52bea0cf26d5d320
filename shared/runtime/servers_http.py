"""JSON over HTTP to an inference server: retries with back-off, and errors in words. The standard library alone.

Deliberately without streaming, connection pools and async: a request here is a batch of completions and takes seconds.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from shared.errors import UserError

PASSING = frozenset({429, 500, 502, 503, 504})  # statuses that a busy or restarting server gives for a while
LONGEST_PAUSE = 30.0  # seconds


class ServerError(UserError):
    """A server did not do what it was asked.

    Attributes:
        status: the HTTP status that it answered with; None where it gave no answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class JsonClient:
    """One server.

    Args:
        url: where it is, such as `http://localhost:8000`; a trailing `/v1` is taken off.
        api_key: sent as a bearer token.
        timeout: seconds that one answer may take.
        retries: how often a request is repeated where the connection fails or the status says "later".
        backoff: seconds before the first repetition; doubled each time.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 600.0, retries: int = 4, backoff: float = 0.5
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"The server's address is {url!r}: give it in full, such as http://localhost:8000.")
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise UserError(
                f"timeout={timeout}, retries={retries}, backoff={backoff}: the timeout must be positive, the others "
                "zero or more."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str, *, timeout: float | None = None, retries: int | None = None) -> Any:
        """What the server answers to a GET of `path`."""
        return self._send(path, None, timeout, retries)

    def post(self, path: str, body: Any = None, *, timeout: float | None = None, retries: int | None = None) -> Any:
        """What the server answers to a POST of `body` as JSON; None for an empty answer, a string where it is no JSON.

        Raises:
            ServerError: the server cannot be reached, is too slow, or refuses.
        """
        return self._send(path, json.dumps({} if body is None else body).encode(), timeout, retries)

    def _send(self, path: str, data: bytes | None, timeout: float | None, retries: int | None) -> Any:
        retries = self.retries if retries is None else retries
        timeout = self.timeout if timeout is None else timeout
        for attempt in range(retries + 1):
            try:
                return self._once(path, data, timeout)
            except ServerError as error:
                # a request that timed out is still being worked on: asking again would only add to the load
                if attempt == retries or not (error.status in PASSING or isinstance(error, _Unreachable)):
                    raise
            time.sleep(min(self.backoff * 2**attempt, LONGEST_PAUSE))
        raise AssertionError("the last attempt answers or raises")

    def _once(self, path: str, data: bytes | None, timeout: float) -> Any:
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                said = _reason(error.read().decode(errors="replace"))
            raise ServerError(f"{self.url}{path} answered {error.code}: {said}", error.code) from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise ServerError(
                    f"{self.url}{path} did not answer within {timeout:g} seconds: raise the timeout, or ask for less "
                    "at once."
                ) from error
            raise _Unreachable(f"{self.url}{path} cannot be reached: {cause}") from error
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            return text


class _Unreachable(ServerError):
    """The connection failed before there was an answer."""


def _reason(text: str) -> str:
    """The message in an error's body: `{"error": {"message": …}}`, `{"error": …}`, `{"detail": …}`, or the text."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = None
    if isinstance(body, dict):
        body = body.get("error", body.get("detail", body))
        body = body.get("message", body) if isinstance(body, dict) else body
        text = body if isinstance(body, str) else json.dumps(body)
    return text.strip()[:500] or "(no message)"
