"""The client of a public GenEval server, against servers that answer, are slow, die and answer garbage."""

from __future__ import annotations

import http.client
import io
import json
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import geneval_server, get_reward, server_client
from opd_fast.rewards.geneval import GenEval
from opd_fast.rewards.geneval_rules import Judgement
from opd_fast.rewards.geneval_server import KEY, REMEDY, GenEvalServer
from opd_fast.rewards.runner import RewardRunner
from opd_fast.rewards.server_client import API_KEY, ServerClient

RECORD = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}


def published(body: bytes) -> bytes:
    """What the public server does with a request, and its answer; the scores tell the images' brightness."""
    data = pickle.loads(body)
    assert set(data) == {"images", "meta_datas", "only_strict"}
    assert data["only_strict"] is False
    images = [np.asarray(Image.open(io.BytesIO(file), formats=["jpeg"])) for file in data["images"]]
    assert len(images) == len(data["meta_datas"]) <= 64
    scores = [float(np.round(image.mean() / 255, 2)) for image in images]
    strict = [float(score > 0.5) for score in scores]
    group = {record["tag"]: [-10.0] * len(images) for record in data["meta_datas"]}
    answer = {"scores": scores, "rewards": [1.0 - s for s in strict], "strict_rewards": strict}
    return pickle.dumps({**answer, "group_rewards": group, "group_strict_rewards": group})


@contextmanager
def serving(answer: Callable[[bytes, Any], tuple[int, bytes] | None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server in a thread: `answer(body, handler)` returns status and body, or None where it wrote by itself."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(body)
            if (said := answer(body, self)) is not None:
                self.send_response(said[0])
                self.send_header("Content-Length", str(len(said[1])))
                self.end_headers()
                self.wfile.write(said[1])

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)


def grey(*levels: int) -> np.ndarray[Any, Any]:
    return np.stack([np.full((16, 16, 3), level, dtype=np.uint8) for level in levels])


def refused(client: GenEvalServer, count: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        client.judge(grey(*[51] * count), [RECORD] * count)
    assert caught.value.key == "reward_models.geneval_server"
    assert caught.value.remedy == geneval_server.REMEDY
    assert "\n" not in str(caught.value)
    return caught.value.problem


def test_requests_and_answers_are_the_published_ones() -> None:
    with serving(lambda body, _: (200, published(body))) as (address, bodies):
        found = GenEvalServer(address).judge(grey(51, 204), [RECORD, {"include": RECORD["include"], "mine": object()}])
    assert found == [Judgement(0.2, 0.0, 1.0), Judgement(0.8, 1.0, 0.0)]
    (body,) = bodies
    assert pickle.loads(body)["meta_datas"] == [
        {**RECORD, "prompt": ""},
        {"tag": "", "prompt": "", "include": RECORD["include"]},  # the server reads a tag of every record
    ]


def test_many_images_go_in_parts_side_by_side_and_come_back_in_order() -> None:
    at_once, most = [0], [0]
    lock = threading.Lock()

    def slow(body: bytes, _: Any) -> tuple[int, bytes]:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.15)
        with lock:
            at_once[0] -= 1
        return 200, published(body)

    levels = [(i * 7) % 256 for i in range(300)]
    with serving(slow) as (address, bodies):
        found = GenEvalServer(address, requests=2).judge(grey(*levels), [RECORD] * 300)
    assert [j.partial for j in found] == [round(level / 255, 2) for level in levels]
    assert sorted(len(pickle.loads(body)["images"]) for body in bodies) == [44, 64, 64, 64, 64]
    assert most[0] == 2


def test_one_failure_is_survived() -> None:
    calls = []

    def once(body: bytes, _: Any) -> tuple[int, bytes]:
        calls.append(1)
        return (500, b"Traceback ...\nRuntimeError: CUDA out of memory") if len(calls) == 1 else (200, published(body))

    with serving(once) as (address, _):
        assert GenEvalServer(address, retries=1).judge(grey(51), [RECORD]) == [Judgement(0.2, 0.0, 1.0)]
    assert len(calls) == 2


def test_a_server_that_fails_is_quoted() -> None:
    traceback = b"Traceback (most recent call last):\n  File ...\nKeyError: 'tag'\n"
    with serving(lambda body, _: (500, traceback)) as (address, bodies):
        client = GenEvalServer(address, retries=2)
        assert refused(client) == f"{address} answered status 500: KeyError: 'tag' (3 attempts)"
        assert len(bodies) == 3
        assert refused(client) == f"{address} answered status 500: KeyError: 'tag'"
        assert len(bodies) == 4  # a single try, since the last request failed
    with serving(lambda body, _: (404, b"")) as (address, bodies):
        assert refused(GenEvalServer(address)) == f"{address} answered status 404"
        assert len(bodies) == 1  # another try would not help


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        said = refused(GenEvalServer(address, retries=1))
    assert said == f"{address} does not answer: ConnectionRefusedError: [Errno 111] Connection refused (2 attempts)"


def drip(body: bytes, handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(200):
        time.sleep(0.05)
        handler.wfile.write(b"x")


def drip_headers(body: bytes, handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for number in range(200):
        time.sleep(0.05)
        handler.wfile.write(b"a: %d\r\n" % number)


def asleep(body: bytes, handler: Any) -> None:
    time.sleep(3)


@pytest.mark.parametrize("answer", [asleep, drip, drip_headers])
def test_a_server_that_is_too_slow(answer: Any) -> None:
    with serving(answer) as (address, bodies):
        start = time.monotonic()
        said = refused(GenEvalServer(address, retries=9, timeout=0.3))
        assert time.monotonic() - start < 2
        assert said == f"{address} took longer than 0.3 s (2 attempts)"
        assert len(bodies) == 2


def dies(body: bytes, handler: Any) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def hangs_up(body: bytes, handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\n" + published(body)[:20])


def speaks_another_language(body: bytes, handler: Any) -> None:
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (dies, "does not answer: "),
        (hangs_up, "does not answer: IncompleteRead(20 bytes read, 9979 more expected) (2 attempts)"),
        (speaks_another_language, "does not answer: BadStatusLine: 220 mail.example.org ESMTP"),
    ],
)
def test_a_server_that_dies(answer: Any, said: str) -> None:
    with serving(answer) as (address, bodies):
        assert refused(GenEvalServer(address, retries=1)).startswith(f"{address} {said}")
        assert len(bodies) == 2


def judgements(**changes: Any) -> bytes:
    return pickle.dumps({"scores": [0.5], "rewards": [1.0], "strict_rewards": [1.0], **changes}, protocol=4)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "answered something other than judgements"),
        (b"<html>hello</html>", "answered something other than judgements"),
        (b"\x80\x04K\x01", "answered something other than judgements"),
        (pickle.dumps([1.0]), "answered without 1 scores"),
        (pickle.dumps({"scores": [1.0]}), "answered without 1 strict_rewards"),
        (judgements(scores=[0.5, 0.5]), "answered without 1 scores"),
        (judgements(rewards=1.0), "answered without 1 rewards"),
        (judgements(rewards=["1"]), "answered with rewards that are not numbers"),
        (judgements(rewards=[None]), "answered with rewards that are not numbers"),
        (judgements(scores=[float("nan")]), "answered with scores that are not numbers"),
        (judgements(scores=[10**400]), "answered with scores that are not numbers"),
        (judgements(scores=np.array([1.0])), "answered something other than judgements (it holds the pickle step"),
        (judgements(rewards=[np.float64(1)]), "answered something other than judgements (it holds the pickle step"),
        (b"\x80\x04r\xff\xff\xff\x7fN.", "answered something other than judgements"),
        (
            b"\x80\x04Nr\xff\xff\xff\x7f.",
            "answered something other than judgements (it holds the pickle step LONG_BINPUT",
        ),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "answered something other than judgements"),
        (b"]" * 5_000_000, "answered more than 4 MiB"),
    ],
)
def test_garbage(answer: bytes, said: str) -> None:
    with serving(lambda body, _: (200, answer)) as (address, _):
        assert refused(GenEvalServer(address, retries=0)).startswith(f"{address} {said}")


class Runs:
    """A pickle that writes a file while it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_an_answer_runs_nothing(tmp_path: Path, protocol: int) -> None:
    answer = pickle.dumps({"scores": [Runs(tmp_path / "made")]}, protocol=protocol)
    with serving(lambda body, _: (200, answer)) as (address, _):
        assert "it holds the pickle step" in refused(GenEvalServer(address, retries=0))
    assert not (tmp_path / "made").exists()
    pickle.loads(answer)
    assert (tmp_path / "made").exists()  # so that the pickle would have done it


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_answers_of_any_newer_protocol_are_read(protocol: int) -> None:
    answer = pickle.dumps(pickle.loads(judgements(scores=[0], group_rewards={"counting": [True, None]})), protocol)
    with serving(lambda body, _: (200, answer)) as (address, _):
        assert GenEvalServer(address, retries=0).judge(grey(51), [RECORD]) == [Judgement(0.0, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:18085", ("127.0.0.1", 18085, "/", False)),
        ("http://gpu7:18085/", ("gpu7", 18085, "/", False)),
        ("https://host/geneval", ("host", 443, "/geneval", True)),
        ("http://[::1]:80", ("::1", 80, "/", False)),
    ],
)
def test_addresses(address: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    connection, target, _ = ServerClient(KEY, address, REMEDY)._connection(address)
    secure = isinstance(connection, http.client.HTTPSConnection)
    assert (connection.host, connection.port, target, secure) == expected


@pytest.mark.parametrize(
    "address", ["127.0.0.1:18085", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://a:0", "", "http://[1"]
)
def test_what_is_no_address_is_refused_before_anything_is_asked(address: str) -> None:
    reward = GenEval(RewardModelsConfig(geneval_server=address))
    with pytest.raises(UserError, match="is not the address of a server; write http://HOST:PORT") as caught:
        reward.check()
    assert caught.value.key == "reward_models.geneval_server"


# --- the rewards -----------------------------------------------------------------------------------------------------


def test_the_rewards_ask_the_server_once_for_each_image() -> None:
    images = torch.stack([torch.full((3, 16, 16), level) for level in (0.2, 0.8, 0.2)])
    prompts = [Prompt("two dogs", RECORD)] * 3
    with serving(lambda body, _: (200, published(body))) as (address, bodies):
        models = RewardModelsConfig(geneval_server=address, batch=1)
        found = {name: get_reward(name, models)(images, prompts) for name in ("geneval", "geneval_strict")}
        found["geneval_accuracy"] = get_reward("geneval_accuracy", models)(images, prompts)
    assert found["geneval"].tolist() == pytest.approx([0.2, 0.8, 0.2])
    assert found["geneval_strict"].tolist() == [0.0, 1.0, 0.0]
    assert found["geneval_accuracy"].tolist() == [1.0, 0.0, 1.0]
    (body,) = bodies
    assert [record["prompt"] for record in pickle.loads(body)["meta_datas"]] == ["two dogs"] * 2
    assert get_reward("geneval", models).identity() == {"geneval_server": address}  # type: ignore[attr-defined]
    assert json.dumps(get_reward("geneval", models).identity())  # type: ignore[attr-defined]


def test_the_settings_of_requests_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit is `request_timeout`, and the judges' API key is not sent to this server."""
    monkeypatch.setenv(API_KEY, "secret")
    sent: list[Any] = []

    def asleep(body: bytes, handler: Any) -> None:
        sent.append(handler.headers)
        time.sleep(0.8)

    images, prompts = torch.full((1, 3, 16, 16), 0.2), [Prompt("two dogs", RECORD)]
    with serving(asleep) as (address, _):
        models = RewardModelsConfig(geneval_server=address, request_timeout=0.3, retries=0)
        with pytest.raises(UserError, match=r"took longer than 0\.3 s; start the server"):
            get_reward("geneval", models)(images, prompts)
    assert [(headers["Authorization"], headers["Content-Type"]) for headers in sent] == [
        (None, "application/octet-stream")
    ]


def test_a_failure_is_a_missing_value_and_is_not_kept() -> None:
    down = [True]

    def sometimes(body: bytes, _: Any) -> tuple[int, bytes]:
        return (503, b"busy") if down[0] else (200, published(body))

    images, prompts = torch.full((1, 3, 16, 16), 0.2), [Prompt("two dogs", RECORD)]
    with serving(sometimes) as (address, _):
        runner = RewardRunner("record", 30, RewardModelsConfig(geneval_server=address, retries=1))
        assert runner("geneval", images, prompts).isnan().all()
        assert runner.failures == {("geneval", "unavailable"): 1}
        (message,) = runner.messages.values()
        assert f"reward_models.geneval_server: {address} answered status 503: busy (2 attempts); start" in message
        down[0] = False
        assert runner("geneval", images, prompts).tolist() == pytest.approx([0.2])
