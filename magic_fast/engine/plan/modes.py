"""How each step runs: streamed through blocks of memory, held whole, or in torch; and why."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

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
from magic_fast.methods.workspace import decomposition_bytes
from magic_fast.ops import asked_for, why_unavailable
from magic_fast.ops.job import Job, View
from magic_fast.recipe import Recipe


def native_missing() -> str | None:
    """Why the native backend cannot run here, or None."""
    return why_unavailable("native")


class Mode(str, Enum):
    """Where a step's arrays are while it is merged.

    STREAM: in pieces, in the blocks of memory that go round. HOLD: the whole tensor in memory of
        its
    own, merged by the native backend. TORCH: the whole tensor and float32 copies, merged by torch.
    """

    STREAM = "stream"
    HOLD = "hold"
    TORCH = "torch"


def modes(
    steps: Sequence[Step],
    slot_bytes: int,
    device: str,
    backend: str | None,
    *,
    searches: bool = True,
) -> dict[str, tuple[Mode, str]]:
    """Step name → how it runs, and why not in pieces ('' where it does). ``searches``: a tensor may
    be read once more than it is merged, for its inner products."""
    known: _Known = {}
    found = {s.name: mode_of(s, slot_bytes, device, backend, known) for s in steps}
    for s in steps if not searches else ():
        if found[s.name][0] is Mode.STREAM and needs_whole(s) and not fits(s, slot_bytes):
            found[s.name] = Mode.HOLD, "its coefficients follow from all of the tensor"
    scoped = [s for s in steps if over_model(s)]
    bad = next((s for s in scoped if found[s.name][0] is Mode.TORCH), None)
    if bad is not None:  # one threshold for all of them comes from one place
        found |= {s.name: (Mode.TORCH, found[bad.name][1]) for s in scoped}
    return found


def mode_of(
    step: Step, slot_bytes: int, device: str, backend: str | None, known: _Known | None = None
) -> tuple[Mode, str]:
    """How one step runs, looked at alone; ``known`` keeps what holds for others like it."""
    reason = _why_torch(step, device, backend, {} if known is None else known)
    if reason is not None:
        return Mode.TORCH, reason
    if step.copy or fits(step, slot_bytes):
        return Mode.STREAM, ""
    if not cut(step, slot_bytes):
        return Mode.HOLD, "a row, or a number for all rows, needs more than a block of memory"
    if piece_bytes(step, search_grain(step)) > slot_bytes and search_grain(step) > SUM_BLOCK:
        return Mode.HOLD, "norms of what ranks in rows decide are summed over whole tensors"
    return Mode.STREAM, ""


#: What decides whether the native backend takes a step → why it does not, or None.
_Known = dict[object, "str | None"]


def _why_torch(step: Step, device: str, backend: str | None, known: _Known) -> str | None:
    if device != "cpu":
        return f"it runs on {device}"
    if "every step" not in known:
        asked = asked_for(backend)
        other = asked not in (None, "native")
        known["every step"] = f"backend {asked} was asked for" if other else native_missing()
    if known["every step"] is not None:
        return known["every step"]
    dtypes = [i.info.dtype for i in step.inputs]
    if "F64" in (*dtypes, step.dtype) and not (step.copy and dtypes[0] not in FLOATS):
        return "float64 runs in torch"
    if step.copy:
        return None
    directions = directions_of(step)
    if step.recipe is None and directions is None:
        return f"method {step.method} looks at whole tensors"
    if step.whole and step.calibration is not None:
        return "whole weights are calibrated against a base"
    calibration, shape = step.calibration, step.shape
    key = (
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
    if key not in known:
        known[key] = _unsupported(step)
    return known[key]


def _unsupported(step: Step) -> str | None:
    from magic_fast.ops.native.backend import NativeBackend

    recipe = step.recipe or Recipe((1.0,) * len(step.experts))
    if over_model(step) and recipe.needs_factors:
        return "norms of each tensor under a threshold of the whole model are found in torch"
    views = [View(0, step.cast or i.info.dtype, step.shape) for i in step.inputs]
    if step.merged is not None:
        views.pop()  # checked with the others by dtype
    base = views.pop(0) if step.base is not None else None
    job = Job(
        base,
        views,
        recipe,
        View(0, step.dtype, step.shape),
        step.name,
        calibration=step.calibration,
        directions=directions_of(step),
    )
    return NativeBackend().supports(job)


def held_bytes(step: Step, mode: Mode) -> int:
    """Memory beyond the blocks while a tensor is held whole, with the next one being read."""
    own = 2 * sum(i.nbytes for i in step.inputs) + step.numel * element_size(step.dtype)
    return own + (working_bytes(step) if mode is Mode.TORCH and not step.copy else 0)


def working_bytes(step: Step) -> int:
    """What PyTorch holds beside inputs and output of a step: (K + 2) float32 copies, and what a
    decomposition takes."""
    count = len(step.experts)
    more = decomposition_bytes(step.method, step.arguments, count, len(step.shape))
    return (4 * (count + 2) + more) * step.numel
