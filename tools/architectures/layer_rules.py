"""Which lists of layers the configurations of transformers make by themselves, by which rule.

``python tools/architectures/layer_rules.py`` writes ``magic_fast/models/layer_rules.json``: for
each model type the list → rule:

``["every", period, field, at, other, shift]``
    ``at`` where (layer + shift) is a multiple of the period, which ``field`` may state, else
    ``other``
``["after", field, default, switch, before, after]``
    ``after`` from layer ``field`` on, where there is a sliding window and ``switch``, if any, is
    on

A rule stands there only where it gives the lists of the installed transformers for several depths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[2] / "magic_fast" / "models" / "layer_rules.json"
LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
FIELDS = (
    "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval",
    "global_attn_every_n_layers", "no_rope_layer_interval", "layer_group_size",
)  # fmt: skip
DEPTHS = (23, 24, 25, 36)


def listed(model_type: str, key: str, depth: int, **fields: Any) -> list[Any] | None:
    """The list that a configuration of this depth makes by itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[model_type](num_hidden_layers=depth, **fields)
        value = getattr(config, key, None)
    except Exception:
        return None
    return list(value) if isinstance(value, list | tuple) and len(value) == depth else None


def every(depth: int, period: int, at: Any, other: Any, shift: int) -> list[Any]:
    return [other if (i + shift) % period else at for i in range(depth)]


def after(depth: int, start: int, before: Any, then: Any) -> list[Any]:
    return [before if i < start else then for i in range(depth)]


def rule_of(model_type: str, key: str) -> list[Any] | None:
    """The rule of one list, or None where no known one gives it."""
    known = {depth: listed(model_type, key, depth) for depth in DEPTHS}
    if any(value is None for value in known.values()):
        return None
    kinds = {kind for value in known.values() for kind in value or ()}
    if len(kinds) == 1:
        return _windowed(model_type, key, kinds.pop())
    for period in range(2, 9):
        for shift in (0, 1):
            for at in sorted(kinds, key=str):
                other = next(iter(kinds - {at}))
                if len(kinds) == 2 and all(
                    value == every(depth, period, at, other, shift)
                    for depth, value in known.items()
                ):
                    return ["every", period, _field(model_type, key, period, at, other, shift), at,
                            other, shift]  # fmt: skip
    return None


def _field(model_type: str, key: str, period: int, at: Any, other: Any, shift: int) -> str | None:
    want = every(24, period + 1, at, other, shift)
    for field in FIELDS:
        if listed(model_type, key, 24, **{field: period + 1}) == want:
            return field
    return None


def _windowed(model_type: str, key: str, plain: Any) -> list[Any]:
    """One kind by default; another one from some layer on where a window is switched on."""
    fields = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 5}
    value = listed(model_type, key, 24, **fields)
    if value is not None and len(set(value)) == 2 and value == after(24, 5, plain, value[-1]):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        default = CONFIG_MAPPING[model_type]().max_window_layers
        fields["use_sliding_window"] = False
        switch = None if listed(model_type, key, 24, **fields) == value else "use_sliding_window"
        return ["after", "max_window_layers", default, switch, plain, value[-1]]
    return ["every", 1, None, plain, plain, 0]


def rules() -> dict[str, dict[str, list[Any]]]:
    """Model type → list → rule."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, dict[str, list[Any]]] = {}
    for model_type in sorted(CONFIG_MAPPING.keys()):
        for key in LISTS:
            rule = rule_of(model_type, key)
            if rule is not None:
                found.setdefault(model_type, {})[key] = rule
    return found


def text() -> str:
    lines = [f"{json.dumps(t)}: {json.dumps(r)}" for t, r in rules().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    OUT.write_text(text())
