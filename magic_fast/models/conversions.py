"""How the names and tensors of a file become those of a module tree: the renamings and conversions
of transformers, as the table records them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from magic_fast.models.roles import Step

_NUMBER = re.compile(r"\.(\d+)\.")
_LITERAL = re.compile(r"\.\d")
_BACK = re.compile(r"\\(\d)")


class Converted(NamedTuple):
    """A name of a file in the module tree, and the steps from its tensor to the parameters."""

    name: str
    steps: tuple[Step, ...] = ()
    targets: tuple[str, ...] = ()
    checked: tuple[str, int] | None = None  # a transposition that depends on where this field is


class Transform:
    """One renaming or conversion.

    Args:
        plain: ``from`` and ``to`` are its patterns; ``scope`` the part of the model that it is for
            and the prefix of the base model; ``steps`` what is done with the tensors; ``guarded``
            one whose other patterns wait for its first; ``offset`` what is added to the number.
    """

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self.sources: Sequence[str] = plain["from"]
        self.targets: Sequence[str] = plain["to"]
        self.scope: Sequence[str] | None = plain.get("scope")
        self.steps: Sequence[Sequence[Any]] | None = plain.get("steps")
        self.guarded: bool = plain.get("guarded", False)
        self.offset: int = plain.get("offset", 0)
        self.active = not self.guarded

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """All sources as one expression, the longest first; ``*.`` stands for any text, and a
        pattern that ends in a letter or digit ends where the word does."""
        branches = []
        for i, source in sorted(enumerate(self.sources), key=lambda one: -len(one[1])):
            branch = source.replace("*.", r".*\.")
            if re.search(r"[a-zA-Z0-9]$", branch):
                branch += r"(?!\w)"
            branches.append(f"(?P<g{i}>{branch})")
        return re.compile("|".join(branches))

    def _prefix(self, name: str) -> str | None:
        """The part of ``name`` that leads into the scope, or None where it lies outside."""
        if self.scope is None:
            return ""
        inner, base = (f"{part}." if part else "" for part in self.scope)
        return next((p for p in (base + inner, inner) if name.startswith(p)), None)

    def match(self, name: str) -> tuple[str, re.Match[str], int] | None:
        """The prefix of the scope, the match, and which of the sources it is."""
        prefix = self._prefix(name)
        match = None if prefix is None else self._pattern.search(name[len(prefix) :])
        if prefix is None or match is None:
            return None
        which = next(i for i in range(len(self.sources)) if match[f"g{i}"] is not None)
        return prefix, match, which

    def rename(self, name: str) -> str:
        """``name`` with the first match replaced."""
        found = self.match(name)
        if found is None:
            return name
        _, _, which = found
        if self.guarded and which == 0:
            self.active = True
        return self._replaced(name, found, which if self.guarded else 0) if self.active else name

    def _replaced(self, name: str, found: tuple[str, re.Match[str], int], target: int) -> str:
        prefix, match, which = found
        first = match.re.groupindex[f"g{which}"]

        def group(back: re.Match[str]) -> str:
            text = match[first + int(back[1])]
            return str(int(text) + self.offset) if self.offset else text

        replacement = _BACK.sub(group, self.targets[target])
        return prefix + name[len(prefix) :].replace(match[0], replacement, 1)

    def convert(self, name: str) -> Converted | None:
        """The parameters that the file's tensor ``name`` goes into, or None where this conversion
        is not for it."""
        found = self.match(name)
        if found is None or self.steps is None:
            return None
        _, match, which = found
        number = _NUMBER.search(match[0])
        steps, checked = [], None
        for operation, axis, *more in self.steps:
            if operation == "transpose":
                steps.append(Step("transpose", axis, other=more[0]))
                checked = (more[1], more[2]) if len(more) > 1 else checked
            elif operation == "stack":
                steps.append(Step("stack", axis, index=int(number[1]) if number else 0))
            elif operation == "concatenate":
                steps.append(Step("concatenate", axis, index=which, count=len(self.sources)))
            elif operation == "chunk":
                steps.append(Step("chunk", axis, count=len(self.targets)))
            else:
                steps.append(Step(operation, axis))
        names = tuple(self._replaced(name, found, i) for i in range(len(self.targets)))
        return Converted(names[0], tuple(steps), names, checked)


class Conversions:
    """All renamings and conversions of one model."""

    def __init__(self, plain: Iterable[Mapping[str, Any]], names: Iterable[str]) -> None:
        transforms = [Transform(one) for one in plain]
        self._renamings = [t for t in transforms if t.steps is None]
        self._converters = [t for t in transforms if t.steps is not None]
        #: Whether one layer's names may be changed otherwise than another's.
        self.knows_numbers = any(_LITERAL.search(s) for t in transforms for s in t.sources)
        if any(t.guarded for t in self._renamings):
            for name in names:  # whether a guard is there does not depend on the names' order
                self.convert(name)

    def convert(self, name: str) -> Converted:
        """``name`` in the module tree: every renaming in turn, then one conversion at most."""
        for renaming in self._renamings:
            name = renaming.rename(name)
        for converter in self._converters:
            converted = converter.convert(name)
            if converted is not None:
                return converted
        return Converted(name)


def axes_in_file(axes: Sequence[int], steps: Iterable[Step]) -> tuple[int, ...] | None:
    """Axes of a parameter as axes of the file's tensor that becomes (a part of) it, or None where a
    step is not known.

    >>> axes_in_file((0, 1), (Step("stack", 0, index=3), Step("concatenate", 1, count=2)))
    (0,)
    """
    result = list(axes)
    for step in reversed(tuple(steps)):
        if step.operation in ("stack", "deal"):
            result = [a - (a > step.axis) for a in result if a != step.axis]
        elif step.operation == "transpose":
            swap = {step.axis: step.other, step.other: step.axis}
            result = [swap.get(a, a) for a in result]
        elif step.operation == "flatten":
            if any(a >= step.axis for a in result):
                return None
        elif step.operation not in ("concatenate", "chunk", "interleave", "permute_rope"):
            return None
    return tuple(sorted(result))


def dimensions_in_file(dimensions: int, steps: Iterable[Step]) -> int | None:
    """How many axes the file's tensor has, or None where a step does not tell."""
    for step in steps:
        if step.operation in ("stack", "deal"):
            dimensions -= 1
        elif step.operation not in (
            "transpose", "concatenate", "chunk", "interleave", "permute_rope"
        ):  # fmt: skip
            return None
    return dimensions
