"""Random streams: their numbers decide what a resumed run draws, so that none of them may change."""

from __future__ import annotations

import ast
from pathlib import Path

import opd_fast
from opd_fast.seeds import SftDraw, Stream, noise_keys
from opd_kernels.philox import INITIAL_NOISE

NUMBERS = {
    "ROLLOUT": 1,
    "QUERY": 2,
    "ORDER": 3,
    "FLOAT8_CHECK": 3,
    "WINDOW": 4,
    "NFT_NOISE": 5,
    "NFT_LEVELS": 6,
    "SFT_NOISE": 7,
    "MERGE": 8,
    "TASK_SCHEDULE": 2**32 - 1,
}


def test_the_numbers_are_those_that_runs_were_begun_with() -> None:
    assert {name: int(stream) for name, stream in Stream.__members__.items()} == NUMBERS
    assert {name: int(draw) for name, draw in SftDraw.__members__.items()} == {"NOISE": 0, "LEVEL": 1}
    assert INITIAL_NOISE == 2**31 - 1


def test_the_two_that_share_a_number_share_no_key() -> None:
    order = {int(noise_keys(0, Stream.ORDER, rollout, samples=1)) for rollout in range(200)}
    assert order.isdisjoint(noise_keys(0, Stream.FLOAT8_CHECK, samples=200).tolist())


def test_keys_of_a_stream_are_those_of_its_number() -> None:
    assert noise_keys(5, Stream.SFT_NOISE, 2, samples=3).tolist() == noise_keys(5, 7, 2, samples=3).tolist()
    assert noise_keys(0, Stream.ROLLOUT, 0, 0, samples=2).tolist() == [9024882901509940785, 2070679625798137377]


def test_no_stream_has_its_number_elsewhere() -> None:
    """Every path of `noise_keys` or `generator` in the package names its stream, if it has one."""
    paths: dict[str, list[str]] = {}
    for file in Path(opd_fast.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("noise_keys", "generator"):
                paths.setdefault(file.name, []).extend(ast.unparse(argument) for argument in node.args[1:2])
    named = {stream for of_file in paths.values() for stream in of_file}
    assert named == {
        *(f"Stream.{name}" for name in NUMBERS if name not in ("NFT_NOISE", "SFT_NOISE", "TASK_SCHEDULE")),
        "stream",
        "name",
    }
