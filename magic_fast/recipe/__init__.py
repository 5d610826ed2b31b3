"""What a merge does, as data: frozen dataclasses and enums, and the checks of one field against
another.

A method is a :class:`Recipe`; a backend runs any recipe. The stages, in order, for one tensor with
experts ``θ_k`` and task vectors ``τ_k = θ_k − θ_0``::

    trim → rescale → align → weight → vote → contributors → reduce → consensus → limit → scale

Nothing here imports torch, numpy or any other part of the package but its errors.
"""

from magic_fast.recipe.found import RowCalibration, RowFunction, Selection, stream_of
from magic_fast.recipe.merging import Recipe, per_expert
from magic_fast.recipe.stages import Alone, Consensus, Trim
from magic_fast.recipe.words import (
    Align,
    Contributors,
    CountRule,
    Direction,
    EpsMode,
    Granularity,
    Reduce,
    Rescale,
    TieRule,
    TrimRule,
    TrimScope,
    Variant,
    Vote,
    VoteOn,
    Weigh,
    ZeroVote,
)

__all__ = [
    "Align",
    "Alone",
    "Consensus",
    "Contributors",
    "CountRule",
    "Direction",
    "EpsMode",
    "Granularity",
    "Recipe",
    "Reduce",
    "Rescale",
    "RowCalibration",
    "RowFunction",
    "Selection",
    "TieRule",
    "Trim",
    "TrimRule",
    "TrimScope",
    "Variant",
    "Vote",
    "VoteOn",
    "Weigh",
    "ZeroVote",
    "per_expert",
    "stream_of",
]
