"""Which of several stacks of layers a configuration counts."""

from __future__ import annotations

from dataclasses import replace

from magic_fast.checkpoint import Checkpoint
from magic_fast.config.blocks import Structure, declared_layers, find_blocks, split_name


def counted_stack(model: Checkpoint) -> str | None:
    """What stands before the number of a layer in the names of the stack that config.json counts;
    None where its architecture is not known."""
    part = declared_layers(model.config)[0]
    counted = [stack for stack, fields in model.roles.stacks.items() if fields.part == part
               and isinstance(fields.count, str) and "decoder" not in fields.count]  # fmt: skip
    first = ((name, parts[0]) for name in model.tensors
             if (parts := split_name(name)) is not None and parts[1] == 0)  # fmt: skip
    blocks = {prefix: model.roles[name].block for name, prefix in first}
    found = [prefix for prefix, block in blocks.items() if block and block.stack in counted]
    return found[0] if len(found) == 1 else None


def structure_of(model: Checkpoint, name: str) -> Structure:
    """The stacks of a model; ``name`` is for messages."""
    structure = find_blocks(list(model.tensors), model.config, name)
    if structure.main is None:
        main = structure.stacks.get(counted_stack(model) or "")
        structure = replace(structure, main=main)
    return structure
