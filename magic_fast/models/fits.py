"""Whether a model's tensors are those that its configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from magic_fast.models.assign import roles_of
from magic_fast.models.lookup import part_of, text_parts
from magic_fast.models.model_roles import ModelRoles, Source
from magic_fast.models.roles import Kind, Tensors


def misfits(
    config: Mapping[str, Any], tensors: Tensors, roles: ModelRoles
) -> tuple[list[str], str]:
    """What of a model ``from_pretrained`` could not load, a sentence each; and what tells so, ""
    where nothing is known of its type.

    Layers, words and heads are compared with the table. Where transformers is installed and knows
    the class, it builds the configuration without weights: then all names and shapes are compared.
    """
    if roles.source is Source.HEADERS:
        return [], ""
    from magic_fast.models.live import parameters_by_transformers

    if not any(role.kind is Kind.QUANTISED for role in roles.values()):
        expected = parameters_by_transformers(config, roles.architecture)
        if expected is not None:
            own = roles_of(config, {name: (shape, "F32") for name, shape in expected.items()})
            wanted = {own[name].canonical: shape for name, shape in expected.items()}
            return list(_by_parameters(wanted, tensors, roles)), str(Source.TRANSFORMERS)
    return list(_by_table(config, tensors, roles)), str(roles.source)


def _by_table(config: Mapping[str, Any], tensors: Tensors, roles: ModelRoles) -> Iterator[str]:
    stored = {name: roles[name] for name in tensors}
    for stack, fields in roles.stacks.items():
        count = part_of(config, fields.part).get(fields.count or "")
        numbers = {r.block.number for r in stored.values() if r.block and r.block.stack == stack}
        if numbers and isinstance(count, int) and (lack := set(range(count)) - numbers):
            first = _first([f"{stack}.{number}" for number in sorted(lack)])
            yield f"config.json: {fields.count} is {count}, and no tensor is of {first}"
    for name, role in stored.items():
        if role.vocabulary is None or role.kind not in (Kind.EMBEDDING, Kind.HEAD):
            continue
        sizes = {part.get("vocab_size") for part in text_parts(config)}
        rows = tensors[name][0][role.vocabulary]
        if len(sizes - {None}) == 1 and rows not in sizes:
            yield f"config.json: vocab_size is {(sizes - {None}).pop()}, '{name}' has {rows}"
    names = {role.canonical for role in stored.values()}
    for tied, source in roles.ties.items():
        if roles.is_head(tied) and tied not in names and source in names and not roles.tied:
            yield f"tensor '{tied}': missing, and config.json does not tie it to {source}"


def _by_parameters(
    expected: Mapping[str, tuple[int, ...]], tensors: Tensors, roles: ModelRoles
) -> Iterator[str]:
    """By the parameters of a model that transformers built."""
    stored: dict[str, str] = {}
    for name in tensors:
        stored.update(dict.fromkeys((*roles[name].targets, roles[name].canonical), name))
    missing = [name for name in expected if name not in stored]
    if missing:
        yield f"tensor {_first(missing)}: {roles.architecture} has it, missing from the files"
    unlike = []
    for canonical, shape in expected.items():
        role = roles[stored[canonical]] if canonical in stored else None
        whole = role is not None and not role.layout and len(role.targets) == 1
        if whole and tensors[stored[canonical]][0] != shape:
            unlike.append((stored[canonical], shape))
    if unlike:
        name, shape = unlike[0]
        yield (
            f"tensor {_first([name for name, _ in unlike])}: shape {list(tensors[name][0])}, and "
            f"config.json makes it {list(shape)}"
        )


def _first(names: list[str]) -> str:
    return f"'{names[0]}'{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
