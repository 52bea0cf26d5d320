"""JSON over HTTP to a model's server: retries with back-off, and errors in words. The standard library alone.

Deliberately without streaming, connection pools and async: a request here takes seconds.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from shared.errors import UserError

BUSY = 429  # a status that passes, as those from 500 on do: what a busy or restarting server gives for a while
LONGEST_PAUSE = 60.0  # seconds between two attempts, whatever a server asks for


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
        api_key: sent as a bearer token, to this server alone: not to where it redirects.
        timeout: seconds that one answer may take.
        retries: how often a request is repeated where the connection fails or the status says "later".
        backoff: seconds before the first repetition; doubled each time. A server's own Retry-After counts if longer.
        repeat_slow: repeat a request that timed out too. A server still works on it, so that this adds to its load.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 4,
        backoff: float = 0.5,
        repeat_slow: bool = False,
    ):
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc:  # the address is shown in errors and reports
            raise UserError("The server's address holds a login: leave it out, and give a key as an option.")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"The server's address is {url!r}: give it in full, such as http://localhost:8000.")
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise UserError(
                f"timeout={timeout}, retries={retries}, backoff={backoff}: the timeout must be positive, the others "
                "zero or more."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff, self.repeat_slow = timeout, retries, backoff, repeat_slow
        self._api_key = api_key

    def get(self, path: str, *, timeout: float | None = None, retries: int | None = None) -> Any:
        """What the server answers to a GET of `path`."""
        return self._send(path, None, timeout, retries, None)

    def post(
        self,
        path: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        stop: threading.Event | None = None,
    ) -> Any:
        """What the server answers to a POST of `body` as JSON; None for an empty answer, a string where it is no JSON.

        Args:
            stop: once it is set, the request is not repeated.

        Raises:
            ServerError: the server cannot be reached, is too slow, or refuses.
        """
        return self._send(path, json.dumps({} if body is None else body).encode(), timeout, retries, stop)

    def _send(
        self, path: str, data: bytes | None, timeout: float | None, retries: int | None, stop: threading.Event | None
    ) -> Any:
        retries = self.retries if retries is None else retries
        timeout = self.timeout if timeout is None else timeout
        stop = threading.Event() if stop is None else stop
        for attempt in range(retries + 1):
            try:
                return self._once(path, data, timeout)
            except _Passing as error:
                if attempt == retries or stop.is_set():
                    tries = f" (asked {attempt + 1} times)" if attempt else ""
                    raise ServerError(f"{error}{tries}", error.status) from error
                pause = max(self.backoff * 2**attempt, error.after)
            stop.wait(min(pause, LONGEST_PAUSE))
        raise AssertionError("the last attempt answers or raises")

    def _once(self, path: str, data: bytes | None, timeout: float) -> Any:
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        if self._api_key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._api_key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                said = _reason(error.read().decode(errors="replace"))
            message = f"{self.url}{path} answered {error.code}: {said}"
            if error.code == BUSY or error.code >= 500:
                raise _Passing(message, error.code, _seconds(error.headers.get("Retry-After"))) from error
            raise ServerError(message, error.code) from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                kind = _Passing if self.repeat_slow else ServerError
                raise kind(
                    f"{self.url}{path} did not answer within {timeout:g} seconds: raise the timeout, or ask for less "
                    "at once."
                ) from error
            raise _Passing(f"{self.url}{path} cannot be reached: {cause or type(cause).__name__}") from error
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            return text


class _Passing(ServerError):
    """What may be better the next time; not before `after` seconds."""

    def __init__(self, message: str, status: int | None = None, after: float = 0.0):
        super().__init__(message, status)
        self.after = after


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


def _seconds(retry_after: str | None) -> float:
    try:
        seconds = float(retry_after or 0)
    except ValueError:  # a date: the own pause does
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0
