"""The specialists of the demo: trained once, loaded after; the table tells what was scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from magic_fast.cli import demo_accuracy as demo_experts
from magic_fast.cli.demo_accuracy import (
    CALIBRATIONS,
    MERGES,
    AccuracyTable,
    Recipe,
    accuracy_table,
    draw,
    specialists,
)

SHORT = Recipe(width=16, base_steps=20, expert_steps=10, batch=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the demo runs it: such small products are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = specialists(tmp_path, SHORT)

    def refuse(recipe: Recipe) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo_experts, "_train", refuse)
    loaded = specialists(tmp_path, SHORT)
    assert list(loaded.experts) == list(made.experts)
    for task, expert in made.experts.items():
        for name, tensor in expert.items():
            assert torch.equal(loaded.experts[task][name], tensor)
            assert name.endswith("bias") or not torch.equal(made.base[name], tensor)
        assert torch.equal(loaded.heads[task], made.heads[task])
    with pytest.raises(AssertionError, match="trained again"):  # another recipe
        specialists(tmp_path, Recipe(width=16, base_steps=21, expert_steps=10, batch=16))


def test_the_same_seed_gives_the_same_table(tmp_path: Path) -> None:
    first = accuracy_table(tmp_path / "a", SHORT)
    assert accuracy_table(tmp_path / "b", SHORT) == first
    assert set(first.merged) == {(m, c) for m in MERGES for c in CALIBRATIONS}


def test_glyphs_differ_and_stay_in_the_picture() -> None:
    images, labels = draw(400, torch.Generator().manual_seed(0))
    assert images.shape == (400, 8, 8) and set(labels.tolist()) == set(range(10))
    means = torch.stack([images[labels == g].mean(0) for g in range(10)])
    assert float(torch.pdist(means.flatten(1)).min()) > 0.3


def test_lines() -> None:
    scores = {(m, c): 0.5 + 0.1 * i for m in MERGES for i, c in enumerate(CALIBRATIONS)}
    lines = list(AccuracyTable(0.1, 0.95, scores).lines())
    assert lines[0].split() == list(CALIBRATIONS)
    assert lines[1] == "average            50.0%   60.0%   70.0%   80.0%"
    assert lines[-1] == "base 10.0%, each expert on its own task 95.0%"


def test_experts_learn() -> None:
    """With a quarter of the demo's steps each expert beats the base at its own task."""
    from magic_fast.cli.demo_accuracy import _Judge

    recipe = Recipe(width=64, base_steps=150, expert_steps=60)
    found = demo_experts._train(recipe)
    judge = _Judge(found, demo_experts.new_encoder(recipe.width), 5)
    for task, expert in found.experts.items():
        assert judge.of_task(expert, task) > judge.of_task(found.base, task) + 0.1
