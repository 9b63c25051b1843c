"""HPSv3 (arXiv 2508.03789), judged by a server, because its package pins libraries older than the trainer's.

No protocol of such a server is common to public projects, so there is one here, small enough to write down: a POST to
ADDRESS/score with the JSON {"images": [PNG in base64, ...], "prompts": [text, ...]} is answered by the JSON
{"scores": [number, ...]}, one for each image in order. docs/judges.md has a server of it for the published package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, short
from opd_fast.rewards.judge import ServerReward, read_json, to_base64, to_pixels
from opd_fast.rewards.server_client import SHOWN, ServerClient, ServerError

KEY = "reward_models.hps3_server"
START = "python hpsv3_server.py (docs/judges.md has the file)"


class HPSv3(ServerReward):
    """The mean of the score that the model predicts, mu of the published inference, unscaled; it may be negative."""

    def client(self) -> ServerClient:
        """Return what asks the server. Raises UserError for an address that is missing or of another form."""
        return ServerClient.of(KEY, self.models.hps3_server, self.models, START)

    def check(self) -> None:
        super().check()
        self.client()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Ask the server about no images. Raises UserError where it does not answer as described above."""
        try:
            self.client().reach("/score", lambda answer: _scores(answer, 0), _body([], []))
        except ServerError as error:
            remedy = f"give the address of a server that was started by {START}"
            raise UserError(KEY, str(error), remedy) from error

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels, client, size = to_pixels(images), self.client(), self.models.batch
        starts = range(0, len(pixels), size)

        def body(number: int) -> bytes:
            part = slice(starts[number], starts[number] + size)
            return _body([to_base64(one) for one in pixels[part]], [one.text for one in prompts[part]])

        def read(number: int, answer: bytes) -> list[float]:
            start = starts[number]
            values = _scores(answer, min(size, len(pixels) - start))
            for index, value in enumerate(values, start):
                if not math.isfinite(value):
                    self.missing(index, f"{client.address} has no score for {short(prompts[index].text, SHOWN)!r}")
            return values

        parts = client.ask_all("/score", len(starts), body, read)
        return torch.tensor([value for part in parts for value in part])

    def identity(self) -> dict[str, Any]:
        return {"server": self.models.hps3_server}


def _body(images: list[str], prompts: list[str]) -> bytes:
    return json.dumps({"images": images, "prompts": prompts}).encode()


def _scores(answer: bytes, count: int) -> list[float]:
    """Return `count` scores; null is NaN. Raises ServerError for another answer."""
    found = read_json(answer)
    scores = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(scores, list) or not all(one is None or _is_number(one) for one in scores):
        raise ServerError(f"answered no list of scores: {short(str(found), SHOWN)}")
    if len(scores) != count:
        raise ServerError(f"answered {len(scores)} scores for {count} images")
    return [math.nan if one is None else float(one) for one in scores]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
