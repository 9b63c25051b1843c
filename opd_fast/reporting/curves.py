"""The curves of a report. Each is drawn twice, because a page is light or dark as its reader's system is."""

from __future__ import annotations

import base64
import io
import math
import re
from typing import Any

from opd_fast.reporting.reward_keys import key_words, reward_key

# Okabe and Ito's colours, told apart with any colour vision; the dark set is lightened to keep 4.5:1 on its page.
THEMES: dict[str, dict[str, Any]] = {
    "light": {"ink": "#1c1e21", "faint": "#6b7178", "grid": "#e3e5e8", "student": "#0072b2", "teacher": "#b8500a"},
    "dark": {"ink": "#e8eaed", "faint": "#9aa0a6", "grid": "#33373c", "student": "#6cb8ea", "teacher": "#f0a35e"},
}

Series = dict[str, list[tuple[int, float]]]  # name to (round, value)


def draw(results: dict[str, Any], history: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Draw the curves that the history has data for.

    Returns `[{"title", "caption", "light", "dark"}]`, where "light" and "dark" are images as data URIs.
    """
    drawn = []
    rewards = {key: points for key, points in reward_series(history).items() if len(points) > 1}
    if rewards:
        caption = "Held-out prompts, averaged weights. Dashed: the task's teacher. Dotted: the base."
        drawn.append(_twice("Rewards over rounds", caption, lambda theme: _rewards(rewards, results, theme)))
    steps, tasks = step_series(history), _matching(history, r"loss/task_(.+)")
    if steps:
        caption = (
            "One line for each trained solver step, from the noisiest (dark) to the cleanest (bright). "
            "Steps weigh very differently, so they are not to be judged by their sum."
        )
        drawn.append(_twice("Loss of each solver step", caption, lambda theme: _steps(steps, theme)))
    total = [(line["round"], line["loss"]) for line in history if "loss" in line]
    if total:
        caption = "The round's whole loss" + (", and each task's part of it." if tasks else ".")
        losses = {"all tasks": total, **tasks}
        drawn.append(_twice("Loss over rounds", caption, lambda theme: _losses(losses, theme)))
    return drawn


def reward_series(history: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return (task, reward) to [(rounds done, mean)], from the evaluation lines of metrics.jsonl.

    A round that was evaluated twice keeps the later value.
    """
    series: dict[tuple[str, str], dict[int, float]] = {}
    for line in history:
        for task, means in line.get("evaluation", {}).items():
            for reward, value in means.items():
                series.setdefault((task, reward), {})[line["round"]] = value
    return {key: sorted(points.items()) for key, points in series.items()}


def step_series(history: list[dict[str, Any]]) -> Series:
    """Return solver step to [(round, loss)], in the order of the steps."""
    return dict(sorted(_matching(history, r"loss/step_?(\d+)").items(), key=lambda item: int(item[0])))


def _matching(history: list[dict[str, Any]], pattern: str) -> Series:
    """Return what the pattern's group matches in a metric's name, to that metric."""
    series: Series = {}
    for line in history:
        for key, value in line.items():
            if match := re.fullmatch(pattern, key):
                series.setdefault(match.group(1), []).append((line["round"], value))
    return series


def _twice(title: str, caption: str, figure: Any) -> dict[str, str]:
    return {"title": title, "caption": caption, **{name: _png(figure(theme)) for name, theme in THEMES.items()}}


def _axes(theme: dict[str, Any], panels: int, height: float = 2.6) -> tuple[Any, list[Any]]:
    """Return a figure and its `panels`, at most three in a row, without the boxes that carry no data."""
    from matplotlib.figure import Figure

    columns = {1: 1, 2: 2, 4: 2}.get(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(9.2, height * rows), layout="constrained")
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(theme["grid"])
        ax.grid(axis="y", color=theme["grid"], linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=theme["faint"], labelsize=8, length=0)
        ax.set_xlabel("round", color=theme["faint"], fontsize=8)
    return figure, axes


def _rewards(series: dict[tuple[str, str], list[tuple[int, float]]], results: dict[str, Any], theme: Any) -> Any:
    figure, axes = _axes(theme, len(series))
    rewards = [reward for _, reward in series]
    colours = {"student": theme["student"], "teacher": theme["teacher"], "base": theme["faint"]}
    for ax, ((task, reward), points) in zip(axes, series.items(), strict=True):
        rounds, values = zip(*points, strict=True)
        title = _title(task, reward, shared=rewards.count(reward) > 1)
        ax.set_title(title, color=theme["ink"], fontsize=9.5, loc="left", fontweight="bold")
        ends = {"student": values[-1]}
        ax.plot(rounds, values, color=theme["student"], linewidth=2, marker="o", markersize=3.5)
        for label, row, style in (("teacher", f"teacher:{task}", (0, (5, 3))), ("base", "base", (0, (1, 2)))):
            means = results["rows"].get(row, {})
            level = means.get(reward_key(means, task, reward))
            if level is not None and math.isfinite(level):  # NaN: that reward failed there
                ax.axhline(level, color=colours[label], linewidth=1.4, linestyle=style)
                ends[label] = level
        low, high = min((*values, *ends.values())), max((*values, *ends.values()))
        room = max(high - low, 1e-3)
        ax.set_ylim(low - 0.08 * room, high + 0.12 * room)
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        for label, y in _apart(ends, 0.11 * room).items():  # names beside the lines instead of a legend
            ax.annotate(label, (1.0, y), xytext=(4, 0), color=colours[label], fontsize=8, va="center", **beside)
    return figure


def _title(task: str, reward: str, *, shared: bool) -> str:
    """Return a panel's heading: the reward, after its task where the reward's name does not imply the task."""
    implied = not shared and (task == reward or reward.startswith(f"{task}_"))
    return key_words(reward if implied else f"{task}/{reward}")


def _apart(levels: dict[str, float], least: float) -> dict[str, float]:
    """Return the labels' heights, moved so that neighbours are at least `least` apart in the same order."""
    placed: dict[str, float] = {}
    for label, y in sorted(levels.items(), key=lambda item: item[1]):
        placed[label] = max(y, max(placed.values()) + least) if placed else y
    return placed


def _steps(series: Series, theme: dict[str, Any]) -> Any:
    from matplotlib import colormaps

    # Ends of viridis that vanish on the page are left out.
    low, high = (0.0, 0.85) if theme is THEMES["light"] else (0.25, 1.0)
    places = [low + (high - low) * i / max(len(series) - 1, 1) for i in range(len(series))]
    styles = [{"color": colormaps["viridis"](place), "linewidth": 1.5} for place in places]
    named = {f"step {step.lstrip('0') or '0'}": points for step, points in series.items()}
    return _lines(named, styles, theme, height=3.2)


def _losses(series: Series, theme: dict[str, Any]) -> Any:
    colours = [theme["student"], theme["teacher"], "#009e73", "#cc79a7", theme["faint"]]
    dashes = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 3))]
    styles = [
        {"color": colours[i % 5], "linestyle": dashes[i % 5], "linewidth": 1.3 if i else 1.8}
        for i in range(len(series))
    ]
    return _lines(series, styles, theme, height=2.6)


def _lines(series: Series, styles: list[dict[str, Any]], theme: dict[str, Any], height: float) -> Any:
    figure, (ax,) = _axes(theme, 1, height)
    for (name, points), style in zip(series.items(), styles, strict=True):
        ax.plot(*zip(*points, strict=True), label=name, **style)
    _log(ax, series)
    if len(series) > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, labelcolor=theme["ink"])
    return figure


def _log(ax: Any, series: Series) -> None:
    """Make the axis logarithmic where the values span more than a decade or so; below that it would have one tick."""
    values = [value for points in series.values() for _, value in points]
    if min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
        ax.minorticks_off()
    else:
        ax.ticklabel_format(axis="y", scilimits=(-2, 3))
        ax.yaxis.get_offset_text().set(color=ax.yaxis.get_ticklabels()[0].get_color(), fontsize=8)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return data_uri(buffer.getvalue())


def data_uri(picture: bytes, kind: str = "image/png") -> str:
    """Return a picture in the form in which a page holds it."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"
