"""Where a run on checkpoints writes: what is in the way, whether the disk has room, and the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from magic_fast.checkpoint import Checkpoint
from magic_fast.engine import MergePlan, MergeReport
from magic_fast.engine import run as run_plan
from magic_fast.engine.output.record import write_small_files
from magic_fast.engine.plan.plan import free_bytes
from magic_fast.engine.run import Finish
from magic_fast.errors import OutputError
from magic_fast.planning.options import RunOptions


def check_out(out: str | Path, resume: bool) -> str:
    """OUT as a string, refused where something is in the way (which may be the finished result of a
    run that is resumed)."""
    path = Path(out).expanduser()
    if resume and is_whole(path):
        return str(path)
    if path.suffix == ".safetensors":
        return check_new_file(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"output folder {str(path)!r}: expected it missing or empty, got something in it. "
            "Remove it, or name another."
        )
    return str(path)


def check_new_file(path: str | Path) -> str:
    """A file to make, refused where one is."""
    path = Path(path).expanduser()
    if path.exists():
        raise OutputError(
            f"output file {str(path)!r}: expected none of that name, got one. Remove it, "
            "or name another."
        )
    return str(path)


def is_whole(path: Path) -> bool:
    """Whether a finished result lies there: nothing else has the final name."""
    if path.suffix == ".safetensors":
        return path.is_file()
    return path.is_dir() and any(path.iterdir())


def check_disk(plan: MergePlan) -> None:
    """Refuses a plan whose result has no room; a finished one needs none."""
    free = free_bytes(plan.out)
    if free < plan.disk_needed and not is_whole(Path(plan.out)):
        raise OutputError(
            f"disk for {plan.out!r}: expected {plan.disk_needed} free bytes, got {free}. "
            "Free some space, or write elsewhere."
        )


def run_and_close(
    plan: MergePlan, options: RunOptions, finish: Finish = write_small_files
) -> MergeReport:
    """Runs a plan, or verifies its finished result; its checkpoints are closed afterwards."""
    with closing(plan.models):
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


@contextmanager
def closing(models: Mapping[str, Checkpoint]) -> Iterator[None]:
    """The checkpoints are closed after the block."""
    try:
        yield
    finally:
        for model in models.values():
            model.close()
