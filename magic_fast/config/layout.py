"""From a configuration and the names in the checkpoints to the tensors of the output."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from magic_fast.config.blocks import (
    Stack,
    Structure,
    comes_before,
    find_blocks,
    gradient_position,
    split_name,
)
from magic_fast.config.groups import Group, Member, Part, build_parts
from magic_fast.config.modules import REST, split_modules
from magic_fast.config.outputs import ModelView, OutputTensor
from magic_fast.config.presence import Presence
from magic_fast.config.schema import MergeConfig
from magic_fast.config.settings import filters_of
from magic_fast.errors import CheckpointError, ConfigError

_LOG = logging.getLogger("magic_fast")


def resolve_layout(config: MergeConfig, models: Mapping[str, ModelView]) -> list[OutputTensor]:
    """Every tensor of the output with its sources and the values of its parameters.

    Reads names only, never data; the work is linear in the number of tensors.

    With ``models:`` each tensor of the donor (``config.donor``) is merged with those of the same
    name. With ``slices:`` layers are renumbered in the order of the slices; tensors before the
    blocks (embeddings) take the first slice's sources, those after (final norm, head) the last
    slice's. A gradient is taken at index ÷ (n − 1) inside the slice, at 1 for a single layer, at 0
    outside the blocks. With ``modules:`` each module's tensors are merged in one of these ways.

    Args:
        config: a validated configuration.
        models: a view of each of ``config.model_references``.

    Raises:
        CheckpointError: a tensor that one model has and another lacks (tied ones are not lacking).
        ConfigError: a layer_range beyond the model, no stack of layers to slice, or a module that
            is not in the model.
    """
    absent = [name for name in config.model_references if name not in models]
    if absent:
        raise ConfigError(
            f"missing checkpoint for {absent[0]}: expected a view of every model, got none of it. "
            "Open it first."
        )
    presence = Presence(models)
    outputs: list[OutputTensor] = []
    for part, view in _parts(config, presence):
        if part.sliced:
            outputs += _Slices(config.donor, part, view).outputs()
        else:
            outputs += _whole_models(config.donor, part, view)
    _warn_unused_filters(config, outputs)
    return outputs


def _parts(config: MergeConfig, presence: Presence) -> Iterator[tuple[Part, Presence]]:
    """The parts of a configuration, each with a view of its own tensors."""
    parts = build_parts(config)
    if config.modules is None:
        yield parts[0], presence
        return
    modules = tuple(config.modules)
    split = {
        model: split_modules(presence.stored(model), modules, model)
        for model in config.model_references
    }
    for part in parts:
        yield (
            part,
            presence.only({m: {n for n in s if s[n] == part.module} for m, s in split.items()}),
        )


def _whole_models(donor: str, part: Part, presence: Presence) -> Iterator[OutputTensor]:
    (group,) = part.groups
    names = presence.stored(donor)
    structure = find_blocks(names, presence.config(donor) if part.counted else {}, donor)
    main, declared = structure.main, structure.declared
    if main is not None and declared is not None and main.count < declared:
        _LOG.warning(
            "%s has %d blocks %s*, its config.json says %d layers.",
            donor, main.count, main.prefix, declared,
        )  # fmt: skip
    others = dict.fromkeys(one.model for one in group.members if one.model != donor)
    kept = _kept(group, donor, presence, names, others)
    dropped, left = set(), set()
    for other in others:
        stored = presence.stored(other)
        for name in stored.keys() - names.keys():
            chosen = name not in presence.left_out(other)
            if chosen and not presence.check(name, donor, name, other):
                left.add(name)
        for name in names.keys() - stored.keys() - kept:
            if not presence.check(name, other, name, donor):
                dropped.add(name)
    presence.raise_missing()
    _say("are left out, as not all models have them and none needs them", sorted(left | dropped))
    for name in names:
        if name in kept:
            yield group.alone(name, structure.position(name), donor, name)
        elif name not in dropped:
            yield group.output(name, structure.position(name))


def _kept(
    group: Group, donor: str, presence: Presence, names: Iterable[str], others: Collection[str]
) -> set[str]:
    """The donor's tensors that stay: those that it has alone as the base, and those that the merge
    leaves out."""
    alone: list[str] = []
    if others and any(one.is_base and one.model == donor for one in group.members):
        alone = [name for name in names if presence.is_of_base_alone(name, donor, others)]
    _say(f"stay as in {donor}, as no other model has them", alone)
    return {*alone, *presence.left_out(donor)}


def _say(what: str, names: Sequence[str]) -> None:
    """One line of tensors that are not merged."""
    if names:
        more = ", …" if len(names) > 3 else ""
        _LOG.warning("%d tensors %s: %s%s", len(names), what, ", ".join(names[:3]), more)


class _Slices:
    """Layers of several models, stacked in a new order."""

    def __init__(self, donor: str, part: Part, presence: Presence) -> None:
        self.donor = donor
        self.part = part
        self.groups = part.groups
        self.presence = presence
        self.structures: dict[str, Structure] = {}
        self.prefix = self._stack(donor).prefix

    def outputs(self) -> Iterator[OutputTensor]:
        for group in self.groups:
            for member in group.members:
                self._check_range(group, member)
        self._check_count()
        outside = [n for n in self.presence.stored(self.donor) if not self._in_stack(n)]
        tensors = [
            *self._outside(self.groups[0], [n for n in outside if comes_before(n)], True),
            *self._layers(),
            *self._outside(self.groups[-1], [n for n in outside if not comes_before(n)], False),
        ]
        self.presence.raise_missing()
        yield from tensors

    def _structure(self, model: str) -> Structure:
        if model not in self.structures:
            names = self.presence.stored(model)
            config = self.presence.config(model) if self.part.counted else {}
            found = find_blocks(names, config, model)
            if found.main is None and self.part.counted:
                counted = self.presence.counted_stack(model)
                found = replace(found, main=found.stacks.get(counted or ""))
            self.structures[model] = found
        return self.structures[model]

    def _stack(self, model: str) -> Stack:
        """The layers of a model that layer_range counts."""
        structure = self._structure(model)
        main, declared = structure.main, structure.declared
        if main is None:
            found = ", ".join(f"{s.prefix}* ({s.count})" for s in structure.stacks.values())
            raise ConfigError(
                f"no layers to slice for {model}: expected one stack of numbered blocks, got "
                f"{found or 'none'}. Merge whole models under 'models:'."
            )
        if declared is not None and main.count < declared:
            raise CheckpointError(
                f"missing blocks for {model}: expected {declared} blocks {main.prefix}* as its "
                f"config.json says, got {main.count}. Download the checkpoint again; where its "
                "layers share their weights, merge whole models under 'models:'."
            )
        return main

    def _in_stack(self, name: str) -> bool:
        found = split_name(name)
        return found is not None and found[0] == self.prefix

    def _check_range(self, group: Group, member: Member) -> None:
        stack = self._stack(member.model)
        if stack.prefix != self.prefix:
            raise CheckpointError(
                f"different layer names for {member.model}: expected {self.prefix}* as in "
                f"{self.donor}, got {stack.prefix}*. Merge models of one architecture."
            )
        end = member.start + (group.length or 0)
        if end > stack.count:
            raise ConfigError(
                f"layer_range past the end for {group.path}, source {member.model}: expected at "
                f"most {stack.count}, the number of its layers, got [{member.start}, {end}]. "
                "Correct the layer_range."
            )

    def _check_count(self) -> None:
        """config.json counts the layers of the main module; of others it has to stay true."""
        count, now = self._stack(self.donor).count, sum(g.length or 0 for g in self.groups)
        if not self.part.counted and count != now:
            raise ConfigError(
                f"other number of layers for module {self.part.module}: expected {count} as in "
                f"{self.donor}, whose config.json stays, got {now}. Only the layers of "
                f"{' or '.join(REST)} may become more or fewer."
            )

    def _outside(self, group: Group, names: list[str], before: bool) -> Iterator[OutputTensor]:
        """Tensors outside the blocks: ``names`` of the donor, from one slice's sources."""
        models = dict.fromkeys(one.model for one in group.members if one.model != self.donor)
        for model in models:
            for name in self.presence.stored(model):
                if not self._in_stack(name) and comes_before(name) == before:
                    self.presence.check(name, self.donor, name, model)
        kept = _kept(group, self.donor, self.presence, names, models)
        for name in names:
            if name in kept:
                yield group.alone(name, 0.0, self.donor, name)
            elif all([self.presence.check(name, m, name, self.donor) for m in models]):
                yield group.output(name, 0.0)

    def _layers(self) -> Iterator[OutputTensor]:
        layer = 0
        for group in self.groups:
            length = group.length or 0
            for step in range(length):
                t = gradient_position(step, length)
                yield from self._layer(group, step, f"{self.prefix}{layer}.", t)
                layer += 1

    def _layer(self, group: Group, step: int, prefix: str, t: float) -> Iterator[OutputTensor]:
        """One output layer: the leader's tensors of that block, which all members must have."""
        leader = group.leader
        places = [f"{self.prefix}{one.start + step}." for one in group.members]
        first = f"{self.prefix}{leader.start + step}."
        kept = self.presence.left_out(leader.model)
        for one, place in zip(group.members, places, strict=True):
            for rest in self._stack(one.model).blocks[one.start + step]:
                self.presence.check(first + rest, leader.model, place + rest, one.model)
        for rest in self._stack(leader.model).blocks[leader.start + step]:
            if first + rest in kept:
                yield group.alone(prefix + rest, t, leader.model, first + rest)
                continue
            names = [place + rest for place in places]
            found = [
                self.presence.check(name, one.model, first + rest, leader.model)
                for one, name in zip(group.members, names, strict=True)
            ]
            if all(found):
                yield group.output(prefix + rest, t, names)


def _warn_unused_filters(config: MergeConfig, outputs: list[OutputTensor]) -> None:
    """A filter that matches no tensor is most likely misspelt."""
    blocks = []
    for part in config.listings:
        blocks += [part.parameters, *(entry.parameters for entry in part.models or ())]
        for piece in part.slices or ():
            blocks += [piece.parameters, *(source.parameters for source in piece.sources)]
    words = dict.fromkeys(
        w for block in blocks for value in block.values() for w in filters_of(value)
    )
    for word in words:
        if word != "*" and not any(word in tensor.name for tensor in outputs):
            _LOG.warning("filter %r matches no tensor of the output.", word)
