"""The backends, as data, and the choice between them.

An explicit choice (argument or ``MAGIC_FAST_BACKEND``) never falls back; an automatic one may, and
says in the log what it took and why.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from magic_fast.errors import BackendError
from magic_fast.ops.backend import Backend
from magic_fast.ops.job import Job

log = logging.getLogger("magic_fast")


@dataclass(frozen=True)
class BackendSpec:
    """One backend: where its class lives and where its arrays may live."""

    name: str
    module: str
    factory: str
    devices: tuple[str, ...]
    summary: str

    def load(self) -> Backend:
        backend: Backend = getattr(importlib.import_module(self.module), self.factory)()
        return backend


SPECS: tuple[BackendSpec, ...] = (
    BackendSpec(
        "native",
        "magic_fast.ops.native.backend",
        "NativeBackend",
        ("cpu",),
        "fused C++ kernels on the CPU",
    ),
    BackendSpec(
        "cuda",
        "magic_fast.ops.cuda.backend",
        "CudaBackend",
        ("cuda",),
        "fused CUDA kernels on a GPU",
    ),
    BackendSpec(
        "triton",
        "magic_fast.ops.triton.backend",
        "TritonBackend",
        ("cuda",),
        "fused Triton kernels on a GPU",
    ),
    BackendSpec(
        "torch", "magic_fast.ops.torch.backend", "TorchBackend", ("cpu", "cuda"), "plain PyTorch"
    ),
)


@dataclass(frozen=True)
class BackendStatus:
    """What ``mf.backends()`` tells of one backend. ``reason`` is None where it is available."""

    name: str
    available: bool
    devices: tuple[str, ...]
    summary: str
    reason: str | None
    details: str = ""


@cache
def _loaded(name: str) -> tuple[Backend | None, str | None]:
    """The backend or the reason why not; both are remembered."""
    spec = next(s for s in SPECS if s.name == name)
    try:
        backend = spec.load()
    except ImportError as e:
        return None, f"cannot be imported: {e}"
    return backend, backend.why_not()


def why_unavailable(name: str) -> str | None:
    """Why one backend cannot run here, without loading any other; None if it can."""
    return _loaded(name)[1]


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and why not if it cannot.

    >>> any(b.name == "torch" and b.available for b in backends())
    True
    """
    found = []
    for spec in SPECS:
        backend, reason = _loaded(spec.name)
        details = getattr(backend, "details", None)
        text = details() if callable(details) and reason is None else ""
        found.append(
            BackendStatus(spec.name, reason is None, _devices(spec), spec.summary, reason, text)
        )
    return found


def implementation(name: str) -> Backend:
    """A backend itself, for what is more than a merge (graphs, workspaces).

    Raises:
        BackendError: it cannot run here.
    """
    backend, reason = _loaded(name)
    if backend is None or reason is not None:
        raise BackendError(f"backend {name!r}: expected one that can run here, got: {reason}.")
    return backend


def asked_for(name: str | None) -> str | None:
    """The backend that the caller or else MAGIC_FAST_BACKEND names; None where the choice is free.

    Raises:
        BackendError: there is none of that name.
    """
    wanted = name or os.environ.get("MAGIC_FAST_BACKEND") or "auto"
    if wanted == "auto":
        return None
    if wanted not in [s.name for s in SPECS]:
        names = ", ".join(repr(s.name) for s in SPECS)
        raise BackendError(
            f"backend {wanted!r}: expected one of {names} or 'auto', got an unknown name."
        )
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
    spec = next(s for s in SPECS if s.name == wanted)
    reason = _loaded(wanted)[1]
    if reason is None and kind not in _devices(spec):
        reason = f"the tensors are on {kind}, it runs on {', '.join(_devices(spec))}"
    if reason is not None:
        raise BackendError(
            f"backend {wanted!r}: expected one that can run on {device}, got: {reason}. Leave it "
            "out, or see `magic-fast doctor`."
        )


def best_backend(device: str) -> str:
    """The first backend that can run on ``device`` (``cpu``, ``cuda``) here."""
    return next(s.name for s in SPECS if device in s.devices and why_unavailable(s.name) is None)


def _device_of(job: Job) -> str:
    return str(getattr(job.experts[0], "device", "cpu")).split(":")[0]


def _devices(spec: BackendSpec) -> tuple[str, ...]:
    """Where its arrays may live: what the loaded backend says, else its row of the table."""
    devices: tuple[str, ...] = getattr(_loaded(spec.name)[0], "devices", spec.devices)
    return devices


def _why_not(spec: BackendSpec, job: Job, *, asked_for: bool) -> str | None:
    """``asked_for``: by name. A backend may then also run where it does not by itself (Triton's
    interpreter on the CPU)."""
    where = _device_of(job)
    if not asked_for and where not in spec.devices:  # not even loaded
        return f"the tensors are on {where}, it runs on {', '.join(spec.devices)}"
    backend, reason = _loaded(spec.name)
    if reason is not None:
        return reason
    if where not in _devices(spec):
        return f"the tensors are on {where}, it runs on {', '.join(_devices(spec))}"
    assert backend is not None
    return backend.supports(job)


@cache
def _say_once(message: str) -> None:
    log.info(message)


def choose(jobs: Sequence[Job], wanted: str | None = None) -> list[Backend]:
    """A backend for each job: the one asked for, else the first that can run it."""
    wanted = asked_for(wanted)
    chosen = []
    for job in jobs:
        refused = []
        for spec in SPECS:
            if wanted not in (None, spec.name):
                continue
            reason = _why_not(spec, job, asked_for=wanted is not None)
            if reason is None:
                backend = _loaded(spec.name)[0]
                assert backend is not None
                chosen.append(backend)
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
