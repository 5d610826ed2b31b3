"""Changes of a tensor that are no plain s·B·A: Tucker LoRA, LoHa, LoKr, differences, and DoRA over
any of them. No torch.

With a, b the factors of a file and s = α/r (``lycoris.functional``, ``peft.tuners``):

==========  ============================================================================
tucker      Σ_mn mid[m,n,…]·up[o,m]·down[n,i]
LoHa        s·(w1_a·w1_b) ∘ (w2_a·w2_b), each product with its t where there is one
LoKr        s·w1 ⊗ w2; a file of LyCORIS has s = 1 where neither is decomposed, PEFT's has not
difference  ``diff``, ``w_norm`` of the weight, ``diff_b``, ``b_norm`` of the bias, ``diff_m`` of
            the modulation
DoRA        m·(W + Δ) ÷ ‖W + Δ‖, along the outputs, or the inputs where m is shaped so
==========  ============================================================================

LyCORIS' own merge of LoHa and LoKr has s², its forward pass s: what was trained is s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from magic_fast.checkpoint import TensorInfo
from magic_fast.errors import CheckpointError

Get = Callable[[TensorInfo], Any]  # a stored tensor as an array of float32 or float64
#: part → the tensor of a module that it is a difference of
LEAVES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_LORA, _LOHA = ("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class Form:
    """How one tensor changes.

    Attributes:
        words: what it is, and a key that says so.
        parts: ``down``, ``up``, ``mid``, ``hada_…``, ``lokr_…`` or ``diff``, and ``dora``.
        shape: of the change, [out, in, …]; a convolution's may be flat. Embeddings [tokens, width].
        rank: of its factors; 0 where there are none.
        scaling: s.
        peft: it is of PEFT's file.
        embedding: the factors are of the transpose.
        leaf: the name of the tensor in its module.
    """

    words: str
    parts: Mapping[str, TensorInfo]
    shape: tuple[int, ...]
    rank: int
    scaling: float
    peft: bool
    embedding: bool = False
    leaf: str = "weight"

    @property
    def is_dora(self) -> bool:
        return "dora" in self.parts

    @property
    def is_flat(self) -> bool:
        """Whether the file does not say if it changes a matrix or a convolution."""
        return len(self.shape) == 2 and "down" not in self.parts and "diff" not in self.parts

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.parts.values())

    def change(self, get: Get, weight: Any = None) -> Any:
        """Δ in ``shape``, or that of ``weight``; with DoRA m·(W + Δ) ÷ ‖W + Δ‖ − W, which needs
        the weight."""
        delta = self._plain({part: get(info) for part, info in self.parts.items()})
        if weight is not None:
            delta = delta.reshape(weight.shape)
        return self._decomposed(get(self.parts["dora"]), weight, delta) if self.is_dora else delta

    def _plain(self, parts: Mapping[str, Any]) -> Any:
        import numpy as np

        if "diff" in parts:
            return parts["diff"]
        if "down" in parts:
            up = parts["up"].reshape(parts["up"].shape[0], -1) * self._s(parts["up"])
            down = parts["down"]
            if "mid" in parts:
                mid, down = parts["mid"], down.reshape(len(down), -1)
                core = np.tensordot(mid, down, (1, 0))  # [m, …, in]
                made = np.tensordot(up, np.moveaxis(core, -1, 1), 1)
            else:
                made = (up @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])
            return np.ascontiguousarray(made.T) if self.embedding else made
        if "hada_w1_a" in parts:
            one, two = (
                _product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}"))
                for n in (1, 2)
            )
            return one * two * self._s(one)
        one, two = (
            parts[f"lokr_w{n}"]
            if f"lokr_w{n}" in parts
            else _product(parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}"))
            for n in (1, 2)
        )
        if not (self.peft and two.ndim == 3):  # PEFT's Conv1d has the last axes
            one = one.reshape(*one.shape, *[1] * (two.ndim - 2))
        return (np.kron(one, two) * self._s(one)).reshape(self.shape)

    def _s(self, like: Any) -> Any:
        return like.dtype.type(self.scaling)

    def _decomposed(self, magnitude: Any, weight: Any, delta: Any) -> Any:
        import numpy as np

        new = weight + delta
        axis = 1 if self.embedding else 0
        if not self.peft and magnitude.ndim > 1 and magnitude.shape[0] == 1 < new.shape[0]:
            axis = 1 if magnitude.shape[1] == new.shape[1] else 0  # wd_on_out
        others = tuple(i for i in range(new.ndim) if i != axis)
        norm = np.sqrt(np.square(new).sum(axis=others, keepdims=True, dtype=np.float64))
        if not self.peft:
            norm = norm + np.finfo(new.dtype).eps
        factor = magnitude.reshape(norm.shape) / norm
        return ((weight + delta.astype(np.float64)) * factor - weight).astype(new.dtype)


def _product(a: Any, b: Any, t: Any) -> Any:
    """a·b, or Σ_ij t[i,j,…]·a[i,p]·b[j,r]."""
    import numpy as np

    if t is None:
        return a @ b
    core = np.moveaxis(np.tensordot(t, b, (1, 0)), -1, 1)  # [i, r, …]
    return np.tensordot(a.T, core, 1)


def forms_of(
    name: str,
    found: Mapping[str, TensorInfo],
    scaling: Callable[[int | None], float],
    path: str,
    peft: bool,
    embedding: bool,
) -> list[Form]:
    """What the parts of a module are, but for plain LoRA.

    Args:
        scaling: rank → s; None: PEFT's configuration has the rank.

    Raises:
        CheckpointError: parts are missing, or do not fit together.
    """
    made = [
        Form(f"a full difference ({info.name})", {"diff": info}, info.shape, 0, 1.0, peft,
             leaf=LEAVES[part])
        for part, info in found.items() if part in LEAVES
    ]  # fmt: skip
    factors = {p: i for p, i in found.items() if p not in LEAVES and p not in ("alpha", "dora")}
    dora = {"dora": found["dora"]} if "dora" in found else {}
    if "diff" in found and not factors and dora:
        made[0] = Form(f"DoRA ({dora['dora'].name})", {"diff": found["diff"], **dora},
                       made[0].shape, 0, 1.0, peft)  # fmt: skip
    if not factors:
        return made
    try:
        shape, rank, what = _shape(factors)
    except (KeyError, IndexError, ValueError):
        sizes = {part: list(info.shape) for part, info in factors.items()}
        raise CheckpointError(
            f"module '{name}' in {path}: expected factors that multiply (LoRA with lora_mid, LoHa, "
            f"LoKr), got {sizes}. Download the adapter again."
        ) from None
    if dora and prod(dora["dora"].shape) not in (shape[0], *shape[1:2]):
        raise CheckpointError(
            f"magnitude '{dora['dora'].name}' in {path}: expected {shape[0]} or "
            f"{prod(shape[1:2])} numbers, as its module's outputs or inputs, got "
            f"{list(dora['dora'].shape)}. Download the adapter again."
        )
    key = (dora.get("dora") or next(iter(factors.values()))).name
    words = f"DoRA ({key})" if dora else f"{what} ({key})"
    decomposed = what != "LoKr" or bool(rank) or peft
    s = scaling(rank or None) if decomposed else 1.0
    shape = shape[::-1] if embedding else shape
    return [*made, Form(words, {**factors, **dora}, shape, rank, s, peft, embedding)]


def _shape(parts: Mapping[str, TensorInfo]) -> tuple[tuple[int, ...], int, str]:
    """(Of the change, r, the form's name); an error of Python's where the parts do not fit."""
    sizes = {part: info.shape for part, info in parts.items()}
    if "down" in sizes or "up" in sizes:
        down, up = (sizes[part] for part in _LORA)
        mid = sizes.get("mid")
        _require(set(sizes) <= {*_LORA, "mid"}, up[1] > 0, prod(up[2:]) == 1)
        if mid is None:
            _require(up[1] == down[0])
        else:
            _require(up[1] == mid[0], mid[1] == down[0], prod(down[2:]) == 1)
        into = down[1:] if mid is None else (down[1], *mid[2:])
        what = "LoRA" if mid is None else "LoRA in a Tucker decomposition, with lora_mid"
        return (up[0], *into), down[0], what
    if "hada_w1_a" in sizes:
        one, two = (
            _inner(sizes[a], sizes[b], sizes.get(t))
            for a, b, t in ((*_LOHA[:2], "hada_t1"), (*_LOHA[2:], "hada_t2"))
        )
        _require(one == two, set(sizes) <= {*_LOHA, "hada_t1", "hada_t2"})
        shape, rank = one
        return shape, rank, "LoHa"
    rank = 0
    found: list[tuple[int, ...]] = []
    for n in (1, 2):
        if f"lokr_w{n}" in sizes:
            found.append(sizes[f"lokr_w{n}"])
        else:
            made, rank = _inner(
                sizes[f"lokr_w{n}_a"], sizes[f"lokr_w{n}_b"], sizes.get(f"lokr_t{n}")
            )
            found.append(made)
    w1, w2 = found
    _require(len(w1) == 2, len(w2) >= 2)
    return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:]), rank, "LoKr"


def _inner(
    a: tuple[int, ...], b: tuple[int, ...], t: tuple[int, ...] | None
) -> tuple[tuple[int, ...], int]:
    if t is None:
        _require(len(a) == len(b) == 2, a[1] == b[0])
        return (a[0], b[1]), b[0]
    _require(len(a) == len(b) == 2, (a[0], b[0]) == t[:2])
    return (a[1], b[1], *t[2:]), b[0]


def _require(*facts: bool) -> None:
    if not all(facts):
        raise ValueError
