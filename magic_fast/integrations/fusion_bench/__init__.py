"""FusionBench with the merges of this library as one of its algorithms:
:class:`~magic_fast.integrations.fusion_bench.algorithm.MagicFastAlgorithm`.

fusion_bench is imported when that class is asked for, here or by ``_target_`` of a configuration.
"""

from __future__ import annotations

from importlib import import_module

from magic_fast.errors import missing_package

__all__ = ["MagicFastAlgorithm"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import_module("fusion_bench.method.base_algorithm")
    except ImportError as error:
        raise missing_package("fusion_bench", f"for {__name__}", "fusion-bench", error) from None
    return getattr(import_module("magic_fast.integrations.fusion_bench.algorithm"), name)
