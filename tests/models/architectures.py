"""Models of transformers without weights, and their tensors as files have them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from architectures.shrink import default_config
from magic_fast.models.built import classes

WORDS = 1031  # as long as nothing else in a tiny model
Tensors = dict[str, tuple[tuple[int, ...], str]]


def default(name: str, model_type: str) -> Any:
    """A model of the default configuration of a type."""
    with classes.absent_parts():
        return classes.built(name, default_config(model_type))


def config_of(model: Any) -> dict[str, Any]:
    """The model's config.json."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    return {**config, "architectures": [type(model).__name__]}


def headers(tensors: dict[str, torch.Tensor]) -> Tensors:
    """Shapes and dtypes as safetensors' headers have them."""
    words = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
    return {name: (tuple(t.shape), words.get(t.dtype, "F32")) for name, t in tensors.items()}


def in_memory(model: Any) -> Tensors:
    """The tensors by their names in the module tree."""
    return headers(model.state_dict())


def as_in_file(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the module tree as transformers writes them: in the layout of the published
    checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    result: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return result


def numbers_of_units(like: torch.Tensor, units: tuple[int, ...] | None) -> torch.Tensor:
    """A tensor of the same shape that holds the number of its output unit everywhere."""
    if not units:
        return torch.zeros(like.shape)
    sizes = [n if axis in units else 1 for axis, n in enumerate(like.shape)]
    return torch.arange(math.prod(sizes)).view(sizes).expand(like.shape).float().contiguous()


def each_unit_has_one_number(tensor: torch.Tensor, units: tuple[int, ...]) -> bool:
    """Whether a tensor is constant over all axes but ``units``, and different along those."""
    others = [axis for axis in range(tensor.dim()) if axis not in units]
    low, high = (tensor.amin(others), tensor.amax(others)) if others else (tensor, tensor)
    return torch.equal(low, high) and len(low.unique()) == low.numel()


def owners(model: Any) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Full name, module, local name and tensor of every parameter."""
    for path, module in model.named_modules():
        for local, tensor in module.named_parameters(recurse=False):
            yield f"{path}.{local}" if path else local, module, local, tensor


def units_by_class(module: nn.Module, local: str) -> tuple[int, ...] | None:
    """The axes of output units that the class of a module of torch has, None for other classes."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and local.startswith("weight"):
        return (0,)
    if isinstance(module, nn.MultiheadAttention) and local.endswith("proj_weight"):
        return (0,)
    stacked = getattr(module, "is_transposed", None)  # experts of transformers
    if isinstance(stacked, bool) and getattr(module, local).dim() == 3:
        return (0, 2) if stacked else (0, 1)
    if local != "weight":
        return None
    if type(module).__name__ == "Conv1D":
        return (1,)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return (1,) if module.groups == 1 else None
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (0,)
    return () if isinstance(module, nn.Embedding | nn.LayerNorm | nn.BatchNorm2d) else None
