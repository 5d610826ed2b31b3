"""Which lists of layers the configurations of transformers make by themselves, by which rule.

``python tools/architectures/layer_rules.py`` writes ``magic_fast/models/layer_rules.json``: for
each model type the list → rule:

``["every", period, field, at, other, shift]``
    ``at`` where (layer + shift) is a multiple of the period, which ``field`` may state, else
    ``other``; the last layer is of the kind that may stand behind
``["first", count, field, at, other]``
    ``at`` for the first layers, as many as ``count`` or as ``field`` may state, else ``other``
``["after", field, default, switch, before, after]``
    ``after`` from layer ``field`` on, where there is a sliding window and ``switch``, if any, is
    on

A rule stands there only where it gives the lists of the installed transformers for several depths.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[2] / "magic_fast" / "models" / "layer_rules.json"
LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
FIELDS = (
    "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval",
    "global_attn_every_n_layers", "no_rope_layer_interval", "layer_group_size",
)  # fmt: skip
FIRST = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers", "num_hash_layers")
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


def every(depth: int, period: int, at: Any, other: Any, shift: int, *last: Any) -> list[Any]:
    return [*(other if (i + shift) % period else at for i in range(depth - len(last))), *last]


def after(depth: int, start: int, before: Any, then: Any) -> list[Any]:
    return [before if i < start else then for i in range(depth)]


def rule_of(model_type: str, key: str) -> list[Any] | None:
    """The rule of one list, or None where no known one gives it."""
    known = {depth: listed(model_type, key, depth) for depth in DEPTHS}
    if any(value is None for value in known.values()):
        return None
    lists = {depth: value or [] for depth, value in known.items()}
    kinds = {kind for value in lists.values() for kind in value}
    if len(kinds) == 1:
        return _windowed(model_type, key, kinds.pop())
    if len(kinds) != 2:
        return None
    for at in sorted(kinds, key=str):
        other = next(iter(kinds - {at}))
        count = lists[DEPTHS[0]].count(at)
        if all(value == after(depth, count, at, other) for depth, value in lists.items()):
            fields = [*_equal(model_type, count), *FIRST]
            want = after(24, count + 1, at, other)
            return ["first", count, _field(model_type, key, fields, count + 1, want), at, other]
        for period in range(2, 9):
            for shift, last in itertools.product((0, 1), ([], [at])):
                rule = at, other, shift, *last
                if all(value == every(d, period, *rule) for d, value in lists.items()):
                    plain = None, every(24, period, *rule)
                    if any(listed(model_type, key, 24, **{f: 7}) not in plain for f in FIRST):
                        return None  # not of the period alone
                    want = every(24, period + 1, *rule)
                    field = _field(model_type, key, FIELDS, period + 1, want)
                    return ["every", period, field, *rule]
    return None


def _field(
    model_type: str, key: str, fields: Iterable[str], value: int, want: list[Any]
) -> str | None:
    """The field that gives the wanted list where it states a value."""
    return next((f for f in fields if listed(model_type, key, 24, **{f: value}) == want), None)


def _equal(model_type: str, value: int) -> list[str]:
    """The fields of a configuration that state a value."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = vars(CONFIG_MAPPING[model_type]()).items()
    return [key for key, one in stated if type(one) is int and one == value]


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
    for field in FIRST:
        value = listed(model_type, key, 24, **{field: 7})
        if value is not None and value == after(24, 7, value[0], plain) and value[0] != plain:
            return ["first", 0, field, value[0], plain]
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
