"""Triton's interpreter, where tests run without a GPU: switched on before Triton is imported, and
made quick enough for a grid of cases."""

from __future__ import annotations

import os
from typing import Any


def switch_on() -> bool:
    """TRITON_INTERPRET=1 unless the caller chose or a GPU is here. Must come before the first
    import of Triton: its functions are bound at definition."""
    if "TRITON_INTERPRET" not in os.environ:
        try:
            import torch
        except ImportError:
            return False
        if torch.cuda.is_available():
            return False
        os.environ["TRITON_INTERPRET"] = "1"
    return os.environ["TRITON_INTERPRET"] == "1"


def interprets() -> bool:
    """Whether the Triton backend is here and runs its kernels in the interpreter."""
    from magic_fast.ops.registry import why_unavailable

    if why_unavailable("triton") is not None:
        return False
    from magic_fast.ops.triton.backend import interpreted

    return interpreted()


class _Scopes:
    """Patches of one launch, undone together."""

    def __init__(self, scopes: list[Any]) -> None:
        self.scopes = scopes

    def restore(self) -> None:
        while self.scopes:
            self.scopes.pop().restore()


def quicken() -> None:
    """The language is patched once a launch, not at every call of a device function: that alone is
    two thirds of the time. Where the interpreter is built otherwise, nothing changes."""
    try:
        from triton.language import standard
        from triton.runtime import interpreter
    except ImportError:
        return
    real = getattr(interpreter, "_patch_lang", None)
    if real is None or not hasattr(interpreter, "_LangPatchScope") or hasattr(real, "quick"):
        return
    current = _Scopes([])

    def patch_once(fn: Any) -> _Scopes:
        if current.scopes:
            return _Scopes([])
        current.scopes += [real(fn), real(standard.sum.fn)]
        return current

    patch_once.quick = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once
