"""The choice of a backend: explicit ones never fall back, automatic ones say what they took."""

from __future__ import annotations

import logging

import pytest
import torch

import magic_fast as mf
from magic_fast import ops
from magic_fast.errors import BackendError
from magic_fast.ops import choice, registry
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe


def _job(dtype: torch.dtype = torch.float32, name: str = "") -> Job:
    experts = [torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)]
    return Job(None, experts, Recipe((1.0, 1.0)), torch.empty(2, 3, dtype=dtype), name)


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("MAGIC_FAST_BACKEND", raising=False)
    return monkeypatch


def _needs_native() -> None:
    status = next(b for b in mf.backends() if b.name == "native")
    if not status.available:
        pytest.skip(f"backend native: {status.reason}")


def test_every_backend_says_whether_it_can_run_and_why_not() -> None:
    found = {b.name: b for b in mf.backends()}
    assert set(found) == {s.name for s in registry.SPECS}
    assert found["torch"].available and found["torch"].reason is None
    for status in found.values():
        assert status.available == (status.reason is None)
        assert status.summary and status.devices


def test_native_refuses_float64_by_name(no_environment: pytest.MonkeyPatch) -> None:
    _needs_native()
    with pytest.raises(BackendError) as caught:
        ops.merge([_job(torch.float64, "w")], backend="native")
    message = str(caught.value)
    assert message.startswith(
        "backend 'native' for 'w': expected one that can run this merge, got: native: "
        "it takes float32, float16 and bfloat16, not torch.float64."
    )
    assert message.endswith("See magic_fast.backends() or `magic-fast doctor`.")


def test_the_automatic_choice_falls_back(
    no_environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _needs_native()
    choice._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="magic_fast"):
        assert ops.merge([_job(torch.float64)])[0].backend == "torch"
        assert ops.merge([_job(torch.float64)])[0].backend == "torch"
    assert caplog.text.count("backend torch (native: it takes float32, float16 and bfloat16") == 1
    assert ops.merge([_job()])[0].backend == "native"


@pytest.mark.parametrize("word", ["auto", ""])
def test_auto_in_the_environment_is_the_automatic_choice(
    no_environment: pytest.MonkeyPatch, word: str
) -> None:
    no_environment.setenv("MAGIC_FAST_BACKEND", word)
    automatic = ops.merge([_job()])[0].backend
    no_environment.delenv("MAGIC_FAST_BACKEND")
    assert automatic == ops.merge([_job()])[0].backend


def test_the_environment_chooses_and_never_falls_back(no_environment: pytest.MonkeyPatch) -> None:
    no_environment.setenv("MAGIC_FAST_BACKEND", "torch")
    assert ops.merge([_job()])[0].backend == "torch"
    no_environment.setenv("MAGIC_FAST_BACKEND", "native")
    with pytest.raises(BackendError, match="backend 'native'"):
        ops.merge([_job(torch.float64)])
    no_environment.setenv("MAGIC_FAST_BACKEND", "fast")
    names = "'native', 'cuda', 'triton', 'torch'"
    with pytest.raises(BackendError, match=f"backend 'fast': expected one of {names}"):
        ops.merge([_job()])


def test_the_argument_goes_before_the_environment(no_environment: pytest.MonkeyPatch) -> None:
    no_environment.setenv("MAGIC_FAST_BACKEND", "fast")
    assert ops.merge([_job()], backend="torch")[0].backend == "torch"


def test_a_backend_that_cannot_load_is_no_crash(
    no_environment: pytest.MonkeyPatch, own_registry: None
) -> None:
    """Without the extension the install still works, and the reason is there to read."""
    mf.register_backend("broken", "magic_fast.ops.nowhere:X", devices=("cpu",), before="native")
    status = next(b for b in registry.backends() if b.name == "broken")
    assert not status.available
    assert status.reason is not None and status.reason.startswith("cannot be imported: ")
    assert ops.merge([_job()])[0].backend != "broken"
    with pytest.raises(BackendError, match="broken: cannot be imported"):
        ops.merge([_job()], backend="broken")


def test_whole_tensor_methods_run_on_torch_alone(no_environment: pytest.MonkeyPatch) -> None:
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    with pytest.raises(BackendError) as caught:
        mf.merge(a, [b], "iso_c", backend="native")
    assert str(caught.value) == (
        "backend 'native': expected 'torch' for this method, which is no element-wise recipe."
    )
