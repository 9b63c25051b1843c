"""Distil teachers into a student:

python -m opd_fast.train [RECIPE_OR_YAML] [--section.key VALUE ...] [--run-dir DIR] [--resume RUN_DIR]
                         [--dry-run] [--profile]
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

from opd_fast.config.command_line import Command, parse
from opd_fast.config.run_dir import check_run_dir, prepare_run_dir
from opd_fast.errors import UserError, main_guard
from opd_fast.reporting.telemetry import quiet_libraries
from opd_fast.training.problems import check_paths
from opd_fast.training.resuming import ended, finished, finished_stages
from opd_fast.waiting import bound_spinning


def is_finished(command: Command) -> str | None:
    """What to say of a resumed run that has nothing left to do; None where it has.

    Raises `UserError` for fewer rounds than were done, before config.yaml is written again.
    """
    run_dir, stages = command.run_dir, command.stages
    results = finished_stages(run_dir, stages) if stages else finished(run_dir, command.config)
    return None if results is None else ended(run_dir, results, staged=bool(stages))


@main_guard
def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    bound_spinning()
    command = parse(argv)
    if command.dry_run:
        quiet_libraries()
        _plan(command)
        return 0
    if command.resume and (said := is_finished(command)) is not None:
        if os.environ.get("RANK", "0") == "0":
            print(said, flush=True)
        return 0
    for config in command.configs:
        check_paths(config)
    quiet_libraries()
    from opd_fast.distributed.plan import Planner
    from opd_fast.distributed.world import open_world
    from opd_fast.training.loop import train
    from opd_fast.training.stages import train_stages

    planner = Planner(command.config)
    with open_world(command.config, planner) as world, ExitStack() as hold:
        run_dir = world.on_first(lambda: prepare_run_dir(command, hold))
        resume, profile = command.resume, command.profile
        if command.stages:
            train_stages(command.stages, run_dir, resume=resume, profile=profile, world=world, planner=planner)
        else:
            train(command.config, run_dir, resume=resume, profile=profile, world=world, planner=planner)
    return 0


def _plan(command: Command) -> None:
    """Print what a run would do, and all that it would be refused for; raise the first of these."""
    from opd_fast.distributed.plan import Planner
    from opd_fast.distributed.plan_table import print_plan
    from opd_fast.distributed.world import check_alone, launched
    from opd_fast.training.preflight import refusals, unchecked

    checks = [lambda: check_run_dir(command)]
    if command.devices is None and launched() is None:
        checks.append(lambda: check_alone(command.config))
    refused: list[ValueError] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            refused.append(error)
    for config in command.configs:
        planner = Planner(config, command.devices, command.gpu_memory)
        refused += refusals(planner, sharded=planner.plan.strategy in ("fsdp2", "hsdp"), fetches=False)
        print_plan(planner.plan, config, command.run_dir, dict.fromkeys(refused), unchecked(config))
    if refused:
        raise refused[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
