"""Which tensors of a model a call is about: by their names, by what they do, by the part they are
in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from magic_fast.errors import InputError
from magic_fast.models.model_roles import ModelRoles
from magic_fast.models.roles import Kind, Role


@dataclass(frozen=True)
class TensorChoice:
    """The tensors that are merged; what is left out stays the base's.

    A tensor is chosen where it matches some of ``include`` (or that is empty) and none of
    ``exclude``. An entry is, in this order,

    * a kind of tensor: ``head``, ``embedding``, ``router``, ``norm``, ``bias``, … (the names of
      :class:`~magic_fast.models.Kind`). A head that is tied to an embedding is both;
    * a part of a multimodal model, as its configuration calls it: ``vision``, ``text``, ``audio``.
      ``language`` is ``text``;
    * else a regular expression (``re.search``) on the name in the file.

    >>> bool(TensorChoice()), bool(TensorChoice(exclude=("head",)))
    (False, True)
    """

    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        for where in ("include", "exclude"):
            given = getattr(self, where)
            entries = (given,) if isinstance(given, str) else given
            if not isinstance(entries, Sequence) or not all(isinstance(e, str) for e in entries):
                raise InputError(f"{where}: expected words and patterns, got {given!r}.")
            object.__setattr__(self, where, tuple(entries))

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def left_out(self, roles: ModelRoles) -> frozenset[str]:
        """The tensors of a model that are not chosen."""
        tests = words(roles)

        def matched(entries: str | Sequence[str]) -> list[frozenset[str]]:
            return [_matched(entry, roles, tests) for entry in entries]

        chosen, dropped = matched(self.include), matched(self.exclude)
        kept = frozenset(roles) - frozenset().union(*chosen) if chosen else frozenset()
        return kept.union(*dropped)

    def check(self, models: Sequence[ModelRoles]) -> None:
        """Raises:
        InputError: an entry is no regular expression, or matches no tensor of any model.
        """
        known = [(roles, words(roles)) for roles in models]
        for where in ("include", "exclude"):
            for entry in getattr(self, where):
                try:
                    found = any(_matched(entry, roles, tests) for roles, tests in known)
                except re.error as error:
                    raise InputError(
                        f"{where} {entry!r}: expected a word or a regular expression, got an "
                        f"error: {error}. Escape special characters with a backslash."
                    ) from None
                if not found:
                    raise InputError(
                        f"{where} {entry!r}: expected some tensor that it matches, got none. Give "
                        f"a regular expression on names such as {next(iter(models[0]), None)!r}, "
                        f"or one of {', '.join(sorted(known[0][1]))}."
                    )


def _matched(
    entry: str, roles: ModelRoles, tests: Mapping[str, Callable[[Role], bool]]
) -> frozenset[str]:
    if entry in tests:
        return frozenset(name for name in roles if tests[entry](roles[name]))
    return frozenset(filter(re.compile(entry).search, roles))


EVERYTHING = TensorChoice()


def words(roles: ModelRoles) -> dict[str, Callable[[Role], bool]]:
    """Word → whether a tensor is meant by it, of all words that a choice may use of one model."""
    tests: dict[str, Callable[[Role], bool]] = {
        kind.name.lower(): partial(_is_kind, roles, kind) for kind in Kind
    }
    tests |= {part: partial(_is_inside, root) for part, root in roles.parts.items()}
    if "text" in tests:
        inside, head = tests["text"], tests["head"]
        tests["text"] = tests["language"] = lambda role: inside(role) or head(role)
    return tests


def _is_kind(roles: ModelRoles, kind: Kind, role: Role) -> bool:
    return role.kind is kind or (kind is Kind.HEAD and role.canonical in roles.tied_heads)


def _is_inside(root: str, role: Role) -> bool:
    return f"{role.canonical}.".startswith(f"{root}.")
