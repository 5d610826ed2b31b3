"""Where two results of one merge differ, counted by reason (three_way.py names them).

Rounding is bounded by the arithmetic of the dtype, unit roundoff u (float32 2^-24, bfloat16 2^-8),
for K experts and a tensor of n elements:

* float32: a value takes at most K + 5 roundings (subtraction, weight, K - 1 sums, divisor, lambda,
  base), each at most u of what went in, so two ways differ by 2 (K + 5) u (max |result| + Σ|τ|).
  Methods that look at norms, variances or angles add ⌈log2 n⌉ u for a sum over the tensor and 10 u
  for the functions of it (two roots, a product and a quotient of 1 u; two sines of 2 u, their
  quotient and the product with the weight of 1 u). The angle of nearly parallel vectors is ill
  conditioned, but weights sin((1-t)θ)/sin θ are not: cos θ wrong by δ moves them by δ/3 or less.
  Their errors are on whole weights, so there Σ|θ| stands for Σ|τ|;
* bfloat16: each way rounds the result once, to nearest: 2 u of it. mergekit also rounds each step,
  which could come to (K + 4) u of Σ|τ|; 2 u is allowed, and what is beyond goes to the next test;
* *its rounding*: the value is within what float32 allows of mergekit in higher precision, and in
  bfloat16 one rounding, u. In float32 that happens where mergekit takes torch.norm of much: on the
  CPU it adds up lane by lane, and is 1.9e-3 off over 24.6 million task vector elements;
* a vote is near zero where |Σ w τ| is at most (K + 1) u Σ|w τ|: subtraction, weight, K - 1 sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from yaml_cases import EXPERTS, FLOAT32, METHODS, NORMS, VOTES, WHOLE


@dataclass
class Counts:
    """Elements of a pair of ways."""

    elements: int = 0
    differ: int = 0
    ties: int = 0
    votes: int = 0
    rounding: int = 0
    all_ties: int = 0
    all_votes: int = 0

    @property
    def other(self) -> int:
        return self.differ - self.ties - self.votes - self.rounding

    def add(self, differ: Tensor, ties: Tensor, votes: Tensor, rounding: Tensor) -> None:
        self.elements += differ.numel()
        self.differ += int(differ.sum())
        self.all_ties += int(ties.sum())
        self.all_votes += int(votes.sum())
        for name, mask in (("ties", ties), ("votes", votes), ("rounding", rounding)):
            setattr(self, name, getattr(self, name) + int((differ & mask).sum()))
            differ = differ & ~mask


class Model:
    """Tensors of a folder by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _cuts(magnitude: Tensor, method: str, parameters: Mapping[str, Any]) -> list[Tensor]:
    """The magnitudes at which the trim of a method cuts."""
    n, density = magnitude.numel(), parameters.get("density", 1.0)
    kept = max(1, int(density * n)) if method == "ties" else int(density * n)
    top = 0 if method == "ties" else min(int(parameters["gamma"] * n), n - kept)
    flat = magnitude.flatten()
    ranks = [r for r in (top, top + kept) if 0 < r < n]  # largest first
    return [flat.kthvalue(n - r + 1).values for r in ranks]


def doubtful(
    base: Tensor | None, experts: Sequence[Tensor], method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(at ties, votes near zero, Σ|τ|) of one tensor, as ``dtype`` sees it."""
    parameters = METHODS[method]
    deltas = [e.to(dtype) - (0 if base is None else base.to(dtype)) for e in experts]
    ties = torch.zeros(experts[0].shape, dtype=torch.bool)
    kept = [d.float() for d in deltas]
    if "density" in parameters:
        for k, delta in enumerate(deltas):
            magnitude = delta.abs()
            cuts = _cuts(magnitude, method, parameters)
            for cut in cuts:
                ties |= (magnitude == cut) & (cut > 0)  # of zeros any may stay
            low = cuts[-1] if cuts else magnitude.min()
            keep = magnitude >= low
            if method != "ties" and len(cuts) > 1:
                keep &= magnitude <= cuts[0]
            kept[k] = kept[k] * keep
    size = torch.zeros(experts[0].shape)
    if base is not None or dtype == torch.float32:  # whole weights may cancel in float32, too
        size = torch.stack([d.float().abs() for d in deltas]).sum(0)
    votes = torch.zeros_like(ties)
    if method in VOTES:
        total, mass = sum(kept), sum(d.abs() for d in kept)
        votes = total.abs() <= mass * ((len(experts) + 1) * unit(dtype))
        votes &= mass > 0  # nothing kept: nothing to vote on
    return ties, votes, size


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: half of eps."""
    return torch.finfo(dtype).eps / 2


def bound(method: str, dtype: torch.dtype, num_experts: int, n: int) -> float:
    """What rounding leaves between two ways, relative to the result and what went into it."""
    if dtype == torch.bfloat16:
        return 2 * unit(dtype)
    steps = num_experts + 5
    if method in NORMS:
        steps += math.ceil(math.log2(max(n, 2))) + 10
    return 2 * steps * unit(torch.float32)


def far(a: Tensor, b: Tensor, size: Tensor, relative: float) -> Tensor:
    """Where two results differ by more than rounding."""
    a, b = a.float(), b.float()
    return ~((a - b).abs() <= relative * (torch.maximum(a.abs(), b.abs()) + size))


def compare(
    models: Sequence[Path],
    results: Mapping[str, Path],
    method: str,
    dtype: str,
    exact: Path | None = None,
) -> dict[str, Counts]:
    """``inside`` and ``engine`` against ``mergekit``; ``exact`` is its own in higher precision."""
    kind: torch.dtype = getattr(torch, dtype)
    inputs = [Model(path) for path in models[: 1 + EXPERTS.get(method, len(models))]]
    outputs = {way: Model(path) for way, path in results.items()}
    truth = None if exact is None else Model(exact)
    found = {way: Counts() for way in results if way != "mergekit"}
    for name in outputs["mergekit"].names:
        base, *experts = (model[name] for model in inputs)
        start = None if method in WHOLE else base
        ties, votes, size = doubtful(start, experts, method, kind)
        theirs = outputs["mergekit"][name]
        if method not in FLOAT32:
            assert theirs.dtype == kind, (name, theirs.dtype)
        theirs = theirs.to(kind)
        for way, counts in found.items():
            ours = outputs[way][name]
            if way == "inside":
                ours = ours.to(kind) if method in FLOAT32 else ours
            assert ours.dtype == kind and ours.shape == theirs.shape, name
            n, count = theirs.numel(), len(experts)
            differ = far(ours, theirs, size, bound(method, kind, count, n))
            its = torch.zeros_like(differ)
            if truth is not None:
                # of all that went in: in bfloat16 `size` may leave out whole weights
                exact_size = sum(e.float().abs() for e in experts)
                exactly = truth[name].double()
                truth_size = exactly.abs()
                allowed = bound(method, torch.float32, count, n) * (truth_size + exact_size)
                once = unit(kind) * (truth_size + allowed) if kind == torch.bfloat16 else 0.0
                its = (ours.double() - exactly).abs() <= once + allowed
            counts.add(differ, ties, votes, its)
    return found


def moved(models: Sequence[Path], result: Path) -> tuple[float, float]:
    """Share of elements that differ from the base, and the L1 norm of the change."""
    base, merged = Model(models[0]), Model(result)
    count = changed = 0
    norm = 0.0
    for name in merged.names:
        change = merged[name].float() - base[name].float()
        count += change.numel()
        changed += int(change.count_nonzero())
        norm += float(change.abs().double().sum())
    return changed / count, norm
