"""What a tensor is to its model, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from typing import NamedTuple

from magic_fast.errors import InputError

#: Name in a file → (shape, safetensors' dtype).
Tensors = Mapping[str, tuple[tuple[int, ...], str]]


class Kind(str, Enum):
    """What a tensor does in the module that owns it."""

    MATRIX = "matrix"  # of a linear map
    CONVOLUTION = "convolution"
    EMBEDDING = "embedding"  # rows that are looked up by number
    HEAD = "head"  # a matrix whose outputs are words
    CLASSIFIER = "classifier head"  # a matrix whose outputs are classes or scores
    ROUTER = "router"  # a matrix whose outputs choose experts
    NORM = "norm"  # the scale of a normalisation
    BIAS = "bias"
    SCALE = "scale or gate"
    POSITION = "position table"
    TOKEN = "token"  # learned vectors that stand in the sequence: class and mask tokens, queries
    STATE = "state"  # A_log, dt_bias, D and their kin in recurrent layers
    DERIVED = "derived buffer"  # computed from the configuration: inv_freq, masks, position ids
    COUNTER = "counter"
    STATISTICS = "statistics"  # running means and variances
    BUFFER = "buffer"  # any other
    QUANTISED = "quantised"  # codes, or the scales that belong to them
    PARAMETER = "parameter"  # used in a way that nothing here knows

    def __str__(self) -> str:
        return self.value


#: Kinds whose rows are outputs of a map.
MAPS = frozenset({Kind.MATRIX, Kind.CONVOLUTION, Kind.HEAD, Kind.CLASSIFIER, Kind.ROUTER})


class Block(NamedTuple):
    """A place in a stack of layers: ``model.layers``, 7."""

    stack: str
    number: int


@dataclass(frozen=True)
class Step:
    """One step from a file's tensor to the parameter of the module.

    ========================  =========================================================
    operation                 what it does
    ========================  =========================================================
    ``stack``                 tensor ``index`` of a new axis ``axis``
    ``concatenate``           piece ``index`` of ``count`` along ``axis``
    ``chunk``                 is cut into ``count`` pieces along ``axis``, one a target
    ``transpose``             axes ``axis`` and ``other`` change places
    ``interleave``            pairs along ``axis`` become halves, or the reverse
    ``permute_rope``          rows of each head change places, by halves
    ``flatten``               axes from ``axis`` on become one
    anything else             an operation of transformers that is not known here
    ========================  =========================================================
    """

    operation: str
    axis: int = 0
    index: int = 0
    count: int = 0
    other: int = 0


class Experts(NamedTuple):
    """How a module lays out its stacks of experts.

    Attributes:
        transposed: [expert, in, out], else [expert, out, in].
        concatenated: gate and up are halves; else they alternate.
        gate: whether there is a gate at all.
        bias: whether there are biases.
    """

    transposed: bool
    concatenated: bool
    gate: bool
    bias: bool


@dataclass(frozen=True)
class Role:
    """What one tensor of a file is.

    Attributes:
        kind: what it does.
        units: the axes that count output units in the file's layout; () where it has none, None
            where they are not known.
        vocabulary: the axis whose places are words, or None.
        block: its place in a stack of layers, or None.
        canonical: its name in transformers' module tree, whatever the file calls it. A file's
            tensor that is cut into several parameters has the first one's.
        targets: the names of all parameters that it is cut into; else only ``canonical``.
        layout: the steps from the file's tensor to the parameter; () where they are the same.
        module: the path of the module that owns it.
        owner: the class of that module; "" where the headers alone are known.
        loaded: whether transformers reads it at all. It leaves ``mtp.*``, old masks and layers
            beyond the configuration's aside.
        experts: how a stack of experts is laid out, or None.
        units_doubt: the reason why ``units`` is not known, or None.
        words_doubt: the reason why ``vocabulary`` may be wrong, or None.
    """

    kind: Kind
    units: tuple[int, ...] | None
    vocabulary: int | None = None
    block: Block | None = None
    canonical: str = ""
    targets: tuple[str, ...] = ()
    layout: tuple[Step, ...] = ()
    module: str = ""
    owner: str = ""
    loaded: bool = True
    experts: Experts | None = None
    units_doubt: str | None = None
    words_doubt: str | None = None

    def unit_axes(self, name: str) -> tuple[int, ...]:
        """``units``, of the tensor that a file calls ``name``.

        Raises:
            InputError: they are not known.
        """
        if self.units is None:
            raise InputError(
                f"output units of {name!r}: expected a model whose layout is known, got "
                f"{self.units_doubt}. Name the axis with row_axis, or leave the tensor out."
            )
        return self.units


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
