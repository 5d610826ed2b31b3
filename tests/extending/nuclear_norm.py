"""A variant of WSC that looks at whole tensors: the sum of the singular values."""

import torch

import magic_fast as mf


@mf.register_calibration(
    "nuclear_norm",
    needs="tensors",
    use_when="many directions carry the change, of different strengths",
)
def nuclear_norm(task_vectors: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """the singular values of the change add up to the mean of the experts' sums"""
    of_experts = torch.linalg.svdvals(task_vectors.flatten(2)).sum(-1)  # [K]
    return of_experts.mean() / torch.linalg.svdvals(change.flatten(1)).sum()
