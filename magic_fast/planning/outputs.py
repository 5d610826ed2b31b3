"""Where a run on checkpoints writes: what is in the way, and whether the disk has room."""

from __future__ import annotations

from pathlib import Path

from magic_fast.engine import (
    MergePlan,
)
from magic_fast.engine.plan.plan import free_bytes
from magic_fast.errors import OutputError


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
    free = free_bytes(plan.out)
    if free < plan.disk_needed:
        raise OutputError(
            f"disk for {plan.out!r}: expected {plan.disk_needed} free bytes, got {free}. "
            "Free some space, or write elsewhere."
        )
