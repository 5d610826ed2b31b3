"""Which tensors are calibrated, and along which axes their rows lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from magic_fast.errors import InputError

# Embeddings and heads: their rows are tokens or classes, not units of a hidden layer.
_EMBEDDING_OR_HEAD = re.compile(
    r"(^|\.)([a-z0-9_]*embed[a-z0-9_]*|wte|wpe|shared|lm_head|classifier|score)(\.|$)",
    re.IGNORECASE,
)
# Architectures whose projections are stored [in, out] (transformers' Conv1D).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_NAMES = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_EXPERT_STACK = re.compile(r"(^|\.)experts(\.|$)")


def is_calibratable_magic(name: str, shape: Sequence[int]) -> bool:
    """The authors' rule: any name with "conv", else 2-D with "weight" and without the substring
    "ln"."""
    if "conv" in name:
        return len(shape) >= 1
    return "weight" in name and "ln" not in name and len(shape) == 2


def is_calibratable_general(name: str, shape: Sequence[int]) -> bool:
    """Every weight of two or more dimensions except embeddings and heads; a bare tensor ('') of
    two or more.

    >>> is_calibratable_general("model.layers.0.mlp.up_proj.weight", (8, 4))
    True
    >>> is_calibratable_general("model.embed_tokens.weight", (8, 4))
    False
    """
    return len(shape) >= 2 and _EMBEDDING_OR_HEAD.search(name) is None


@dataclass(frozen=True)
class TensorFilter:
    """Tensor selection by regular expressions (``re.search``) on top of the general rule.

    A name that matches any of ``exclude`` is out; else one that matches any of ``include`` is in,
    whatever the general rule says of embeddings and heads; with no ``include`` the general rule
    decides.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as e:
                raise InputError(
                    f"pattern {pattern!r} of calibration tensors: expected a regular "
                    "expression, got an "
                    f"error: {e}. Escape special characters with a backslash."
                ) from None

    def __call__(self, name: str, shape: Sequence[int]) -> bool:
        if any(re.search(p, name) for p in self.exclude):
            return False
        if self.include:
            return len(shape) >= 1 and any(re.search(p, name) for p in self.include)
        return is_calibratable_general(name, shape)


def row_axes(name: str, dims: int, model_type: str | None) -> tuple[int, ...]:
    """Axes of the output units, by the layout of the model."""
    if model_type in _CONV1D_MODELS and dims == 2 and _CONV1D_NAMES.search(name):
        return (1,)
    if dims == 3 and _EXPERT_STACK.search(name):
        return (0, 1)
    return (0,)
