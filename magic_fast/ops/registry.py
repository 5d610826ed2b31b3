"""The backends, as data: ours, those of others that are registered, and those of installed packages
(entry points ``magic_fast.backends``, loaded when backends are first listed or chosen)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from magic_fast.errors import BackendError, InputError
from magic_fast.ops.backend import REQUIRED, Backend, Capable
from magic_fast.ops.order import FASTEST, Operation
from magic_fast.plugins import check_registration, entry_points_of, made

log = logging.getLogger("magic_fast")
GROUP = "magic_fast.backends"
RUNS_EVERYTHING = "torch"


@dataclass(frozen=True)
class BackendSpec:
    """One backend: where it comes from and where its arrays may live.

    Attributes:
        factory: a class or function of no arguments, or where it is: ``"module:attribute"``.
        streams: it takes borrowed memory and parts of tensors (see ``ops/backend.py``).
        before: the backend that the automatic choice tries after this one, or None.
    """

    name: str
    factory: str | Callable[[], Any]
    devices: tuple[str, ...]
    summary: str
    streams: bool = False
    before: str | None = None

    def load(self) -> Backend:
        backend: Backend = made(self.factory)
        return backend


#: Ours.
SPECS: tuple[BackendSpec, ...] = (
    BackendSpec(
        "native",
        "magic_fast.ops.native.backend:NativeBackend",
        ("cpu",),
        "fused C++ kernels on the CPU",
        streams=True,
    ),
    BackendSpec(
        "cuda",
        "magic_fast.ops.cuda.backend:CudaBackend",
        ("cuda",),
        "fused CUDA kernels on a GPU",
    ),
    BackendSpec(
        "triton",
        "magic_fast.ops.triton.backend:TritonBackend",
        ("cuda",),
        "fused Triton kernels on a GPU",
    ),
    BackendSpec(
        "torch", "magic_fast.ops.torch.backend:TorchBackend", ("cpu", "cuda"), "plain PyTorch"
    ),
)
_REGISTERED: list[BackendSpec] = []  # of others, in the order of registration


def register_backend(
    name: str,
    factory: str | Callable[[], Any],
    *,
    devices: Sequence[str],
    summary: str = "",
    streams: bool = False,
    before: str | None = None,
) -> BackendSpec:
    """Adds a backend: one more name for ``backend=``, ``--backend`` and ``MAGIC_FAST_BACKEND``.

    What a backend must offer is in docs/contributing/add-a-backend.md. A package registers one by
    an entry point of the group ``magic_fast.backends`` that names what this function returned.

    Args:
        name: unlike that of any other backend.
        factory: a class or function of no arguments that makes it, or where that is:
            ``"module:attribute"``, imported when the backend is first looked at.
        devices: where its tensors may live: ``"cpu"``, ``"cuda"``.
        summary: what it is, in a few words, for ``magic-fast doctor``.
        streams: it also takes borrowed memory and parts of tensors, so that it merges checkpoints
            in pieces.
        before: the backend ahead of which the automatic choice tries it. None: after all others,
            so that in general it runs only where it is asked for by name.

    Returns:
        The entry of the registry.

    Raises:
        InputError: the name is taken, or an argument is not as described.

    >>> import magic_fast as mf
    >>> mf.register_backend("torch", "somewhere:Backend", devices=("cpu",))
    Traceback (most recent call last):
    magic_fast.errors.InputError: name of a backend: expected one that is not taken, got 'torch'.
    """
    spec = BackendSpec(name, factory, tuple(devices), summary or name, streams, before)
    rows = _in_order()
    if spec in rows:
        return spec
    names = [row.name for row in rows]
    check_registration("a backend", name, factory, spec.devices, names)
    if before not in (None, *names):
        known = ", ".join(map(repr, names))
        raise InputError(f"before of backend {name!r}: expected {known}, got {before!r}.")
    _REGISTERED.append(spec)
    _forget()
    return spec


def _in_order() -> list[BackendSpec]:
    """Ours and those registered so far."""
    rows = list(SPECS)
    for spec in _REGISTERED:
        names = [row.name for row in rows]
        rows.insert(len(rows) if spec.before is None else names.index(spec.before), spec)
    return rows


def _forget() -> None:
    """After a change of the registry."""
    specs.cache_clear()
    measured_order.cache_clear()


@cache
def specs() -> tuple[BackendSpec, ...]:
    """Every backend, in the order in which they are listed. The first call loads what installed
    packages offer."""
    left_out()  # the modules of entry points register what they have
    return tuple(_in_order())


@cache
def left_out() -> dict[str, str]:
    """What installed packages offer and cannot be used: its name → the reason."""
    offered, reasons = entry_points_of(GROUP)
    wrong = {
        name: f"expected what register_backend({name!r}, ...) returned, got {value!r}"
        for name, value in offered.items()
        if not isinstance(value, BackendSpec) or value.name != name or value not in _in_order()
    }
    for name, reason in wrong.items():
        log.warning("entry point %s of %s is left out: %s", name, GROUP, reason)
    return {**reasons, **wrong}


@cache
def measured_order(operation: Operation) -> tuple[BackendSpec, ...]:
    """Every backend; those that were measured at an operation change places among themselves, so
    that the fastest comes first."""
    fastest = [spec for name in FASTEST[operation] for spec in specs() if spec.name == name]
    ahead = iter(fastest)
    return tuple(next(ahead) if spec in fastest else spec for spec in specs())


def spec_of(name: str) -> BackendSpec:
    """The row of a backend that is known to be there."""
    ours = next((spec for spec in SPECS if spec.name == name), None)
    return ours or next(spec for spec in specs() if spec.name == name)


@cache
def loaded(name: str) -> tuple[Backend | None, str | None]:
    """The backend, or the reason it cannot run here; both are remembered."""
    try:
        backend = spec_of(name).load()
        missing = [member for member in REQUIRED if not hasattr(backend, member)]
        if missing:
            return None, f"it has no {', '.join(missing)}, which every backend must have"
        return backend, backend.why_not()
    except ImportError as e:
        return None, f"cannot be imported: {e}"
    except Exception as e:  # of any kind: it may be code of others
        return None, f"cannot be loaded: {type(e).__name__}: {e}"


def why_unavailable(name: str) -> str | None:
    """The reason one backend cannot run here, or None. No other is loaded."""
    return loaded(name)[1]


def implementation(name: str) -> Capable:
    """A backend itself, for what is more than a merge. What is optional in it must be asked for
    first, by :func:`~magic_fast.ops.backend.offers`.

    Raises:
        BackendError: it cannot run here.
    """
    backend, reason = loaded(name)
    if backend is None or reason is not None:
        raise BackendError(f"backend {name!r}: expected one that can run here, got: {reason}.")
    return cast(Capable, backend)


def devices_of(spec: BackendSpec) -> tuple[str, ...]:
    """Where its arrays may live: what the loaded backend says, else its row of the table."""
    devices: tuple[str, ...] = getattr(loaded(spec.name)[0], "devices", spec.devices)
    return devices


@dataclass(frozen=True)
class BackendStatus:
    """What ``mf.backends()`` tells of one backend. ``reason`` is None if it is available."""

    name: str
    available: bool
    devices: tuple[str, ...]
    summary: str
    reason: str | None
    details: str = ""


def backends() -> list[BackendStatus]:
    """Every backend, whether it can run here, and the reason if it cannot. An entry point of an
    installed package that is broken stands here too, as one that cannot run.

    >>> any(b.name == "torch" and b.available for b in backends())
    True
    """
    rows = []
    for spec in specs():
        backend, reason = loaded(spec.name)
        details = getattr(backend, "details", None)
        text = details() if callable(details) and reason is None else ""
        devices = devices_of(spec)
        rows.append(BackendStatus(spec.name, reason is None, devices, spec.summary, reason, text))
    for name, reason in left_out().items():
        why = f"the entry point is left out: {reason}"
        rows.append(BackendStatus(name, False, (), "of an installed package", why))
    return rows
