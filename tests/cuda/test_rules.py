"""Planning and refusals of the CUDA extension, without a launch that counts."""

from __future__ import annotations

import pytest
import torch

from magic_fast.ops.cuda.calls import extension
from magic_fast.ops.cuda.scans import log_bins_of, segments_of

pytestmark = pytest.mark.usefixtures("needs_cuda")


@pytest.mark.parametrize("n", [1, 1023, 1024, 1025, 10**6, 2**31 + 5, 2**36])
@pytest.mark.parametrize("processors", [1, 108, 132])
def test_segments_cover_a_tensor(n: int, processors: int) -> None:
    segments, length = segments_of(n, processors)
    assert length % 1024 == 0
    assert (segments - 1) * length < n <= segments * length
    assert segments <= 8 * processors


def test_bins_stay_within_the_workspace() -> None:
    assert all(4 * t << log_bins_of(t, 1 << 30) <= 32 << 20 for t in range(1, 129))


def arguments(**more: object) -> dict[str, object]:
    word = torch.zeros(64, dtype=torch.int64)
    given: dict[str, object] = {
        "base": 0, "base_dtype": 0, "merged": 0, "merged_dtype": 0, "out": 0, "out_dtype": 0,
        "experts": [word.data_ptr()], "dtypes": [0], "kinds": [0], "masks": [0],
        "task_masks": [0], "integers": word.data_ptr(), "numbers": word.data_ptr(),
        "report": word.data_ptr(), "kept": word.data_ptr(), "offset": 0, "rule": [0] * 10,
    }  # fmt: skip
    return given | more


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": []}, "1 to 64"),
        ({"dtypes": [0, 0]}, "one an expert"),
        ({"rule": [0]}, "10 words"),
        ({"dtypes": [3]}, "dtype"),
        ({"kinds": [4]}, "mask is missing"),
        ({"kinds": [1], "kept": 0}, "kept is missing"),
        ({"integers": 0}, "numbers are missing"),
        ({"rule": [0, 0, 2, 0, 0, 0, 1, 0, 0, 0]}, "merged is missing"),
    ],
)
def test_what_would_corrupt_memory_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extension().merge(extension().Job(**arguments(**wrong)), 1, 8, 0, False, 1, 0)
