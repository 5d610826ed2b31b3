"""The table of architectures that ships with the package: one line for each model type, of which
only the wanted one is parsed.

The first line of ``architectures.jsonl`` says what the table was generated from. Every other is
``"model_type"``, a tab, and the entry of that type (magic_fast/models/built says what is in it).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

NAME = "architectures.jsonl"


@cache
def _text() -> bytes:
    return Path(__file__).with_name(NAME).read_bytes()


@cache
def entry_of(model_type: str) -> Entry | None:
    """The entry of a model type, or None where the table has none."""
    text = _text()
    key = f"\n{json.dumps(model_type)}\t".encode()
    start = text.find(key)
    if start < 0:
        return None
    start += len(key)
    entry: Entry = json.loads(text[start : text.find(b"\n", start)])
    return entry


@cache
def heading() -> Entry:
    """What the table was generated from: the version of transformers, and the renamings that it
    applies to every model."""
    text = _text()
    entry: Entry = json.loads(text[: text.find(b"\n")])
    return entry


def model_types() -> list[str]:
    """Every model type of the table, sorted."""
    lines = _text().decode().splitlines()[1:]
    return [json.loads(line.partition("\t")[0]) for line in lines]
