"""The native backend: every element-wise recipe in one fused pass on the CPU, in C++.

Arrays are contiguous torch CPU tensors or :class:`~magic_fast.ops.backend.View`; only their addresses go down, so
torch is never imported here. Job tuples are positional: ``csrc/bindings/module.cpp`` lists the fields.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from magic_fast.errors import BackendError, InputError
from magic_fast.ops.backend import Array, Job, Stats, View
from magic_fast.recipe import (
    Contributors,
    Direction,
    EpsMode,
    Granularity,
    Recipe,
    Reduce,
    Rescale,
    RowCalibration,
    Selection,
    TieRule,
    Trim,
    TrimRule,
    Variant,
    Vote,
    VoteOn,
    ZeroVote,
)

try:
    from magic_fast import _native
except ImportError as error:  # remembered: `why_not` tells it
    _missing: str | None = str(error)
else:
    _missing = None

_DTYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 2,
    "torch.float32": 0,
    "torch.float16": 1,
    "torch.bfloat16": 2,
}
_codes: dict[Any, int | None] = {}  # dtype object or word -> code

_NONE, _BAND, _RANDOM, _RANKED, _GIVEN = range(5)
_TIE_RULES = {TieRule.EXACT: 0, TieRule.KEEP_ALL: 1, TieRule.DROP_ALL: 2}
_RESCALES = {
    Rescale.NONE: 0,
    Rescale.KEEP_PROBABILITY: 0,
    Rescale.L1: 1,
    Rescale.L2: 2,
    Rescale.LINF: 3,
}
_VOTES = {Vote.NONE: 0, Vote.MASS: 1, Vote.COUNT: 2}
_VOTES_ON = {VoteOn.WEIGHTED: 0, VoteOn.UNWEIGHTED: 1}
_ZERO_VOTES = {ZeroVote.POSITIVE: 0, ZeroVote.NEGATIVE: 1, ZeroVote.MAJORITY: 2, ZeroVote.DROP: 3}
_CONTRIBUTORS = {Contributors.AGREEING: 0, Contributors.NONZERO: 1, Contributors.ALL: 2}
_REDUCES = {Reduce.SUM: 0, Reduce.MEAN: 1, Reduce.WEIGHTED_MEAN: 2, Reduce.MAX: 3}
_VARIANTS = {Variant.MANIFOLD: 0, Variant.MANIFOLD_EXACT: 1, Variant.SPHERE: 2, Variant.SPECTRAL: 2}
_EPS_MODES = {EpsMode.ABSOLUTE: 0, EpsMode.RELATIVE: 1, EpsMode.NONE: 2}
_DIRECTIONS = {Direction.FREE: 0, Direction.GROW: 1, Direction.SHRINK: 2}


def _code(array: Array) -> int | None:
    """Dtype code of the C surface, or None."""
    dtype = array.dtype
    try:
        return _codes[dtype]
    except KeyError:
        _codes[dtype] = code = _DTYPES.get(str(dtype))
        return code


def _address(array: Array) -> int:
    address: int = array.ptr if isinstance(array, View) else array.data_ptr()
    return address


def _numel(array: Array) -> int:
    n: int = array.numel if isinstance(array, View) else array.numel()
    return n


def _contiguous(array: Array) -> bool:
    return isinstance(array, View) or array.is_contiguous()


# ---- recipes as plain numbers ----
def _trim_counts(trim: Trim, k: int, n: int) -> tuple[int, int, int]:
    """(kind, count, top_count) of expert ``k`` of a tensor (or model) of ``n`` elements."""
    if not trim.active(k) or trim.rule is TrimRule.GIVEN:
        return _NONE, 0, -1
    if trim.rule is TrimRule.RANDOM:
        return _RANDOM, 0, -1
    if trim.rule is TrimRule.RANKED:
        return _RANKED, 0, -1
    if n == 0:
        return _NONE, 0, -1
    if trim.rule is TrimRule.BAND:
        top, kept = trim.band_counts(k, n)
        return (_BAND, top + kept, top) if kept else (_BAND, 0, 0)
    if trim.tie_rule is TieRule.DROP_ALL:
        dropped = math.trunc(float(n) * (1.0 - trim.density[k]))
        return (_BAND, n - dropped + 1, -1) if dropped else (_NONE, 0, -1)
    return _BAND, trim.kept_count(k, n), -1


def _plan(recipe: Recipe, total: int, *, count: int | None = None) -> Any:
    """The recipe for tensors of ``total`` elements, as the C surface takes it. ``count``: keep so many, whatever
    the recipe's trim."""
    trim = recipe.trim
    experts = []
    by_probability = recipe.rescale is Rescale.KEEP_PROBABILITY
    for k, weight in enumerate(recipe.weights):
        kind, kept, top_count = (
            _trim_counts(trim, k, total) if count is None else (_BAND, count, -1)
        )
        density = float(trim.density[k]) if trim.density else 1.0
        restored = 1.0 / density if by_probability else 1.0
        experts.append(
            {
                "weight": weight,
                "trim": kind,
                "count": kept,
                "top_count": top_count,
                "density": density,
                "epsilon": float(trim.epsilon[k]) if trim.epsilon else 0.0,
                "random_bound": math.floor(density * 2.0**32) if kind == _RANDOM else 0,
                "lambda": recipe.consensus.lambdas[k]
                if recipe.consensus is not None and recipe.consensus.lambdas
                else 0.0,
                "factor": 1.0 if kind == _NONE else restored,
                "given_factor": restored,
            }
        )
    fields = {
        "tie_rule": _TIE_RULES[trim.tie_rule],
        "rescale": _RESCALES[recipe.rescale],
        "vote": _VOTES[recipe.vote],
        "vote_on": _VOTES_ON[recipe.vote_on],
        "zero_vote": _ZERO_VOTES[recipe.zero_vote],
        "contributors": _CONTRIBUTORS[recipe.contributors],
        "reduce": _REDUCES[recipe.reduce],
        "consensus": 0 if recipe.consensus is None else 2 if recipe.consensus.given else 1,
        "min_tasks": 0 if recipe.consensus is None else recipe.consensus.min_tasks,
        "scale": recipe.scale,
        "seed": trim.seed,
    }
    return _native.Plan(fields, experts)


def _calibration(c: RowCalibration) -> Any:
    spectral_rows = c.variant is Variant.SPECTRAL  # the singular value of a row is its norm
    return _native.Calibration(
        c.rows,
        c.cols,
        _VARIANTS[c.variant],
        c.granularity is Granularity.TENSOR,
        2.0 if spectral_rows else float(c.p),
        _EPS_MODES[c.eps_mode],
        c.guards,
        c.clamp,
        c.strength,
        c.scale,
        _DIRECTIONS[c.direction],
        c.included,
    )


def _rank_cols(job: Job, numel: int) -> int:
    """Elements that DELLA ranks together."""
    shape = job.experts[0].shape
    return numel if len(shape) < 2 else numel // shape[0] if shape[0] else 0


class _Call:
    """Plans and calibrations of one call: many jobs share them."""

    def __init__(self) -> None:
        self.plans: dict[tuple[int, int], Any] = {}
        self.calibrations: dict[int, Any] = {}

    def job(
        self, job: Job, *, merged: Array | None = None, coefficient: int = 0, factor: int = 0
    ) -> tuple[Any, ...]:
        """The positional tuple of ``job``."""
        recipe, experts = job.recipe, job.experts
        numel = _numel(experts[0])
        total = numel if job.total is None else job.total
        key = (id(recipe), total)
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = _plan(recipe, total)
        calibration = None
        if job.calibration is not None:
            calibration = self.calibrations.get(id(job.calibration))
            if calibration is None:
                calibration = self.calibrations[id(job.calibration)] = _calibration(job.calibration)
        drawn = recipe.trim.rule in (TrimRule.RANDOM, TrimRule.RANKED)
        selection = job.selection
        return (
            plan,
            numel,
            job.offset,
            total,
            _rank_cols(job, numel) if recipe.trim.rule is TrimRule.RANKED else 0,
            job.stream if drawn else 0,
            0 if job.base is None else _address(job.base),
            0 if job.base is None else _code(job.base),
            0 if merged is None else _address(merged),
            0 if merged is None else _code(merged),
            0 if job.out is None else _address(job.out),
            0 if job.out is None else _code(job.out),
            tuple([_address(e) for e in experts]),
            tuple([_code(e) for e in experts]),
            None
            if job.masks is None
            else tuple([0 if m is None else _address(m) for m in job.masks]),
            None if job.task_masks is None else tuple([_address(m) for m in job.task_masks]),
            calibration,
            coefficient,
            factor,
            None
            if selection is None
            else (
                selection.threshold,
                selection.tie_cut,
                selection.top_threshold,
                selection.top_tie_cut,
                selection.factor,
                selection.majority,
            ),
        )


def _floats(n: int) -> array[float]:
    return array("f", bytes(4 * n))


def _doubles(like: Array, *shape: int) -> tuple[Any, int]:
    """A float64 array of ``shape`` and its address: a torch tensor for torch callers, else a memoryview."""
    if not isinstance(like, View):
        import torch

        tensor = torch.empty(shape, dtype=torch.float64)
        return tensor, tensor.data_ptr()
    values = array("d", bytes(8 * math.prod(shape)))
    view = memoryview(values).cast("B")
    return view.cast("d", shape) if math.prod(shape) else view, values.buffer_info()[0]


class NativeBackend:
    """Fused C++ loops. f32, f16 and bf16 in any mix; contiguous arrays; every recipe that is not reference-only.

    Args:
        threads: 0: ``MAGIC_FAST_NUM_THREADS``, else what machine, affinity and cgroup allow.
        isa: None: ``MAGIC_FAST_CPU_ISA``, else the best; or ``"baseline" | "avx2" | "avx512" | "neon"``.
    """

    name = "native"

    def __init__(self, *, threads: int = 0, isa: str | None = None) -> None:
        self.threads = threads
        self.isa = -1 if isa is None else _native.isa_number(isa)

    def why_not(self) -> str | None:
        if _missing is not None:
            return f"the extension is not built here ({_missing}). Install a C++17 compiler and reinstall."
        try:
            _native.isa()
        except ValueError as e:
            return str(e)
        return None

    def details(self) -> str:
        config = _native.build_config()
        return (
            f"{_native.isa()}, {_native.num_threads()} threads; compiled by {config['compiler']} for "
            f"{', '.join(config['isas'])}; CUDA {'yes' if config['cuda'] else 'no'}"
        )

    def supports(self, job: Job) -> str | None:
        arrays = [a for a in (job.base, *job.experts, job.out) if a is not None]
        for a in arrays:
            if _code(a) is None:
                return f"it takes float32, float16 and bfloat16, not {a.dtype}"
            if not _contiguous(a):
                return "it takes contiguous tensors only"
        for masks in (job.masks, job.task_masks):
            if masks is not None and not all(m is None or _contiguous(m) for m in masks):
                return "it takes contiguous masks only"
        reason = job.recipe.reference_only
        if reason is not None:
            return reason
        if len(job.experts) > 1024:
            return f"it takes up to 1024 experts, not {len(job.experts)}"
        return self._rows_unsupported(job) or self._slab_unsupported(job)

    @staticmethod
    def _rows_unsupported(job: Job) -> str | None:
        shape, c = job.experts[0].shape, job.calibration
        if (
            job.recipe.trim.rank_dim1
            and job.recipe.trim.rule is TrimRule.RANKED
            and math.prod(shape[2:]) != 1
        ):
            return "ranks along dimension 1 alone of a tensor of three or more dimensions are in the reference only"
        if c is None:
            return None
        if c.variant is Variant.SPECTRAL and c.granularity is Granularity.TENSOR:
            return "the spectral calibration of a tensor needs its singular values"
        if c.axes != tuple(range(len(c.axes))) and math.prod(shape) != 0:
            return "it calibrates rows along leading axes only"
        return None

    @staticmethod
    def _slab_unsupported(job: Job) -> str | None:
        numel = _numel(job.experts[0])
        if job.total is None or job.total == numel:
            return None
        if job.selection is None and job.recipe.needs_select:
            return "a part of a tensor needs a selection found over the whole"
        if job.calibration is not None and job.calibration.granularity is Granularity.TENSOR:
            return "the calibration of a whole tensor needs all of it at once"
        return None

    # ---- the primitives ----
    def select(self, job: Job) -> Selection:
        found = _native.select([_Call().job(job)], self.threads, self.isa)[0]
        return Selection(*found)

    def merge(self, job: Job) -> Stats:
        return self.merge_many([job])[0]

    def merge_many(self, jobs: Sequence[Job]) -> list[Stats]:
        call = _Call()
        tuples, coefficients = [], []
        for job in jobs:
            if job.calibration is None:
                tuples.append(call.job(job))
                coefficients.append(None)
                continue
            raw, factor = _floats(job.calibration.rows), _floats(job.calibration.rows)
            coefficients.append((raw, factor))
            tuples.append(
                call.job(job, coefficient=raw.buffer_info()[0], factor=factor.buffer_info()[0])
            )
        results = _native.merge(tuples, self.threads, self.isa)
        return [
            Stats(
                selection=Selection(*selection),
                coefficient=None if rows is None else rows[0],
                kept=kept,
                first_nonfinite=first,
                base_nonfinite=base,
                overflow=overflow,
                extra={} if rows is None else {"factor": rows[1]},
            )
            for rows, (selection, kept, first, base, _, overflow) in zip(
                coefficients, results, strict=True
            )
        ]

    def calibrate(self, job: Job, merged: Array) -> Stats:
        """WSC of a tensor merged elsewhere, one read of base, experts and ``merged``, one write."""
        if job.calibration is None:
            raise BackendError("calibrate: expected a calibration, got None.")
        self._need_code(merged)
        raw, factor = _floats(job.calibration.rows), _floats(job.calibration.rows)
        task = _Call().job(
            job, merged=merged, coefficient=raw.buffer_info()[0], factor=factor.buffer_info()[0]
        )
        _, _, first, base, bad, overflow = _native.merge([task], self.threads, self.isa)[0]
        return Stats(
            selection=Selection.keep_everything(len(job.experts), _numel(job.experts[0])),
            coefficient=raw,
            first_nonfinite=(*first, bad),
            base_nonfinite=base,
            overflow=overflow,
            extra={"factor": factor},
        )

    def row_stats(self, job: Job, merged: Array) -> tuple[Any, Any, Any]:
        self._need_code(merged)
        if job.calibration is None:
            shape = job.experts[0].shape
            rows = shape[0] if len(shape) else 1
            cols = _numel(job.experts[0]) // rows if rows else 0
            job = _with_rows(job, RowCalibration(rows, cols))
        assert job.calibration is not None
        rows, k = job.calibration.rows, len(job.experts)
        like = job.experts[0]
        (gram, g), (dots, d), (norm2, s) = (
            _doubles(like, rows, k, k),
            _doubles(like, rows, k),
            _doubles(like, rows),
        )
        _native.row_stats(_Call().job(job, merged=merged), g, d, s, self.threads, self.isa)
        return gram, dots, norm2

    def scale(self, job: Job, merged: Array, coefficient: Any) -> None:
        self._need_code(merged)
        values = array("f", [float(x) for x in coefficient])
        if job.calibration is None:
            job = _with_rows(
                job, RowCalibration(len(values), _numel(merged) // max(1, len(values)))
            )
        _native.scale(
            _Call().job(job, merged=merged), values.buffer_info()[0], self.threads, self.isa
        )

    def row_norms(
        self, x: Array, *, base: Array | None = None, rows: int | None = None
    ) -> tuple[Any, Any, Any]:
        """L1, L2 and L∞ norms, float64 [rows] each, of the rows of ``x`` (of ``x − base`` where a base is given).

        Args:
            rows: into how many rows the contiguous array falls (default: its first extent).
        """
        count = rows if rows is not None else (x.shape[0] if len(x.shape) else 1)
        cols = _numel(x) // count if count else 0
        job = _with_rows(
            Job(base=base, experts=[x], recipe=Recipe((1.0,))), RowCalibration(count, cols)
        )
        (l1, a), (l2, b), (linf, c) = (_doubles(x, count) for _ in range(3))
        _native.row_norms(_Call().job(job), a, b, c, self.threads, self.isa)
        return l1, l2, linf

    def kth_magnitude(self, x: Array, k: int, *, base: Array | None = None) -> float:
        """The k-th largest |x| (|x − base|), k from 1, exactly."""
        n = _numel(x)
        if not 1 <= k <= n:
            raise InputError(
                f"k of kth_magnitude: expected 1 to {n}, the number of elements, got {k}."
            )
        plan = _Call()
        recipe = Recipe((1.0,))
        plan.plans[id(recipe), n] = _plan(recipe, n, count=k)
        task = plan.job(Job(base=base, experts=[x], recipe=recipe))
        threshold: float = _native.select([task], self.threads, self.isa)[0][0][0]
        return threshold

    def _need_code(self, merged: Array) -> None:
        if _code(merged) is None or not _contiguous(merged):
            raise BackendError(
                f"native backend: expected a contiguous float32, float16 or bfloat16 merged tensor, got "
                f"{merged.dtype}. Use backend='torch'."
            )


def _with_rows(job: Job, rows: RowCalibration) -> Job:
    return Job(
        base=job.base,
        experts=job.experts,
        recipe=job.recipe,
        out=job.out,
        name=job.name,
        calibration=rows,
    )


class StreamingSelect:
    """Thresholds of a recipe over data that arrives piece by piece: one tensor in slabs, or a whole model.

    The answer is the one that all the data in memory would give. Model scope: feed the tensors in name order,
    ``offset`` running through; :meth:`result` then holds cuts in that running index (see :func:`cut_for`).

    >>> search = StreamingSelect(recipe, total)                     # doctest: +SKIP
    >>> while search.wants():
    ...     for start, stop in search.wants():
    ...         search.feed(base[start:stop], [e[start:stop] for e in experts], offset=start)
    >>> selection = search.result()
    """

    def __init__(self, recipe: Recipe, total: int, *, threads: int = 0) -> None:
        self._recipe, self._total, self._threads = recipe, total, threads
        self._plan = _plan(recipe, total)
        k = recipe.num_experts
        empty = (
            self._plan,
            0,
            0,
            total,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            (0,) * k,
            (0,) * k,
            None,
            None,
            None,
            0,
            0,
            None,
        )
        self._search = _native.Search(empty)

    def _piece(self, base: Array | None, experts: Sequence[Array], offset: int) -> tuple[Any, ...]:
        return (
            self._plan,
            _numel(experts[0]),
            offset,
            self._total,
            0,
            0,
            0 if base is None else _address(base),
            0 if base is None else _code(base),
            *(0, 0, 0, 0),
            tuple([_address(e) for e in experts]),
            tuple([_code(e) for e in experts]),
            *(None, None, None, 0, 0, None),
        )

    def sample(self, base: Array | None, experts: Sequence[Array]) -> None:
        """Optional, before the first ``feed``: data from anywhere. A fair sample makes one pass enough as a rule."""
        self._search.sample(self._piece(base, experts, 0))

    def wants(self) -> list[tuple[int, int]]:
        """Flat ranges [start, stop) to feed now, each element once, in any order and cut; empty: finished."""
        ranges: list[tuple[int, int]] = self._search.wants()
        return ranges

    def feed(self, base: Array | None, experts: Sequence[Array], *, offset: int) -> None:
        """One piece: contiguous arrays of equal length, whose first element has flat index ``offset``."""
        self._search.feed(self._piece(base, experts, offset), self._threads, -1)

    def result(self) -> Selection:
        """Thresholds and cuts. Factors are those of the recipe where it has no norm rescale, else 1; majority 0:
        what needs another read of the data is :func:`select`'s."""
        threshold, tie_cut, top, top_cut, factor, _ = self._search.result()
        return Selection(threshold, tie_cut, top, top_cut, factor, 0)


def cut_for(selection: Selection, start: int, numel: int) -> Selection:
    """The part of a model-scope selection that concerns the tensor at [start, start + numel) of the concatenation."""

    def local(cuts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(max(c - start, 0), numel) for c in cuts)

    return Selection(
        selection.threshold,
        local(selection.tie_cut),
        selection.top_threshold,
        local(selection.top_tie_cut),
        selection.factor,
        selection.majority,
    )
