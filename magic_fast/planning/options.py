"""What the calls on checkpoints take beside what they merge: one list of options, each with its
default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from magic_fast.checkpoint.plan import DEFAULT_SHARD_BYTES
from magic_fast.engine.execute.executor import Executor
from magic_fast.engine.output.report import Progress

ProgressCall: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True)
class RunOptions:
    """How a run on checkpoints executes. The public calls take each by its name, with the default
    that stands here; :func:`magic_fast.merge_checkpoints` describes them.

    >>> RunOptions(device="cpu").nonfinite
    'error'
    """

    device: str = "auto"
    backend: str | None = None
    executor: str | Executor = "auto"
    max_shard_size: int = DEFAULT_SHARD_BYTES
    memory: int | None = None
    nonfinite: str = "error"
    resume: bool = False
    progress: ProgressCall | None = None
