"""Adapters of one diffusion model in unlike conventions: they meet in the names of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from magic_fast.adapters.fitted import named_for
from magic_fast.adapters.merged import pattern_of
from magic_fast.adapters.opening import Adapter
from magic_fast.adapters.regrouped import Bit, bits_of, regrouped
from magic_fast.errors import CheckpointError
from magic_fast.models.diffusion import Meaning, Naming, families, meanings


@dataclass(frozen=True)
class _Speech:
    """How an adapter names the parts of a family: part → prefix and whose names."""

    family: str
    flat: bool
    parts: Mapping[str, tuple[str, Naming]]

    def has(self, meaning: Meaning) -> bool:
        """Whether a name is one of its own, or of a part that it says nothing of."""
        prefix, naming = self.parts.get(meaning.part, (meaning.prefix, meaning.naming))
        return meaning.prefix == prefix and (_same_in_both(meaning) or meaning.naming is naming)

    def naming(self, part: str) -> Naming:
        return self.parts.get(part, ("", Naming.DIFFUSERS))[1]

    def module(self, part: str, parameter: str) -> str:
        """What it calls the module of a parameter."""
        default = families()[self.family][part]["flat" if self.flat else "dotted"]
        prefix = self.parts[part][0] if part in self.parts else default[0] if default else ""
        stem = parameter.removesuffix(".weight")
        return prefix + (stem.replace(".", "_") if self.flat else stem)


def in_one_convention(opened: Sequence[Adapter]) -> tuple[list[Adapter], list[str]]:
    """The adapters in the names of the first, where all are of one family of diffusion models, and
    what the user should know of it; as they are where they meet as they are, or are of none.

    Raises:
        CheckpointError: a name with two meanings, or that the first one's convention has none for.
    """
    result, notes = list(opened), []
    named = [set(named_for(a, a.style == "kohya")) for a in opened if a.kind == "lora"]
    if len(named) < len(opened):
        return result, []
    common = [f for f in families() if all(f in names for names in named)]
    speeches = [speech for f in common if (speech := _speech(opened[0], f)) is not None]
    for k, adapter in enumerate(opened[1:], 1):
        if not speeches or _meets(adapter, opened[0], speeches[0]):
            continue
        groups, *others = (_groups(adapter, speech) for speech in speeches)
        for other, speech in zip(others, speeches[1:], strict=True):
            if _plain(other) != _plain(groups):
                raise CheckpointError(
                    f"names of {adapter.path}: expected one meaning, got that of "
                    f"{speeches[0].family} and that of {speech.family}. Save the adapters in one "
                    "convention of names."
                )
        result[k] = _said(adapter, opened[0], groups)
        notes.append(
            f"{adapter.path}: its modules are read and written in the names of "
            f"{opened[0].path}, as those of {' or '.join(speech.family for speech in speeches)}"
        )
    return result, notes


def _same_in_both(meaning: Meaning) -> bool:
    return meaning.links[0].names[0] == meaning.links[0].names[1]


def _meanings(adapter: Adapter, family: str, module: str) -> list[Meaning]:
    flat = adapter.style == "kohya"
    return meanings(family, module if flat else f"{module}.weight", flat=flat)


def _speech(first: Adapter, family: str) -> _Speech | None:
    """How the first adapter names parts; None where it has two names for one."""
    parts: dict[str, tuple[str, Naming]] = {}
    modules = first.modules.values()
    every = [found for module in modules for found in _meanings(first, family, module.name)]
    for meaning in sorted(every, key=_same_in_both):
        own = (meaning.prefix, meaning.naming)
        prefix, naming = parts.setdefault(meaning.part, own)
        if prefix != meaning.prefix or not (_same_in_both(meaning) or naming is meaning.naming):
            return None
    return _Speech(family, first.style == "kohya", parts)


def _meets(adapter: Adapter, first: Adapter, speech: _Speech) -> bool:
    return adapter.style == first.style and all(
        any(speech.has(m) for m in _meanings(adapter, speech.family, name))
        for name in (module.name for module in adapter.modules.values())
    )


def _groups(adapter: Adapter, speech: _Speech) -> dict[str, list[Bit]]:
    """Module in the names of the first → what the adapter has for it."""
    groups: dict[str, list[Bit]] = {}
    for module in adapter.modules.values():
        name = module.name
        found, *more = _meanings(adapter, speech.family, name)
        if more:
            raise CheckpointError(
                f"module '{name}' in {adapter.path}: expected one meaning, got that of the "
                f"{found.part} and that of the {more[0].part}. Save the adapters in one convention "
                "of names."
            )
        for parameter, bit in bits_of(module, found, speech.naming(found.part)).items():
            if not parameter.endswith(".weight"):
                raise CheckpointError(
                    f"module '{name}' in {adapter.path}: expected a name for it in the convention "
                    f"of the first adapter, got none, as it is a part of '{parameter}'. Name this "
                    "adapter first."
                )
            groups.setdefault(speech.module(found.part, parameter), []).append(bit)
    return groups


def _plain(groups: Mapping[str, Sequence[Bit]]) -> Mapping[str, object]:
    return {name: [bit.told for bit in bits] for name, bits in groups.items()}


def _said(adapter: Adapter, first: Adapter, groups: Mapping[str, Sequence[Bit]]) -> Adapter:
    like = next((m for m in first.modules.values() if m.up is not None), None)
    if like is None or like.up is None:
        raise CheckpointError(
            f"names of {adapter.path}: expected those of {first.path}, whose changes are no A and "
            "B to name others after, got another convention. Name this adapter first."
        )
    before, _, down = like.down.name.partition(like.name)
    up = like.up.name.partition(like.name)[2]
    modules, weights = regrouped(
        adapter, groups, lambda name: (before + name + down, before + name + up), only_cut=False
    )
    return replace(
        adapter,
        style=first.style,
        checkpoint=weights,
        modules=dict(zip(groups, modules, strict=True)),
        config={"target_modules": pattern_of(list(groups))} if first.config else {},
    )
