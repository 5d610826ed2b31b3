"""Polar factors and leading singular triples by matrix products, each checked, each with an exact
fallback; sums of low-rank matrices by their factors."""

from magic_fast.spectral.factorizations import FastFactorizations
from magic_fast.spectral.leading_triples import leading
from magic_fast.spectral.low_rank import combine_low_rank, low_rank_svd, stack_factors
from magic_fast.spectral.polar_factor import polar

__all__ = [
    "FastFactorizations",
    "combine_low_rank",
    "leading",
    "low_rank_svd",
    "polar",
    "stack_factors",
]
