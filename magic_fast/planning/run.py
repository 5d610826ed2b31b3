"""Runs a plan and closes its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from magic_fast.engine import (
    MergePlan,
    MergeReport,
    Progress,
)
from magic_fast.engine import run as run_plan
from magic_fast.engine.execute.executor import Executor
from magic_fast.engine.output.record import write_small_files
from magic_fast.engine.run import Finish
from magic_fast.planning.outputs import is_whole

ProgressCall = Callable[[Progress], None]


def run_and_close(
    plan: MergePlan,
    nonfinite: str,
    resume: bool,
    progress: ProgressCall | None,
    finish: Finish = write_small_files,
    executor: str | Executor = "auto",
) -> MergeReport:
    """Runs a plan, or verifies its finished result; its checkpoints are closed afterwards."""
    try:
        if resume and is_whole(Path(plan.out)):
            from magic_fast.engine.output.finished import verified

            return verified(plan, nonfinite)
        return run_plan(
            plan,
            executor=executor,
            nonfinite=nonfinite,
            resume=resume,
            progress=progress,
            finish=finish,
        )
    finally:
        for model in plan.models.values():
            model.close()
