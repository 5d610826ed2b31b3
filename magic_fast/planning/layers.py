"""What config.json says of the layers of a merge by slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic_fast.checkpoint import Checkpoint, ModelFolder, sidecar_source
from magic_fast.config import MergeConfig
from magic_fast.config.blocks import declared_layers
from magic_fast.config.groups import build_parts
from magic_fast.config.per_layer import Layer, follow
from magic_fast.models.lookup import part_of
from magic_fast.planning.stacks import structure_of


def config_of_layers(
    config: MergeConfig,
    models: Mapping[str, Checkpoint],
    files: Checkpoint | ModelFolder | None = None,
) -> tuple[dict[str, Any] | None, int | None]:
    """The configuration whose lists follow the layers, and how many layers it states; None and None
    where the layers stay as they are.

    Raises:
        ConfigError: config.json cannot say what some layer is.
    """
    groups = next((p.groups for p in build_parts(config) if p.sliced and p.counted), None)
    source = files or sidecar_source(models[config.donor], list(models.values()))
    if groups is None or source is None:
        return None, config.num_layers
    views = {name: _Counted(model, name) for name, model in models.items()}
    layers = [
        views[group.leader.model].layer(group.leader.start + step)
        for group in groups
        for step in range(group.length or 0)
    ]
    own = next((v for name, v in views.items() if models[name] is source), views[config.donor])
    stated, count = follow(
        source.config, own.path, own.count, layers, reads=own.reads, stores_mtp=own.stores_mtp
    )
    part = part_of(stated, own.path)
    if own.counted_by is not None and part.get(own.counted_by, own.count) == own.count:
        assert isinstance(part, dict)
        part[own.counted_by] = count
    return stated, count


class _Counted:
    """The layers of one model."""

    def __init__(self, model: Checkpoint, name: str) -> None:
        structure = structure_of(model, name)
        main = structure.main
        stored = main.count if main is not None else 0
        self.count = min(stored, structure.declared or stored)
        self.stores_mtp = stored > self.count
        self.path = declared_layers(model.config)[0]
        self.reads: tuple[str, ...] = ()
        self.counted_by: str | None = None
        if main is not None:
            name = next(n for n in model.tensors if n.startswith(f"{main.prefix}0."))
            block = model.roles[name].block
            fields = model.roles.stacks.get(block.stack) if block is not None else None
            if fields is not None:
                self.path, self.reads = fields.part, fields.lists
                self.counted_by = fields.count
        self.part = part_of(model.config, self.path)
        top = model.config.get("model_type") if not self.path else None
        self.model_type = str(self.part.get("model_type") or top or "")

    def layer(self, number: int) -> Layer:
        return Layer(self.part, self.model_type, number, self.count)
