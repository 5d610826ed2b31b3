"""Other libraries, each imported only when something of it is asked for."""

from __future__ import annotations

from importlib import import_module

#: What stands in front of other packages; importing one of these imports nothing of theirs.
_FRONTS = ("fusion_bench", "mergekit", "peft")


def __getattr__(name: str) -> object:
    if name not in _FRONTS:
        raise AttributeError(f"module 'magic_fast.integrations' has no attribute {name!r}")
    return import_module(f"magic_fast.integrations.{name}")
