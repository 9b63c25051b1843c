"""Vision-language models as judges, asked by the OpenAI chat protocol that vLLM and SGLang serve.

A judge of one's own is a subclass of `Judge` with a question, where the number stands in the reply, and its scale:

    class Legible(Judge):
        question = "How easy to read is the text in this image of {prompt}? End with 'Score: N', N from 0 to 10."
        pattern = r"Score: (10|[0-9])"
        scale = 10.0

It is named by its path, `my_judge:Legible`. docs/judges.md has the whole example.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, short
from opd_fast.rewards.model_reward import ModelReward
from opd_fast.rewards.server_client import SHOWN, RefusedError, RetryableError, ServerClient, ServerError, words_of
from opd_fast.rewards.values import MissingValues


class ServerReward(ModelReward):
    """A reward whose values come from a server. An image without a value does not take those of the others with it."""

    remote = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._asking = threading.Lock()
        self._faults: dict[int, str] = {}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As `ModelReward` says. Raises MissingValues where some images have none."""
        with self._asking:
            self._faults.clear()
            values = super().__call__(images, prompts)
            if self._faults:
                raise MissingValues(values, self._faults[min(self._faults)])
        return values

    def missing(self, index: int, why: str) -> float:
        """Return NaN, the value of image `index`, which has none, and remember why."""
        self._faults[index] = why
        return math.nan

    def batch_size(self, count: int) -> int:
        return max(1, count)  # the client bounds what is under way


class Judge(ServerReward):
    """A reward that asks a vision-language model about each image and reads a number from its reply."""

    question: ClassVar[str]
    """What is asked; {prompt} stands for the prompt's text."""
    pattern: ClassVar[str] = r"Final Score:\s*([1-5](?:\.\d+)?)"
    """A regular expression whose first match in the reply has the number as its first group."""
    scale: ClassVar[float] = 5.0
    """The number is divided by it."""
    unread: ClassVar[float] = math.nan
    """The value of a reply without a number; NaN counts as missing."""
    size: ClassVar[tuple[int, int] | None] = None
    """Width and height that images are resized to; None leaves them."""
    server: ClassVar[str | None] = None
    """The server's address; None: `reward_models.judge_server`."""
    model: ClassVar[str | None] = None
    """The name under which the server serves the model; None: `reward_models.judge`."""
    options: ClassVar[dict[str, Any]] = {}
    """Further fields of the request, such as {"max_tokens": 64}."""
    start: ClassVar[str | None] = None
    """The command that starts the server, for messages; None: that of vLLM."""

    def ask(self, prompt: Prompt) -> str:
        """Return the question about one image; overridden where it depends on the prompt's metadata."""
        return self.question.replace("{prompt}", prompt.text)

    def read(self, reply: str) -> float:
        """Return the value that a reply gives, NaN where it gives none."""
        found = re.search(self.pattern, reply)
        try:
            return self.unread if found is None else float(found[1]) / self.scale
        except ValueError:
            return self.unread

    @property
    def served(self) -> str:
        """The model's name in requests."""
        return self.model or self.models.judge

    def client(self) -> ServerClient:
        """Return what asks the server. Raises UserError for an address that is missing or of another form."""
        key = "reward_models.judge_server" if self.server is None else f"{type(self).__name__}.server"
        start = self.start or f"vllm serve {self.served} --port 17140"
        return ServerClient.of(key, self.server or self.models.judge_server, self.models, start)

    def check(self) -> None:
        """As `ModelReward` says. Raises UserError for a class that is not whole, too."""
        super().check()
        name = type(self).__name__
        if not hasattr(self, "question"):
            raise UserError(f"{name}.question", "is missing", "write what the model is asked; {prompt} is the caption")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(f"{name}.pattern", f"{self.pattern!r} is wrong ({error})", "correct it") from error
        if not groups:
            raise UserError(f"{name}.pattern", f"{self.pattern!r} has no group", "put the number in brackets: (...)")
        self.client()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Find the server and whether it serves the model. Raises UserError."""
        client = self.client()
        try:
            answer = client.reach("/models", read_json)
        except ServerError as error:
            if error.status in (404, 405):
                return  # it does not list its models
            remedy = "look at the server, or correct the address"
            raise UserError(client.key, str(error), remedy) from error
        listed = answer.get("data") if isinstance(answer, dict) else None
        names = [str(entry["id"]) for entry in listed or () if isinstance(entry, dict) and "id" in entry]
        if names and self.served not in names:
            key = "reward_models.judge" if self.model is None else f"{type(self).__name__}.model"
            problem = f"{client.address} does not serve {self.served}, but {', '.join(names)}"
            raise UserError(key, problem, "give the name that it serves, or the address of another server")

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = to_pixels(images)

        def body(index: int) -> bytes:
            url = f"data:image/png;base64,{to_base64(pixels[index], self.size)}"
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": self.ask(prompts[index])},
            ]
            asked = {"model": self.served, "messages": [{"role": "user", "content": content}], "temperature": 0}
            return json.dumps(asked | self.options).encode()

        def read(index: int, answer: bytes) -> float:
            value = self.read(reply := reply_text(answer))
            if math.isfinite(value):
                return value
            asked = short(prompts[index].text, SHOWN)
            return self.missing(index, f"the reply about {asked!r} has no value: {short(reply, SHOWN)!r}")

        def refused(index: int, error: RefusedError) -> float:
            return self.missing(index, f"{error}, for {short(prompts[index].text, SHOWN)!r}")

        client = self.client()
        return torch.tensor(client.ask_all("/chat/completions", len(pixels), body, read, refused))

    def identity(self) -> dict[str, Any]:
        return {"model": self.served, "question": self.question, "pattern": self.pattern, "scale": self.scale}


def reply_text(answer: bytes) -> str:
    """Return the text of a chat completion. Raises ServerError for another answer."""
    found = read_json(answer)
    try:
        text = found["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ServerError(f"answered no chat completion: {short(str(found), SHOWN)}")
    return text


def read_json(answer: bytes) -> Any:
    """Return the value that an answer holds. Raises RetryableError for what is not JSON."""
    try:
        return json.loads(answer)
    except ValueError as error:
        raise RetryableError(f"answered what is not JSON: {words_of(answer)}") from error


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
