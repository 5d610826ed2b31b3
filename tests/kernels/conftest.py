"""Tests of the Triton kernels; where no Triton is, each says so."""

from __future__ import annotations

import pytest

from support.backends import why_not


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    reason = why_not("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
