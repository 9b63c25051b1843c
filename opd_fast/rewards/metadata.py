"""What the bundled rewards need of a prompt's metadata, asked of every prompt before a run begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opd_fast.data.prompt_files import Prompt, entry_fault
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward
from opd_fast.worlds.shapes import COLOURS, RELATIONS, SHAPES

Needs = Callable[[dict[str, Any]], str | None]


def target_fault(metadata: dict[str, Any]) -> str | None:
    """What keeps the reward `text` from judging: it compares what it reads with `metadata["target"]`."""
    if "target" not in metadata:
        return "has no target; put exactly one piece of the line in double quotes, or add the key or column target"
    target = metadata["target"]
    if not isinstance(target, str) or not target.strip():
        return f"has the target {target!r}; give the words that the image must show"
    return None


def scene_fault(metadata: dict[str, Any]) -> str | None:
    """What keeps the reward `composition` from judging: it looks for the entries of `metadata["include"]`.

    Its detector knows the shapes, colours and relations of the bundled world alone; a position names an earlier entry.
    """
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        return 'has no GenEval list "include"; write GenEval records (.jsonl)'
    for index, entry in enumerate(include):
        if fault := entry_fault(entry, len(include)):
            return f"has an entry of 'include' that {fault}"
        known: list[tuple[str, Any, tuple[str, ...]]] = [("class", entry["class"], SHAPES)]
        known += [("color", entry["color"], tuple(COLOURS))] if "color" in entry else []
        known += [("position", entry["position"][0], RELATIONS)] if "position" in entry else []
        for key, word, words in known:
            if word not in words:
                return f'has the "{key}" {word!r}, which its detector does not know; give {", ".join(words)}'
        if "position" in entry and entry["position"][1] >= index:
            return f'has a "position" that names entry {entry["position"][1]} in entry {index}; name an earlier entry'
    return None


NEEDS: dict[str, Needs] = {
    "opd_fast.rewards.text": target_fault,
    "opd_fast.rewards.composition": scene_fault,
}
"""By the module of the reward's function, so that a reward named by its dotted path is asked too."""


def check_metadata(reward: str, prompts: Sequence[Prompt], key: str) -> None:
    """Raise `UserError` for the first prompt whose metadata the reward cannot judge by.

    Args:
        reward: a name or dotted path (`rewards.get_reward`). A reward of the user's is asked nothing.
        prompts: as read; the message names the file and the line of the one at fault.
        key: the setting that names the prompts.
    """
    needs = NEEDS.get(getattr(get_reward(reward), "__module__", ""))
    for prompt in prompts if needs is not None else ():
        fault = needs(prompt.metadata) if needs is not None else None
        if fault is not None:
            problem, _, remedy = fault.partition("; ")
            where = prompt.where or repr(prompt.text)
            raise UserError(key, f"{where}, which the reward {reward} judges, {problem}", remedy)
