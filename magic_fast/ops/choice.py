"""The choice of a backend.

An explicit choice (argument or ``MAGIC_FAST_BACKEND``) never falls back; an automatic one may, and
says in the log what it took and why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

from magic_fast.errors import BackendError
from magic_fast.ops.backend import Backend, offers
from magic_fast.ops.functions import as_run, why_unsupported
from magic_fast.ops.job import Job, View
from magic_fast.ops.order import operation_of
from magic_fast.ops.registry import (
    RUNS_EVERYTHING,
    SPECS,
    BackendSpec,
    devices_of,
    left_out,
    loaded,
    measured_order,
    spec_of,
    specs,
)

log = logging.getLogger("magic_fast")
_OURS = frozenset(spec.name for spec in SPECS)


def asked_for(name: str | None) -> str | None:
    """The backend that the caller or else MAGIC_FAST_BACKEND names, or None if the choice is free.

    Raises:
        BackendError: there is none of that name.
    """
    wanted = name or os.environ.get("MAGIC_FAST_BACKEND") or "auto"
    if wanted == "auto":
        return None
    if wanted not in _OURS and wanted not in [spec.name for spec in specs()]:
        names = ", ".join(repr(spec.name) for spec in specs())
        reason = left_out().get(wanted, "an unknown name")
        raise BackendError(f"backend {wanted!r}: expected one of {names} or 'auto', got {reason}.")
    return wanted


def refuse_backend(name: str | None, device: str) -> None:
    """Before anything is read: a backend that is asked for is never replaced.

    Args:
        name: as the caller has it, or None.
        device: ``cpu``, ``cuda`` or ``cuda:i``, where the tensors will be.

    Raises:
        BackendError: no such backend, or it cannot run here, or not on that device.
    """
    wanted, kind = asked_for(name), device.partition(":")[0]
    if wanted is None:
        return
    reason, devices = loaded(wanted)[1], devices_of(spec_of(wanted))
    if reason is None and kind not in devices:
        reason = f"the tensors are on {kind}, it runs on {', '.join(devices)}"
    if reason is not None:
        raise BackendError(
            f"backend {wanted!r}: expected one that can run on {device}, got: {reason}. Leave it "
            "out, or see `magic-fast doctor`."
        )


def automatic(device: str) -> tuple[str, ...]:
    """The backends that the automatic choice tries on ``device`` (``cpu``, ``cuda``) ahead of the
    one that runs everything; that one if there are no others."""
    names = []
    for spec in specs():
        if spec.name == RUNS_EVERYTHING:
            break
        if device in spec.devices and loaded(spec.name)[1] is None:
            names.append(spec.name)
    return tuple(names) or (RUNS_EVERYTHING,)


def streaming(name: str | None, device: str) -> tuple[list[Backend], str | None]:
    """The backends that take borrowed memory and parts of tensors on ``device``, in the order in
    which they are tried: the one that is asked for, else all that can run here.

    Returns:
        (Backends, the reason there are none or None.)
    """
    wanted = asked_for(name)
    able: list[Backend] = []
    reasons = []
    for spec in specs() if wanted is None else [spec_of(wanted)]:
        if not spec.streams or device not in spec.devices:
            continue
        backend, reason = loaded(spec.name)
        if backend is not None and reason is None:
            able.append(backend)
        else:
            reasons.append(reason)
    if able:
        return able, None
    return able, reasons[0] if reasons else f"backend {wanted} was asked for"


def _device_of(job: Job) -> str:
    return str(getattr(job.experts[0], "device", "cpu")).split(":")[0]


def _why_not(
    spec: BackendSpec, job: Job, where: str, primitive: str, *, by_name: bool
) -> str | None:
    """The reason a backend does not run a primitive for a job, or None.

    Args:
        by_name: it is asked for. It may then also run where it does not by itself (Triton's
            interpreter on the CPU).
    """
    if not by_name and where not in spec.devices:  # not even loaded
        return f"the tensors are on {where}, it runs on {', '.join(spec.devices)}"
    backend, reason = loaded(spec.name)
    if reason is not None:
        return reason
    assert backend is not None
    if where not in (devices := getattr(backend, "devices", spec.devices)):
        return f"the tensors are on {where}, it runs on {', '.join(devices)}"
    if not spec.streams and isinstance(job.experts[0], View):
        return "it takes torch tensors only"
    if not offers(as_run(backend, job), primitive):
        return f"it has no {primitive}"
    return why_unsupported(backend, job)


def _tried(job: Job, where: str, wanted: str | None, primitive: str) -> Sequence[BackendSpec]:
    """The backends to try, in order."""
    if wanted is not None:
        return (spec_of(wanted),)
    if where == "cpu":  # nothing was measured against one another there
        return specs()
    return measured_order(operation_of(job, primitive))


def offering(capability: str, job: Job) -> Backend | None:
    """The first backend that offers a member of :class:`~magic_fast.ops.backend.Capable` and runs
    the job, or None; of one that the environment names, only that."""
    wanted, where = asked_for(None), _device_of(job)
    for spec in _tried(job, where, wanted, capability):
        if _why_not(spec, job, where, capability, by_name=wanted is not None) is None:
            return loaded(spec.name)[0]
    return None


@cache
def _say_once(message: str) -> None:
    log.info(message)


def choose(
    jobs: Sequence[Job], wanted: str | None = None, *, primitive: str = "merge"
) -> list[Backend]:
    """A backend for each job: the one that is asked for, else the first that can run it, the
    fastest by measurement tried first.

    Args:
        primitive: what will be called: a member of :class:`~magic_fast.ops.backend.Capable`.
    """
    wanted = asked_for(wanted)
    chosen = []
    for job in jobs:
        refused = []
        where = _device_of(job)
        for spec in _tried(job, where, wanted, primitive):
            reason = _why_not(spec, job, where, primitive, by_name=wanted is not None)
            if reason is None:
                backend = loaded(spec.name)[0]
                assert backend is not None
                chosen.append(as_run(backend, job))
                break
            refused.append(f"{spec.name}: {reason}")
        else:
            label = f" for '{job.name}'" if job.name else ""
            raise BackendError(
                f"backend {wanted or 'auto'!r}{label}: expected one that can run this merge, "
                f"got: {'; '.join(refused)}. See magic_fast.backends() or `magic-fast doctor`."
            )
        why = f" ({'; '.join(refused)})" if refused else ""
        _say_once(f"backend {chosen[-1].name}{why}")
    return chosen
