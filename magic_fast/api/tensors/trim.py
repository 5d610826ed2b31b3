"""``trim``: one tensor, one rule, with the mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magic_fast.errors import InputError
from magic_fast.recipe import CountRule, Recipe, Rescale, TieRule, Trim, TrimRule, stream_of
from magic_fast.reference import trim as trimming

# rule → (trim rule, count rule, tie rule)
_RULES = {
    "magnitude": (TrimRule.MAGNITUDE, CountRule.FLOOR, TieRule.EXACT),
    "magnitude_plus_one": (TrimRule.MAGNITUDE, CountRule.FLOOR_PLUS_ONE, TieRule.KEEP_ALL),
    "magnitude_complement": (TrimRule.MAGNITUDE, CountRule.COMPLEMENT_PLUS_ONE, TieRule.KEEP_ALL),
    "magnitude_drop": (TrimRule.MAGNITUDE, CountRule.FLOOR, TieRule.DROP_ALL),
    "random": (TrimRule.RANDOM, CountRule.FLOOR, TieRule.EXACT),
    "ranked": (TrimRule.RANKED, CountRule.FLOOR, TieRule.EXACT),
    "band": (TrimRule.BAND, CountRule.FLOOR, TieRule.EXACT),
    "std": (TrimRule.STD, CountRule.FLOOR, TieRule.EXACT),
    "norm_fraction": (TrimRule.NORM_FRACTION, CountRule.FLOOR, TieRule.EXACT),
}


def trim(
    x: Tensor,
    rule: str,
    q: float,
    *,
    relative_to: Tensor | None = None,
    side: str = "largest",
    rescale: str | None = None,
    mask: Tensor | None = None,
    gamma: float = 0.01,
    epsilon: float = 0.15,
    seed: int = 0,
    name: str = "",
    rank_dim1: bool = False,
    compat: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One tensor with the entries that a rule drops set to zero, and the keep mask.

    Args:
        x: floating tensor, any shape.
        rule: ``magnitude`` (exactly max(1, ⌊q·n⌋) largest), ``magnitude_plus_one`` (ties-merging,
            MAGIC: everything at or above the (n − ⌊q·n⌋)-th smallest), ``magnitude_complement``
                (sd-mecha),
            ``magnitude_drop`` (strictly above the ⌊(1−q)·n⌋-th smallest: MAGIC's magnitude DARE),
            ``random``, ``ranked``, ``band``, ``std`` (q = multiples of the deviation),
            ``norm_fraction`` (q = share of the squared norm).
        q: kept fraction in (0, 1].
        relative_to: magnitudes are taken of x ÷ relative_to.
        side: ``"largest"``, or ``"smallest"`` to keep everything at or below the same threshold.
        rescale: None, ``keep_probability``, ``l1``, ``l2`` or ``linf``.
        mask: keep mask that replaces a random draw.
        gamma, epsilon, seed, name, rank_dim1: of the rules that have them (see ``recipe.Trim``).

    Returns:
        (trimmed, mask): same shape; ``trimmed`` has x's dtype, ``mask`` is bool.

    >>> trim(torch.tensor([1.0, -4.0, 2.0, 3.0]), "magnitude", 0.5)
    (tensor([ 0., -4.,  0.,  3.]), tensor([False,  True, False,  True]))
    """
    if rule not in _RULES:
        raise InputError(f"rule: expected one of {', '.join(_RULES)}, got {rule!r}.")
    if side not in ("largest", "smallest"):
        raise InputError(f"side: expected 'largest' or 'smallest', got {side!r}.")
    if side == "smallest" and not rule.startswith("magnitude"):
        raise InputError(f"side 'smallest': expected a magnitude rule, got {rule!r}.")
    if not x.is_floating_point():
        raise InputError(f"x: expected a floating tensor, got {x.dtype}.")
    if rescale is not None and rescale not in list(Rescale):
        words = ", ".join(Rescale)
        raise InputError(f"rescale: expected None or one of {words}, got {rescale!r}.")
    for what, other in (("relative_to", relative_to), ("mask", mask)):
        if other is not None and other.shape != x.shape:
            raise InputError(f"{what}: expected shape {tuple(x.shape)}, got {tuple(other.shape)}.")
    kind, count, ties = _RULES[rule]
    settings = Trim(
        rule=kind,
        density=(float(q),),
        gamma=(gamma,),
        epsilon=(epsilon,),
        count_rule=count,
        tie_rule=ties,
        seed=seed,
        rank_dim1=rank_dim1,
        empty_band_zeroes=compat == "mergekit-0.1.4",
    )
    recipe = Recipe((1.0,), trim=settings, rescale=Rescale(rescale or "none"))
    wide = x if x.dtype == torch.float64 else x.float()
    measured = wide if relative_to is None else wide / relative_to.to(wide.dtype)
    keep = _keep(measured, recipe, side, mask, name)
    factor = trimming.rescale_factor(wide, keep, recipe, 0)
    kept = torch.where(keep, wide, torch.zeros_like(wide))
    return (kept if factor == 1 else kept * factor).to(x.dtype), keep


def _keep(x: Tensor, recipe: Recipe, side: str, mask: Tensor | None, name: str) -> Tensor:
    bounds = trimming.select_trim(x, recipe.trim, 0)
    if side == "smallest" and x.numel():
        return x.abs() <= (bounds[0] if recipe.trim.active(0) else math.inf)
    keep = trimming.keep_mask(x, recipe.trim, 0, bounds=bounds, stream=stream_of(name), given=mask)
    return torch.ones_like(x, dtype=torch.bool) if keep is None else keep
