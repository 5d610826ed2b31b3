"""Recorded tensor-level outputs of the reference systems, each within its manifest's tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden import (
    adapters_consensus,
    adapters_features,
    adapters_geometric,
    adapters_lora,
    adapters_magic,
    adapters_mergekit,
    adapters_peft,
    adapters_spectral,
    adapters_ties,
)
from golden.adapters import ADAPTERS, TORCH_ONLY, NotYet
from golden.golden_case import GoldenCase, load_cases, mismatch, why_absent
from magic_fast.errors import BackendError
from support.backends import available_backends

# importing them registers their operations
REGISTERED = (
    adapters_consensus, adapters_features, adapters_geometric, adapters_lora, adapters_magic,
    adapters_mergekit, adapters_peft, adapters_spectral, adapters_ties,
)  # fmt: skip

_CASES = [case for case in load_cases() if not case.on_disk]


def _params() -> list[object]:
    """Each case on each backend that is here; one that has no implementation yet appears once."""
    params = []
    for number, case in enumerate(_CASES):
        names = available_backends() if case.op in ADAPTERS else ["torch"]
        for name in names:
            if name == "torch" or case.op not in TORCH_ONLY:
                # interpreted kernels take seconds a case: one in six where time counts
                slow = name == "triton" and bool(number % 6)
                marks = (pytest.mark.slow,) if slow else ()
                params.append(pytest.param(case, name, id=f"{case.id}-{name}", marks=marks))
    if not params:
        reason = why_absent() or "no tensor-level case in the manifest"
        params.append(
            pytest.param(None, "torch", id="absent", marks=pytest.mark.skip(reason=reason))
        )
    return params


def _ambiguous(case: GoldenCase, output: str) -> Tensor | None:
    """Where the reference's answer hangs on an accident of its sort or of its rounding."""
    if output == "merged":
        return case.ambiguous
    if case.op in ("mergekit.della", "mergekit.della_linear") and output.startswith("prob"):
        # Our ranks are of float32 differences; the reference ranks them rounded to the inputs'
        # dtype, so entries of a row whose rounded magnitudes are equal have no rank to compare.
        k = int(output.removeprefix("prob"))
        base, expert = case.inputs["base"], case.inputs["experts"][k]
        if base.dtype != torch.float32:
            delta = (expert - base).abs().reshape(base.shape[0], -1)
            shared = (delta[:, :, None] == delta[:, None, :]).sum(-1).gt(1)
            return shared.reshape(base.shape).cpu()
    return None


def _check(case: GoldenCase, backend: str, float32: bool) -> list[str]:
    got = ADAPTERS[case.op](case, backend, float32)
    wanted = case.outputs_f32 if float32 else case.outputs
    faults = []
    for name, want in wanted.items():
        if float32 and want.is_floating_point() and "f32" not in case.record["tolerance"][name]:
            continue  # recorded without a strict tolerance (scalars that no dtype touches)
        tolerance = case.tolerance(name, float32=float32 and want.is_floating_point())
        fault = mismatch(got[name], want, tolerance, _ambiguous(case, name))
        if fault:
            faults.append(f"{name}{' (float32)' if float32 else ''}: {fault}")
    return faults


@pytest.mark.parametrize(("case", "backend"), _params())
def test_golden(case: GoldenCase, backend: str) -> None:
    if case.op not in ADAPTERS:
        pytest.skip(f"operation {case.op} has no implementation yet")
    try:
        faults = _check(case, backend, float32=False)
        if case.outputs_f32:
            faults += _check(case, backend, float32=True)
    except NotYet as reason:
        pytest.skip(f"operation {case.op} has no implementation yet: {reason}")
    except BackendError as refusal:
        if backend == "torch":  # runs everything
            raise
        pytest.skip(f"{case.op}: {refusal}")
    assert not faults, "\n".join(faults)
