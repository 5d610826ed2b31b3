"""Triton kernels and their launch configurations; installed as ``magic_fast.kernels``.

This room imports Triton and nothing of ours.
"""
