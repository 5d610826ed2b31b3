"""Arithmetic in the dtypes that tensors have, whatever the caller's surroundings ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtypes of their factors; autocast is a thread's own."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Without autocast and without gradients: results may go into tensors that want them."""
    with torch.no_grad(), without_autocast():
        yield
