"""Tiny configurations of any model type: the default one with few layers, all of them narrow.

``shrink.json`` has the rules, by the names of fields, and what single types want besides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magic_fast.models.built import classes

_DATA = json.loads(Path(__file__).with_suffix(".json").read_text())
#: Words of every vocabulary.
WORDS: int = _DATA["words"]
#: What of whole-model tests fails → model type → the reason.
LEFT_OUT: dict[str, dict[str, str]] = _DATA["left_out"]
#: Tasks whose classes give logits of text, or of text and image, the first first.
TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION")
_FIELDS = json.loads(Path(__file__).with_name("fields.json").read_text())
_RULES = [(re.compile(pattern), most) for pattern, most in _DATA["rules"]]
_COUNTS = re.compile(_DATA["counts_of_layers"])
_NUMBERS = re.compile(_DATA["numbers_of_layers"])
_KEYS = re.compile("key_value_heads$")
_STAGES = ("out_features", "out_indices")


def default_config(model_type: str) -> Any:
    """The default configuration of a type, with the fields that it lacks."""
    fields = _FIELDS.get(model_type, {})
    return classes.config_class(model_type)(**(fields[0] if isinstance(fields, list) else fields))


def tiny_config(model_type: str) -> Any:
    """The shrunk configuration of a type."""
    plain = _Shrinker().part(default_config(model_type).to_dict())
    return classes.config_class(model_type).from_dict(plain)


def sliced_class(model_type: str) -> str | None:
    """The class of a type that gives logits of text, or of text and image, or None."""
    found = (classes.tasks()[task].get(model_type) for task in TASKS)
    return next((name for name in found if name in classes.names(model_type)), None)


class _Shrinker:
    """Shrinks the parts of one configuration."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}

    def part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """One part, with its parts."""
        part = {str(key): value for key, value in part.items()}
        staged = "depths" in part or ("stage_names" in part and not part.get("num_hidden_layers"))
        counts = {} if staged else {
            key: n for key, n in part.items() if type(n) is int and n > 4 and _COUNTS.search(key)
        }  # fmt: skip
        kept = {count: _layers(part, count) for count in set(counts.values())}
        longest = max(kept, default=0)
        result: dict[str, Any] = {}
        for key, value in part.items():
            if kept and value and (_NUMBERS.search(key) or key in _STAGES):
                result[key] = _renumbered(key, value, kept[longest])
            elif key in counts:
                result[key] = len(kept[value])
            elif key == "per_layer_config" and value:
                single = {int(i): self.part(fields) for i, fields in value.items()}
                result[key] = {
                    str(i): single[old] for i, old in enumerate(kept[longest]) if old in single
                }  # fmt: skip
            elif isinstance(value, Mapping):
                result[key] = self.part(value)
            elif isinstance(value, list | tuple) and len(value) in kept:
                result[key] = [self.value(key, value[i], part) for i in kept[len(value)]]
            elif not kept or key != "stage_names":
                result[key] = self.value(key, value, part)
        for path, value in _DATA["types"].get(part.get("model_type"), {}).items():
            _set(result, path, value)
        return result

    def value(self, key: str, value: Any, part: Mapping[str, Any]) -> Any:
        if key.endswith(("_id", "_ids", "_index")):
            return self.token(value)
        if isinstance(value, bool):
            return value
        if _KEYS.search(key) and value == part.get("num_attention_heads"):
            key = "num_attention_heads"
        for pattern, most in _RULES:
            if pattern.search(key):
                return _at_most(key, value, most)
        return value

    def token(self, value: Any) -> Any:
        """Numbers of words that the vocabulary has still."""
        if isinstance(value, list | tuple):
            return [self.token(one) for one in value]
        if type(value) is not int or value < WORDS // 2:
            return value
        return self.words.setdefault(value, WORDS - 1 - len(self.words))


def _set(part: dict[str, Any], path: str, value: Any) -> None:
    """Sets the field at a dotted path, or leaves it out where ``value`` is None."""
    *parts, key = path.split(".")
    for name in parts:
        part = part[name]
    part[key] = value
    if value is None:
        del part[key]


def _layers(part: Mapping[str, Any], count: int) -> list[int]:
    """The layers that stay: one of each kind, two at least, as many as there are stages."""
    lists = [v for key, v in part.items() if isinstance(v, list | tuple) and len(v) == count
             and not _NUMBERS.search(key)]  # fmt: skip
    single = {int(i): fields for i, fields in (part.get("per_layer_config") or {}).items()}
    named = [v for key, v in part.items() if isinstance(v, list) and _NUMBERS.search(key)]
    first: dict[str, int] = {}
    for i in range(count):
        what = [*(v[i] for v in lists), *(i in v for v in named), single.get(i)]
        first.setdefault(repr(what), i)
    kept = sorted(first.values())
    wanted = max(2, *(len(part.get(key) or ()) for key in _STAGES))
    kept += [i for i in range(count) if i not in kept][: max(0, wanted - len(kept))]
    return sorted(kept)


def _renumbered(key: str, value: Any, kept: list[int]) -> Any:
    """Numbers of layers, or names that end in them, among those that stay."""
    if key == "out_features":
        return [f"stage{len(kept) - len(value) + 1 + i}" for i in range(len(value))]
    first = 1 if key == "out_indices" else 0
    if key == "out_indices":
        return [len(kept) - len(value) + first + i for i in range(len(value))]
    return [i for i, old in enumerate(kept) if old in value]


def _at_most(key: str, value: Any, most: int) -> Any:
    """An integer no larger than ``most``; a list of them halved as often as it is too long."""
    if type(value) is int:
        return min(value, most)
    if not isinstance(value, list | tuple) or not value or any(type(v) is not int for v in value):
        return value
    if "heads" in key:
        return [1 << (v.bit_length() - 1) for v in value]
    if len(set(value)) == 1 or most == 1:
        return [min(v, most) for v in value]
    while max(value) > 2 * most and min(value) > 8 and all(v % 2 == 0 for v in value):
        value = [v // 2 for v in value]
    return list(value)
