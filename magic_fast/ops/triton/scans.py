"""The reads of a whole tensor before its merge, by the Triton kernels."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from magic_fast.kernels import cut, launch, norms, ranked, select
from magic_fast.ops.gpu.jobs import Device, multiprocessors
from magic_fast.ops.gpu.select import Scans, Search
from magic_fast.recipe.codes import Key, Rule

_OPTIONS = {"enable_fp_fusion": False}


class TritonScans(Scans):
    """Each read is a few launches of the kernels of magic_fast/kernels."""

    def search_bytes(self, targets: int) -> int:
        n, shape = self.d.n, launch.block_shape(len(self.d.experts), 2)
        processors = multiprocessors(self.d.base.device)
        segments: int = launch.segments_for(-(-n // shape.block), processors)[0]
        bins = 8 if n >= 1 << 31 else 4
        return targets * ((bins << _log_bins(targets, n)) + 80 + segments * (8 + 8))

    def find(self, search: Search, into: Tensor) -> None:
        """One read of base and experts, as a rule."""
        d, targets, key = self.d, search.targets, search.key
        base, experts, n, k = d.base, d.experts, d.n, len(d.experts)
        device, count = base.device, len(targets)
        size, runs, run = search.size, search.runs, search.run
        sample = torch.empty((search.sampled, size), dtype=torch.int32, device=device)
        per_program = 1024 // run
        select.sample_keys[(-(-runs // per_program),)](
            base, experts, d.integers, sample, n, n // runs, runs, k, d.has_base, key,
            search.sampled, per_program, run, **_OPTIONS,
        )  # fmt: skip
        ordered = torch.sort(sample, dim=1).values
        places, counts, owners_at = (search.words[i * count :] for i in (0, 3, 4))
        owners, rules = tuple(t.owner for t in targets), tuple(t.ties for t in targets)
        passes = _Passes(d, owners, key)
        state, equals, segments = passes.state, passes.equals, passes.segments
        heavy = torch.empty((count, 2), dtype=torch.int32, device=device)
        select.open_brackets[(count,)](
            ordered, places, state, heavy, owners_at, size, n, count, passes.log_bins, **_OPTIONS
        )
        for _ in range(1 if size == n else 1 + math.ceil(31 / passes.log_bins)):
            passes.run(heavy)
            select.locate[(count,)](
                state, heavy, passes.bins, passes.above, equals, counts, segments, count,
                passes.log_bins, 4096, **{**_OPTIONS, "num_warps": 8},
            )  # fmt: skip
        shape = passes.shape
        cut.count_equals[(segments,)](
            base, experts, d.integers, state, equals, n, passes.chunks, k, count, owners, rules,
            d.has_base, key, shape.lanes, shape.vec, **passes.options,
        )  # fmt: skip
        cut.find_cuts[(count,)](
            base, experts, state, equals, into, n, segments, passes.chunks * shape.block,
            k, count, owners, tuple(int(t.top) for t in targets), rules, d.has_base, key, 1024,
            **passes.options,
        )  # fmt: skip

    def varying(self) -> int:
        """Those above a bracket of nothing but 0."""
        passes = _Passes(self.d, (0,), Key.VARIANCE)
        zeros = torch.tensor([[0, -2]], dtype=torch.int32)
        passes.run(zeros.to(self.d.base.device, non_blocking=True))
        return int(passes.above.sum())

    def mask_varied(self) -> None:
        """The kernels form the variance where a bound meets it: no mask."""

    def magnitudes(self, expert: int, part: slice) -> Tensor:
        d, n = self.d, part.stop - part.start
        bits = torch.empty(n, dtype=torch.int32, device=d.base.device)
        shape = launch.block_shape(1, d.widest)
        ranked.magnitudes[(-(-n // shape.block),)](
            d.base.view(-1)[part], d.experts[expert].view(-1)[part], bits, n, d.has_base,
            shape.lanes, shape.vec, **_OPTIONS,
        )  # fmt: skip
        return bits

    @functools.cached_property
    def _chances(self) -> Tensor:
        """float64 [3 K]: least chance, span and density of every expert."""
        trim = self.d.job.recipe.trim
        low = [q - e for q, e in zip(trim.density, trim.epsilon, strict=True)]
        words = [*low, *(2 * e for e in trim.epsilon), *trim.density]
        chances = torch.tensor(words, dtype=torch.float64)
        return chances.to(self.d.base.device, non_blocking=True)

    def keep_ranked(self, expert: int, part: slice, order: Tensor, mask: Tensor) -> None:
        d, (rows, cols) = self.d, order.shape
        blocks = -(-cols // 1024)
        ranked.keep_ranked[(rows * blocks,)](
            order, mask, d.integers, self._chances, expert, cols, blocks,
            d.job.offset + part.start, len(d.experts), 1024, **_OPTIONS,
        )  # fmt: skip

    def norm_sums(self, of: Device, power: int) -> Tensor:
        k = len(of.experts)
        shape = launch.block_shape(k, of.widest, True)
        blocks = -(-of.n // shape.block)
        chunks = min(64, max(1, blocks // 64))
        programs = -(-blocks // chunks)
        partial = torch.zeros((programs, k, 2), dtype=torch.float64, device=of.base.device)
        norms.norm_sums[(programs,)](
            of.base, of.experts, of.masks, of.integers, of.floats, partial, of.n, chunks,
            of.job.offset, k, of.has_base, of.numbers.kinds, Rule(), power, of.aligned(),
            shape.lanes, shape.vec, num_warps=shape.warps, **_OPTIONS,
        )  # fmt: skip
        return partial

    def votes(self) -> Tensor:
        return self._counted(norms.vote_sums).sum(dtype=torch.int64)

    def held(self) -> Tensor:
        return self._counted(norms.held_counts, len(self.d.experts), 2).sum(0, dtype=torch.int64)

    def _counted(self, kernel: Any, *each: int) -> Tensor:
        """int32 [programs, *each]: what one block a program counts."""
        d, k = self.d, len(self.d.experts)
        shape = launch.block_shape(k, d.widest, True)
        programs = -(-d.n // shape.block)
        partial = torch.empty((programs, *each), dtype=torch.int32, device=d.base.device)
        kernel[(programs,)](
            d.base, d.experts, d.masks, d.integers, d.floats, partial, d.n, d.job.offset,
            k, d.has_base, d.numbers.kinds, d.numbers.rule, d.aligned(), shape.lanes, shape.vec,
            num_warps=shape.warps, **_OPTIONS,
        )  # fmt: skip
        return partial


class _Passes:
    """Passes over a tensor that count keys for ``owners``, an expert each, and what they fill."""

    def __init__(self, d: Device, owners: tuple[int, ...], key: int) -> None:
        self.d, self.owners, self.key = d, owners, key
        k, n, count, device = len(d.experts), d.n, len(owners), d.base.device
        together = k if key == Key.MAGNITUDE else 2 * k  # of which all are in registers at once
        self.shape = launch.block_shape(max(together, count), d.widest)
        blocks = -(-n // self.shape.block)
        self.segments, self.chunks = launch.segments_for(blocks, multiprocessors(device))
        self.log_bins = _log_bins(count, n)
        bin_type = torch.int64 if n >= 1 << 31 else torch.int32
        self.state = torch.zeros((count, 8), dtype=torch.int64, device=device)
        self.bins = torch.zeros((count, 1 << self.log_bins), dtype=bin_type, device=device)
        self.above = torch.zeros((self.segments, count), dtype=torch.int64, device=device)
        self.equals = torch.zeros((self.segments, count, 2), dtype=torch.int32, device=device)
        self.options = {**_OPTIONS, "num_warps": self.shape.warps}

    def run(self, heavy: Tensor) -> None:
        d = self.d
        select.scan[(self.segments,)](
            d.base, d.experts, d.integers, self.state, heavy, self.bins, self.above, self.equals,
            d.n, self.chunks, len(d.experts), len(self.owners), self.owners, d.has_base, self.key,
            self.log_bins, self.shape.lanes, self.shape.vec, **self.options,
        )  # fmt: skip


def _log_bins(targets: int, n: int) -> int:
    """Bins of a pass: few enough to be looked through at once for a small tensor."""
    if n < 1 << 20:
        return 12
    return 16 if targets <= 32 else 15
