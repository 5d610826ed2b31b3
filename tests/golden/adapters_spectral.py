"""Iso-C, Iso-CTS and TSV-M: the MAGIC authors' functions and the original codes they come from.
All run by matrix products, not by the exact decomposition that the references use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter
from golden.golden_case import GoldenCase


def _merge(case: GoldenCase, method: str, **params: Any) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = mf.merge_task_vectors(
        case.models("expert"), method, preset="magic", **params
    )
    return merged


@adapter("magic.iso_c", "iso.iso_c", torch_only=True)
def iso_c(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    return _merge(case, "iso_c")


@adapter("magic.iso_cts", "iso.iso_cts", torch_only=True)
def iso_cts(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    return _merge(case, "iso_cts", **case.params)


@adapter("magic.TSVM", torch_only=True)
def tsv_m(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    if case.params["model"] == "BERT":
        return _merge(case, "tsv_m", tensors=r"output\.dense\.weight")
    return _merge(case, "tsv_m")


@adapter("tsv.TSVM", torch_only=True)
def tsv_m_original(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    """The original code excludes no embeddings."""
    return _merge(case, "tsv_m", tensors=r"^(?!.*text_projection)")
