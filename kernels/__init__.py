"""Triton kernels and their launch configurations; installed as ``magic_fast.kernels``.

This room imports Triton and nothing of ours. One idea a file, in the order in which an element
meets them: ``load`` (blocks, task vectors) → ``trim``, ``philox`` → ``vote`` → ``delta`` (the
stages together) → ``rowstats``, ``calibrate`` → ``store``; and the kernels themselves: ``merge``,
``rows`` (calibrated merges), ``table`` (many small tensors), ``select`` and ``cut`` (thresholds),
``norms`` (sums over a tensor), ``ranked`` (DELLA). ``launch`` says how many threads, ``words`` what
the numbers in a recipe mean. docs/kernels.md has the byte model and how to change one.
"""
