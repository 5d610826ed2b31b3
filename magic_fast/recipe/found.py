"""What is known of one tensor: what ``select`` found, the rows of its calibration, its stream of
random numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from magic_fast.recipe.words import Direction, EpsMode, Granularity, Variant


@dataclass(frozen=True)
class Selection:
    """What ``select`` found, K numbers each: an entry of expert k stays if its rank by
    (|τ| descending, flat index ascending) lies at or below (threshold, tie_cut) and above (top_*).

    Attributes:
        threshold: smallest kept magnitude (float32 value; inf keeps nothing).
        tie_cut: entries equal to the threshold stay while their flat index is < tie_cut.
        top_threshold, top_tie_cut: the same pair for the outliers a band drops (inf, 0: none).
        factor: what each kept entry is multiplied by (norm rescale or 1/density, times the
            alignment), a float32 value.
        majority: sign for zero votes under ``ZeroVote.MAJORITY``: −1, 0 or 1.
        weights: those found (``Weigh.ENERGY``), float32 values; empty where they are given.
        alone: factor of what each expert alone holds (:class:`Alone`); empty without.
        score_cut, score_top: bounds of the scores (``Weigh.SCORE``); empty without.

    Under ``TrimRule.VARIANCE`` threshold and cut are of the variance, equal for all experts; under
    ``TrimRule.COMPETE`` threshold and top_threshold bound the magnitudes, and nothing drops out.
    """

    threshold: tuple[float, ...]
    tie_cut: tuple[int, ...]
    top_threshold: tuple[float, ...]
    top_tie_cut: tuple[int, ...]
    factor: tuple[float, ...]
    majority: int = 0
    weights: tuple[float, ...] = ()
    alone: tuple[float, ...] = ()
    score_cut: tuple[float, ...] = ()
    score_top: tuple[float, ...] = ()

    @staticmethod
    def keep_everything(num_experts: int, numel: int) -> Selection:
        k = num_experts
        return Selection((0.0,) * k, (numel,) * k, (math.inf,) * k, (0,) * k, (1.0,) * k, 0)


@dataclass(frozen=True)
class RowFunction:
    """A variant of WSC that is a plain function on torch tensors (``mf.register_calibration``).

    Attributes:
        name: as the user asks for it.
        function: ``(gram, dots, norm2) -> ξ``, the sums of rows in float64; with ``whole``
            ``(task_vectors, change) -> ξ``; with ``changes`` that returns the calibrated change.
        whole: it looks at whole tensors, not at sums of rows.
        changes: it returns a change, not coefficients.
        named: it takes the name of the tensor too, as the keyword ``name``.
        source: a hash of its text, so that a run is not continued by another function.
        tensor: name of the tensor that it calibrates.
    """

    name: str
    function: Callable[..., Any] = field(repr=False, compare=False)
    whole: bool = False
    changes: bool = False
    named: bool = False
    source: str = ""
    tensor: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    def __call__(self, *tensors: Any) -> Any:
        more = {"name": self.tensor} if self.named else {}
        return self.function(*tensors, **more)


@dataclass(frozen=True)
class RowCalibration:
    """WSC resolved for one tensor: what the kernels need (docs/methods.md).

    ``direction`` is never AUTO here. ``rows`` × ``cols`` is the row view of the tensor: ``axes``
    moved to the front and flattened, everything else flattened behind (a 1-D tensor is [n, 1]).
    Where ``axes`` are the leading ones in order, that is the contiguous tensor itself.
    ``included`` says which experts count (those of weight 0 are left out); empty means all. The
    defaults are those of all calibrations: their settings take them from here.
    """

    rows: int
    cols: int
    axes: tuple[int, ...] = (0,)
    variant: Variant | RowFunction = Variant.MANIFOLD
    granularity: Granularity = Granularity.ROW
    p: float = 2
    eps_mode: EpsMode = EpsMode.RELATIVE
    guards: bool = True
    clamp: tuple[float, float] | None = (0.1, 10.0)
    strength: float = 1.0
    scale: float = 1.0
    direction: Direction = Direction.FREE
    included: tuple[bool, ...] = ()

    @property
    def needs_tensors(self) -> bool:
        """Whether ξ comes from the tensors themselves: from their singular values, or by a function
        that looks at whole tensors. Else sums of rows are enough."""
        if isinstance(self.variant, RowFunction):
            return self.variant.whole
        return self.granularity is Granularity.TENSOR and self.variant is Variant.SPECTRAL


def stream_of(name: str) -> int:
    """Philox stream of a tensor: little-endian u64 of BLAKE2b-64 of the UTF-8 output name ('' if
    bare).

    >>> hex(stream_of("model.layers.0.mlp.up_proj.weight"))
    '0x345b65baf420f1e5'
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
