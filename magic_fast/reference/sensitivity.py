"""How sensitive a model is to one of its layers: the measure and its uncertainty
(docs/calibration.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def enlarged(base: Tensor, merged: Tensor, factor: float) -> Tensor:
    """base + factor·(merged − base), in float32 (float64 where one of them is).

    >>> enlarged(torch.tensor([1.0]), torch.tensor([3.0]), 1.5)
    tensor([4.])
    """
    wide = torch.promote_types(torch.promote_types(base.dtype, merged.dtype), torch.float32)
    end = merged.to(wide)
    return end + (factor - 1) * (end - base.to(wide))


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) ‖ softmax(logits)) along the last dimension, in float64.

    A class whose probability is 0 in ``reference`` adds nothing.

    Args:
        reference, logits: [..., classes].

    Returns:
        [...], at least 0 but for rounding.

    >>> divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
    0.0
    """
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def differences_from_median(
    scores: Tensor, *, resamples: int, confidence: float, seed: int
) -> tuple[Tensor, Tensor]:
    """By how much each row's mean lies above that of the median row, and how wide its interval is.

    The intervals hold together (max-|t|): with probability ``confidence`` all of them contain their
    truth, however many rows there are. What all rows have in common (a hard sample) is taken out
    sample by sample first. The distribution of the largest |t| comes from a wild bootstrap: the
    residuals of each sample keep or change their sign, all rows together, and every draw has its
    own standard errors; with symmetric residuals that is exact for any number of samples
    (signs: Davidson and Flachaire, J. Econometrics 146, 2008; the largest of many: Chernozhukov,
    Chetverikov and Kato, Ann. Stat. 41, 2013).

    Args:
        scores: float64 [rows, samples].
        resamples: draws of the bootstrap.
        confidence: of all intervals together, in (0, 1).
        seed: of the draws.

    Returns:
        (difference, half width), float64 [rows] each; a width of infinity where the samples are too
        few.
    """
    rows, samples = scores.shape
    own = scores.double()
    own = own - own.median(0).values
    means = own.mean(1)
    found = means - means.median()
    if samples < 2:
        return found, torch.full_like(found, torch.inf)
    residuals = own - means[:, None]
    squares = residuals.square().sum(1)
    error = (squares / (samples * (samples - 1))).sqrt()
    varies = error > 0
    generator = torch.Generator().manual_seed(seed)
    largest = []
    for count in _pieces(resamples, rows):
        signs = torch.randint(0, 2, (count, samples), generator=generator).double() * 2 - 1
        drawn = signs @ residuals.T / samples  # [count, rows]
        spread = (squares / samples - drawn.square()).clamp_min(0) / (samples - 1)
        drawn = (drawn - drawn.median(1, keepdim=True).values).abs()
        # all signs alike: no spread, and so no evidence against anything
        t = torch.where(varies & (drawn > 0), drawn / spread.sqrt(), 0.0)
        largest.append(t.max(1).values)
    # "higher": between two infinities, of two samples, lies no number
    quantile = torch.quantile(torch.cat(largest), confidence, interpolation="higher")
    return found, torch.where(varies, quantile * error, 0.0)


def _pieces(resamples: int, rows: int, elements: int = 1 << 22) -> list[int]:
    """How many draws at a time, so that no more than ``elements`` numbers are held."""
    step = max(1, elements // max(1, rows))
    return [min(step, resamples - at) for at in range(0, resamples, step)]
