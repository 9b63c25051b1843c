"""Asks a reward's server over HTTP: several requests at a time, a hard time limit for each attempt, and retries.

A request and its answer are bytes; each reward encodes and reads them (JSON in `judge.py`, pickles in
`geneval_server.py`). The standard library is enough. The threads are daemons, so that a request without an answer does
not keep an interrupted process alive.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import math
import os
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from opd_fast.config import RewardModelsConfig
from opd_fast.errors import UserError, one_line, short

T = TypeVar("T")

API_KEY = "OPD_FAST_JUDGE_KEY"
"""The environment variable that holds the judges' API key. The key goes into no file and no message."""
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed a moment later."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled before each further one, and their limit."""
SHOWN = 160
"""Characters of an answer that a message shows."""


class ServerError(RuntimeError):
    """A server gave no answer, or another answer than the request wants.

    The client puts the request's URL before the message of an error that a reward's `read` raises.

    Attributes:
        status: HTTP status of the answer, where it is the fault.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, message: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


class RefusedError(ServerError):
    """A server refused one request, most likely because the model does not take its image or prompt.

    Requests with other images may succeed.
    """


class RetryableError(ServerError):
    """A fault that the same request may not meet again."""


@dataclass(frozen=True)
class ServerClient:
    """Asks one server. It holds no connection, and several threads may use it.

    Attributes:
        key: the setting that gives the address, for messages.
        address: such as http://127.0.0.1:17140/v1; the requests' paths are added to it.
        remedy: what to do where nobody answers, for messages.
        requests: the most requests under way at a time in one `ask_all`.
        retries: how often a request is sent again.
        timeout: seconds for one attempt after the connection stands, and seconds for connecting.
        patience: seconds after which no further attempt of a request begins.
        content_type: of the requests.
        largest: bytes of the largest answer that is read.
        sends_key: whether requests carry the API key in `$OPD_FAST_JUDGE_KEY`.
    """

    key: str
    address: str
    remedy: str
    requests: int = 8
    retries: int = 2
    timeout: float = 120.0
    patience: float = math.inf
    content_type: str = "application/json"
    largest: int = 16 << 20
    sends_key: bool = True
    _parts: SplitResult = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises UserError for an address of another form."""
        object.__setattr__(self, "_parts", parse_address(self.key, self.address))

    @classmethod
    def of(cls, key: str, address: str | None, models: RewardModelsConfig, start: str) -> ServerClient:
        """Return the client of an address from the settings. Raises UserError, with `start`, where there is none."""
        if not address:
            remedy = f"start a server, {start}, and give its address"
            raise UserError(key, "is not set, and the reward asks a server", remedy)
        remedy = f"start the server, {start}, or correct the address"
        return cls(key, address.rstrip("/"), remedy, models.requests, models.retries, models.request_timeout)

    def reach(self, path: str, read: Callable[[bytes], T], body: bytes | None = None) -> T:
        """Ask once and return what `read` makes of the answer. A request without a body is a GET.

        Raises UserError where nobody answers or the server is not ready, ServerError for any other wrong answer.
        """
        try:
            return self._attempt(path, body, read)
        except RetryableError as error:
            raise UserError(self.key, str(error), self.remedy) from error

    def ask_all(
        self,
        path: str,
        count: int,
        body: Callable[[int], bytes],
        read: Callable[[int, bytes], T],
        refused: Callable[[int, RefusedError], T] | None = None,
    ) -> list[T]:
        """Post `count` requests, `requests` at a time, and return what `read` makes of the answers, in order.

        Args:
            path: of all requests.
            body: returns body i. It is called when its turn comes, so only the bodies under way take memory.
            read: reads answer i. Where it raises RetryableError, the request is sent again.
            refused: returns the value of request i, which the server refused; None: the error is raised.

        Raises:
            The first exception of a request or of the functions. Requests that have not begun are then left out.
        """
        results: list[Any] = [None] * count
        finished: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        indices, stop = iter(range(count)), threading.Event()

        def work() -> None:
            for index in indices:
                if stop.is_set():
                    return
                try:
                    try:
                        value = self._ask(path, body(index), functools.partial(read, index), stop)
                    except RefusedError as error:
                        if refused is None:
                            raise
                        value = refused(index, error)
                    finished.put((index, value, None))
                except BaseException as error:
                    finished.put((index, None, error))
                    return

        try:
            for _ in range(min(self.requests, count)):
                threading.Thread(target=work, name=f"requests to {self.address}", daemon=True).start()
            for _ in range(count):
                index, results[index], error = finished.get()
                if error is not None:
                    raise error  # without waiting for the other requests
        finally:
            stop.set()
        return results

    def _ask(self, path: str, body: bytes, read: Callable[[bytes], T], stop: threading.Event) -> T:
        pause, last_start = FIRST_PAUSE, time.monotonic() + self.patience
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(path, body, read)
            except RetryableError as error:
                if attempt == self.retries or stop.is_set() or time.monotonic() > last_start:
                    attempts = f" ({attempt + 1} attempts)" if attempt else ""
                    raise ServerError(f"{error}{attempts}", error.status) from error
                stop.wait(min(max(pause, error.wait), LONGEST_PAUSE))
                if stop.is_set():
                    raise
                pause *= 2
        raise AssertionError

    def _attempt(self, path: str, body: bytes | None, read: Callable[[bytes], T]) -> T:
        """Raises RetryableError where a further attempt may help, else ServerError, both with the URL."""
        url = f"{self.address}{path}"
        try:
            response, answer = self._exchange(url, body)
            if not 200 <= response.status < 300:  # redirects too: a redirected POST would arrive without its body
                raise self._status_error(response, answer)
            if len(answer) > self.largest:
                raise ServerError(f"answered more than {self.largest >> 20} MiB")
            return read(answer)
        except ServerError as error:
            error.args = (f"{url} {error}",)
            raise

    def _exchange(self, url: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        """Return the response and its body, one byte more than `largest` at most. Raises RetryableError."""
        late = threading.Event()
        connection, target, headers = self._connection(url)
        try:
            connection.connect()
            # A socket's timeout begins anew with every byte. This timer ends a server that sends a byte now and then.
            limit = threading.Timer(self.timeout, _hang_up, (connection.sock, late))
            limit.daemon = True
            limit.start()
            try:
                connection.request("GET" if body is None else "POST", target, body, headers)
                response = connection.getresponse()
                answer = response.read(self.largest + 1)
            finally:
                limit.cancel()
            if response.length and len(answer) <= self.largest:  # read() with a size does not report a cut connection
                raise http.client.IncompleteRead(answer, response.length)
        except (OSError, http.client.HTTPException) as error:
            if not late.is_set() and not isinstance(error, TimeoutError):
                kind, words = f"{type(error).__name__}: ", one_line(error)
                raise RetryableError(f"does not answer: {kind if kind[:-2] not in words else ''}{words}") from error
            late.set()
        finally:
            connection.close()
        if late.is_set():
            raise RetryableError(f"took longer than {self.timeout:g} s")
        return response, answer

    def _connection(self, url: str) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """Return a connection to the server or its proxy, the request's target, and the headers.

        The environment names proxies as for urllib (http_proxy, https_proxy, no_proxy). A server on this machine has
        none.
        """
        scheme, host, target = self._parts.scheme, self._parts.hostname or "", urlsplit(url).path or "/"
        headers = {"Content-Type": self.content_type, "Accept": self.content_type}
        if self.sends_key and (key := os.environ.get(API_KEY)):
            headers["Authorization"] = f"Bearer {key}"
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        local = host in ("localhost", "::1") or host.startswith("127.")
        proxy = None if local or urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(scheme)
        if not proxy:
            return kind(self._parts.netloc, timeout=self.timeout), target, headers
        login, _, proxy_host = proxy.rpartition("://")[2].rstrip("/").rpartition("@")
        credentials = base64.b64encode(unquote(login).encode()).decode()
        proxy_headers = {"Proxy-Authorization": f"Basic {credentials}"} if login else {}
        connection = kind(proxy_host, timeout=self.timeout)
        if scheme == "http":
            return connection, url, headers | proxy_headers
        connection.set_tunnel(self._parts.netloc, headers=proxy_headers)
        return connection, target, headers

    def _status_error(self, response: http.client.HTTPResponse, answer: bytes) -> ServerError:
        status, words = response.status, words_of(answer)
        message = f"answered status {status}{f': {words}' if words else ''}"
        if status in RETRIED:
            wait = response.headers.get("Retry-After", "")
            return RetryableError(message, status, float(wait) if wait.isdecimal() else 0.0)
        if status in (401, 403) and self.sends_key:
            return ServerError(f"{message}; put the server's key into ${API_KEY}", status)
        return (RefusedError if status in (400, 413, 422) else ServerError)(message, status)


def parse_address(key: str, address: str) -> SplitResult:
    """Return the parts of an address that the setting `key` gives. Raises UserError for one of another form."""
    if "@" in address.partition("//")[2].partition("/")[0]:  # first, since the other message shows the address
        raise UserError(key, "the address holds a user or password", f"put the server's key into ${API_KEY}")
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        remedy = "write http://HOST:PORT, or with a path, http://HOST:PORT/v1"
        raise UserError(key, f"{address!r} is not the address of a server", remedy)
    return parts


def words_of(answer: bytes) -> str:
    """Return an answer's first words for a message; of a traceback its last line, which names the error."""
    text = answer.decode(errors="replace").strip()
    if text.startswith("Traceback"):
        text = text.splitlines()[-1]
    return short(" ".join(text[: 10 * SHOWN].split()), SHOWN)


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        # close() would not wake a thread that reads, and the shutdown of ssl changes an object that the thread uses.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
