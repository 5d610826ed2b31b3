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
from magic_fast.ops.gpu.numbers import BYTES, VARIED

#: Names a build of the same sources for the host, where tests run the kernels without a GPU.
EMULATED = "MAGIC_FAST_CUDA_EMULATED"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def call_job(
    d: Device,
    *,
    merged: Tensor | None = None,
    out: Tensor | None = None,
    report: Tensor,
    kept: Tensor,
    start: int = 0,
) -> Any:
    """A job for the extension. The tensors must outlive the work on the stream.

    Args:
        merged: what a merge elsewhere gave, where the rule is that of d = merged − base.
        out: takes the result; None where there is none.
        start: element from which on the arrays are seen.
    """

    def at(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr() + start * x.element_size()

    k, rule = len(d.experts), d.numbers.rule
    given = d.job.task_masks is not None
    base = d.job.base
    like = d.experts[0]
    return extension().Job(
        base=at(base),
        base_dtype=_DTYPES[like.dtype if base is None else base.dtype],
        merged=at(merged),
        merged_dtype=_DTYPES[like.dtype if merged is None else merged.dtype],
        out=at(out),
        out_dtype=_DTYPES[like.dtype if out is None else out.dtype],
        experts=[at(e) for e in d.experts],
        dtypes=[_DTYPES[e.dtype] for e in d.experts],
        # a trim by variance is a mask here, made once a merge
        kinds=[BYTES if kind == VARIED else kind for kind in d.numbers.kinds],
        masks=[m.data_ptr() + start for m in d.masks],
        task_masks=[m.data_ptr() + start for m in d.task_masks] if given else [0] * k,
        integers=d.integers.data_ptr(),
        numbers=d.floats.data_ptr(),
        report=report.data_ptr(),
        kept=kept.data_ptr(),
        offset=d.job.offset + start,
        rule=[*rule[:5], rule[7], rule[9], rule[10], rule[11], rule[13]],
    )
