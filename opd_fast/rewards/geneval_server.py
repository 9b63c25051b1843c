"""Asks a public GenEval server, of Flow-GRPO's protocol, for judgements.

The server is github.com/yifan123/reward-server (app_geneval.py, port 18085). A request is a POST to `/` of a pickled
dict: `images`, a list of JPEG files as bytes; `meta_datas`, their records; `only_strict`, whether the benchmark's
accuracy may be left out. The answer is a pickled dict of lists: `scores` (partial), `rewards` (accuracy),
`strict_rewards`, and two groupings by tag that are not read here. After a failure the server answers 500 with a
traceback as text. Flow-GRPO's client sends 64 images at a time and waits 120 s.

Its values differ from those of the detector in this process: the images pass through JPEG, and the server's detector
sees red and blue exchanged (`geneval_detector.py`).

A pickle may run anything while it is read, so an answer is read only where its steps make nothing but numbers, texts,
lists and dicts.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import pickle
import pickletools
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards.geneval_rules import Judgement

KEY = "reward_models.geneval_server"
BATCH = 64
"""Images of a request."""
TIMEOUT = 120.0
"""Seconds for a whole request; the server's own limit is the same."""
PAUSE = 1.0
"""Seconds before a request is sent again; they double each time."""
LAST_START = 1.5
"""Times the limit after which no other try begins: a server that answers nothing is named after two tries, within the
300 s that an evaluation gives a reward."""
LARGEST = 4 << 20
"""Bytes of an answer; the largest real one, of 64 images, takes under 20 KB."""
REMEDY = "start the server (github.com/yifan123/reward-server), or set it to null for the detector in this process"


class _Failed(Exception):
    """A request got no judgements; `again` says whether another try may get them."""

    def __init__(self, problem: str, *, again: bool = True) -> None:
        super().__init__(problem)
        self.again = again


class GenEvalServer:
    """A server's client. One that failed gets a single try for each request until it answers again.

    Args:
        address: such as http://127.0.0.1:18085.
        requests: that are under way at once.
        retries: times that a request is sent again after it failed.
        timeout: seconds for one try.

    Raises:
        UserError: the address is none of http or https.
    """

    def __init__(self, address: str, requests: int = 8, retries: int = 2, timeout: float = TIMEOUT) -> None:
        self.host, self.port, self.path, self.secure = parse_address(address)
        self.address, self.requests, self.retries, self.timeout = address, requests, retries, timeout
        self._failed = False

    def judge(self, images: np.ndarray[Any, Any], records: Sequence[Mapping[str, Any]]) -> list[Judgement]:
        """Return the server's judgement of each image.

        Args:
            images: (B, H, W, 3) uint8.
            records: a GenEval record for each.

        Raises:
            UserError: the server cannot be reached, is too slow, fails, or answers something else.
        """
        starts = range(0, len(images), BATCH)
        with ThreadPoolExecutor(max_workers=max(1, min(self.requests, len(starts)))) as pool:
            parts = list(pool.map(lambda i: self._ask(images[i : i + BATCH], records[i : i + BATCH]), starts))
        return [judgement for part in parts for judgement in part]

    def _ask(self, images: np.ndarray[Any, Any], records: Sequence[Mapping[str, Any]]) -> list[Judgement]:
        body = encode_request(images, records)
        tries = 1 if self._failed else 1 + self.retries
        start = time.monotonic()
        for attempt in range(1, tries + 1):
            try:
                judgements = decode_answer(self._post(body), len(images))
            except _Failed as failure:
                early = time.monotonic() - start < LAST_START * self.timeout
                if failure.again and attempt < tries and early:
                    time.sleep(PAUSE * 2 ** (attempt - 1))
                    continue
                self._failed = True
                after = f" after {attempt} tries" if attempt > 1 else ""
                raise UserError(KEY, f"{self.address} {failure}{after}", REMEDY) from failure
            self._failed = False
            return judgements
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> bytes:
        """Send a request and return the answer's body. Raises _Failed."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        late = threading.Event()
        try:
            connection.connect()
            # A socket's timeout begins anew with every byte; this one ends a server that sends a byte now and then.
            limit = threading.Timer(self.timeout, _hang_up, (connection.sock, late))
            limit.daemon = True
            limit.start()
            try:
                connection.request("POST", self.path, body, {"Content-Type": "application/octet-stream"})
                response = connection.getresponse()
                answer = response.read(LARGEST + 1)
            finally:
                limit.cancel()
        except (OSError, http.client.HTTPException) as error:
            if not late.is_set() and not isinstance(error, TimeoutError):
                raise _Failed(f"cannot be asked ({type(error).__name__}: {one_line(error)})") from error
            late.set()
        finally:
            connection.close()
        if late.is_set():
            raise _Failed(f"did not answer within {self.timeout:g} s")
        if response.status != http.client.OK:
            lines = answer[-2000:].decode("utf-8", "replace").strip().splitlines()
            said = f" ({short(lines[-1].strip(), 300)})" if lines else ""
            raise _Failed(f"answered with status {response.status}{said}", again=response.status >= 500)
        if len(answer) > LARGEST:
            raise _Failed(f"answered with more than {LARGEST >> 20} MB, which are no judgements")
        return answer


def parse_address(address: str) -> tuple[str, int, str, bool]:
    """Return host, port, path, and whether it is https. Raises UserError for an address of another form."""
    remedy = "give an address such as http://127.0.0.1:18085"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(KEY, f"{address!r} is not an address ({error})", remedy) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(KEY, f"{address!r} is not an address of http or https", remedy)
    secure = parts.scheme == "https"
    return host, port or (443 if secure else 80), parts.path or "/", secure


def encode_request(images: np.ndarray[Any, Any], records: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the body of a request: images (B, H, W, 3) uint8 as JPEG files of Pillow's quality, 75, and their records.

    A record is sent with the keys that the server reads; it needs a `tag` and a `prompt`, and gets empty ones where
    there are none.
    """
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG")
        files.append(file.getvalue())
    wanted = [
        {"tag": record.get("tag", ""), "prompt": record.get("prompt", "")}
        | {key: record[key] for key in ("include", "exclude") if key in record}
        for record in records
    ]
    # Protocol 4 is that of the server's Python 3.10.
    return pickle.dumps({"images": files, "meta_datas": wanted, "only_strict": False}, protocol=4)


def decode_answer(answer: bytes, count: int) -> list[Judgement]:
    """Return the judgements of `count` images. Raises _Failed for anything but a dict with three lists of so many."""
    try:
        found = _unpickle(answer)
    except Exception as error:  # what garbage raises is not documented
        raise _Failed(f"answered something other than judgements ({short(one_line(error), 200)})") from error
    columns = []
    for name in ("scores", "strict_rewards", "rewards"):
        values = found.get(name) if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != count:
            raise _Failed(f"answered without {count} {name}")
        if not all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in values):  # NaN is not less
            raise _Failed(f"answered with {name} that are not numbers")
        columns.append([float(value) for value in values])
    return [Judgement(*row) for row in zip(*columns, strict=True)]


# fmt: off
_PLAIN = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
))
# fmt: on
"""The steps of a pickle that make numbers, texts, lists and dicts. LONG_BINPUT is left out, by which a few bytes make
Python reserve gigabytes; answers of a protocol from 4 on do without it."""


def _unpickle(data: bytes) -> Any:
    """Read a pickle of numbers, texts, lists and dicts. Raises any exception for another one."""
    for step, _, _ in pickletools.genops(data):
        if step.name not in _PLAIN:
            raise pickle.UnpicklingError(f"it holds the pickle step {step.name}")
    return _PlainUnpickler(io.BytesIO(data)).load()


class _PlainUnpickler(pickle.Unpickler):
    """Refuses any function or class that a pickle names, were the list of steps to let one through."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # close() would not wake a thread that reads
