"""Polar factors and leading singular triples by matrix products, each checked, each with an exact
fallback."""

from magic_fast.spectral.factorizations import FastFactorizations
from magic_fast.spectral.leading_triples import leading
from magic_fast.spectral.polar_factor import polar

__all__ = ["FastFactorizations", "leading", "polar"]
