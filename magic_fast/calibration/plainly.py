"""How a model runs while its features are looked at: plainly, and as it was afterwards.

Nothing here touches a switch of the whole process without a count of who has it, so threads may do
this side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from magic_fast.reference.arithmetic import without_autocast

_fast_path = threading.Lock()
_users = 0
_kept = True


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Without compiled code, autocast, and kernels that hide the calls of layers in them."""
    with ExitStack() as stack:
        stack.enter_context(plain_attention())
        stack.enter_context(eager_experts(model))
        stack.enter_context(uncompiled(model))
        stack.enter_context(without_autocast())
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without PyTorch's one kernel for a whole layer of attention, which calls no module in it. The
    last thread that leaves puts the switch back."""
    global _users, _kept
    with _fast_path:
        if not _users:
            _kept = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _users += 1
    try:
        yield
    finally:
        with _fast_path:
            _users -= 1
            if not _users:
                torch.backends.mha.set_fastpath_enabled(_kept)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """transformers' stacks of experts as one product an expert and projection, whatever kernel they
    are set to."""
    key = "_experts_implementation_internal"
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(c): c for c in found if key in getattr(c, "__dict__", {})}
    kept = [(c, vars(c)[key]) for c in configs.values()]
    try:
        for config, _ in kept:
            setattr(config, key, "eager")
        yield
    finally:
        for config, own in kept:
            setattr(config, key, own)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules that ``torch.compile`` wrapped, or compiled in place, run their own forward."""
    kept: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        own = getattr(module, "_orig_mod", None)
        if isinstance(own, nn.Module):  # calls the original, hooks and all
            kept.append((module, "forward", vars(module).get("forward")))
            vars(module)["forward"] = own.__call__
        if getattr(module, "_compiled_call_impl", None) is not None:
            kept.append((module, "_compiled_call_impl", module._compiled_call_impl))
            module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, name, value in kept:
            if value is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value
