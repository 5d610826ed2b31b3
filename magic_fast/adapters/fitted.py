"""An adapter of a diffusion model in the names of the model that it stands on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from magic_fast.adapters.names import weight_names
from magic_fast.adapters.opening import Adapter, AdapterModule
from magic_fast.adapters.regrouped import Bit, bits_of, regrouped
from magic_fast.checkpoint import Checkpoint
from magic_fast.errors import CheckpointError
from magic_fast.models import Source
from magic_fast.models.diffusion import Meaning, Naming, Part, families, meanings, recognised

#: The part of a pipeline that a module is of, where no map says it.
_PART = re.compile(r"(unet|transformer|text_encoder(_\d)?)\.|lora_(unet|te\d?)_")


@dataclass
class Fit:
    """What an adapter means in one family, of which the model is.

    Attributes:
        groups: stored tensor → what the adapter has for it.
        whole: tensor that was trained whole → the stored one.
        left: part that the model's files lack → the modules for it.
        lost: module or tensor → the part that should have it and does not; None for no such name.
    """

    groups: dict[str, list[Bit]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    lost: dict[str, str | None] = field(default_factory=dict)

    def targets(self) -> Mapping[str, object]:
        """What tells it from that of another family."""
        changed = {target: [bit.told for bit in bits] for target, bits in self.groups.items()}
        return changed | self.whole


def fitted(adapter: Adapter, model: Checkpoint) -> tuple[Adapter, list[str]]:
    """The adapter in the names of ``model``, and what the user should know of it. As it is where
    its names are the model's, or those of no diffusion model that is known.

    Raises:
        CheckpointError: a name with two meanings; an adapter of another family than the model's, or
            for another part of it.
    """
    names = [*adapter.whole, *(f"{m.name}.{m.leaf}" for m in adapter.modules.values())]
    if all(name in model for name in names):
        return adapter, []
    flat = adapter.style == "kohya"
    known = recognised(model.tensors)
    fits = {family: _fit(adapter, model, family, parts, flat) for family, parts in known.items()}
    whole = {family: fit for family, fit in fits.items() if not fit.lost}
    if not whole:
        _refuse_lost(adapter, model, fits)
        _refuse_other_family(adapter, model, list(known), flat)
        return _without_absent_parts(adapter, model)
    (family, fit), *others = whole.items()
    for other, second in others:
        if second.targets() != fit.targets():
            raise CheckpointError(
                f"names of {adapter.path}: expected one meaning in {model.path}, got that of "
                f"{family} and that of {other}. Merge it into its model by the library that made "
                "it, and merge full models."
            )
    if not fit.groups:
        raise CheckpointError(
            f"adapter {adapter.path}: expected modules for a part of {model.path}, got those of "
            f"the {' and the '.join(fit.left)} only. Name the file that has that part."
        )
    modules, weights = regrouped(adapter, fit.groups, _keys, only_cut=True)
    places = zip(fit.groups, modules, strict=True)
    changed = {name: replace(module, weight=name) for name, module in places}
    own = {fit.whole[name]: key for name, key in adapter.whole.items() if name in fit.whole}
    return replace(adapter, checkpoint=weights, modules=changed, whole=own), _notes(
        adapter, model, fit.left
    )


def _keys(name: str) -> tuple[str, str]:
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def _fit(
    adapter: Adapter, model: Checkpoint, family: str, parts: Mapping[str, Part], flat: bool
) -> Fit:
    fit = Fit()
    for module in adapter.modules.values():
        name = module.name
        found = meanings(family, name if flat else f"{name}.weight", flat=flat)
        here = [m for m in found if m.part in parts]
        there = [m for m in here if _stands(m, parts[m.part])]
        shaped = [m for m in there if _shaped(module, m, parts[m.part], model)]
        if not shaped and any(_shares(m.part, parts) for m in there):
            here, there = [], []  # the names are another part's, as the widths say
        there = shaped or there
        if len(there) > 1:
            a, b = there[:2]
            raise CheckpointError(
                f"module '{name}' in {adapter.path}: expected one meaning in {model.path}, got "
                f"{_stored(a, parts)} and {_stored(b, parts)}. Save the adapter with the prefixes "
                "of its parts."
            )
        if there:
            part = parts[there[0].part]
            for target, bit in bits_of(module, there[0], part.naming).items():
                beside = target.removesuffix(".weight")
                place = part.prefix + (f"{beside}.{module.leaf}" if beside != target else target)
                fit.groups.setdefault(place, []).append(bit)
        elif found and not here:
            fit.left.setdefault(found[0].part, []).append(name)
        else:
            inside = here and parts[here[0].part].places
            fit.lost[name] = here[0].part if inside else None
    for name in adapter.whole:
        found = [m for m in meanings(family, name) if m.part in parts]
        stored = [parts[m.part].places.get(m.links[0].names[0]) for m in found]
        if stored and stored[0] is not None and len(found[0].links) == 1 == len(stored):
            link, place = stored[0]
            if link.rows is None and not link.turned:
                fit.whole[name] = place
                continue
        fit.lost[name] = None
    return fit


def _stands(meaning: Meaning, part: Part) -> bool:
    return all(link.names[0] in part.places for link in meaning.links)


def _shares(part: str, parts: Mapping[str, Part]) -> bool:
    """Whether the names of a part may be those of another."""
    own = parts[part]
    return any(p is not own and p[:2] == own[:2] and p.places for p in parts.values())


def _stored(meaning: Meaning, parts: Mapping[str, Part]) -> str:
    return f"'{parts[meaning.part].places[meaning.links[0].names[0]][1]}'"


def _shaped(module: AdapterModule, meaning: Meaning, part: Part, model: Checkpoint) -> bool:
    """Whether a module's inputs are as many as those of the tensor."""
    link, name = part.places[meaning.links[0].names[0]]
    shape = model.resolve(name).shape
    if module.form is not None:
        return True  # by its own shapes, when it is put on
    into = shape[:1] if link.turned and part.naming is Naming.ORIGINAL else shape[1:]
    return module.down.shape[1:] == into


def _refuse_lost(adapter: Adapter, model: Checkpoint, fits: Mapping[str, Fit]) -> None:
    """Refuses modules that the family has and the model does not."""
    for family, fit in fits.items():
        if all(fit.lost.values()):
            name, part = next(iter(fit.lost.items()))
            raise CheckpointError(
                f"module '{name}' in {adapter.path}: expected its weight in the {part} of "
                f"{model.path}, which has names of {family}, got none. Name the model that the "
                "adapter was trained on."
            )


def _without_absent_parts(adapter: Adapter, model: Checkpoint) -> tuple[Adapter, list[str]]:
    """Of a pipeline that is not known: without the parts of which the model has no module, where
    it has all of another."""
    parts: dict[str, dict[str, AdapterModule]] = {}
    for name, module in adapter.modules.items():
        found = _PART.match(name)
        parts.setdefault(found[0] if found else "", {})[name] = module
    here = {
        part: sum(bool(weight_names(name, adapter.style, model.tensors)) for name in modules)
        for part, modules in parts.items()
    }
    there = any(part and here[part] == len(modules) for part, modules in parts.items())
    if adapter.style == "peft" or not there:
        return adapter, []
    left = {part: list(modules) for part, modules in parts.items() if part and not here[part]}
    kept = {name: m for part in parts if part not in left for name, m in parts[part].items()}
    return replace(adapter, modules=kept), _notes(adapter, model, left)


def _notes(adapter: Adapter, model: Checkpoint, left: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{adapter.path}: {len(names)} of its modules are for the part '{part.strip('._')}', which "
        f"{model.path} does not have, and were left out, first '{names[0]}'"
        for part, names in left.items()
    ]


def no_weight(adapter: Adapter, model: Checkpoint, name: str) -> CheckpointError:
    """The error for a module or tensor of an adapter that finds none in the model, or several."""
    stem, _, leaf = name.rpartition(".")
    near = weight_names(stem, adapter.style, model.tensors)
    got = f"{near[0]} and {near[1]}" if len(near) > 1 else "none of that name"
    way = "Name the model that the adapter was trained on."
    if near or model.roles.source is Source.HEADERS:
        way = (
            "It was trained on another model, which is the one to name, or its names follow a "
            "convention that is not known here: save it by the library that saved the model."
        )
    if not near and model.quantisation is not None:
        got = f"{model.quantisation.scheme} codes"
        way = "Name the model whose weights are not quantised."
    what = f"module '{stem}'" if leaf == "weight" else f"tensor '{name}'"
    return CheckpointError(
        f"{what} in {adapter.path}: expected its weight in {model.path}, got {got}. {way}"
    )


def named_for(adapter: Adapter, flat: bool) -> list[str]:
    """The families in which every module of an adapter has a meaning."""
    names = [m.name if flat else f"{m.name}.weight" for m in adapter.modules.values()]
    return [f for f in families() if all(meanings(f, name, flat=flat) for name in names)]


def _refuse_other_family(
    adapter: Adapter, model: Checkpoint, known: Sequence[str], flat: bool
) -> None:
    named = named_for(adapter, flat)
    if known and named and not set(known) & set(named):
        raise CheckpointError(
            f"adapter {adapter.path}: expected names of {' or '.join(known)}, as {model.path} is, "
            f"got those of {' or '.join(named)}. Name the model that the adapter was trained on."
        )
