"""Lists of models that are merged with one another: one for whole models, one for each slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from magic_fast.config.entries import ModuleEntry
from magic_fast.config.modules import REST
from magic_fast.config.outputs import OutputTensor, Source
from magic_fast.config.resolve import GroupParameters, Settings
from magic_fast.config.schema import MergeConfig
from magic_fast.methods.registry import find_method
from magic_fast.methods.spec import MethodSpec


@dataclass(frozen=True)
class Member:
    """One model of a group.

    ``start`` is its first layer (0 for whole models); ``merged`` is False for a base that only the
    calibration uses.
    """

    model: str
    start: int
    is_base: bool = False
    merged: bool = True


@dataclass(frozen=True)
class Group:
    """Models merged with one another over ``length`` layers (None: all), and their parameters."""

    path: str
    members: tuple[Member, ...]
    settings: GroupParameters
    length: int | None

    @property
    def leader(self) -> Member:
        """The base, else the first: the model whose blocks the group follows."""
        return next((one for one in self.members if one.is_base), self.members[0])

    def output(self, name: str, t: float, names: Sequence[str] | None = None) -> OutputTensor:
        """The output tensor ``name`` at gradient position ``t``.

        Args:
            names: the tensor's name in each member; None where it is ``name`` in all.
        """
        sources, base = [], None
        for index, one in enumerate(self.members):
            own = name if names is None else names[index]
            source = Source(one.model, own, one.is_base)
            if one.is_base:
                base = source
            if one.merged:
                sources.append(source)
        return OutputTensor(name, tuple(sources), base, *self.settings.at(name, t))

    def alone(self, name: str, t: float, model: str, own: str) -> OutputTensor:
        """The output tensor that is ``own`` of one model, and merged with nothing."""
        return OutputTensor(name, (), Source(model, own, True), *self.settings.at(name, t))


@dataclass(frozen=True)
class Part:
    """What is merged in one way: the whole model (``module`` is None), or one of ``modules:``.

    ``groups`` is one for whole models, or one for each slice.
    """

    module: str | None
    groups: tuple[Group, ...]
    sliced: bool

    @property
    def counted(self) -> bool:
        """Whether config.json's number of layers is that of this part."""
        return self.module is None or self.module in REST


def build_parts(config: MergeConfig) -> list[Part]:
    """The parts of a configuration, in its order."""
    if config.modules is None:
        return [_part(config, None, config, [config.parameters])]
    return [
        _part(config, name, module, [module.parameters, config.parameters])
        for name, module in config.modules.items()
    ]


def _part(
    config: MergeConfig,
    module: str | None,
    listed: MergeConfig | ModuleEntry,
    shared: Sequence[Settings],
) -> Part:
    method = find_method(config.merge_method)
    prefix = f"modules.{module}." if module is not None else ""
    if listed.slices is None:
        whole = [(entry.model, entry.parameters, 0) for entry in listed.models or ()]
        base = config.base_model
        group = _build(config, method, f"{prefix}models", base, whole, shared, None)
        return Part(module, (group,), sliced=False)
    groups = []
    for index, part in enumerate(listed.slices):
        ranges = [(s.model, s.parameters, s.layer_range[0]) for s in part.sources]
        start, end = part.sources[0].layer_range
        base = part.base_model or config.base_model
        levels = [part.parameters, *shared]
        path = f"{prefix}slices[{index}]"
        groups.append(_build(config, method, path, base, ranges, levels, end - start))
    return Part(module, tuple(groups), sliced=True)


def _build(
    config: MergeConfig,
    method: MethodSpec,
    path: str,
    base: str | None,
    listed: Sequence[tuple[str, Settings, int]],
    shared: Sequence[Settings],
    length: int | None,
) -> Group:
    uses_base = method.uses_base(base)
    members, own = [], []
    for model, parameters, start in listed:
        is_base = uses_base and model == base
        members.append(Member(model, start, is_base))
        if not is_base:
            own.append(parameters)
    needs_base = uses_base or config.calibrate is not None
    if needs_base and base is not None and not any(one.is_base for one in members):
        members.append(Member(base, members[0].start, True, merged=uses_base))
    settings = GroupParameters(method, config.preset, shared, own)
    return Group(path, tuple(members), settings, length)
