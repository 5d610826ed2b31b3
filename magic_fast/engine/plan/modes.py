"""How each step runs: streamed through blocks of memory, held whole, or in torch; by which backend;
and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from magic_fast.engine.plan.directions import directions_of, needs_whole
from magic_fast.engine.plan.step import FLOATS, Step, over_model
from magic_fast.engine.plan.units import (
    SUM_BLOCK,
    cut,
    element_size,
    fits,
    piece_bytes,
    search_grain,
)
from magic_fast.methods.registry import find_step
from magic_fast.ops import offers, streaming
from magic_fast.ops.backend import Backend
from magic_fast.ops.functions import why_unsupported
from magic_fast.ops.job import Job, View
from magic_fast.recipe import Recipe, RowFunction


class Mode(str, Enum):
    """Where a step's arrays are while it is merged.

    STREAM: in pieces, in the blocks of memory that go round. HOLD: the whole tensor in memory of
    its own, merged by a backend that streams. TORCH: the whole tensor as torch tensors, merged by
    whatever backend runs it, and float32 copies.
    """

    STREAM = "stream"
    HOLD = "hold"
    TORCH = "torch"


class Way(NamedTuple):
    """How a step runs.

    Attributes:
        mode: where its arrays are.
        why: the reason it does not run in pieces, or ''.
        backend: name of the one that takes its arrays as they are; '' under TORCH.
    """

    mode: Mode
    why: str = ""
    backend: str = ""


def modes(
    steps: Sequence[Step],
    slot_bytes: int,
    device: str,
    backend: str | None,
    *,
    searches: bool = True,
) -> dict[str, Way]:
    """Step name → how it runs. ``searches``: a tensor may be read once more than it is merged, for
    its inner products."""
    usable = streaming(backend, device) if device == "cpu" else ([], f"it runs on {device}")
    known = _Known(*usable)
    ways = {s.name: _way_of(s, slot_bytes, known) for s in steps}
    for s in steps if not searches else ():
        if ways[s.name].mode is Mode.STREAM and needs_whole(s) and not fits(s, slot_bytes):
            ways[s.name] = Way(Mode.HOLD, _OF_ALL, ways[s.name].backend)
    scoped = [s for s in steps if over_model(s)]
    bad = next((s for s in scoped if ways[s.name].mode is Mode.TORCH), None)
    if bad is not None:  # one threshold for all of them comes from one place
        ways |= {s.name: ways[bad.name] for s in scoped}
    return ways


_OF_ALL = "its coefficients follow from all of the tensor"


@dataclass
class _Known:
    """What holds for many steps of one plan.

    Attributes:
        able: backends that stream there.
        none: the reason there are none.
        kinds: what decides whether they take a step → the first that does, or the reason.
    """

    able: list[Backend]
    none: str | None
    kinds: dict[object, tuple[Backend | None, str]] = field(default_factory=dict)


def _way_of(step: Step, slot_bytes: int, known: _Known) -> Way:
    """How one step runs, looked at alone."""
    by, reason = _taken_by(step, known)
    if by is None:
        return Way(Mode.TORCH, reason)
    why = "" if step.copy or fits(step, slot_bytes) else _why_whole(step, slot_bytes, by)
    return Way(Mode.HOLD if why else Mode.STREAM, why, by.name)


def _why_whole(step: Step, slot_bytes: int, backend: Backend) -> str:
    """The reason a step that is larger than a block does not run in pieces, or ''."""
    if not cut(step, slot_bytes):
        return "a row, or a number for all rows, needs more than a block of memory"
    if piece_bytes(step, search_grain(step)) > slot_bytes and search_grain(step) > SUM_BLOCK:
        return "norms of what ranks in rows decide are summed over whole tensors"
    if needs_whole(step) and not offers(backend, "gram"):
        return _OF_ALL
    searched = step.recipe is not None and step.recipe.needs_select and step.merged is None
    if searched and not offers(backend, "search"):
        return f"backend {backend.name} looks for thresholds in whole tensors"
    return ""


def _taken_by(step: Step, known: _Known) -> tuple[Backend | None, str]:
    """The first backend that takes the arrays of a step as they are; or None, and the reason."""
    able = known.able
    if known.none is not None:
        return None, known.none
    dtypes = [i.info.dtype for i in step.inputs]
    if step.exact or (step.copy and dtypes[0] not in FLOATS):
        return able[0], ""
    if "F64" in (*dtypes, step.dtype):
        able = [one for one in able if one.supports(_conversion("F64", "F64")) is None]
        if not able:
            return None, "float64 runs in torch"
    directions = directions_of(step)
    if not step.copy and step.recipe is None and directions is None:
        return None, f"method {step.method} looks at whole tensors"
    if not step.copy and step.whole and step.calibration is not None:
        return None, "whole weights are calibrated against a base"
    calibration, shape = step.calibration, step.shape
    key = (
        step.copy,
        step.method
        if directions
        else id(step.recipe),  # the plan keeps them; tensors of the same parameters share one
        step.dtype,
        step.cast,
        *dtypes,
        step.base is None,
        step.merged is None,
        shape if len(shape) > 2 else len(shape),
        calibration and (calibration.variant, calibration.granularity, calibration.axes),
    )
    if key not in known.kinds:
        reasons = [_unsupported(step, one) for one in able]
        taking = (one for one, why in zip(able, reasons, strict=True) if why is None)
        known.kinds[key] = next(taking, None), reasons[0] or ""
    return known.kinds[key]


def _unsupported(step: Step, backend: Backend) -> str | None:
    """The reason a backend does not take the arrays of a step as they are, or None."""
    given, taken = (i.info.dtype for i in step.inputs), step.dtype if step.copy else step.cast
    for dtype in {dtype for dtype in given if step.copy or taken not in (None, dtype)}:
        if (reason := backend.supports(_conversion(dtype, taken or dtype))) is not None:
            return reason
    if step.copy:
        return None
    recipe = step.recipe or Recipe((1.0,) * len(step.experts))
    if over_model(step) and recipe.needs_factors:
        return "norms of each tensor under a threshold of the whole model are found in torch"
    if over_model(step) and not offers(backend, "search"):
        return f"backend {backend.name} looks for thresholds in single tensors"
    if step.merged is not None and not offers(backend, "calibrate"):
        return f"backend {backend.name} does not calibrate what is merged elsewhere"
    every = [View(0, step.cast or i.info.dtype, step.shape) for i in step.inputs]
    base, views, _ = step.split(every)  # what is merged is checked with the others by dtype
    job = Job(
        base,
        views,
        recipe,
        View(0, step.dtype, step.shape),
        step.name,
        calibration=step.calibration,
        directions=directions_of(step),
    )
    return why_unsupported(backend, job)


def _conversion(source: str, target: str) -> Job:
    """The job that rounds an array to another dtype."""
    return Job(None, [View(0, source, (1,))], Recipe((1.0,)), View(0, target, (1,)))


def held_bytes(step: Step, mode: Mode) -> int:
    """Memory beyond the blocks while a tensor is held whole, with the next one being read."""
    own = 2 * sum(i.nbytes for i in step.inputs) + step.numel * element_size(step.dtype)
    return own + (working_bytes(step) if mode is Mode.TORCH and not step.copy else 0)


def working_bytes(step: Step) -> int:
    """What PyTorch holds beside inputs and output of a step: (K + 2) float32 copies, K more for a
    calibration that is a function of whole tensors, and the workspace of its method."""
    count, more = len(step.experts), 0
    variant = step.calibration and step.calibration.variant
    stacked = count if isinstance(variant, RowFunction) and variant.whole else 0
    named = step.recipe is None and step.method  # copies and calibrations have neither
    spec = find_step(step.method) if named else None
    if spec is not None and spec.workspace is not None:
        more = spec.workspace(step.arguments, count, len(step.shape))
    return (4 * (count + 2 + stacked) + more) * step.numel
