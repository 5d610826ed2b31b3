"""Products in full float32: whatever precision the process has chosen, and it has it back after."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import magic_fast as mf
from magic_fast.spectral import leading, polar
from magic_fast.spectral import polar_factor as polar_module
from magic_fast.spectral.precision import full_float32
from spectral.spectra import geometric, matrix


@pytest.fixture(params=["highest", "high", "medium"])
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


def test_full_precision_inside_and_back_after(chosen: str) -> None:
    outside = tf32()
    assert outside == (chosen != "highest")
    with full_float32():
        assert not tf32()
        with full_float32():
            assert not tf32()
        assert not tf32()
    assert tf32() == outside and torch.get_float32_matmul_precision() == chosen


def test_back_after_an_error(chosen: str) -> None:
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == chosen


def test_the_newer_switches() -> None:
    """Set by name of a backend, PyTorch refuses to read the older switch."""
    scope = torch.backends.cuda.matmul
    if not hasattr(scope, "fp32_precision"):
        pytest.skip("PyTorch before 2.9: one switch only")
    before = scope.fp32_precision
    scope.fp32_precision = "tf32"
    try:
        with full_float32():
            assert scope.fp32_precision == "ieee"
        assert scope.fp32_precision == "tf32"
    finally:
        scope.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("chosen", ["high"], indirect=True)
def test_two_threads(chosen: str) -> None:
    """The one that ends first does not take the other's precision away."""
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with full_float32():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    with full_float32():
        leave.set()
        thread.join()
        assert not tf32()
    assert tf32()


@pytest.mark.parametrize("chosen", ["high"], indirect=True)
def test_every_spectral_call_takes_it(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    plain = polar_module.gram

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(tf32())
        return plain(x)

    monkeypatch.setattr(polar_module, "gram", watched)
    x = matrix((70, 90), geometric(70, 20))
    polar(x)
    leading(x, 10)
    mf.merge_task_vectors([x, 2 * x], "tsv_m")
    assert seen and not any(seen)
    assert tf32()
