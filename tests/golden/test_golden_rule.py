"""The comparison itself: what it must let pass, and what it must not."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from golden.adapters import ADAPTERS
from golden.golden_case import load_cases, mismatch, why_absent
from golden.test_golden_tensors import REGISTERED

_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def _of(*values: float) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("got", "want", "tolerance", "passes"),
    [
        (_of(1.0, 2.0), _of(1.0, 2.0), _TOLERANCE, True),
        (_of(1.0, 2.002), _of(1.0, 2.0), _TOLERANCE, True),
        (_of(1.0, 2.003), _of(1.0, 2.0), _TOLERANCE, False),
        (_of(1.0, math.nan), _of(1.0, 2.0), _TOLERANCE, False),
        (_of(1.0, 2.0), _of(1.0, math.nan), _TOLERANCE, False),
        (_of(math.nan), _of(math.nan), _TOLERANCE, False),
        (_of(math.nan), _of(math.nan), {**_TOLERANCE, "equal_nan": True}, True),
        (_of(math.inf), _of(math.inf), {**_TOLERANCE, "equal_nan": True}, True),
        (_of(-math.inf), _of(math.inf), {**_TOLERANCE, "equal_nan": True}, False),
        (_of(1.0), _of(math.inf), {**_TOLERANCE, "equal_nan": True}, False),
        (_of(1.0), _of(1.0, 1.0), _TOLERANCE, False),
        (torch.zeros(100).index_fill(0, torch.tensor([3]), 1.0), torch.zeros(100),
         {**_TOLERANCE, "max_mismatch_frac": 0.01}, True),
        (torch.zeros(100).index_fill(0, torch.tensor([3, 4]), 1.0), torch.zeros(100),
         {**_TOLERANCE, "max_mismatch_frac": 0.01}, False),
        (torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.uint8), _TOLERANCE, True),
        (torch.tensor([1, 1]), torch.tensor([1, 0], dtype=torch.uint8), _TOLERANCE, False),
        (torch.tensor([True, False]), torch.tensor([1, 0], dtype=torch.uint8), _TOLERANCE, True),
    ],
)  # fmt: skip
def test_golden_rule(
    got: torch.Tensor, want: torch.Tensor, tolerance: dict[str, float], passes: bool
) -> None:
    assert (mismatch(got, want, tolerance) is None) == passes


def test_golden_rule_skips_ambiguous_ties_only() -> None:
    ambiguous = torch.tensor([True, False])
    assert mismatch(_of(9.0, 2.0), _of(1.0, 2.0), _TOLERANCE, ambiguous) is None
    assert mismatch(_of(1.0, 9.0), _of(1.0, 2.0), _TOLERANCE, ambiguous) is not None


# The groups that must be answered.
_ANSWERED = (
    "magic_wsc_", "magic_post_rectification_v2", "magic_layer_wise_", "magic_ties", "magic_wa_ta",
    "magic_topk_values_mask", "magic_slerp", "magic_dare", "ties_original", "mergekit_linear",
    "mergekit_task_arithmetic", "mergekit_ties", "mergekit_breadcrumbs", "mergekit_slerp",
    "mergekit_passthrough", "mergekit_sparsify", "mergekit_dare_",
    "mergekit_della", "peft_ties", "peft_task_arithmetic", "peft_magnitude_prune",
    "peft_dare_", "magic_consensus_", "magic_tall_mask", "iso_original_tall_mask",
    "mergekit_nuslerp", "mergekit_multislerp", "mergekit_karcher", "mergekit_model_stock",
    "mergekit_nearswap", "mergekit_arcee_fusion", "mergekit_sce", "mergekit_ram",
)  # fmt: skip


def test_golden_operations_without_implementation_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prints what is left out, and fails where a group that was answered no longer is."""
    assert len(REGISTERED) > 0
    if why_absent():
        pytest.skip(str(why_absent()))
    cases = [case for case in load_cases() if not case.on_disk]
    missing = Counter(case.op for case in cases if case.op not in ADAPTERS)
    with capsys.disabled():
        listed = ", ".join(f"{op} ({count})" for op, count in sorted(missing.items()))
        print(f"\n{sum(missing.values())} of {len(cases)} cases without implementation: {listed}")
    lost = [case.id for case in cases if case.id.startswith(_ANSWERED) and case.op not in ADAPTERS]
    assert not lost
