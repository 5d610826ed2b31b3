"""Runs a plan and closes its checkpoints."""

from __future__ import annotations

from pathlib import Path

from magic_fast.engine import MergePlan, MergeReport
from magic_fast.engine import run as run_plan
from magic_fast.engine.output.record import write_small_files
from magic_fast.engine.run import Finish
from magic_fast.planning.options import RunOptions
from magic_fast.planning.outputs import is_whole


def run_and_close(
    plan: MergePlan, options: RunOptions, finish: Finish = write_small_files
) -> MergeReport:
    """Runs a plan, or verifies its finished result; its checkpoints are closed afterwards."""
    try:
        if options.resume and is_whole(Path(plan.out)):
            from magic_fast.engine.output.finished import verified

            return verified(plan, options.nonfinite)
        return run_plan(
            plan,
            executor=options.executor,
            nonfinite=options.nonfinite,
            resume=options.resume,
            progress=options.progress,
            finish=finish,
        )
    finally:
        for model in plan.models.values():
            model.close()
