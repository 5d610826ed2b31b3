"""Of every model type: each parameter of its module tree has one role, under its own name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from magic_fast.models import Source, roles_of, table
from models.architectures import (
    as_in_file,
    config_of,
    default,
    headers,
    in_memory,
)

TYPES = table.model_types()
SAMPLED = TYPES[::25]


def names(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and kind of every module under a node, ``0`` for the number of a layer. Where the tree
    has numbers of its own, those."""
    node = node if isinstance(node, dict) else {"": node}
    for key, inner in node.items():
        if key == "":
            yield from ((path, number) for number in ([inner] if isinstance(inner, int) else inner))
        elif key != "@" and not (key == "*" and any(other.isdigit() for other in node)):
            step = "0" if key == "*" else key
            yield from names(inner, f"{path}.{step}" if path else step)


@pytest.mark.parametrize("model_type", TYPES)
def test_one_role_for_each_parameter(model_type: str) -> None:
    entry = table.entry_of(model_type)
    assert entry is not None
    prefix = entry.get("prefix", "")
    trees = [entry["base"], entry.get("heads", {}).get(entry["class"], {})]
    for tree, above in zip(trees, (prefix, ""), strict=True):
        tensors, kinds = {}, {}
        for path, number in names(tree, above):
            for local, record in entry["kinds"][number][1].items():
                name = f"{path}.{local}" if path else local
                tensors[name] = ((4,) * record[3], "F32")
                kinds.setdefault(name, []).append(record)
        config = {"model_type": model_type, "architectures": [entry["class"]], "hidden_size": 4}
        roles = roles_of(config, tensors)
        assert not roles.assumed
        for name, records in kinds.items():
            role = roles[name]
            assert role.canonical == name
            assert [str(role.kind)] == sorted(
                {r[0] for r in records if r[3] == len(tensors[name][0])}
            )
            alike = {None if r[1] is None else tuple(r[1]) for r in records}
            assert role.units in alike


def check(model_type: str, name: str) -> None:
    """A model of the default configuration: its names in memory and in files."""
    model = default(name, model_type)
    config = config_of(model)
    roles = roles_of(config, in_memory(model))
    assert roles.source is Source.TABLE
    assert not roles.assumed
    for one, role in roles.items():
        if role.layout == ():
            assert (role.units is None) == (role.units_doubt is not None), one
    found = roles_of(config, headers(as_in_file(model, model.state_dict())))
    assert not found.assumed
    targets = {target for role in found.values() for target in role.targets}
    assert targets == {role.canonical for role in roles.values()}


def shipped_class(model_type: str) -> str:
    pytest.importorskip("transformers", minversion=table.heading()["transformers"])
    entry = table.entry_of(model_type)
    assert entry is not None
    return str(entry["class"])


@pytest.mark.parametrize("model_type", SAMPLED)
def test_sampled_models(model_type: str) -> None:
    check(model_type, shipped_class(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_models(model_type: str) -> None:
    check(model_type, shipped_class(model_type))
