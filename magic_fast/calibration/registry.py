"""The calibrations by name: ours, those that are registered, and those of installed packages (entry
points ``magic_fast.calibrations``, loaded when an unknown name is looked up or all are listed)."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from magic_fast.calibration.builtin import CALIBRATIONS, Calibration
from magic_fast.errors import InputError
from magic_fast.plugins import entry_points_of
from magic_fast.recipe import Granularity, RowFunction, Variant

GROUP = "magic_fast.calibrations"
_RESERVED = frozenset({"wsc", "none", "auto", "weight", "feature", "dual"})
_NAME = re.compile(r"[a-z][a-z0-9_]*")


_REGISTERED: dict[str, Calibration] = {}

Function = Callable[..., Any]


def register_calibration(
    name: str,
    function: Function | None = None,
    *,
    needs: str = "rows",
    gives: str = "coefficients",
    summary: str = "",
    use_when: str = "",
    paper: str = "",
    arxiv: str = "",
) -> Any:
    """Adds a variant of WSC: one more word for ``calibrate=``, for ``calibrate:`` of a YAML and for
    the options ``--calibrate`` and ``--variant``. Use it as a call or as a decorator
    (docs/contributing/add-a-calibration.md).

    The function gets torch tensors and must not write to them; K counts the experts whose weight is
    not 0. Strength, clamp, direction, guards and the choice of tensors are those of every variant.

    Args:
        name: lower case letters, digits and underscores; unlike that of any other calibration.
        function: with ``needs="rows"``: ``(gram, dots, norm2) -> ξ``: inner products ⟨τ_j, τ_k⟩
            float64 [rows, K, K], ⟨τ_k, Δ⟩ [rows, K] and ‖Δ‖² [rows], to ξ [rows]; per tensor one
            row holds the sums of all. With ``needs="tensors"``: ``(task_vectors, change) -> ξ``,
            [K, *shape] and [*shape] in float32, to one number for the tensor. It may take the name
            of the tensor as a further keyword ``name``.
        needs: ``rows`` runs on every backend and streams checkpoints; ``tensors`` runs in PyTorch,
            a tensor at a time.
        gives: ``coefficients`` ξ; or, with ``needs="tensors"``, the calibrated ``change`` itself.
        summary: what it does, in a line (default: the first line of the function's docstring).
        use_when: when to prefer it.
        paper, arxiv: where it comes from.

    Returns:
        The function.

    Raises:
        InputError: the name is taken, or an argument is not as described.

    >>> register_calibration("svc", lambda gram, dots, norm2: norm2)
    Traceback (most recent call last):
    magic_fast.errors.InputError: name of a calibration: expected one that is not taken, got 'svc'.
    """
    if function is None:
        return lambda given: register_calibration(
            name, given, needs=needs, gives=gives, summary=summary, use_when=use_when,
            paper=paper, arxiv=arxiv,
        )  # fmt: skip
    _check_words(name, needs, gives)
    named = _check_signature(name, function, 3 if needs == "rows" else 2)
    made = RowFunction(
        name, function, whole=needs == "tensors", changes=gives == "change", named=named,
        source=_source_of(function),
    )  # fmt: skip
    known = _REGISTERED.get(name)
    if known is not None and known.function is not None and _home(known.function) != _home(made):
        raise InputError(f"name of a calibration: expected one that is not taken, got {name!r}.")
    first = (inspect.getdoc(function) or name).splitlines()[0]
    one_number = made.whole and not made.changes
    _REGISTERED[name] = Calibration(
        name, summary or first, use_when, paper, arxiv, needs,
        granularity=Granularity.TENSOR if one_number else Granularity.ROW, function=made,
    )  # fmt: skip
    return function


def _check_words(name: object, needs: str, gives: str) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)) or name in _RESERVED:
        raise InputError(
            "name of a calibration: expected lower case letters, digits and underscores, and no "
            f"word that has a meaning already, got {name!r}."
        )
    if name in CALIBRATIONS:
        raise InputError(f"name of a calibration: expected one that is not taken, got {name!r}.")
    if needs not in ("rows", "tensors"):
        raise InputError(
            f"needs of calibration {name!r}: expected 'rows' or 'tensors', got {needs!r}."
        )
    allowed = ("coefficients",) if needs == "rows" else ("coefficients", "change")
    if gives not in allowed:
        words = " or ".join(map(repr, allowed))
        raise InputError(
            f"gives of calibration {name!r}: expected {words} with needs={needs!r}, got {gives!r}."
        )


def _check_signature(name: str, function: object, count: int) -> bool:
    """Whether it takes the name of the tensor too.

    Raises:
        InputError: it cannot be called with ``count`` tensors.
    """
    what = "(gram, dots, norm2)" if count == 3 else "(task_vectors, change)"
    if not callable(function):
        raise InputError(
            f"function of calibration {name!r}: expected one of {what}, got {function!r}."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled code without one: the call will tell
        return False
    named = "name" in signature.parameters
    try:
        signature.bind(*range(count), **({"name": ""} if named else {}))
    except TypeError as error:
        raise InputError(
            f"function of calibration {name!r}: expected one of {what}, got one of {signature}: "
            f"{error}."
        ) from None
    return named


def _source_of(function: Function) -> str:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # typed in, or compiled
        code = getattr(function, "__code__", None)
        text = "" if code is None else f"{code.co_code!r}{code.co_names}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _home(function: RowFunction) -> tuple[object, object]:
    """Where a function is written; the same one may be registered again."""
    f = function.function
    return getattr(f, "__module__", None), getattr(f, "__qualname__", f)


def find(name: object) -> Calibration | None:
    """The calibration of that name, or None."""
    if not isinstance(name, str):
        return None
    name = str(name)
    known = CALIBRATIONS.get(name) or _REGISTERED.get(name)
    if known is None and _NAME.fullmatch(name) and name not in _RESERVED:
        entry_points_of(GROUP)  # importing one registers it
        known = _REGISTERED.get(name)
    return known


def is_variant(name: object) -> bool:
    """Whether a variant of WSC has that name."""
    found = find(name)
    return found is not None and found.space == "weight"


def variants() -> tuple[str, ...]:
    """The names of the variants of WSC that are known so far, ours first."""
    known = (*CALIBRATIONS.values(), *_REGISTERED.values())
    return tuple(c.name for c in known if c.space == "weight")


def calibrations() -> dict[str, Calibration]:
    """All calibrations by name, those of installed packages too."""
    entry_points_of(GROUP)
    return {**CALIBRATIONS, **_REGISTERED}


def left_out(name: object) -> str:
    """`` (reason)`` for an entry point of that name that cannot be used, else nothing."""
    loaded, reasons = entry_points_of(GROUP)
    if name in reasons:
        return f" ({reasons[str(name)]})"
    return f" ({GROUP} has it, but does not register it)" if name in loaded else ""


def variant_of(value: object) -> Variant | str:
    """A variant of WSC by its name.

    Raises:
        InputError: there is none of that name.
    """
    found = find(value)
    if found is None or not is_variant(value):
        allowed = ", ".join(map(repr, variants()))
        raise InputError(
            f"calibration variant: expected one of {allowed}, got {value!r}{left_out(value)}."
        )
    return found.name if found.function is not None else Variant(found.name)


def resolved(variant: Variant | str, tensor: str) -> Variant | RowFunction:
    """A variant as backends take it, for one tensor."""
    if isinstance(variant, Variant):
        return variant
    found = find(variant)
    assert found is not None and found.function is not None
    return replace(found.function, tensor=tensor)
