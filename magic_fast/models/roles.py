"""What a tensor is to its model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
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
