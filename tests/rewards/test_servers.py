"""Rewards that ask servers: what is sent, what is read, and what servers that are slow, broken or gone do."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward, server_client
from opd_fast.rewards.judge import Judge, read_json, to_pixels
from opd_fast.rewards.runner import RewardFailure, RewardRunner
from opd_fast.rewards.server_client import API_KEY, ServerClient, ServerError
from tests import judge_server as fake
from tests.judge_server import Answer, Handler, Server, chat, serving

PROMPTS = [Prompt(f"a {{red}} cube, number {i}") for i in range(12)]
IMAGES = torch.rand(12, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 12).view(
    -1, 1, 1, 1
)
SCORES = [1 + round(4 * float(image.mean())) for image in IMAGES]

PUBLISHED = "d68ab1dcf4dc3a39ec5dfab963d17fe30a6e5f713eb49f743ed88a4c8ce4317f"
"""SHA-256 of the f-string `question` in flow_grpo/rewards.py (yifan123/flow_grpo), with {prompt} in its place."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv(API_KEY, raising=False)


def settings(server: Server | None = None, **options: Any) -> RewardModelsConfig:
    addresses = {} if server is None else {"judge_server": f"{server.address}/v1", "hps3_server": server.address}
    return RewardModelsConfig(**{**addresses, "request_timeout": 20.0, **options})


@contextmanager
def judged(how: Answer, name: str = "unified_reward", **options: Any) -> Iterator[tuple[Server, RewardRunner]]:
    with serving(how) as server, RewardRunner("record", 60.0, settings(server, **options)) as runner:
        yield server, runner


def message(runner: RewardRunner) -> str:
    [found] = runner.messages.values()
    return found


# --- what is sent and read -------------------------------------------------------------------------------------------


def test_unified_reward_asks_as_published() -> None:
    """The request of Flow-GRPO's released code: question, order of the parts, PNG of 512 by 512 by PIL, temperature."""
    with serving(fake.judge) as server:
        values = get_reward("unified_reward", settings(server, requests=1))(IMAGES, PROMPTS)
    assert isinstance(values, torch.Tensor)
    assert len(set(SCORES)) > 2
    torch.testing.assert_close(values, torch.tensor(SCORES) / 5, rtol=0, atol=1e-6)
    for (path, asked, _), image, prompt in zip(server.asked, to_pixels(IMAGES), PROMPTS, strict=True):
        assert path == "/v1/chat/completions"
        assert asked.keys() == {"model", "messages", "temperature"}
        assert (asked["model"], asked["temperature"]) == ("CodeGoat24/UnifiedReward-7b-v1.5", 0)
        [sent] = asked["messages"]
        assert sent["role"] == "user"
        assert [part["type"] for part in sent["content"]] == ["image_url", "text"]
        assert sent["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        received = fake.chat_image(asked)
        assert (received.format, received.size, received.mode) == ("PNG", (512, 512), "RGB")
        assert received.tobytes() == Image.fromarray(image).resize((512, 512), Image.Resampling.BICUBIC).tobytes()
        text = sent["content"][1]["text"]
        template = text.replace(f"Text Caption: [{prompt.text}]", "Text Caption: [{prompt}]")
        assert hashlib.sha256(template.encode()).hexdigest() == PUBLISHED


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Final Score: 4", 0.8),
        ("It is good.\nFinal Score:3.5", 0.7),
        ("Final Score: 1\nFinal Score: 5", 0.2),
        ("Final Score: 9", 0.0),
        ("final score: 4", 0.0),
        ("The image is good.", 0.0),
        ("", 0.0),
    ],
)
def test_unified_reward_reads_replies_as_published(reply: str, value: float) -> None:
    with serving(lambda *_: chat(reply)) as server:
        found = get_reward("unified_reward", settings(server))(IMAGES[:1], PROMPTS[:1])
    assert found == pytest.approx([value])


def test_pixels_are_rounded() -> None:
    images = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 127.5 / 255, 1.0, 1.2]).view(1, 1, 1, 7).expand(1, 3, 2, 7)
    assert to_pixels(images)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]
    assert to_pixels(images.half()).shape == (1, 2, 7, 3)


@pytest.mark.parametrize(("batch", "requests"), [(5, 8), (5, 1), (1, 3), (64, 8)])
def test_hpsv3_asks_in_batches(batch: int, requests: int) -> None:
    with serving(fake.hpsv3) as server:
        values = get_reward("hpsv3", settings(server, batch=batch, requests=requests))(IMAGES, PROMPTS)
    expected = torch.tensor([15 * fake.brightness(Image.fromarray(image)) for image in to_pixels(IMAGES)])
    torch.testing.assert_close(values, expected)
    assert server.asked[0][:2] == ("/score", {"images": [], "prompts": []})  # whether it is there
    batches = sorted((asked for _, asked, _ in server.asked[1:]), key=lambda asked: fake.digits(asked["prompts"][0]))
    assert [text for asked in batches for text in asked["prompts"]] == [prompt.text for prompt in PROMPTS]
    assert [len(asked["images"]) for asked in batches] == [min(batch, 12 - start) for start in range(0, 12, batch)]
    sent = [fake.image_of(image).tobytes() for asked in batches for image in asked["images"]]
    assert sent == [pixels.tobytes() for pixels in to_pixels(IMAGES)]


class Legible(Judge):
    question = "How easy to read is {prompt}?"
    pattern = r"Score: (10|[0-9]|many)"
    scale = 10.0
    model = "own/judge"
    options = {"max_tokens": 32, "temperature": 0.5}  # noqa: RUF012


def test_a_judge_of_ones_own() -> None:
    """Where a reply has no number the value is missing, and the message says what the reply was."""

    def reply(_: Handler, asked: Any) -> Any:
        number = fake.digits(asked["messages"][0]["content"][1]["text"])
        return chat({10: "Score: many", 11: "I would rather not."}.get(number, f"I see. Score: {number}"))

    name = f"{__name__}:Legible"
    with serving(reply, "own/judge", "other") as server:
        runner = RewardRunner("record", 60.0, settings(server))
        found = runner.submit(IMAGES, PROMPTS, [name]).result()[name]
        asked = server.asked[0][1]
    assert found[:10].tolist() == pytest.approx([i / 10 for i in range(10)])
    assert found[10:].isnan().all()
    assert message(runner) == (
        f"reward '{name}' has no value for 2 of 12 images: the reply about 'a {{red}} cube, number 10' has no value: "
        "'Score: many'"
    )
    assert runner.failures == {(name, "not finite"): 2}
    assert (asked["model"], asked["max_tokens"], asked["temperature"]) == ("own/judge", 32, 0.5)
    assert fake.chat_image(asked).size == (40, 24)
    assert re.fullmatch(r"How easy to read is a \{red\} cube, number \d+\?", asked["messages"][0]["content"][1]["text"])


def test_the_key_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(handler: Handler, asked: Any) -> Any:
        if handler.headers.get("Authorization") == "Bearer secret":
            return fake.judge(handler, asked)
        return handler.answer({"error": "Unauthorized"}, 401)

    with judged(locked) as (server, runner):
        assert runner("unified_reward", IMAGES, PROMPTS).isnan().all()
        assert len(server.asked) <= 8  # and not tried again
        assert (
            'answered status 401: {"error": "Unauthorized"}; put the server\'s key into $OPD_FAST_JUDGE_KEY'
            in message(runner)
        )
        monkeypatch.setenv(API_KEY, "secret")
        assert runner("unified_reward", IMAGES, PROMPTS).tolist() == pytest.approx([score / 5 for score in SCORES])


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "start"),
    [
        (
            "unified_reward",
            "judge_server",
            "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 --port 17140 ",
        ),
        (f"{__name__}:Legible", "judge_server", "vllm serve own/judge --port 17140"),
        ("hpsv3", "hps3_server", "python hpsv3_server.py"),
    ],
)
def test_a_server_that_is_not_named(name: str, key: str, start: str) -> None:
    reward: Any = get_reward(name, settings())
    with pytest.raises(UserError, match=rf"^reward_models\.{key}: is not set, .*; start a server, {start}"):
        reward.check()
    for address in ("127.0.0.1:17140", "ftp://host/v1", "http://", "http://host:port/v1", "http://host/v1?model=a"):
        with pytest.raises(
            UserError, match=rf"^reward_models\.{key}: .* is not the address of a server; write http://"
        ):
            get_reward(name, settings(**{key: address})).check()  # type: ignore[attr-defined]
    for address in ("http://me:secret@host/v1", "http://me:secret@host:port/v1", "http://me:secret@host/v1?model=a"):
        with pytest.raises(UserError, match="user or password") as error:
            get_reward(name, settings(**{key: address})).check()  # type: ignore[attr-defined]
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(("name", "key"), [("unified_reward", "judge_server"), ("hpsv3", "hps3_server")])
def test_a_server_that_is_not_there_is_named_once(name: str, key: str) -> None:
    """One line with the remedy, and no wait: it is asked once a batch, and judges as soon as it is there."""
    how = fake.judge if name == "unified_reward" else fake.hpsv3
    with serving(how) as gone:
        models = settings(gone)
    begun = time.monotonic()
    with RewardRunner("record", 60.0, models) as runner:
        pending = [runner.submit(IMAGES, PROMPTS, [name, "colour"]) for _ in range(3)]
        assert all(batch.result()[name].isnan().all() for batch in pending)
    assert time.monotonic() - begun < 5
    assert runner.failures[name, "unavailable"] == 36
    said = runner.messages[name, "unavailable"]
    address = re.escape(getattr(models, key))
    assert re.fullmatch(
        rf"reward '{name}' cannot judge: reward_models\.{key}: {address}/\w+ does not answer: .*; "
        r"start the server, python .*, or correct the address",
        said,
    )
    assert "\n" not in said


def test_a_server_of_another_model() -> None:
    with serving(fake.judge, "Qwen/Qwen2.5-VL-7B-Instruct") as server:
        models = settings(server)
        with pytest.raises(
            UserError, match=r"^reward_models\.judge: .* does not serve CodeGoat24/UnifiedReward-7b-v1\.5, "
        ):
            get_reward("unified_reward", models)(IMAGES, PROMPTS)
        renamed = settings(server, judge="Qwen/Qwen2.5-VL-7B-Instruct")
        assert len(get_reward("unified_reward", renamed)(IMAGES, PROMPTS)) == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"^Bare\.question: is missing"),
        ({"question": "?", "pattern": "(["}, r"^Bare\.pattern: '\(\[' is wrong"),
        ({"question": "?", "pattern": "[0-9]"}, r"^Bare\.pattern: .* has no group"),
    ],
)
def test_a_judge_that_is_not_whole(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        type("Bare", (Judge,), fields)(settings(judge_server="http://localhost:1/v1")).check()


# --- servers that are slow, broken or gone ---------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 4])
def test_requests_at_a_time(requests: int) -> None:
    with judged(fake.slowly(fake.judge, 0.3), requests=requests) as (server, runner):
        assert runner("unified_reward", IMAGES, PROMPTS).tolist() == pytest.approx([score / 5 for score in SCORES])
        assert server.most == requests


@pytest.mark.parametrize("name", ["unified_reward", "hpsv3"])
@pytest.mark.parametrize("how", ["429", "500", "503", "cut before", "cut within", "not JSON", "slow"])
def test_what_may_pass_is_tried_again(name: str, how: str) -> None:
    """Every request fails once and is answered then."""
    right = fake.judge if name == "unified_reward" else fake.hpsv3

    def passing(handler: Handler, asked: Any) -> Any:
        if handler.number > 1 or asked == {"images": [], "prompts": []}:
            return right(handler, asked)
        if how.isdigit():
            return handler.answer({"error": "later"}, int(how), Retry_After="0")
        if how == "slow":
            time.sleep(0.6)
        return (
            handler.cut(b'{"scores": [' if how == "cut within" else b"") if "cut" in how else handler.answer(b"<html>")
        )

    options = {"request_timeout": 0.5} if how == "slow" else {}
    with judged(passing, batch=5, **options) as (server, runner):
        found = runner(name, IMAGES, PROMPTS)
    assert runner.messages == {}
    assert found.isfinite().all()
    if name == "unified_reward":
        assert found.tolist() == pytest.approx([score / 5 for score in SCORES])
        assert len(server.asked) == 24


BROKEN = {
    "500": (r"/chat/completions answered status 500: \{\"error\": \"out of memory\"\} \(3 attempts\)", 3),
    "cut before": (r"/chat/completions does not answer: .* \(3 attempts\)", 3),
    "cut within": (r"/chat/completions does not answer: IncompleteRead.* \(3 attempts\)", 3),
    "not JSON": (r"/chat/completions answered what is not JSON: <html>busy</html> \(3 attempts\)", 3),
    "slow": (r"/chat/completions took longer than 0\.3 s \(3 attempts\)", 3),
    "dribbles": (r"/chat/completions took longer than 0\.3 s \(3 attempts\)", 3),
    "dribbles headers": (r"/chat/completions took longer than 0\.3 s \(3 attempts\)", 3),
    "404": (r"/chat/completions answered status 404: no such model", 1),
    "redirect": (r"/chat/completions answered status 307", 1),
    "no choices": (r"/chat/completions answered no chat completion: \{'error': 'no'\}", 1),
    "a list": (r"/chat/completions answered no chat completion: \[1, 2\]", 1),
    "endless": (r"/chat/completions answered more than 16 MiB", 1),
}


def broken(how: str) -> Answer:
    def answer(handler: Handler, asked: Any) -> Any:
        if how in ("500", "404"):
            return handler.answer({"error": "out of memory"} if how == "500" else b"no such\nmodel", int(how))
        if how == "redirect":
            return handler.answer({}, 307, Location="http://127.0.0.1:9/")
        if how == "slow":
            time.sleep(1)
        if "cut" in how:
            return handler.cut(b'{"choices": [' if how == "cut within" else b"")
        if "dribbles" in how:
            if how == "dribbles":
                handler.answer(b"", Content_Length="1000")
            else:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\na: ")
            for _ in range(10):
                time.sleep(0.1)
                handler.wfile.write(b" ")
            return None
        if how == "endless":
            handler.answer(b"", Content_Length=str(2**30))
            while True:
                handler.wfile.write(b" " * 2**20)
        return handler.answer({"no choices": {"error": "no"}, "a list": [1, 2]}.get(how, b"<html>busy</html>"))

    return answer


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_server_is_one_line(how: str) -> None:
    said, attempts = BROKEN[how]
    with judged(broken(how), requests=1, request_timeout=0.3 if how.startswith(("slow", "dribbles")) else 20.0) as (
        server,
        runner,
    ):
        assert runner("unified_reward", IMAGES[:3], PROMPTS[:3]).isnan().all()
        assert len(server.asked) == attempts  # the other images are not sent
        assert re.fullmatch(
            rf"reward 'unified_reward' raised ServerError: {re.escape(server.address)}/v1{said}.*", message(runner)
        )
        assert "\n" not in message(runner)
        assert runner("colour", IMAGES[:3], PROMPTS[:3]).isfinite().all()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"scores": [1.0, 2.0]}, "answered 2 scores for 3 images"),
        ({"scores": [1.0, 2.0, 3.0, 4.0]}, "answered 4 scores for 3 images"),
        ({"scores": [1.0, "high", 3.0]}, "answered no list of scores: {'scores': [1.0, 'high', 3.0]}"),
        ({"scores": {"0": 1.0}}, "answered no list of scores: {'scores': {'0': 1.0}}"),
        ([1.0, 2.0, 3.0], "answered no list of scores: [1.0, 2.0, 3.0]"),
    ],
)
def test_hpsv3_is_given_the_wrong_scores(answer: Any, said: str) -> None:
    with judged(lambda _, asked: answer if asked["images"] else {"scores": []}) as (server, runner):
        assert runner("hpsv3", IMAGES[:3], PROMPTS[:3]).isnan().all()
    assert message(runner) == f"reward 'hpsv3' raised ServerError: {server.address}/score {said}"


def test_hpsv3_at_the_address_of_another_server() -> None:
    with judged(lambda *_: chat("Hello")) as (server, runner):
        assert runner("hpsv3", IMAGES, PROMPTS).isnan().all()
    assert message(runner).startswith(
        f"reward 'hpsv3' cannot judge: reward_models.hps3_server: {server.address}/score answered no list of scores: "
    )


def test_images_without_a_score_leave_the_others() -> None:
    with judged(lambda _, asked: {"scores": [None if i == 1 else 2.0 for i in range(len(asked["images"]))]}) as (
        _,
        runner,
    ):
        found = runner("hpsv3", IMAGES[:3], PROMPTS[:3])
    assert [found[0], found[2]] == [2.0, 2.0]
    assert found[1].isnan()
    assert "has no value for 1 of 3 images: " in message(runner)
    assert message(runner).endswith("has no score for 'a {red} cube, number 1'")


def test_a_prompt_that_the_server_refuses_leaves_the_others() -> None:
    def choosy(handler: Handler, asked: Any) -> Any:
        text = asked["messages"][0]["content"][1]["text"]
        if "number 3]" in text or "number 7]" in text:
            return handler.answer({"error": "the prompt is too long"}, 400)
        return fake.judge(handler, asked)

    with judged(choosy) as (server, runner):
        found = runner("unified_reward", IMAGES, PROMPTS)
    assert found.isnan().nonzero().flatten().tolist() == [3, 7]
    known = [i for i in range(12) if i not in (3, 7)]
    assert found[known].tolist() == pytest.approx([SCORES[i] / 5 for i in known])
    assert len(server.asked) == 12
    assert "has no value for 2 of 12 images: " in message(runner)
    assert 'answered status 400: {"error": "the prompt is too long"}, for \'a {red} cube, number 3\'' in message(runner)
    with pytest.raises(RewardFailure, match="has no value for 2 of 12"), serving(choosy) as server:
        RewardRunner("raise", 60.0, settings(server))("unified_reward", IMAGES, PROMPTS)


def test_a_server_that_dies_in_the_middle_and_comes_back() -> None:
    """The first batch has values, the second says why it has none, the third has values again."""
    dead = threading.Event()

    def mortal(handler: Handler, asked: Any) -> Any:
        if not dead.is_set():
            return fake.judge(handler, asked)
        return handler.cut()

    with judged(mortal, retries=1) as (_, runner):
        for index in range(3):
            if index == 1:
                dead.set()
            found = runner("unified_reward", IMAGES, PROMPTS)
            assert bool(found.isnan().all()) == (index == 1)
            dead.clear()
        assert "does not answer: " in message(runner)
        assert runner.failures == {("unified_reward", "raised"): 12}


def test_pauses_grow_and_heed_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.5)
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", lambda seconds: pauses.append(seconds))
    client = ServerClient("key", "http://127.0.0.1:9", "start it", retries=8)
    with pytest.raises(ServerError, match=r"does not answer: .* \(9 attempts\)"):
        client._ask("/x", b"{}", read_json, stop)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)
    waits = iter(["7", "soon", "\u00b2", "3600", "later"])

    def later(handler: Handler, asked: Any) -> Any:
        return handler.answer({}, 429, Retry_After=next(waits))

    with serving(later) as server:
        client = ServerClient("key", server.address, "start it", retries=4)
        pauses.clear()
        with pytest.raises(ServerError, match="status 429"):
            client._ask("/x", b"{}", read_json, stop)
    assert pauses == [7.0, 0.02, 0.04, 30.0]


def test_proxies_do_not_stand_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(fake.judge) as server:
        assert len(get_reward("unified_reward", settings(server))(IMAGES, PROMPTS)) == 12
    assert "http_proxy" in os.environ


def test_other_machines_are_asked_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is asked for the whole URL, or for a tunnel where the server speaks https, with its user and password."""
    seen = []

    class Proxy(Handler):
        def do_CONNECT(self) -> None:
            seen.append((self.path, self.headers["Proxy-Authorization"]))
            self.answer({}, 502)

    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("REQUEST_METHOD", raising=False)
    with serving(fake.judge) as server:
        server.RequestHandlerClass = Proxy
        proxy = server.address.replace("//", "//me:p%40ss@")
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("https_proxy", proxy)
        models = settings(judge_server="http://judge.invalid/v1")
        assert len(get_reward("unified_reward", models)(IMAGES[:1], PROMPTS[:1])) == 1
        [(path, _, _)] = server.asked
        assert path == "http://judge.invalid/v1/chat/completions"
        with pytest.raises(UserError, match="does not answer: OSError: Tunnel connection failed: 502"):
            get_reward("unified_reward", settings(judge_server="https://judge.invalid/v1"))(IMAGES[:1], PROMPTS[:1])
    assert seen == [("judge.invalid:443", "Basic bWU6cEBzcw==")]
