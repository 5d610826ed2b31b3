"""Tests of the CUDA kernels, compiled for the host where no GPU is; elsewhere each says why not."""

from __future__ import annotations

import pytest

from support.backends import why_not


@pytest.fixture
def needs_cuda() -> None:
    reason = why_not("cuda")
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
