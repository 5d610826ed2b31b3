"""What is no plain tensor in memory, refused in words at the door."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from magic_fast.adapters.names import is_factor
from magic_fast.errors import InputError

_LOG = logging.getLogger("magic_fast")
_PLAIN = {Tensor, nn.Parameter, getattr(nn, "Buffer", nn.Parameter)}


def refuse_odd(x: Tensor, what: str) -> None:
    """Refuses tensors whose values do not lie in one strided memory.

    Args:
        what: the tensor, for the message.

    Raises:
        InputError: sparse, meta (of accelerate's offloading too), fake, distributed, quantised by a
            subclass, or without memory.
    """
    if type(x) in _PLAIN and x.layout is torch.strided and x.device.type != "meta":
        return
    if x.layout is not torch.strided:
        layout = str(x.layout).removeprefix("torch.")
        _refuse(what, f"a dense one, got layout {layout}", "Make it dense: to_dense()")
    kind = type(x).__name__
    if type(x) not in _PLAIN:
        if kind == "DTensor":
            _refuse(
                what,
                "the whole tensor, got a distributed one (DTensor)",
                "Gather it: full_tensor(), or get_model_state_dict() with full_state_dict=True",
            )
        if kind == "FakeTensor":
            _refuse(
                what,
                "one with values, got a fake one (FakeTensor)",
                "Make it outside of FakeTensorMode",
            )
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            _refuse(
                what,
                f"a plain torch.Tensor, got the subclass {type(x).__module__}.{kind}, whose values "
                "lie elsewhere (quantised by torchao, for one)",
                "Make it plain first: dequantize()",
            )
    if x.device.type == "meta":
        _refuse(
            what,
            "one with values, got one on the meta device",
            "Load the model without device_map or offloading, or give its state dict",
        )


def _refuse(what: str, expected: str, remedy: str) -> None:
    raise InputError(f"{what}: expected {expected}. {remedy}.")


def refuse_adapters(names: Iterable[str], what: str) -> None:
    """Refuses a model that holds an adapter's factors beside its weights: A and B merged each by
    itself are no merge of their products. An adapter's file, all factors, is merged as it is asked
    for, with a warning.

    Raises:
        InputError: with what to do instead.
    """
    own = [name for name in names if "ia3_l" not in name]
    found = [name for name in own if is_factor(name)]
    if found and len(found) == len(own):
        _LOG.warning(
            "%s is an adapter: its factors are merged one by one, which is no merge of the changes "
            "they make (mf.merge_adapters is)",
            what,
        )
    elif found:
        raise InputError(
            f"tensor '{found[0]}' in {what}: expected a model's own weights, got a factor of an "
            f"adapter ({len(found)} of them). Merged one by one they are no merge of the changes "
            "they make: merge the adapters with mf.merge_adapters(), or each into its model first "
            "(merge_and_unload() of PEFT), or leave them out (exclude)."
        )
