"""Which backends a test runs on: all, or those that MAGIC_FAST_TEST_BACKENDS=native,torch names."""

from __future__ import annotations

import os

import pytest

from magic_fast.ops.registry import backends, specs

ENVIRONMENT = "MAGIC_FAST_TEST_BACKENDS"


def chosen_backends() -> list[str]:
    """Names of the backends under test. An empty selection or an unknown name is an error: a run
    with nothing in it must not pass."""
    known = [spec.name for spec in specs()]
    text = os.environ.get(ENVIRONMENT)
    if text is None:
        return known
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise pytest.UsageError(
            f"{ENVIRONMENT}: expected one or more of {', '.join(known)}, got {text!r}."
        )
    return wanted


def why_not(name: str) -> str | None:
    """Why the backend cannot run here; None if it can."""
    return next(status.reason for status in backends() if status.name == name)


def available_backends() -> list[str]:
    """The backends under test that can run here."""
    return [name for name in chosen_backends() if why_not(name) is None]


def backend_params() -> list[object]:
    """One parameter per backend under test; one that cannot run here is skipped with its reason."""
    params = []
    for name in chosen_backends():
        reason = why_not(name)
        marks = [] if reason is None else [pytest.mark.skip(reason=f"backend {name}: {reason}")]
        params.append(pytest.param(name, id=name, marks=marks))
    return params
