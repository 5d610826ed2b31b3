"""The executors, as data: ours, those of others that are registered, and those of installed
packages (entry points ``magic_fast.executors``, loaded when a name is looked up that is not
registered)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from magic_fast.engine.execute.executor import Executor
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.errors import InputError
from magic_fast.plugins import check_registration, entry_points_of, made

GROUP = "magic_fast.executors"  # of entry points


@dataclass(frozen=True)
class ExecutorSpec:
    """One executor: where it comes from and the plans it takes.

    Attributes:
        factory: a class or function of no arguments, or where it is: ``"module:attribute"``.
        devices: kinds of devices whose plans it runs: ``cpu``, ``cuda``.
    """

    name: str
    factory: str | Callable[[], Any]
    devices: tuple[str, ...]
    summary: str

    def load(self) -> Executor:
        """A new executor.

        Raises:
            InputError: it cannot be imported, or lacks a method.
        """
        try:
            executor: Executor = made(self.factory)
        except ImportError as error:
            raise InputError(
                f"executor {self.name!r}: expected one that can be imported, got: {error}. Install "
                "what it needs, or choose another."
            ) from error
        _check_methods(executor)
        return executor


#: Ours, and those that are registered. ``auto`` is the first that runs plans of a device.
_SPECS = {
    spec.name: spec
    for spec in (
        ExecutorSpec(
            "local", "magic_fast.engine.execute.local:Local", ("cpu",), "this process, on the CPU"
        ),
        ExecutorSpec(
            "gpu", "magic_fast.engine.gpu.executor:Gpu", ("cuda",), "this process, on its GPUs"
        ),
    )
}


def register_executor(
    name: str,
    factory: str | Callable[[], Any],
    *,
    devices: Sequence[str] = ("cpu",),
    summary: str = "",
) -> ExecutorSpec:
    """Adds an executor: one more name for ``executor=`` and ``--executor``.

    What an executor must offer is in docs/contributing/add-an-executor.md. A package registers one
    by an entry point of the group ``magic_fast.executors`` that names what this function returned.

    Args:
        name: unlike that of any other executor.
        factory: a class or function of no arguments that makes it, or where that is:
            ``"module:attribute"``, imported when the executor is first chosen.
        devices: kinds of devices whose plans it runs: ``"cpu"``, ``"cuda"``.
        summary: what it is, in a few words, for the message that lists all executors.

    Returns:
        The entry of the registry.

    Raises:
        InputError: the name is taken, or an argument is not as described.

    >>> import magic_fast as mf
    >>> mf.register_executor("gpu", "somewhere:Cluster")
    Traceback (most recent call last):
    magic_fast.errors.InputError: name of an executor: expected one that is not taken, got 'gpu'.
    """
    spec = ExecutorSpec(name, factory, tuple(devices), summary or name)
    if _SPECS.get(name) != spec:
        check_registration("an executor", name, factory, spec.devices, _SPECS)
        _SPECS[name] = spec
    return spec


def executor_for(executor: str | Executor, plans: Sequence[MergePlan]) -> Executor:
    """What runs the plans: the object itself, the executor of that name, or for ``auto`` the first
    one that runs plans of their device.

    Raises:
        InputError: there is none of that name, or it cannot run these plans.
    """
    if isinstance(executor, str):
        chosen = _spec_for(executor, plans[0].device).load()
    else:
        chosen = executor
    chosen.refuse(plans)
    return chosen


def refuse_executor(executor: str | Executor) -> None:
    """Before anything is read.

    Raises:
        InputError: neither ``auto`` nor the name of an executor, nor one itself.
    """
    if isinstance(executor, str):
        if executor != "auto":
            _named(executor)
    else:
        _check_methods(executor)


def _check_methods(executor: object) -> None:
    methods = ("refuse", "run", "sweep")
    if not all(callable(getattr(executor, name, None)) for name in methods):
        raise InputError(
            f"executor: expected a name, or an object with the methods {', '.join(methods)}, got "
            f"{executor!r}."
        )


def _spec_for(name: str, device: str) -> ExecutorSpec:
    kind = device.partition(":")[0]
    if name == "auto":
        return next(spec for spec in _SPECS.values() if kind in spec.devices)
    spec = _named(name)
    if kind not in spec.devices:
        raise InputError(
            f"executor {name!r}: expected one that runs plans on {kind}, got one that runs them on "
            f"{', '.join(spec.devices)}. Leave it out, or choose another device."
        )
    return spec


def _named(name: str) -> ExecutorSpec:
    """The executor of a name. Installed packages are asked only where none of that name is
    registered."""
    if name in _SPECS:
        return _SPECS[name]
    offered, reasons = entry_points_of(GROUP)  # their modules register what they have
    if name in _SPECS:
        return _SPECS[name]
    reason = reasons.get(name)
    if name in offered:
        reason = f"expected what register_executor({name!r}, ...) returned, got {offered[name]!r}"
    got = "an unknown name" if reason is None else f"one that is left out: {reason}"
    known = "; ".join(f"{spec.name!r}: {spec.summary}" for spec in _SPECS.values())
    raise InputError(f"executor {name!r}: expected 'auto' or one of {known}; got {got}.")
