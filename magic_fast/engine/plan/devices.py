"""The device and the backend of a run, from what the user asked and what is here."""

from __future__ import annotations

import os

from magic_fast.errors import InputError
from magic_fast.ops import asked_for, automatic


def device_of(device: str) -> str:
    """``cpu``, ``cuda`` or ``cuda:i`` of this machine for what the user asked.

    ``auto`` is a CUDA device where torch finds one, and the CPU elsewhere; torch is not imported to
    find out where no driver is installed.

    Raises:
        InputError: no such device here.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise InputError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:i', got {device!r}.")
    if kind == "cpu" or (kind == "auto" and not os.path.exists("/dev/nvidiactl")):
        return "cpu"
    import torch

    count = torch.cuda.device_count()
    if kind == "auto":
        return "cuda" if count else "cpu"
    if int(index or 0) >= count:
        here = "none" if count == 0 else f"{count}, numbered from 0"
        raise InputError(
            f"device {device!r}: expected a GPU that PyTorch sees, got {here}. Use --device cpu; "
            "`magic-fast doctor` says why."
        )
    return device


def backend_name(backend: str | None, device: str) -> str:
    """What computes, for the identity of a run: the backend that is asked for, else those that the
    automatic choice tries here."""
    wanted = asked_for(backend)
    if wanted is not None:
        return wanted
    return "+".join(automatic(device.partition(":")[0]))
