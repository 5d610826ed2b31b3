"""What a schema cannot say: which parameters fit the method, which models fit together.

Works on the raw values of the YAML and tolerates broken ones (the schema reports those), so that
all faults of a file are found in one go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from magic_fast.config.chat_templates import check_template
from magic_fast.config.problems import Path, Problem, listed, show_path
from magic_fast.config.references import (
    Entry,
    Groups,
    base_of,
    listed_groups,
    owners,
    parts,
    reference_or_none,
    slice_of,
)
from magic_fast.config.settings import check_setting
from magic_fast.config.tokens import check_tokenizer
from magic_fast.errors import InputError
from magic_fast.methods.parameters import NO_EFFECT
from magic_fast.methods.presets import PRESETS, check_preset
from magic_fast.methods.registry import get, known_parameters, methods, names, suggest
from magic_fast.methods.spec import MethodSpec


@dataclass
class Checker:
    """Collects ``problems`` (fatal) and ``warnings`` (kept and logged) of one raw configuration."""

    data: Mapping[str, Any]
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Checker:
        """Check everything; returns itself."""
        self._check_shape()
        self._check_tokenizer()
        method = self._check_method()
        groups = listed_groups(self.data)
        if method is not None:
            self._check_preset(method)
            self._check_base(method)
            for path, group in groups:
                self._check_group(method, path, group)
            self._check_parameters(method, groups)
        return self

    @property
    def base_model(self) -> str | None:
        return reference_or_none(self.data.get("base_model"))

    def _problem(self, path: Path, wrong: str, detail: str) -> None:
        self.problems.append(Problem(path, wrong, detail))

    def _check_method(self) -> MethodSpec | None:
        name = self.data.get("merge_method")
        if not isinstance(name, str):
            return None  # the schema says so
        spec = get(name)
        if spec is None:
            hint = suggest(name.lower().replace("-", "_"), names()) + " Correct it."
            detail = f"expected one of {listed(names())}, got {name!r}.{hint}"
            self._problem(("merge_method",), "unknown method", detail)
        return spec

    def _check_preset(self, method: MethodSpec) -> None:
        preset = self.data.get("preset", "mergekit")
        if preset not in PRESETS:
            return  # the schema says so
        try:
            check_preset(preset, method.name)
        except InputError as error:
            self._problem(("preset",), "preset without this method", str(error))

    def _check_shape(self) -> None:
        for path, part in parts(self.data):
            keys = ("models", "slices") if path else ("models", "slices", "modules")
            given = [key for key in keys if part.get(key) is not None]
            if len(given) == 1:
                continue
            got = " and ".join(given) if given else "none of them"
            self._problem(
                (*path, given[-1]) if given else path,
                "what to merge is not clear",
                f"expected one of {listed(keys)}, got {got}. List whole models under 'models:', or "
                "ranges of layers under 'slices:'.",
            )
        if isinstance(self.data.get("modules"), Mapping) and not self.data["modules"]:
            self._problem(
                ("modules",), "empty", "expected at least one module, got none. Name one."
            )
        for path, _ in listed_groups(self.data):
            piece = slice_of(path)
            if piece is not None and owners(self.data, path)[-1][1].get("residual_weight"):
                self._warn((*piece, "residual_weight"), "no effect, as in mergekit")

    def _check_tokenizer(self) -> None:
        groups = [entry.model for _, group in listed_groups(self.data) for entry in group]
        self.problems.extend(check_tokenizer(self.data, {self.base_model, *groups}))
        fault = check_template(self.data.get("chat_template"))
        if fault is not None:
            self._problem(("chat_template",), "unknown chat template", f"{fault} Correct it.")

    def _check_base(self, method: MethodSpec) -> None:
        groups = listed_groups(self.data)
        if groups and all(base_of(self.data, path) is not None for path, _ in groups):
            entries = [entry.model for _, group in groups for entry in group]
            if method.base == "none" and self.base_model not in (None, *entries):
                self._warn(
                    ("base_model",),
                    f"{method.name} has no base; it only donates config and tokenizer",
                )
            return
        if method.base == "required":
            why = f"{method.name} needs the model that task vectors start from"
            if method.name == "slerp":
                why = "slerp goes from base_model (t = 0) to the other model (t = 1)"
        elif self.data.get("calibrate") is not None:
            why = "calibrate measures how far each model moved from it"
        else:
            return
        self._problem(
            ("base_model",),
            "missing key",
            f"expected the path of the base checkpoint ({why}), got nothing. Add 'base_model:'.",
        )

    def _check_group(self, method: MethodSpec, path: Path, group: list[Entry]) -> None:
        """How many models, which of them the base, and their layer ranges."""
        if not group:
            self._problem(path, "empty list", "expected at least one model, got []. Add one.")
            return
        base = base_of(self.data, path)
        base = base if method.uses_base(base) else None
        bases = [entry for entry in group if base is not None and entry.model == base]
        if len(bases) > 1:
            self._problem(
                bases[1].path,
                "base listed twice",
                f"expected {base!r} once, got it again. Remove one.",
            )
        experts = len(group) - len(bases)
        most = method.max_experts
        if experts < method.min_experts or (most is not None and experts > most):
            wanted = (
                f"at least {method.min_experts}"
                if most is None
                else f"exactly {most}"
                if most == method.min_experts
                else f"{method.min_experts} to {most}"
            )
            beside = " beside base_model" if base is not None else ""
            self._problem(
                path,
                "wrong number of models",
                f"expected {wanted}{beside} for {method.name}, got {experts}. Correct the list.",
            )
        names = [entry.model for entry in group if entry.model is not None and entry not in bases]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.warnings.append(f"{show_path(path)}: {name} is listed twice; each counts.")
        if slice_of(path) is not None:
            needs = base is not None or self.data.get("calibrate") is not None
            appended = base_of(self.data, path) if needs else None
            self._check_ranges(path, group, appended=appended)

    def _check_ranges(self, path: Path, group: list[Entry], appended: str | None) -> None:
        ranges: list[tuple[int, int]] = []
        for entry in group:
            given = entry.raw.get("layer_range")
            if not isinstance(given, list | tuple) or [type(x) for x in given] != [int, int]:
                continue  # the schema says so
            start, end = given
            if start == end:
                self._problem(
                    (*entry.path, "layer_range"),
                    "no layer",
                    f"expected [first, end) with first < end, got {list(given)} for {entry.model}. "
                    "Remove the slice; to take what is outside the layers from one model, give "
                    "its weight a filter: {filter: lm_head, value: 1}.",
                )
            elif start < 0 or end <= start:
                self._problem(
                    (*entry.path, "layer_range"),
                    "impossible range",
                    f"expected [first, end) with 0 <= first < end, got {list(given)} for "
                    f"{entry.model}. Correct it.",
                )
            elif ranges and end - start != ranges[0][1] - ranges[0][0]:
                self._problem(
                    (*entry.path, "layer_range"),
                    "unequal number of layers",
                    f"expected {ranges[0][1] - ranges[0][0]} layers as in the first source of "
                    f"{show_path(path[:-1])}, got {list(given)} for {entry.model}. Correct it.",
                )
            ranges.append((start, end))
        listed_base = any(entry.model == appended for entry in group)
        if appended is not None and not listed_base and len(set(ranges)) > 1:
            self._problem(
                path,
                "base without a layer_range",
                f"expected {appended!r} among the sources, because their ranges differ, got only "
                f"{listed(e.model or '?' for e in group)}. List it with its layer_range.",
            )

    def _check_parameters(self, method: MethodSpec, groups: Groups) -> None:
        top = self._block(method, (), self.data, "shared")
        for path, group in groups:
            shared = top
            above = owners(self.data, path)
            for place, owner in above:
                shared |= self._block(method, place, owner, "shared")
            base = base_of(self.data, path)
            for entry in group:
                is_base = method.uses_base(base) and entry.model == base
                self._block(method, entry.path, entry.raw, "base" if is_base else "expert")
            for spec in method.parameters:
                if spec.required and spec.scope == "per_tensor" and shared.isdisjoint(spec.names):
                    where: Path = (*(above[-1][0] if above else ()), "parameters")
                    self._problem(
                        (*where, spec.name),
                        "missing parameter",
                        f"expected {spec.expected()}, got nothing. Add '{spec.name}:' under "
                        "'parameters:'.",
                    )

    def _block(
        self, method: MethodSpec, path: Path, owner: Mapping[str, Any], role: str
    ) -> frozenset[str]:
        """Check one ``parameters:`` block; returns the names that it sets."""
        block = owner.get("parameters")
        if not isinstance(block, Mapping):
            return frozenset()
        path = (*path, "parameters")
        for name, setting in block.items():
            spec = method.find(name)
            if spec is None:
                self._foreign(method, (*path, name), name)
                continue
            self.problems.extend(check_setting(spec, setting, (*path, name)))
            if spec.names and sum(block.get(n) is not None for n in spec.names) > 1:
                self._problem(
                    (*path, spec.name),
                    "two names of one parameter",
                    f"expected one of {listed(spec.names)}, got both. Remove one.",
                )
            if role == "base":
                self._warn((*path, name), "the base has no parameters; ignored")
            elif role == "expert" and spec.scope == "per_tensor":
                self._warn(
                    (*path, name),
                    "one value for the merge, not one a model; ignored. "
                    "Set it under the top-level 'parameters:'",
                )
        return frozenset(name for name, setting in block.items() if setting is not None)

    def _foreign(self, method: MethodSpec, path: Path, name: Any) -> None:
        if name in NO_EFFECT:
            self._warn(path, f"no effect: {NO_EFFECT[name]}")
        elif name in known_parameters():
            others = [row.name for row in methods().values() if row.find(name)]
            few = listed(others[:4]) + (", ..." if len(others) > 4 else "")
            self._warn(path, f"{method.name} has no such parameter (it belongs to {few}); ignored")
        else:
            own = method.parameter_names()
            hint = suggest(name, own) or suggest(name, known_parameters())
            detail = f"expected one of {listed(own)} under {method.name}, got {str(name)!r}.{hint}"
            self._problem(path, "unknown parameter", f"{detail} Correct it.")

    def _warn(self, path: Path, text: str) -> None:
        self.warnings.append(f"{show_path(path)}: {text}.")
