"""What rewards need of prompts and their metadata, checked for every prompt before a run begins."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import REWARDS, get_reward


def check_metadata(reward: str, prompts: Sequence[Prompt], key: str) -> None:
    """Raise `UserError` for the first prompt that the reward cannot judge by.

    A reward's file says what it needs by a function `metadata_fault(metadata)`, or by `prompt_fault(prompt)` where the
    text counts as well. The function returns None, or a problem and a remedy as `problem; remedy`. Only the files of
    `REWARDS` are asked, under whatever name the reward is given.

    Args:
        reward: a name or dotted path (`rewards.get_reward`).
        prompts: as read; the message names the file and the line of the one at fault.
        key: the setting that names the prompts.
    """
    module = getattr(get_reward(reward), "__module__", "")
    if module not in {path.partition(":")[0] for path in REWARDS.values()}:
        return
    metadata_fault = getattr(sys.modules[module], "metadata_fault", lambda metadata: None)
    prompt_fault = getattr(sys.modules[module], "prompt_fault", lambda prompt: metadata_fault(prompt.metadata))
    for prompt in prompts:
        if (fault := prompt_fault(prompt)) is not None:
            problem, _, remedy = fault.partition("; ")
            where = prompt.where or repr(prompt.text)
            raise UserError(key, f"{where}, which the reward {reward} judges, {problem}", remedy)
