"""The recorded outputs of the reference systems, with the tensors on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from golden.adapters import ADAPTERS, TORCH_ONLY, NotYet
from golden.golden_case import GoldenCase, load_cases, why_absent
from golden.test_golden_tensors import REGISTERED, _check
from magic_fast.errors import BackendError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
    pytest.mark.skipif(why_absent() is not None, reason=why_absent() or ""),
]

assert REGISTERED
_CASES = [c for c in load_cases() if not c.on_disk and c.op in ADAPTERS and c.op not in TORCH_ONLY]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", _CASES, ids=lambda c: c.id)
def test_golden_on_a_gpu(case: GoldenCase, backend: str) -> None:
    there = replace(case, device="cuda")
    try:
        faults = _check(there, backend, float32=False)
        if case.outputs_f32:
            faults += _check(there, backend, float32=True)
    except (NotYet, BackendError) as reason:
        pytest.skip(f"{case.op}: {reason}")
    assert not faults, "\n".join(faults)
