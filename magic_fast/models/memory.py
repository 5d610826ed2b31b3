"""What each tensor in memory is: by the configuration of its module, by its module's class, else by
its name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from magic_fast.models.assign import roles_of
from magic_fast.models.model_roles import ModelRoles, Source
from magic_fast.models.roles import Kind, Role

if TYPE_CHECKING:
    from magic_fast.models.built.trees import Records


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
    """Roles of what classes of torch and transformers' Conv1D own, which are believed while
    subclasses are not; of the model's output layer, which it says itself; and of bare parameters
    of any class, by their names."""
    from magic_fast.models.built.modules import Place, records_of

    result = {}
    ends = _output_layers(model)
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        believed = kind.__module__.startswith("torch.nn.modules.") or _is_conv1d(kind)
        records = records_of(module, Place()) if believed else _bare_parameters(module)
        if id(module) in ends:
            records |= {"weight": (str(ends[id(module)]), (0,), None, 0)}
        for local, (word, units, _, _) in records.items():
            name = f"{path}.{local}" if path else local
            role = roles.get(name)
            if role is None or role.kind in (Kind.HEAD, Kind.CLASSIFIER):
                continue  # a matrix to its class
            if not believed and id(module) not in ends and not _is_open(role):
                continue
            result[name] = replace(
                role, kind=Kind(word), units=None if units is None else tuple(units),
                owner=kind.__name__, units_doubt=role.units_doubt if units is None else None,
            )  # fmt: skip
    return result


def _is_open(role: Role) -> bool:
    """Whether the class that holds a parameter may say more than its header: not of stacks of
    experts, which only a known class explains."""
    return role.kind is Kind.PARAMETER or (role.kind is Kind.MATRIX and role.units is not None)


def _bare_parameters(module: nn.Module) -> Records:
    """Those that a class of one's own holds beside its layers and does not call weights: where
    their names tell nothing they are no weights of linear maps, and have no units."""
    from magic_fast.models.built.modules import bare_kind

    found: Records = {}
    for name, own in module.named_parameters(recurse=False):
        if own.dim() > 1 and not name.endswith(("weight", "kernel")):
            found[name] = (str(bare_kind(type(module).__name__, name, own)), (), None, own.dim())
    return found


def _output_layers(model: nn.Module) -> dict[int, Kind]:
    """The modules that give a model's output, as it says by the methods of transformers
    (``get_output_embeddings``) and timm (``get_classifier``)."""
    found: dict[int, Kind] = {}
    for method, kind in (
        ("get_output_embeddings", Kind.HEAD), ("get_classifier", Kind.CLASSIFIER),
    ):  # fmt: skip
        ask = getattr(model, method, None)
        if not callable(ask):
            continue
        try:
            said = ask()
        except (NotImplementedError, AttributeError, TypeError):  # of a class that has none
            continue
        for module in said if isinstance(said, tuple | list | nn.ModuleList) else [said]:
            if isinstance(module, nn.Module):
                found[id(module)] = kind
    return found


def _is_conv1d(kind: type) -> bool:
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
