"""The CUDA extension from Python: jobs as it takes them, streams, and which build runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from magic_fast.ops.gpu.jobs import Device
from magic_fast.ops.gpu.results import Pending
from magic_fast.recipe.codes import DTYPES, GpuTrim

#: Names a build of the same sources for the host, where tests run the kernels without a GPU.
EMULATED = "MAGIC_FAST_CUDA_EMULATED"
#: Fields of codes.Rule that mf_gpu_rule has, in its order.
RULE = (
    "vote", "zero_vote", "contributors", "reduce", "unweighted", "consensus", "merged", "limited",
    "singled", "scored",
)  # fmt: skip


def emulated() -> bool:
    """Whether the kernels run on the host."""
    return bool(os.environ.get(EMULATED))


@cache
def extension() -> Any:
    """The compiled kernels.

    Raises:
        ImportError: they were not built.
    """
    path = os.environ.get(EMULATED)
    if not path:
        return importlib.import_module("magic_fast._cuda")
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{EMULATED}: expected an extension module, got {path!r}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream_of_device(device: torch.device) -> int:
    """Handle of the current stream."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)


def pointer(x: Tensor | None, start: int = 0) -> int:
    """Address of element ``start``; 0 for None."""
    return 0 if x is None else x.data_ptr() + start * x.element_size()


def call_job(
    d: Device,
    pending: Pending,
    *,
    merged: Tensor | None = None,
    out: Tensor | None = None,
    start: int = 0,
) -> Any:
    """A job for the extension. The tensors must outlive the work on the stream.

    Args:
        merged: what a merge elsewhere gave, where the rule is that of d = merged − base.
        out: takes the result; None where there is none.
        start: element from which on the arrays are seen.
    """
    k = len(d.experts)
    given = d.job.task_masks is not None
    base = d.job.base
    like = d.experts[0]
    return extension().Job(
        base=pointer(base, start),
        base_dtype=DTYPES[like.dtype if base is None else base.dtype],
        merged=pointer(merged, start),
        merged_dtype=DTYPES[like.dtype if merged is None else merged.dtype],
        out=pointer(out, start),
        out_dtype=DTYPES[like.dtype if out is None else out.dtype],
        experts=[pointer(e, start) for e in d.experts],
        dtypes=[DTYPES[e.dtype] for e in d.experts],
        # a trim by variance is a mask here, made once a merge
        kinds=[GpuTrim.BYTES if x == GpuTrim.VARIED else x for x in d.numbers.kinds],
        masks=[pointer(m, start) for m in d.masks],
        task_masks=[pointer(m, start) for m in d.task_masks] if given else [0] * k,
        integers=d.integers.data_ptr(),
        numbers=d.floats.data_ptr(),
        report=pending.report.data_ptr(),
        kept=pending.kept.data_ptr(),
        offset=d.job.offset + start,
        rule=[getattr(d.numbers.rule, field) for field in RULE],
    )
