"""Which tensors of two files of one model are the same, whatever either file calls them and however
it stacks them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from magic_fast.models.model_roles import ModelRoles
from magic_fast.models.roles import Role, Step, Tensors


class Piece(NamedTuple):
    """Elements of one stored tensor in the order of the file, from ``start`` up to ``stop``."""

    name: str
    start: int
    stop: int


class Made(NamedTuple):
    """A tensor that consists of pieces of others, one after the other."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def match(
    wanted: ModelRoles, wanted_tensors: Tensors, other: ModelRoles, tensors: Tensors
) -> dict[str, Made]:
    """Name in the wanted layout → the pieces of ``other`` that are the same tensor. Names that both
    have stand for the same tensor and are left out, as is what has no counterpart.

    Args:
        wanted, wanted_tensors: roles and headers of the model whose layout is wanted.
        other, tensors: those of the model that is to be read in it.
    """
    moved = text_parts(wanted, other)
    there: Mapping[str, Role] = other if moved is None else _under(other, *moved)
    missing = [name for name in wanted_tensors if name not in tensors]
    left = [name for name in tensors if name not in wanted_tensors]
    if not missing or not left:
        return {}
    made: dict[str, Made] = {}
    places: dict[object, list[str]] = {}
    for name in left:
        places.setdefault(_place(there[name]), []).append(name)
    for name in missing:
        same = places.get(_place(wanted[name]), [])
        if len(same) == 1 and len(tensors[same[0]][0]) == len(wanted_tensors[name][0]):
            made[name] = _whole(same[0], tensors)
    used = {piece.name for one in made.values() for piece in one.pieces}
    missing = [name for name in missing if name not in made]
    left = [name for name in left if name not in used]
    made |= _cut(wanted, wanted_tensors, missing, there, tensors, left)
    made |= _joined(wanted, wanted_tensors, missing, there, tensors, left)
    return made or _by_prefix(wanted_tensors, tensors)


def text_parts(wanted: ModelRoles, other: ModelRoles) -> tuple[str, str] | None:
    """Canonical paths of the text part in ``other`` and in ``wanted`` where one of the two is a
    multimodal model and the other a text model whose layers are named as those of its text part.

    >>> from magic_fast.models import roles_of
    >>> text_parts(roles_of({"model_type": "qwen2_vl"}, {}), roles_of({"model_type": "qwen2"}, {}))
    ('model', 'model.language_model')
    """
    roots = [_text_root(roles) for roles in (other, wanted)]
    several = [bool(roles.parts) for roles in (other, wanted)]
    if None in roots or several[0] == several[1]:
        return None
    (there, stack), (here, wanted_stack) = roots[0] or ("", ""), roots[1] or ("", "")
    return (there, here) if stack == wanted_stack else None


def _text_root(roles: ModelRoles) -> tuple[str, str] | None:
    """Where the text part of a model stands, and what its stack of layers is called there."""
    if "text" in roles.parts:
        root = roles.parts["text"]
        found = [path for path in roles.stacks if path.startswith(f"{root}.")]
        return (root, found[0].removeprefix(f"{root}.")) if len(found) == 1 else None
    if roles.parts or len(roles.stacks) != 1:
        return None
    root, _, stack = next(iter(roles.stacks)).rpartition(".")
    return root, stack


def _under(roles: ModelRoles, root: str, other: str) -> Mapping[str, Role]:
    """The roles, what is under ``root`` being under ``other``."""

    def moved(name: str) -> str:
        return other + name.removeprefix(root) if name.startswith(f"{root}.") else name

    return {
        name: replace(r, canonical=moved(r.canonical), targets=tuple(map(moved, r.targets)))
        for name, r in roles.items()
    }


def common_prefix(wanted: Iterable[str], names: Iterable[str]) -> tuple[str, str] | None:
    """``(before wanted, before names)``: the prefix that all names of one file have before those of
    the other, "" on the other side; None where they differ otherwise.

    >>> common_prefix(["a.w", "b.w"], ["module.a.w", "module.b.w"])
    ('', 'module.')
    """
    ours, theirs = set(wanted), set(names)
    if not ours or not theirs:
        return None
    for few, many, turned in ((ours, theirs, False), (theirs, ours, True)):
        longest = max(few, key=lambda n: (len(n), n))
        for name in many:
            prefix = name[: -len(longest)]
            if prefix.endswith(".") and name.endswith(longest):
                if {prefix + n for n in few} == many:
                    return (prefix, "") if turned else ("", prefix)
    return None


def _by_prefix(wanted: Tensors, tensors: Tensors) -> dict[str, Made]:
    """Where one prefix makes all names of a file those of the other, and all shapes agree."""
    prefix = common_prefix(wanted, tensors)
    if prefix is None:
        return {}
    named = {name: prefix[1] + name.removeprefix(prefix[0]) for name in wanted}
    if any(wanted[a][0] != tensors[b][0] for a, b in named.items()):
        return {}
    return {a: _whole(b, tensors) for a, b in named.items()}


def _place(role: Role) -> tuple[object, ...]:
    return role.targets, role.layout


def _whole(name: str, tensors: Tensors) -> Made:
    shape = tensors[name][0]
    return Made(shape, (Piece(name, 0, math.prod(shape)),))


def _cut(
    wanted: ModelRoles,
    wanted_tensors: Tensors,
    missing: Sequence[str],
    other: Mapping[str, Role],
    tensors: Tensors,
    left: Sequence[str],
) -> dict[str, Made]:
    """Wanted tensors that are a range of a larger one, such as one expert of a stack, all of which
    is wanted."""
    made: dict[str, Made] = {}
    large = _large(other, tensors, left)
    for name in missing:
        for inner in _inner(wanted[name], name, large):
            shape = tensors[inner.holder][0]
            span = _range(shape, inner.steps)
            if span is not None and _size(wanted_tensors[name][0]) == span[1] - span[0]:
                made[name] = Made(wanted_tensors[name][0], (Piece(inner.holder, *span),))
    spans: dict[str, list[tuple[int, int]]] = {}
    for one in made.values():
        spans.setdefault(one.pieces[0].name, []).append(one.pieces[0][1:])
    whole = {n for n, found in spans.items() if _tiles(sorted(found), _size(tensors[n][0]))}
    return {name: one for name, one in made.items() if one.pieces[0].name in whole}


def _joined(
    wanted: ModelRoles,
    wanted_tensors: Tensors,
    missing: Sequence[str],
    other: Mapping[str, Role],
    tensors: Tensors,
    left: Sequence[str],
) -> dict[str, Made]:
    """Wanted tensors of which the other file has all parts, such as a stack of experts."""
    parts: dict[str, list[tuple[int, int, str]]] = {}
    large = _large(wanted, wanted_tensors, missing)
    for name in left:
        for inner in _inner(other[name], name, large):
            span = _range(wanted_tensors[inner.holder][0], inner.steps)
            if span is not None and _size(tensors[name][0]) == span[1] - span[0]:
                parts.setdefault(inner.holder, []).append((*span, name))
    made = {}
    for holder, spans in parts.items():
        spans.sort()
        shape = wanted_tensors[holder][0]
        tiled = _tiles([span[:2] for span in spans], _size(shape))
        if tiled and len({tensors[name][1] for _, _, name in spans}) == 1:
            pieces = tuple(Piece(name, 0, stop - start) for start, stop, name in spans)
            made[holder] = Made(shape, pieces)
    return made


class _Inside(NamedTuple):
    """The steps from a part to the tensor that holds it."""

    holder: str
    steps: tuple[Step, ...]


def _large(roles: Mapping[str, Role], tensors: Tensors, names: Sequence[str]) -> dict[str, _Inside]:
    """Parameter → the tensor that holds it: itself, or one that is cut into several."""
    large: dict[str, _Inside] = {}
    for name in names:
        role = roles[name]
        if not role.layout:
            large[role.canonical] = _Inside(name, ())
        elif [step.operation for step in role.layout] == ["chunk"] and len(role.targets) > 1:
            axis = role.layout[0].axis
            for index, target in enumerate(role.targets):
                step = Step("concatenate", axis, index=index, count=len(role.targets))
                large[target] = _Inside(name, (step,))
    return large


def _inner(role: Role, name: str, large: Mapping[str, _Inside]) -> Iterator[_Inside]:
    """Where the parameter of a part lies in a larger tensor."""
    holder = large.get(role.canonical)
    if holder is None or len(role.targets) > 1:
        return
    if all(step.operation in ("stack", "concatenate") for step in role.layout):
        steps = (*role.layout, *holder.steps)
        if steps:
            yield _Inside(holder.holder, steps)


def _range(shape: tuple[int, ...], steps: Sequence[Step]) -> tuple[int, int] | None:
    """First and last element, in a tensor of ``shape``, of the part from which ``steps`` lead to
    it; None where they do not lie together.

    >>> _range((4, 6, 5), (Step("stack", 0, index=1), Step("concatenate", 1, index=1, count=2)))
    (45, 60)
    """
    box = [(0, n) for n in shape]
    axes = list(range(len(shape)))
    for step in reversed(steps):
        if step.axis >= len(axes):
            return None
        axis = axes[step.axis]
        low, high = box[axis]
        if step.operation == "stack":
            if step.index >= high - low:
                return None
            box[axis] = (low + step.index, low + step.index + 1)
            del axes[step.axis]
        else:
            size, rest = divmod(high - low, step.count or 1)
            if rest:
                return None
            box[axis] = (low + step.index * size, low + (step.index + 1) * size)
    first = next((i for i, (low, high) in enumerate(box) if high - low != 1), len(box))
    if any(
        (low, high) != (0, n)
        for (low, high), n in zip(box[first + 1 :], shape[first + 1 :], strict=True)
    ):
        return None
    start = 0
    for (low, _), n in zip(box, shape, strict=True):
        start = start * n + low
    return start, start + math.prod(high - low for low, high in box)


def _tiles(spans: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether spans in order cover all of a tensor once."""
    ends = [0, *(stop for _, stop in spans)]
    return [start for start, _ in spans] == ends[:-1] and ends[-1] == size


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
