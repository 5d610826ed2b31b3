"""The layers of a model, found in its tensor names: no list of architectures.

The outermost number of a name counts blocks: ``model.layers.7.mlp.up_proj.weight`` is tensor
``mlp.up_proj.weight`` of block 7 of the stack ``model.layers.``. Experts of a mixture
(``…mlp.experts.3.…``) or sub-layers are inside a block. A model may have several stacks
(encoder and decoder, vision and text).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.errors import CheckpointError
from magic_fast.models.lookup import LAYER_COUNTS, TEXT_PARTS, part_of

_NUMBER = re.compile(r"(?:^|(?<=\.))(0|[1-9][0-9]*)\.")

#: Names outside blocks that come before them; all others (final norm, head) come after.
_AFTER = re.compile(r"embed_out|unembed|lm_head|project_out")
_BEFORE = re.compile(
    r"emb|wte|wpe|project_in|pre_?(layer)?norm|ln_pre|stem|patch|conv_in|conv1|vis|vit\b|audio|image"
    r"|multi_modal|mm_proj|projector"
)


@dataclass(frozen=True)
class Stack:
    """Numbered blocks under one prefix: ``blocks[i]`` holds the names inside block i."""

    prefix: str
    blocks: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)


@dataclass(frozen=True)
class Structure:
    """The stacks of one model.

    ``main`` is the stack that ``layer_range`` counts: the only one, or the only one as long as the
    configuration says; None where that is not clear. ``declared`` is the number of layers by the
    configuration, None where it says nothing.
    """

    stacks: Mapping[str, Stack]
    main: Stack | None
    declared: int | None

    def position(self, name: str) -> float:
        """Where ``name`` stands for gradients: index ÷ (layers − 1) in its stack, 0 outside."""
        found = split_name(name)
        stack = self.stacks.get(found[0]) if found is not None else None
        if found is None or stack is None:
            return 0.0
        count = stack.count
        if stack is self.main and self.declared is not None:
            count = min(count, self.declared)  # extra blocks (multi-token prediction) stay at 1
        return gradient_position(found[1], count)


def gradient_position(index: int, count: int) -> float:
    """``index ÷ (count − 1)``, at most 1; 1 for a single layer."""
    return 1.0 if count <= 1 else min(1.0, index / (count - 1))


def split_name(name: str) -> tuple[str, int, str] | None:
    """``(prefix, block, rest)`` at the outermost number of a name, None without one.

    >>> split_name("model.layers.7.mlp.experts.3.w1.weight")
    ('model.layers.', 7, 'mlp.experts.3.w1.weight')
    """
    match = _NUMBER.search(name)
    if match is None:
        return None
    return name[: match.start()], int(match[1]), name[match.end() :]


def comes_before(name: str) -> bool:
    """Whether a tensor outside the blocks belongs to the first layers (embeddings) or the last.

    >>> comes_before("model.embed_tokens.weight"), comes_before("lm_head.weight")
    (True, False)
    """
    return _AFTER.search(name) is None and _BEFORE.search(name) is not None


def declared_layers(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The part of a ``config.json`` that states the number of layers ("" for its top), and the
    number."""
    for name in ("", *TEXT_PARTS):
        part = part_of(config, name)
        for key in LAYER_COUNTS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return name, value
    return "", None


def find_blocks(names: Iterable[str], config: Mapping[str, Any], model: str) -> Structure:
    """The stacks of the model whose tensors are ``names``.

    A stack's blocks are numbered 0, 1, … without a gap and hold named sub-modules (so the ``0`` and
    ``1`` of a two-layer head are no stack, unless the configuration counts just so many layers).

    Args:
        names: all stored tensor names.
        config: parsed ``config.json``, or an empty mapping.
        model: for messages.

    Raises:
        CheckpointError: a block is missing between others of the stack as long as ``config`` says.
    """
    declared = declared_layers(config)[1]
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        parts = split_name(name)
        if parts is not None:
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(parts[2])
    stacks = {}
    holes = []
    for prefix, blocks in found.items():
        length = max(blocks) + 1
        if length != declared and not all(any("." in r for r in rest) for rest in blocks.values()):
            continue
        if length == len(blocks):
            stacks[prefix] = Stack(prefix, tuple(tuple(blocks[i]) for i in range(length)))
        elif length == declared:
            holes.append((prefix, next(i for i in range(length) if i not in blocks)))
    if holes and not any(stack.count == declared for stack in stacks.values()):
        prefix, gap = holes[0]
        raise CheckpointError(
            f"missing block for {model}: expected {prefix}0 to {prefix}{(declared or 0) - 1}, got "
            f"none of the tensors of {prefix}{gap}. Download the checkpoint again."
        )
    return Structure(stacks, _main_stack(stacks, declared), declared)


def _main_stack(stacks: Mapping[str, Stack], declared: int | None) -> Stack | None:
    if len(stacks) == 1:
        return next(iter(stacks.values()))
    fitting = [stack for stack in stacks.values() if stack.count == declared]
    return fitting[0] if len(fitting) == 1 else None
