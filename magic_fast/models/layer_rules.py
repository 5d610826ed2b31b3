"""Lists of layers that a configuration does not write out: what its model makes of it by itself.

``layer_rules.json`` is generated (``make architectures``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

#: Fields from which a model takes a list before it goes by its rule.
_FIRST = ("full_attn_idxs", "attn_layer_indices", "no_rope_layers", "hybrid_override_pattern")


@cache
def _rules() -> dict[str, dict[str, list[Any]]]:
    path = Path(__file__).with_name("layer_rules.json")
    rules: dict[str, dict[str, list[Any]]] = json.loads(path.read_text())
    return rules


def listed_by_rule(model_type: str) -> tuple[str, ...]:
    """The lists of layers that a model type makes by a known rule."""
    return tuple(_rules().get(model_type, ()))


def implied(model_type: str, part: Mapping[str, Any], key: str, count: int) -> list[Any] | None:
    """The list ``key`` that a model of ``count`` layers makes where ``part`` of its configuration
    has none, or None where that is not known.

    >>> implied("gemma3_text", {"sliding_window_pattern": 3}, "layer_types", 4)
    ['sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention']
    """
    rule = _rules().get(model_type, {}).get(key)
    if rule is None or any(part.get(field) for field in _FIRST if field != key):
        return None
    if rule[0] == "after":
        _, field, default, switch, before, then = rule
        on = part.get("sliding_window") is not None and (switch is None or part.get(switch))
        start = part.get(field, default) if on else count
        return [before if i < start else then for i in range(count)]
    kind, number, field, at, other, *more = rule
    stated = [part.get(f) for f in (field, f"_{field}") if field is not None]
    number = next((value for value in stated if value is not None), number)
    if type(number) is not int or number < (kind == "every"):
        return None
    if kind == "first":
        return [at if i < number else other for i in range(count)]
    shift, *last = more
    if number == 1 and at == other and part.get("use_sliding_window"):
        return None
    front = range(count - len(last))
    return [*(other if (i + shift) % number else at for i in front), *last]
