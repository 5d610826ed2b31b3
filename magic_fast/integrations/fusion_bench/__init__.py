"""FusionBench with the merges of this library as one of its algorithms:
:class:`~magic_fast.integrations.fusion_bench.algorithm.MagicFastAlgorithm`.

fusion_bench is imported when that class is asked for, here or by ``_target_`` of a configuration.
"""

from __future__ import annotations

from importlib import import_module

from magic_fast.errors import InputError

__all__ = ["MagicFastAlgorithm"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(
            f"module 'magic_fast.integrations.fusion_bench' has no attribute {name!r}"
        )
    try:
        import_module("fusion_bench.method.base_algorithm")
    except ImportError as error:
        raise InputError(
            "package 'fusion_bench': expected it for magic_fast.integrations.fusion_bench, got "
            f"{error}. Install the extra: pip install 'magic_fast[fusion-bench]'."
        ) from None
    return getattr(import_module("magic_fast.integrations.fusion_bench.algorithm"), name)
