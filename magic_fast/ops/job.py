"""One tensor's work as every backend takes it, and what a backend reports of it. No torch is
imported here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from magic_fast.ops.directions import Directions, RowWeights
from magic_fast.recipe import Recipe, RowCalibration, Selection, stream_of

# torch.Tensor, or View for memory that no torch tensor owns. The rooms above never look inside.
Array = Any


@dataclass(frozen=True)
class View:
    """Borrowed contiguous memory, for callers without torch (the checkpoint engine).

    Attributes:
        ptr: address of the first element.
        dtype: ``"BF16" | "F16" | "F32" | "F64" | "U8" | "BOOL"`` (safetensors' words).
        shape: extents; row-major, contiguous.
        owner: kept alive as long as the view is.
    """

    ptr: int
    dtype: str
    shape: tuple[int, ...]
    owner: object = None

    @property
    def numel(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n


@dataclass
class Job:
    """One tensor to merge: where it comes from, what to do, where it goes. Checked by ``ops``
    before a backend sees it.

    Attributes:
        base: θ_0, or None where the experts are task vectors already.
        experts: K arrays of the base's shape, each of its own dtype.
        recipe: what to do.
        out: array of the same shape that takes the result, rounded once to its dtype. It overlaps
            no input.
        name: output tensor name; keys the random masks and every message.
        masks: K keep masks (uint8/bool, same shape) or None each; ``TrimRule.GIVEN``, or
            overriding a random trim.
        task_masks: K task masks for ``Consensus(given=True)``.
        calibration: WSC of this tensor, or None.
        selection: thresholds found elsewhere (model scope, streaming); None: the backend selects.
        offset: flat index of element 0 inside the whole tensor, where the arrays are a slab of it.
        total: elements of the whole tensor (default: this array's); trims count by it.
        directions: the coefficients come from inner products, not from ``recipe`` (which is then a
            plain sum).
        weights: what ``directions`` gives, found elsewhere; None: the backend looks for it.
        details: keep masks, votes and factors in ``Stats.extra["decisions"]`` (torch backend only).
    """

    base: Array | None
    experts: Sequence[Array]
    recipe: Recipe
    out: Array | None = None
    name: str = ""
    masks: Sequence[Array | None] | None = None
    task_masks: Sequence[Array] | None = None
    calibration: RowCalibration | None = None
    selection: Selection | None = None
    offset: int = 0
    total: int | None = None
    directions: Directions | None = None
    weights: RowWeights | None = None
    details: bool = False

    @property
    def stream(self) -> int:
        return stream_of(self.name)


@dataclass
class Stats:
    """What a merge found on its way.

    Attributes:
        selection: what was used.
        coefficient: raw ξ per row (float32, before side, strength and clamp), or None without
            calibration. torch tensor, or a buffer of float32.
        kept: entries of each expert that survived the trim.
        first_nonfinite: flat index of the first NaN or infinity of each expert (−1: none).
        base_nonfinite: the same for the base.
        overflow: flat index of the first finite result that overflows the output dtype (−1: none).
        backend: name of the backend that ran it, filled in by ``ops``.
        extra: with calibration ``repaired`` (bool [rows]), ``norms2`` (float64 [K + 2]: ‖τ_k‖² of
            each expert, ‖d‖² before and after the factors), ``magnitude_before`` and
            ``magnitude_after``.
    """

    selection: Selection
    coefficient: Any = None
    kept: tuple[int, ...] = ()
    first_nonfinite: tuple[int, ...] = ()
    base_nonfinite: int = -1
    overflow: int = -1
    backend: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def count_repaired(stats: Stats) -> int:
    """Rows that the guards of a calibration left alone."""
    flags = stats.extra.get("repaired", ())
    return int(flags.sum()) if hasattr(flags, "sum") else sum(flags)


def magnitudes_of(norms2: Sequence[float]) -> tuple[float | None, float | None]:
    """‖Δ‖_F ÷ mean_k ‖τ_k‖_F before and after calibration, from ``norms2`` of ``Stats.extra``; None
    where all task vectors are zero."""
    *own, before, after = norms2
    mean = sum(math.sqrt(x) for x in own) / len(own)
    return (math.sqrt(before) / mean, math.sqrt(after) / mean) if mean > 0 else (None, None)
