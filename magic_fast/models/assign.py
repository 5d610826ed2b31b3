"""The one door: what is each tensor of a model?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from magic_fast.models.conversions import Conversions, Converted, axes_in_file, dimensions_in_file
from magic_fast.models.lookup import Found, Tree, part_of, said_tied, text_parts
from magic_fast.models.model_roles import ModelRoles, Source, StackFields
from magic_fast.models.quantised import with_quantised
from magic_fast.models.roles import Block, Experts, Kind, Role, Step, Tensors
from magic_fast.models.table import Entry, entry_of, heading

if TYPE_CHECKING:
    from magic_fast.models.headers import Headers

_WRAPPERS = re.compile(r"^((_forward_)?module\.)+|(^|(?<=\.))_orig_mod\.")
_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


def roles_of(config: Mapping[str, Any], tensors: Tensors) -> ModelRoles:
    """The role of every tensor of a model.

    Args:
        config: the model's ``config.json``; an empty mapping where it has none.
        tensors: name in the file → (shape, safetensors' dtype).

    >>> config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    >>> name = "model.layers.3.mlp.up_proj.weight"
    >>> role = roles_of(config, {name: ((16, 8), "BF16")})[name]
    >>> str(role.kind), role.units, role.block
    ('matrix', (0,), Block(stack='model.layers', number=3))
    """
    model_type = str(config.get("model_type") or "")
    entry, source = entry_of(model_type), Source.TABLE
    if entry is None and model_type:
        from magic_fast.models.live import entry_by_transformers

        entry, source = entry_by_transformers(config), Source.TRANSFORMERS
    if entry is None:
        from magic_fast.models.headers import Headers

        headers = Headers.of(tensors, config)

        def role_of(name: str) -> Role:
            plain = _WRAPPERS.sub("", name)
            return replace(headers.role(name), canonical=plain, targets=(plain,))

        return ModelRoles(
            tensors,
            with_quantised(role_of, config, tensors),
            model_type=model_type,
            architecture="",
            source=Source.HEADERS,
            ties=(ties := headers.ties(config)),
            tied=bool(ties),
            lacking=lambda: (_unknown_type(model_type),),
        )
    return _Assignment(entry, config, tensors).result(model_type, source)


def _unknown_type(model_type: str) -> str:
    what = f"model type {model_type!r} is not known" if model_type else "no model type is stated"
    return (
        f"{what}: axis 0 of every matrix and convolution is taken to count output units, and names "
        "such as embed_tokens and lm_head to have a row for each word"
    )


class _Assignment:
    """Roles by an entry; tensors that its tree lacks get theirs by their headers."""

    def __init__(self, entry: Entry, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.entry = entry
        self.config = config
        self.tensors = tensors
        self.tree = Tree(entry, config)
        stated = config.get("architectures")
        first = str(stated[0]) if isinstance(stated, list) and stated else ""
        known = first in entry.get("heads", {}) or first in entry.get("ties", {})
        self.architecture = first if known or first.endswith("Model") else entry["class"]
        plain = [*self.tree.conversions(self.architecture), *heading()["legacy"]]
        self.conversions = Conversions(plain, tensors)
        self.ignored = re.compile("|".join(f"(?:{p})" for p in entry.get("ignored", ())) or "$^")
        self.lacking: set[str] = set()
        self._layers: dict[tuple[str, str, tuple[int, ...]], Role] = {}

    def _stands(self, name: str) -> bool:
        """Whether ``name`` is a name of the module tree as it is."""
        canonical, found = self.tree.place(name, self.architecture)
        return bool(found) and canonical == name

    @cached_property
    def _all_stand(self) -> bool:
        """Whether all names are the module tree's: then none is renamed. Some renamings of
        transformers would change those names too."""
        return all(self._stands(_WRAPPERS.sub("", name)) for name in self.tensors)

    @cached_property
    def _headers(self) -> Headers:
        from magic_fast.models.headers import Headers

        return Headers.of(self.tensors, self.config)

    def result(self, model_type: str, source: Source) -> ModelRoles:
        """The roles of all tensors."""
        stacks = self.tree.stacks()
        counts = self._counts(stacks)

        def role_of(name: str) -> Role:
            role = self._role(name)
            block = role.block
            beyond = block is not None and block.number >= counts.get(block.stack, math.inf)
            return replace(role, loaded=False) if beyond else role

        return ModelRoles(
            self.tensors,
            with_quantised(role_of, self.config, self.tensors),
            model_type=model_type,
            architecture=self.architecture,
            source=source,
            lacking=self._assumed,
            is_head=self._is_head,
            ties=self._ties(role_of),
            tied=self._is_tied(),
            stacks=stacks,
        )

    def _role(self, name: str) -> Role:
        """As of :meth:`_fresh_role`; of layers that differ by their number alone one is looked
        up."""
        number = _NUMBER.search(name)
        if number is None or self.conversions.knows_numbers:
            return self._fresh_role(name)[0]
        key = (name[: number.start(1)], name[number.end(1) :], self.tensors[name][0])
        if key in self._layers:
            return _renumbered(self._layers[key], int(number[1]))
        role, uniform = self._fresh_role(name)
        if uniform and role.block is not None and role.block.number == int(number[1]):
            layer = f"{role.block.stack}.{role.block.number}."
            if all(target.startswith(layer) for target in role.targets):
                self._layers[key] = role
        return role

    def _fresh_role(self, name: str) -> tuple[Role, bool]:
        """The role of a tensor, and whether those of other layers differ by the number alone."""
        shape, _ = self.tensors[name]
        plain = _WRAPPERS.sub("", name)
        converted = self.conversions.convert(plain)
        if converted.name != plain and self._stands(plain) and self._all_stand:
            converted = Converted(plain)
        for one in (converted, Converted(plain)):
            canonical, found = self.tree.place(one.name, self.architecture)
            steps, doubt = self._steps(one, shape)
            fitting = [f for f in found if dimensions_in_file(f.dimensions, steps)
                       in (len(shape), None)]  # fmt: skip
            if fitting:
                role = self._role_of(canonical, fitting, one, steps, doubt)
                return role, all(f.uniform for f in found)
        by_header = self._headers.role(name)
        canonical, _ = self.tree.place(converted.name, self.architecture)
        left_aside = self.ignored.search(converted.name) is not None
        if not left_aside:
            self.lacking.add(name)
        return replace(by_header, canonical=canonical, loaded=not left_aside), False

    def _role_of(
        self,
        canonical: str,
        found: list[Found],
        converted: Converted,
        steps: tuple[Step, ...],
        doubt: str | None,
    ) -> Role:
        one = found[0]
        units = None if one.units is None or doubt else axes_in_file(one.units, steps)
        if len({f.units for f in found}) > 1:
            owners = ", ".join(sorted({f.owner for f in found}))
            units, doubt = None, f"several modules of its place: {owners}"
        words = None
        if one.vocabulary is not None:
            words = next(iter(axes_in_file((one.vocabulary,), steps) or ()), None)
        parts = canonical.split(".")
        block = None
        if one.block is not None:
            block = Block(".".join(parts[: one.block]), int(parts[one.block]))
        targets = [self.tree.place(target, self.architecture)[0] for target in converted.targets]
        return Role(
            one.kind,
            units,
            vocabulary=words,
            block=block,
            canonical=canonical,
            targets=tuple(targets) or (canonical,),
            layout=steps,
            module=canonical.rpartition(".")[0],
            owner=one.owner,
            experts=None if one.experts is None else Experts(*one.experts),
            units_doubt=None if units is not None else doubt or _unknown_use(one, steps),
        )

    def _steps(
        self, converted: Converted, shape: tuple[int, ...]
    ) -> tuple[tuple[Step, ...], str | None]:
        """The steps to the parameter; a transposition only where the shape says that the file has
        the other layout, as transformers decides it."""
        if converted.checked is None or len(shape) < 2:
            return converted.steps, None
        key, axis = converted.checked
        step = next(s for s in converted.steps if s.operation == "transpose")
        other = step.other if axis == step.axis else step.axis
        sizes = {part.get(key) for part in text_parts(self.config)} - {None}
        if len(sizes) != 1 or not sizes & {shape[axis], shape[other]}:
            return converted.steps, (
                f"a stack {list(shape)} whose layout only {key} of the configuration tells"
            )
        turned = shape[axis] not in sizes
        steps = tuple(s for s in converted.steps if turned or s is not step)
        return steps, None

    def _assumed(self) -> tuple[str, ...]:
        if not self.lacking:
            return ()
        more = f" and {len(self.lacking) - 1} more" if len(self.lacking) > 1 else ""
        first = next(name for name in self.tensors if name in self.lacking)
        return (
            f"{first}{more}: not in the module tree of {self.architecture}, taken for "
            "what the headers show",
        )

    def _ties(self, role_of: Callable[[str], Role]) -> dict[str, str]:
        """Canonical name → the name whose values it has, by the class."""
        ties = self.entry.get("ties", {}).get(self.architecture, {})
        result: dict[str, str] = {}
        names: set[str] = set()
        if any("*" in pattern for pattern in ties):
            names = {role_of(name).canonical for name in self.tensors}
        for pattern, source in ties.items():
            if "*" not in pattern:
                result[pattern] = source
                continue
            numbers = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)") + "$")
            for match in filter(None, map(numbers.match, names)):
                result[match[0]] = match.expand(source)
        return {name: source for name, source in result.items() if name != source}

    def _is_head(self, canonical: str) -> bool:
        found = self.tree.place(canonical, self.architecture)[1]
        return any(one.kind is Kind.HEAD for one in found)

    def _counts(self, stacks: Mapping[str, StackFields]) -> dict[str, int]:
        """How many layers of each stack the configuration states. More of them (for multi-token
        prediction) are left aside by transformers."""
        stated = {
            stack: part_of(self.config, fields.part).get(fields.count or "")
            for stack, fields in stacks.items()
        }
        return {stack: count for stack, count in stated.items() if isinstance(count, int)}

    def _is_tied(self) -> bool:
        """Whether the configuration ties: by its top, by its text part, or by default."""
        said = said_tied(self.config)
        return bool(self.entry.get("tied", False)) if said is None else said


def _renumbered(role: Role, number: int) -> Role:
    """The role of the same tensor in another layer."""
    assert role.block is not None
    skip = len(f"{role.block.stack}.{role.block.number}")
    layer = f"{role.block.stack}.{number}"
    return replace(
        role,
        block=Block(role.block.stack, number),
        canonical=layer + role.canonical[skip:],
        targets=tuple(layer + target[skip:] for target in role.targets),
        module=layer + role.module[skip:],
    )


def _unknown_use(found: Found, steps: tuple[Step, ...]) -> str:
    unknown = [s.operation for s in steps if s.operation[0].isupper()]
    if unknown:
        return f"a tensor that transformers changes by {unknown[0]}, which is not known here"
    return f"a parameter that {found.owner} uses in a way that is not known here"
