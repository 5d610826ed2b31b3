"""The schema library's faults in our words."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from magic_fast.config.problems import Path, Problem, listed
from magic_fast.methods.registry import get, known_parameters, suggest

#: Path without list indices -> the model that describes the mapping there.
Owners = Mapping[Path, type[BaseModel]]

#: Keys that mergekit has and magic_fast does not: what they are, to say so. Null is accepted.
UNSUPPORTED = {
    "name": "it belongs to files of several merges (mergekit-multi). Remove it, or add the merges "
    "that use it",
    "lora": "adapters are not supported here. Merge the adapter into its model first",
}


def translate(error: ValidationError, owners: Owners) -> list[Problem]:
    """pydantic's faults in our words."""
    problems = []
    for fault in error.errors(include_url=False):
        path = tuple(part for part in fault["loc"] if not str(part).startswith("<"))
        if fault["type"] == "extra_forbidden":
            problems.append(_unknown_key(path, owners))
        elif fault["type"] == "missing":
            text = f"expected '{path[-1]}', got nothing. Add '{path[-1]}:' there."
            problems.append(Problem(path, "missing key", text))
        elif fault["type"] == "value_error":
            text = str(fault.get("ctx", {}).get("error", fault["msg"]))
            problems.append(Problem(path, "bad value", f"{text}. Correct it."))
        else:
            text = fault["msg"].replace("Input should be ", "expected ")
            text = text if text.startswith("expected ") else f"expected a valid value ({text})"
            got = repr(fault["input"])
            got = got if len(got) <= 80 else got[:77] + "..."
            hint = ""
            if fault["type"] == "literal_error":
                hint = suggest(fault["input"], fault["ctx"]["expected"].replace("'", " ").split())
            problems.append(Problem(path, "bad value", f"{text}, got {got}.{hint} Correct it."))
    return problems


def _unknown_key(path: Path, owners: Owners) -> Problem:
    key = path[-1]
    if key in UNSUPPORTED:
        return Problem(
            path, "unsupported key", f"expected no '{key}', got one: {UNSUPPORTED[str(key)]}."
        )
    known = _fields_at(path[:-1], owners)
    hint = suggest(key, known) + " Correct it."
    if "parameters" in known and key in known_parameters():
        hint = " It is a parameter: move it under 'parameters:' there."
    elif key == "layer_range":
        hint = " Ranges of layers belong to 'slices:'."
    elif isinstance(key, str) and get(key) is not None:
        hint = f" Write 'merge_method: {key}'."
    return Problem(path, "unknown key", f"expected one of {listed(known)}, got {key!r}.{hint}")


def _fields_at(path: Path, owners: Owners) -> tuple[str, ...]:
    """The keys that are known at a place of the document."""
    words = tuple(part for part in path if isinstance(part, str))
    if words[:1] == ("modules",):  # what a module is called is its user's choice
        words = words[2:] or words[:1]
    owner = owners.get(words)
    return tuple(owner.model_fields) if owner is not None else ()
