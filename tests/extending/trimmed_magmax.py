"""A merge method of existing stages: MagMax on what the trim of TIES keeps."""

from collections.abc import Sequence

import magic_fast as mf
from magic_fast.recipe import Recipe, Reduce, Trim, TrimRule, per_expert


@mf.register_method(
    "trimmed_magmax",
    use_when="experts learnt one after the other, and small changes are noise",
    paper="MagMax",
    arxiv="2407.06322",
)
def trimmed_magmax(
    num_experts: int, *, density: float | Sequence[float] = 0.2, scale: float = 0.5
) -> Recipe:
    """the largest change of each entry, if the trim keeps it"""
    return Recipe(
        weights=(1.0,) * num_experts,
        trim=Trim(TrimRule.MAGNITUDE, density=per_expert(density, num_experts, "density")),
        reduce=Reduce.MAX,
        scale=scale,
    )
