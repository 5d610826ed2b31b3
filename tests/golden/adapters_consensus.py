"""TALL masks, their consensus, and the MAGIC authors' Consensus TA, through the public calls."""

from __future__ import annotations

import torch
from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter
from golden.golden_case import GoldenCase


@adapter("magic.generate_task_masks", "iso.generate_task_masks", torch_only=True)
def task_masks(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    x, lam = case.inputs, case.params["tall_mask_lambda"]
    base, experts = x["base"], list(x["experts"])
    if "tv" not in x:
        masks = mf.task_masks(base, experts, tall_mask_lambda=lam)
    else:  # the merged model is given as its task vector
        taus = [e - base for e in experts]
        masks = mf.task_masks(None, taus, x["tv"], tall_mask_lambda=lam)
    return {"mask": torch.stack(masks).to(torch.uint8)}


@adapter("magic.construct_consensus_mask", torch_only=True)
def consensus_mask(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    found = mf.consensus_mask(case.models("mask"), min_tasks=case.params["prun_thre_k"])
    return {name: mask.to(torch.uint8) for name, mask in found.items()}


@adapter("magic.Consensus_TA")
def consensus_ta(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    """The preset trims to 20 % over the whole model before the sum; the original method does
    not."""
    base = case.model("base")
    taus = [{n: e[n] - base[n] for n in base} for e in case.models("expert")]
    return mf.merge_task_vectors(
        taus, "consensus_ta", preset="magic", masks=case.models("mask"), backend=backend
    )
