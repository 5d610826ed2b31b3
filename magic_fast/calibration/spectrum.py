"""The settings of ``svc`` and ``lines``, checked."""

from __future__ import annotations

import math

from magic_fast.errors import InputError

SVC_ALPHA = 0.1  # least share of an expert that counts


def check_svc(alpha: object) -> None:
    if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
        raise InputError(f"alpha for svc: expected a finite number > 0, got {alpha!r}.")


def check_lines(alpha: object, beta: object, num_blocks: object) -> None:
    for what, value in (("alpha", alpha), ("beta", beta)):
        if what == "alpha" and value is None:
            continue
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise InputError(f"{what} for lines: expected a finite number, got {value!r}.")
    if not (isinstance(num_blocks, int) and num_blocks >= 1):
        raise InputError(f"num_blocks for lines: expected a whole number >= 1, got {num_blocks!r}.")
