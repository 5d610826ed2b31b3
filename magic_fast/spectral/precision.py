"""Products of float32 matrices in float32, whatever the process has chosen for its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: _Chosen | None = None


@dataclass(frozen=True)
class _Chosen:
    """What the process has chosen, by PyTorch's older switch and by its newer ones."""

    older: str | None  # None: only the newer ones can be read
    newer: list[tuple[Any, str]]

    @staticmethod
    def now() -> _Chosen:
        on_cpu = getattr(torch.backends.mkldnn, "matmul", None)
        scopes: list[Any] = [torch.backends.cuda.matmul, on_cpu]
        newer = [(s, s.fp32_precision) for s in scopes if hasattr(s, "fp32_precision")]
        try:
            return _Chosen(torch.get_float32_matmul_precision(), newer)
        except RuntimeError:  # set by the newer switches alone, after which this one is refused
            return _Chosen(None, newer)

    def set(self) -> None:
        if self.older is not None:
            torch.set_float32_matmul_precision(self.older)
        for scope, value in self.newer:
            scope.fp32_precision = value

    def in_full(self) -> _Chosen:
        """The same switches, all at full precision: setting one kind alone would make PyTorch
        refuse to read the other."""
        older = None if self.older is None else "highest"
        return _Chosen(older, [(scope, "ieee") for scope, _ in self.newer])


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on a GPU and no bfloat16 on a CPU inside; afterwards as it was.

    A product in TF32 is good to 5e-4: no certificate of 2e-5 is ever met, and every decomposition
    would fall back to the slow one. The switches are the process's: the first thread that comes in
    sets them, the last one out puts them back.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _Chosen.now()
            _before.in_full().set()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _before is not None:
                _before.set()
