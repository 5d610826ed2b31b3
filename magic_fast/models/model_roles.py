"""The roles of all tensors of one model, and what is known of the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile

from magic_fast.errors import InputError
from magic_fast.models.roles import Role

_LAYER = re.compile(r"\.\d+\.")


class Source(str, Enum):
    """Where the roles come from."""

    TABLE = "the table of architectures"
    TRANSFORMERS = "the installed transformers"
    HEADERS = "the headers alone"

    def __str__(self) -> str:
        return self.value


class ModelRoles(Mapping[str, Role]):
    """The role of each tensor of one model, by its name in the file, found when it is asked for.

    Args:
        names: of the tensors.
        role: finds one's role.
        lacking: those that have been met and are not in the model's tree, in words.

    Attributes:
        model_type: of its configuration; "" without one.
        architecture: the class of transformers, or "".
        source: where the roles come from.
        ties: canonical name → the canonical name whose values it has, as the model's class ties
            them.
        tied: whether the configuration asks for ``ties``.
        stacks: canonical path of a stack of layers → its fields of the configuration.
        is_head: whether a canonical name, stored or not, is that of a head.
    """

    def __init__(
        self,
        names: Iterable[str],
        role: Callable[[str], Role],
        *,
        model_type: str,
        architecture: str,
        source: Source,
        lacking: Callable[[], tuple[str, ...]] = tuple,
        is_head: Callable[[str], bool] = lambda name: False,
        ties: Mapping[str, str] | None = None,
        tied: bool = False,
        stacks: Mapping[str, StackFields] | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._role = role
        self._found: dict[str, Role] = {}
        self._lacking = lacking
        self.is_head = is_head
        self.model_type = model_type
        self.architecture = architecture
        self.source = source
        self.ties = dict(ties or {})
        self.tied = tied
        self.stacks = dict(stacks or {})

    def __getitem__(self, name: str) -> Role:
        role = self._found.get(name)
        if role is None:
            if name not in self._names:
                raise KeyError(name)
            role = self._found[name] = self._role(name)
        return role

    def know(self, roles: Mapping[str, Role]) -> None:
        """Takes roles that are known better."""
        self._found |= roles

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was assumed of some tensor, in words; empty where all is known."""
        for name in self:
            self[name]
        return self._lacking()

    def unit_axes(self, name: str) -> tuple[int, ...]:
        """As of :meth:`Role.unit_axes`."""
        return self[name].unit_axes(name)

    def vocabulary_axis(self, name: str) -> int | None:
        """The axis of tensor ``name`` whose places are words, or None where it has none.

        Raises:
            InputError: it is not known.
        """
        role = self[name]
        if role.words_doubt is not None:
            raise InputError(
                f"vocabulary of {name!r}: expected a tensor whose role is known, got "
                f"{role.words_doubt}. Merge models of one tokenizer, or make their rows agree "
                "first."
            )
        return role.vocabulary

    @property
    def tied_heads(self) -> frozenset[str]:
        """Canonical names of embeddings that are the head, too: no tensor of its own is stored."""
        if not self.tied:
            return frozenset()
        stored = {self[name].canonical for name in self}
        tied = (tie for tie in self.ties.items() if tie[0] not in stored)
        return frozenset(source for name, source in tied if self.is_head(name))

    @property
    def parts(self) -> dict[str, str]:
        """Part of a multimodal model, as its configuration calls it (``vision``) → the canonical
        path that all of it is under."""
        stacks = [(path.split("."), fields.part) for path, fields in self.stacks.items()]
        roots: dict[str, set[str]] = {}
        for path, part in stacks:
            shared = [_common(path, other) for other, its in stacks if its != part]
            if part and shared:
                word = part.rpartition(".")[2].removesuffix("_config")
                roots.setdefault(word, set()).add(".".join(path[: max(shared) + 1]))
        return {word: found.pop() for word, found in roots.items() if len(found) == 1}

    @property
    def aliases(self) -> dict[str, str]:
        """Canonical name of each tied parameter that is not stored → the stored name of the tensor
        that has its values. Heads are tied where the configuration ties them, all else always."""
        inside = any(_LAYER.search(name) for tie in self.ties.items() for name in tie)
        names = (name for name in self if inside or not _LAYER.search(name))
        stored = {self[name].canonical: name for name in names} if self.ties else {}
        return {
            tied: stored[source]
            for tied, source in self.ties.items()
            if source in stored and tied not in stored and tied not in self
            and (self.tied or not self.is_head(tied))
        }  # fmt: skip

    def tie_of(self, name: str) -> str | None:
        """The canonical name of the parameter that tensor ``name`` shares its values with where
        the configuration ties them, or None."""
        canonical = self[name].canonical
        if canonical in self.ties.values():
            return canonical
        return self.ties.get(canonical)


def _common(path: Sequence[str], other: Sequence[str]) -> int:
    """How many steps two paths share."""
    steps = zip(path, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], steps))


@dataclass(frozen=True)
class StackFields:
    """The fields of the configuration that describe one stack of layers.

    Attributes:
        part: the path of the part that holds them, such as ``text_config``; "" for the top.
        count: the field that counts the layers, or None.
        lists: fields with one entry for each layer.
    """

    part: str = ""
    count: str | None = None
    lists: tuple[str, ...] = ()
