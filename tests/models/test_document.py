"""What docs/models.md says of architectures is what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from architectures import document, shrink
from magic_fast.models import table


def test_it_is_current(root: Path) -> None:
    import transformers

    if transformers.__version__ != table.heading()["transformers"]:
        pytest.skip("types whose layers are sliced are those of another transformers")
    sliced = sum(shrink.sliced_class(t) is not None for t in table.model_types())
    text = (root / "docs" / "models.md").read_text(encoding="utf-8")
    assert document.updated(text, sliced) == text, "run make architectures"


def test_every_type_is_named_once() -> None:
    text = "\n".join(document.layouts())
    named = [word.strip("†.,:|") for line in text.splitlines() for word in line.split()]
    assert all(named.count(model_type) == 1 for model_type in table.model_types()
               if not {model_type} & {"layers"})  # fmt: skip
