"""A merge method that is a plain function of task vectors."""

import torch

import magic_fast as mf


@mf.register_method(
    "trimmed_mean",
    use_when="one of many experts may be broken",
    paper="Byzantine-Robust Distributed Learning",
    arxiv="1803.01498",
    min_experts=3,
)
def trimmed_mean(task_vectors: torch.Tensor, *, drop: int = 1, scale: float = 1.0) -> torch.Tensor:
    """mean of each entry without its smallest and its largest values"""
    k = len(task_vectors)
    if not 0 <= 2 * drop < k:
        raise mf.InputError(f"drop for {k} experts: expected 0 to {(k - 1) // 2}, got {drop}.")
    ordered = task_vectors.sort(dim=0).values
    return scale * ordered[drop : k - drop].mean(dim=0)
