"""What each tensor in memory is: by the configuration of its module, by its module's class, else by
its name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from magic_fast.models.assign import roles_of
from magic_fast.models.model_roles import ModelRoles, Source
from magic_fast.models.roles import Kind, Role


def roles_in_memory(
    model: object, tensors: Mapping[str, Tensor], model_type: str | None = None
) -> ModelRoles:
    """The role of each of ``tensors`` by its name.

    Args:
        model: what they belong to; only of a module more than names and shapes is known.
        model_type: transformers' name of the architecture; None: that of the module.
    """
    config = {"model_type": model_type} if model_type else plain_config(model)
    found = roles_of(config, {name: (tuple(x.shape), "F32") for name, x in tensors.items()})
    if found.source is Source.HEADERS and isinstance(model, nn.Module):
        found.know(_by_class(model, found))
    return found


def plain_config(model: object) -> Mapping[str, Any]:
    """The configuration that a model carries as transformers' do, as its ``config.json`` has it."""
    config = getattr(model, "config", None)
    if callable(config):
        config = config()
    if callable(plain := getattr(config, "to_dict", None)):
        config = plain()
    if isinstance(config, Mapping):
        return config
    model_type = getattr(config, "model_type", None)
    return {"model_type": model_type} if isinstance(model_type, str) else {}


def _by_class(model: nn.Module, roles: Mapping[str, Role]) -> dict[str, Role]:
    """Roles of what classes of torch and transformers' Conv1D own: these are believed, subclasses
    are not."""
    from magic_fast.models.built.modules import Place, records_of

    result = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if not (kind.__module__.startswith("torch.nn.modules.") or _is_conv1d(kind)):
            continue
        for local, (word, units, _, _) in records_of(module, Place()).items():
            name = f"{path}.{local}" if path else local
            role = roles.get(name)
            if role is None or role.kind in (Kind.HEAD, Kind.CLASSIFIER):
                continue  # a matrix to its class
            result[name] = replace(
                role, kind=Kind(word), units=None if units is None else tuple(units),
                owner=kind.__name__,
            )  # fmt: skip
    return result


def _is_conv1d(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
