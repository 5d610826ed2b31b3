"""Settings of one list of models, compiled once and evaluated per tensor.

Precedence is mergekit's: the source's own ``parameters``, then its slice's, then the top-level
ones, then the preset's default. A level whose filters do not match passes to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magic_fast.config.settings import evaluate, filters_of
from magic_fast.errors import ConfigError
from magic_fast.methods.spec import MethodSpec, ParameterSpec, Value

Settings = Mapping[str, Any]
_Values = tuple[dict[str, Value], dict[str, tuple[Value, ...]]]


class _Chain:
    """One parameter's settings from the nearest level to the default."""

    def __init__(self, spec: ParameterSpec, levels: Sequence[Settings], preset: str) -> None:
        self.spec = spec
        self.preset = preset
        self.settings = [
            level[name] for level in levels for name in spec.names if level.get(name) is not None
        ]
        default = spec.default_for(preset)
        if default is not None:
            self.settings.append(default)

    def at(self, name: str, t: float) -> Value | None:
        """The value for one tensor; None where nothing is set and the method decides."""
        for setting in self.settings:
            value = evaluate(setting, name, t)
            if value is not None:
                return self.spec.normalized(value, self.preset)
        if self.spec.required:
            raise ConfigError(
                f"no value of {self.spec.name} for {name}: expected {self.spec.expected()}, got no "
                "matching filter. Add an entry without a filter: '- value: ...'."
            )
        return None


class GroupParameters:
    """All parameters of a method for one list of experts.

    Args:
        method: which parameters there are.
        preset: whose defaults hold.
        shared: top-level settings, the slice's first.
        experts: the own settings of each expert.
    """

    def __init__(
        self,
        method: MethodSpec,
        preset: str,
        shared: Sequence[Settings],
        experts: Sequence[Settings],
    ) -> None:
        self._shared = {
            spec.name: _Chain(spec, shared, preset)
            for spec in method.parameters
            if spec.scope == "per_tensor"
        }
        self._own = {
            spec.name: tuple(_Chain(spec, [own, *shared], preset) for own in experts)
            for spec in method.parameters
            if spec.scope == "per_model"
        }
        chains = [*self._shared.values(), *(c for own in self._own.values() for c in own)]
        self._words = tuple(
            dict.fromkeys(w for c in chains for s in c.settings for w in filters_of(s))
        )
        self._known: dict[tuple[float, tuple[bool, ...]], _Values] = {}

    def at(self, name: str, t: float) -> _Values:
        """``(parameters, expert_parameters)`` of one tensor; shared, so not to be changed."""
        # A value depends on t and on which filters match: a few hundred cases, not one a tensor.
        key = (t, tuple([word in name for word in self._words]))
        if key not in self._known:
            self._known[key] = self._evaluate(name, t)
        return self._known[key]

    def _evaluate(self, name: str, t: float) -> _Values:
        shared = {key: chain.at(name, t) for key, chain in self._shared.items()}
        parameters = {key: value for key, value in shared.items() if value is not None}
        own = {key: tuple(c.at(name, t) for c in chains) for key, chains in self._own.items()}
        expert_parameters = {
            key: tuple(value for value in values if value is not None)
            for key, values in own.items()
            if None not in values
        }
        return parameters, expert_parameters
