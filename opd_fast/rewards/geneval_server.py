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

import dataclasses
import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards.geneval_rules import Judgement
from opd_fast.rewards.server_client import RetryableError, ServerClient, ServerError

KEY = "reward_models.geneval_server"
BATCH = 64
"""Images of a request."""
PATIENCE = 1.5
"""Times the time limit after which no further attempt begins. A server that answers nothing is then reported after two
attempts, within the 300 s that an evaluation gives a reward."""
LARGEST = 4 << 20
"""Bytes of an answer; the largest real one, of 64 images, takes under 20 KB."""
REMEDY = "start the server (github.com/yifan123/reward-server), or set it to null for the detector in this process"


class GenEvalServer:
    """A server's client. After a failure each request gets a single attempt, until the server has answered a call.

    Args:
        address: such as http://127.0.0.1:18085.
        requests: the most requests under way at once.
        retries: how often a request is sent again after it failed.
        timeout: seconds for one attempt.

    Raises:
        UserError: the address has another form.
    """

    def __init__(self, address: str, requests: int = 8, retries: int = 2, timeout: float = 120.0) -> None:
        limits = (requests, retries, timeout, PATIENCE * timeout)
        kind = "application/octet-stream"
        self._client = ServerClient(KEY, address, REMEDY, *limits, kind, LARGEST, sends_key=False)
        self._failed = False

    def judge(self, images: np.ndarray[Any, Any], records: Sequence[Mapping[str, Any]]) -> list[Judgement]:
        """Return the server's judgement of each image.

        Args:
            images: (B, H, W, 3) uint8.
            records: a GenEval record for each.

        Raises:
            UserError: the server cannot be reached, is too slow, fails, or answers something else.
        """
        parts = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]

        def body(number: int) -> bytes:
            return encode_request(images[parts[number]], records[parts[number]])

        def read(number: int, answer: bytes) -> list[Judgement]:
            return decode_answer(answer, len(images[parts[number]]))

        client = dataclasses.replace(self._client, retries=0) if self._failed else self._client
        try:
            found = client.ask_all("", len(parts), body, read)
        except ServerError as error:
            self._failed = True
            raise UserError(KEY, str(error), REMEDY) from error
        self._failed = False
        return [judgement for part in found for judgement in part]


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
    """Return the judgements of `count` images. Raises RetryableError for anything but a dict with three
    lists of that length."""
    try:
        found = _unpickle(answer)
    except Exception as error:  # what garbage raises is not documented
        raise RetryableError(f"answered something other than judgements ({short(one_line(error), 200)})") from error
    columns = []
    for name in ("scores", "strict_rewards", "rewards"):
        values = found.get(name) if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) != count:
            raise RetryableError(f"answered without {count} {name}")
        if not all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in values):  # NaN is not less
            raise RetryableError(f"answered with {name} that are not numbers")
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
