"""Writes the table of architectures (magic_fast/models/architectures.jsonl) from the installed
transformers: every model type, built without weights on the meta device. No network.

    make architectures
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import transformers  # noqa: E402

from magic_fast.models.built import classes  # noqa: E402
from magic_fast.models.built.conversions import legacy  # noqa: E402
from magic_fast.models.built.entries import Description, describe  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "magic_fast" / "models" / "architectures.jsonl"
#: model type → fields of its configuration where the default one is not complete; or a list of
#: them, each of which switches on modules that the others lack.
FIELDS = Path(__file__).with_name("fields.json")


def configurations(model_type: str, fields: dict[str, Any]) -> list[Callable[[], Any]]:
    """What makes the configurations of a type, the first one its own."""
    chosen = fields.get(model_type, {})
    return [
        functools.partial(classes.config_class(model_type), **one)
        for one in (chosen if isinstance(chosen, list) else [chosen])
    ]


def kind_of_part(model_type: str, name: str) -> str | None:
    """Whether a part of that type and class stands in the table by itself, and which tree of it
    is meant."""
    try:
        if name == classes.base_name(model_type):
            return "base"
        return "head" if name in classes.names(model_type) else None
    except KeyError:  # no type of transformers
        return None


def describe_all(model_types: Iterable[str], shipped: Iterable[str] = ()) -> dict[str, Description]:
    """Every type by its name, with what its parts in other types show of it; parts of the types in
    ``shipped`` have entries too."""
    fields = json.loads(FIELDS.read_text())
    result: dict[str, Description] = {}

    def add(model_type: str, kind: Callable[[str, str], str | None]) -> None:
        if sys.stderr.isatty():
            print(f"\r{model_type:60}", end="", file=sys.stderr)
        make, *variants = configurations(model_type, fields)
        result[model_type] = describe(model_type, kind, make, variants)

    for model_type in model_types:
        add(model_type, kind_of_part)
    known = {name for name, description in result.items() if description.primary} | set(shipped)
    for model_type, description in list(result.items()):
        if not description.types <= known:  # a part that stands in the table nowhere else
            add(model_type, lambda part, name: kind_of_part(part, name) if part in known else None)
    for description in list(result.values()):
        for model_type, name, tree in sorted(description.parts, key=lambda part: part[:2]):
            part = result.get(model_type)
            if part is not None and part.primary:
                part.add_part(name, tree)
    return result


def lines(descriptions: dict[str, Description]) -> list[str]:
    """The lines of the table, the heading first."""
    known = {name: d for name, d in descriptions.items() if d.primary}
    heading = {
        "transformers": transformers.__version__,
        "legacy": legacy(),
        "failures": {name: reason(d) for name, d in sorted(descriptions.items()) if not d.primary},
    }
    return [
        _json(heading),
        *(f"{json.dumps(name)}\t{_json(d.entry())}" for name, d in sorted(known.items())),
    ]


def reason(description: Description) -> str:
    """The reason why the table lacks a type."""
    if description.failures:
        return next(iter(description.failures.values()))
    if classes.base_name(description.model_type) is not None:
        return "its class needs a package that is not installed"
    return "no model class of its own"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE)
    output = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    start = time.process_time()
    descriptions = describe_all(classes.model_types())
    text = "\n".join(lines(descriptions)) + "\n"
    output.write_text(text, encoding="utf-8")
    built = sum(bool(d.primary) for d in descriptions.values())
    failed = {f"{c}: {why}" for d in descriptions.values() for c, why in d.failures.items()}
    print(f"{built} of {len(descriptions)} model types, {len(text) / 1e6:.2f} MB, "
          f"{time.process_time() - start:.0f} s")  # fmt: skip
    for one in sorted(failed):
        print(" ", one)


if __name__ == "__main__":
    main()
