"""A server in this process that answers as vLLM and SGLang do, or as a broken one does."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Answer = Callable[["Handler", Any], Any]
"""Given the handler and the request's JSON; returns the answer's JSON, or None after answering by itself."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path.endswith("/models"):
            self.answer({"object": "list", "data": [{"id": name} for name in self.server.models]})
        else:
            self.answer({"error": "no such path"}, 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.busy += 1
            server.most = max(server.most, server.busy)
            server.asked.append((self.path, asked, self.headers.get("Authorization")))
            self.number = server.counts[json.dumps(asked)] = server.counts[json.dumps(asked)] + 1
        try:
            found = server.how(self, asked)
        finally:
            with server.lock:
                server.busy -= 1
        if found is not None:
            self.answer(found)

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def cut(self, sent: bytes = b"") -> None:
        """Close the connection after part of an answer, or before any."""
        if sent:
            self.answer(sent, Content_Length=str(len(sent) + 100))
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Attributes: `asked` has (path, JSON, Authorization) of every POST, `most` the largest number at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, how: Answer, models: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.how, self.models = how, models
        self.asked: list[tuple[str, Any, str | None]] = []
        self.counts: Counter[str] = Counter()
        self.busy = self.most = 0
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone


@contextmanager
def serving(how: Answer, *models: str) -> Iterator[Server]:
    with Server(how, models or ("CodeGoat24/UnifiedReward-7b-v1.5",)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def image_of(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2], validate=True)))


def chat_image(asked: Any) -> Image.Image:
    """The image of a chat request."""
    return image_of(asked["messages"][0]["content"][0]["image_url"]["url"])


def chat(text: str) -> dict[str, Any]:
    """A chat completion."""
    return {"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": text}}]}


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image, dtype=np.float64).mean() / 255)


def judge(_: Handler, asked: Any) -> Any:
    """A score of 1 to 5 by the image's brightness."""
    return chat(f"The image is fine.\nFinal Score: {1 + round(4 * brightness(chat_image(asked)))}")


def hpsv3(_: Handler, asked: Any) -> Any:
    return {"scores": [15 * brightness(image_of(image)) for image in asked["images"]]}


def slowly(how: Answer, seconds: float) -> Answer:
    def answer(handler: Handler, asked: Any) -> Any:
        time.sleep(seconds)
        return how(handler, asked)

    return answer


def digits(text: str) -> int:
    found = re.search(r"\d+", text)
    assert found is not None
    return int(found[0])
