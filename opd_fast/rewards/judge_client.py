"""What rewards that ask a server share: JSON over HTTP, several requests at a time, time limits, and further attempts.

It needs the standard library alone. The threads are daemons, so that a request without an answer does not keep an
interrupted process alive.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.errors import UserError, one_line, short

T = TypeVar("T")

KEY = "OPD_FAST_JUDGE_KEY"
"""The environment variable that holds the servers' API key; it goes into no file and no message."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that may answer a moment later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled before each further one, and their limit."""
LONGEST_ANSWER = 16 * 2**20
"""Bytes."""
SHOWN = 160
"""Characters of an answer that a message shows."""


class ServerError(RuntimeError):
    """A server gave no answer, or not the one that was asked for: its address, the status, its first words.

    Attributes:
        status: of the answer, where that is the fault.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RefusedError(ServerError):
    """A server refused one request, most likely for what is in it: an image or a prompt that the model does not take.

    Requests with other images may be answered.
    """


@dataclass(frozen=True)
class JudgeClient:
    """Asks one server. It holds no connection and may be used by several threads.

    Attributes:
        key: the setting that gives the address, for messages.
        address: such as http://127.0.0.1:17140/v1; the requests' paths are added to it.
        start: the command that starts such a server.
        requests: requests that are under way at a time in one `ask_all`.
        retries: times that a request is sent again.
        timeout: seconds for one attempt.
    """

    key: str
    address: str
    start: str
    requests: int = 8
    retries: int = 2
    timeout: float = 120.0
    _opener: urllib.request.OpenerDirector = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises UserError for an address of another form."""
        try:
            parts = urlsplit(self.address)
            host, has_form = parts.hostname, parts.scheme in ("http", "https") and parts.port != 0
        except ValueError:
            host, has_form = None, False
        remedy = "write http://HOST:PORT, or with a path, http://HOST:PORT/v1"
        if host is None or not has_form or parts.query or parts.fragment:
            raise UserError(self.key, f"{self.address!r} is not the address of a server", remedy)
        if "@" in parts.netloc:
            raise UserError(self.key, "the address holds a user or password", f"put the server's key into ${KEY}")
        local = host == "localhost" or host.startswith("127.") or host == "::1"
        handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if local else [])]
        object.__setattr__(self, "_opener", urllib.request.build_opener(*handlers))

    @classmethod
    def of(cls, key: str, address: str | None, models: RewardModelsConfig, start: str) -> JudgeClient:
        """Return the client of an address from the settings. Raises UserError, with `start`, where there is none."""
        if not address:
            remedy = f"start a server, {start}, and give its address"
            raise UserError(key, "is not set, and the reward asks a server", remedy)
        return cls(key, address.rstrip("/"), start, models.requests, models.retries, models.request_timeout)

    def reach(self, path: str, body: Any = None) -> Any:
        """Ask once and return the answer; without a body it is a GET.

        Raises UserError where nobody answers or the server is not ready, ServerError for any other answer.
        """
        try:
            return self._attempt(path, None if body is None else _encoded(body))
        except _PassingError as error:
            raise UserError(self.key, str(error), f"start the server, {self.start}, or correct the address") from error

    def ask(self, path: str, body: Any) -> Any:
        """Send a JSON body and return the JSON answer, trying again as often as `retries` says.

        Raises ServerError.
        """
        return self._ask(path, _encoded(body), threading.Event())

    def ask_all(self, path: str, count: int, body: Callable[[int], Any], read: Callable[[int, Any], T]) -> list[T]:
        """Send `count` requests, `requests` at a time, and return what `read` makes of the answers, in order.

        Args:
            path: for all of them.
            body: gives request i; called when its turn comes, so that no more bodies exist than are under way.
            read: reads answer i, which is a RefusedError where the server refused the request.

        Raises:
            The first exception of a request or of `body` and `read`. Requests that have not begun are then left.
        """
        results: list[Any] = [None] * count
        errors: list[BaseException] = []
        indices, lock, stop = iter(range(count)), threading.Lock(), threading.Event()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    index = next(indices, None)
                if index is None:
                    return
                try:
                    try:
                        answer = self._ask(path, _encoded(body(index)), stop)
                    except RefusedError as error:
                        answer = error
                    results[index] = read(index, answer)
                except BaseException as error:
                    errors.append(error)
                    stop.set()

        threads = [
            threading.Thread(target=work, name=f"requests to {self.address}", daemon=True)
            for _ in range(min(self.requests, count))
        ]
        try:
            for thread in threads:
                thread.start()
            while not stop.is_set() and any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.2)  # after an error the others may take as long as a request
                    if stop.is_set():
                        break
        finally:
            stop.set()
        if errors:
            raise errors[0]
        return results

    def _ask(self, path: str, body: bytes, stop: threading.Event) -> Any:
        pause = FIRST_PAUSE
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(path, body)
            except _PassingError as error:
                if attempt == self.retries or stop.is_set():
                    attempts = f" ({attempt + 1} attempts)" if attempt else ""
                    raise ServerError(f"{error}{attempts}", error.status) from error
                stop.wait(min(max(pause, error.wait), LONGEST_PAUSE))
                if stop.is_set():
                    raise
                pause *= 2
        raise AssertionError

    def _attempt(self, path: str, body: bytes | None) -> Any:
        """Raises _PassingError where a further attempt may help, else ServerError."""
        url, until = f"{self.address}{path}", time.monotonic() + self.timeout
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", "Accept": "application/json"})
        if key := os.environ.get(KEY):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer = _read(response, until)
        except urllib.error.HTTPError as error:
            with error:
                raise _status_error(url, error) from error
        except TimeoutError as error:
            raise _PassingError(f"{url} took longer than {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise _PassingError(f"{url} took longer than {self.timeout:g} s") from error
            words = one_line(reason) if isinstance(reason, BaseException) else str(reason)
            raise _PassingError(f"{url} does not answer: {words}") from error
        if len(answer) > LONGEST_ANSWER:
            raise ServerError(f"{url} answered more than {LONGEST_ANSWER >> 20} MiB")
        try:
            return json.loads(answer)
        except ValueError as error:
            raise _PassingError(f"{url} answered what is not JSON: {_words(answer)}") from error


class _PassingError(ServerError):
    """What may not happen again.

    Attributes:
        wait: seconds that the server asks to wait.
    """

    def __init__(self, message: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(message, status)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET, without its body and perhaps at another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _read(response: Any, until: float) -> bytes:
    """Read the body. Raises TimeoutError where it takes too long as a whole; each read has a limit of its own."""
    parts, size = [], 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > LONGEST_ANSWER:
            return b"".join(parts)
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:  # read1 does not complain of a connection that was cut
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _status_error(url: str, error: urllib.error.HTTPError) -> ServerError:
    try:
        words = _words(error.read(4096))
    except (OSError, http.client.HTTPException):
        words = ""
    message = f"{url} answered status {error.code}{f': {words}' if words else ''}"
    if error.code in PASSING:
        wait = error.headers.get("Retry-After", "")
        return _PassingError(message, error.code, float(wait) if wait.isdigit() else 0.0)
    if error.code in (401, 403):
        return ServerError(f"{message}; put the server's key into ${KEY}", error.code)
    kind = RefusedError if error.code in (400, 413, 422) else ServerError
    return kind(message, error.code)


def _words(answer: bytes) -> str:
    return short(" ".join(answer.decode(errors="replace").split())[: 10 * SHOWN], SHOWN)


def _encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def to_pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """Return images (B, 3, H, W) float in 0..1 as (B, H, W, 3) uint8, round(255 x), on the CPU."""
    pixels = np.empty((len(images), *images.shape[2:], 3), dtype=np.uint8)
    for index, image in enumerate(images):  # one at a time, since a whole batch in float32 takes twice its memory
        rounded = (image.float() * 255).round().clamp(0, 255).to(torch.uint8)
        pixels[index] = rounded.permute(1, 2, 0).cpu().numpy()
    return pixels


def to_base64(pixels: np.ndarray[Any, Any], size: tuple[int, int] | None = None) -> str:
    """Return (H, W, 3) uint8 as a PNG in base64, resized to (width, height) by PIL's default filter, bicubic."""
    image = Image.fromarray(pixels)
    if size is not None:
        image = image.resize(size)
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)  # a fifth of the default's time for a tenth more bytes
    return base64.b64encode(file.getvalue()).decode("ascii")
