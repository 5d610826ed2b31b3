"""Other libraries' own tests pass with our functions in place as they do without. `make suites`
fetches them from their source distributions; they are not ours and not committed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LOCAL_MODELS = Path(__file__).with_name("peft_local_models.py")
MERGEKIT = (
    "test_basic_merges.py",
    "test_batched_merges.py",
    "test_config_parameters.py",
    "test_easy_define.py",
    "test_embedding_truncation.py",
    "test_merge_dtypes.py",
    "test_merge_method_interface.py",
    "test_merge_method_regressions.py",
    "test_sparsify.py",
    "test_tokenizer.py",
    "test_vocabulary_axis.py",
)


def test_weighted_adapters_of_peft(suite_outcomes: Callable[..., Any]) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")
    own, ours = suite_outcomes(
        "peft", ("test_custom_models.py",), "-k", "weighted", str(LOCAL_MODELS)
    )
    assert ours == own
    passed = [name for name, outcome in ours.items() if outcome == "passed"]
    assert len(passed) >= 12, own
    assert {"passed", "skipped"} >= set(own.values()), own


def test_merges_and_sparsification_of_mergekit(
    registry: dict[str, Any], suite_outcomes: Callable[..., Any]
) -> None:
    own, ours = suite_outcomes("mergekit", MERGEKIT)
    assert {"passed", "skipped"} >= set(own.values()), own
    assert list(own.values()).count("passed") > 400, own
    assert {name: ours.get(name) for name in own} == own
    # One of its tests takes every method of the registry: there ours are, and pass.
    from magic_fast.integrations import mergekit

    with mergekit.install() as done:
        more = {name: outcome for name, outcome in ours.items() if name not in own}
        assert set(more.values()) == {"passed"}
        assert {name.rpartition("[")[2].rstrip("]") for name in more} == set(done.added)
