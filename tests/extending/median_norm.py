"""A variant of WSC by sums of rows: the norm that most experts agree on."""

import torch

import magic_fast as mf


@mf.register_calibration(
    "median_norm",
    use_when="one of many experts moved much further than the others",
)
def median_norm(gram: torch.Tensor, dots: torch.Tensor, norm2: torch.Tensor) -> torch.Tensor:
    """each row of the change gets the median norm of the experts' rows"""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # [rows, K]
    return norms.quantile(0.5, dim=-1) / norm2.sqrt()
