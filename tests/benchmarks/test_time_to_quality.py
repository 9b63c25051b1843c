"""Time to quality: clock and goal by hand, the published run against its formulas, one tiny whole comparison."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.rounds import bundle_is_there
from benchmarks.time_to_quality import Goal, Judged, PublishedRun, judgements, lines, main, published_decays, told
from opd_fast.config.command_line import parse

GOAL = Goal(base={"text": 0.2, "colour": 0.1}, teachers={"text": 1.0, "colour": 0.1}, share=0.9)


def judged(round: int, text: float) -> Judged:
    return Judged(round, seconds=2.0 * round, rewards={"text": text, "colour": 0.0})


def test_a_student_is_judged_every_five_rounds_then_every_tenth() -> None:
    assert list(judgements(18)) == [5, 10, 15, 18]
    assert list(judgements(10)) == [5, 10]
    later = [at for at in judgements(2000) if at > 200]
    assert all(1.08 < after / before <= 1.1 for before, after in itertools.pairwise(later[:-1]))
    assert later[-1] == 2000


def test_the_share_counts_from_the_base_and_a_teacher_without_gain_asks_nothing() -> None:
    assert GOAL.recovered(judged(1, 0.6)) == pytest.approx({"text": 0.5, "colour": 1.0})
    assert not GOAL.reached(judged(1, 0.91))
    assert GOAL.reached(judged(1, 0.93))


def test_a_side_arrives_at_the_first_judgement_that_reaches_the_goal() -> None:
    found = told([judged(10, 0.5), judged(20, 0.95), judged(30, 0.9)], GOAL)
    assert (found["reached_round"], found["reached_seconds"], found["not_yet_seconds"]) == (20, 40.0, 20.0)
    assert found["round_seconds"] == 2.0
    assert told([judged(10, 0.95)], GOAL)["not_yet_seconds"] == 0.0


def test_a_side_that_never_arrives_gives_a_lower_limit() -> None:
    sides = {"engine": told([judged(10, 0.95)], GOAL), "published": told([judged(10, 0.3), judged(50, 0.8)], GOAL)}
    assert (sides["published"]["reached_seconds"], sides["published"]["not_yet_seconds"]) == (None, 100.0)
    text = "\n".join(lines(sides))
    assert "not reached" in text
    assert "> 5.0x" in text


def test_the_published_average_settles_at_0_729_every_eighth_step() -> None:
    config = parse(["bundled", "--train.ema", "0.9"]).config
    assert [i for i in range(40) if published_decays(i, config)] == [7, 15, 23, 31, 39]
    assert math.prod(published_decays(8 * 100 - 1, config)) == pytest.approx(0.729)
    assert math.prod(published_decays(7, config)) == pytest.approx((8 / 17) ** 3)


@pytest.mark.skipif(not bundle_is_there(), reason="the bundle has not been built")
def test_the_published_run_steps_averages_and_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rounds whose gradients are all one: AdamW, clip, rate and average by hand; judging changes nothing."""
    settings = ["--train.samples_per_task", "1", "--train.schedule", "cosine", "--train.rounds", "16"]
    config = parse(["bundled", "--evaluation.prompts", "2", "--evaluation.steps", "2", *settings]).config
    run = PublishedRun(config, published_average=True)
    start = [p.detach().clone() for p in run.parameters]
    mine = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = torch.optim.AdamW(mine, lr=1.0, weight_decay=config.train.weight_decay)

    def ones(batch: object) -> None:
        for parameter in run.parameters:
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(run.loop, "round", ones)
    for index in range(8):
        run.round()
        optimizer.param_groups[0]["lr"] = config.train.lr * 0.5 * (1 + math.cos(math.pi * index / 16))
        for parameter in mine:
            parameter.grad = torch.ones_like(parameter)
        torch.nn.utils.clip_grad_norm_(mine, config.train.clip)
        optimizer.step()
    torch.testing.assert_close(run.parameters, mine)
    kept = (8 / 17) ** 3
    expected = [kept * before + (1 - kept) * after.detach() for before, after in zip(start, mine, strict=True)]
    torch.testing.assert_close(run.average, expected)

    found = run.judge()
    assert (found.round, sorted(found.rewards)) == (8, ["colour", "composition", "text"])
    torch.testing.assert_close(run.parameters, mine, rtol=0, atol=0)
    with run._averaged():
        torch.testing.assert_close(run.parameters, run.average, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not bundle_is_there(), reason="the bundle has not been built")
def test_a_whole_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "times.json"
    sizes = ["--train.rounds", "2", "--evaluation.prompts", "4", "--evaluation.steps", "2"]
    assert main(["--out", str(out), "--budget", "1", "--share", "2", *sizes]) == 0
    content = json.loads(out.read_text())
    assert list(content["sides"]) == ["engine", "published, tuned", "published"]
    assert content["settings"]["published"]["train"]["lr"] == 3e-4
    assert content["settings"]["recipe"]["train"]["lr"] == 2e-3
    assert [teacher["weight"] for teacher in content["settings"]["published"]["teachers"]] == [1.0, 1.0, 1.0]
    for side in content["sides"].values():
        assert side["reached_seconds"] is None
        assert side["curve"][-1]["seconds"] > 0
    assert content["sides"]["engine"]["curve"][-1]["round"] == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "not reached" in capsys.readouterr().out
