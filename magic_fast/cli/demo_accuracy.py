"""What calibration does to accuracy, on specialists that are trained on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from magic_fast.cli.demo_experts import (
    TRANSFORMS,
    Recipe,
    Specialists,
    State,
    draw,
    new_encoder,
    specialists,
)

MERGES = ("average", "task_arithmetic", "ties", "tsv_m")
CALIBRATIONS = ("none", "WSC", "FSC", "DSC")
SAMPLES = 32  # unlabelled images of each task, for FSC and DSC
TESTED = 1000  # images of each task


@dataclass(frozen=True)
class AccuracyTable:
    """Mean accuracy over the tasks.

    Attributes:
        base, experts: the bounds: the base on all tasks, each expert on its own.
        merged: (merge, calibration) → that of the one merged model.
    """

    base: float
    experts: float
    merged: dict[tuple[str, str], float]

    def lines(self) -> Iterator[str]:
        yield f"{'':16}" + "".join(f"{name:>8}" for name in CALIBRATIONS)
        for merge in MERGES:
            values = (self.merged[merge, name] for name in CALIBRATIONS)
            yield f"{merge:16}" + "".join(f"{100 * value:7.1f}%" for value in values)
        yield f"base {100 * self.base:.1f}%, each expert on its own task {100 * self.experts:.1f}%"


def accuracy_table(folder: Path, recipe: Recipe | None = None) -> AccuracyTable:
    """Merges the specialists of ``folder`` (trained first where there are none) and calibrates in
    three ways: WSC without data, FSC and DSC with unlabelled images. Test images and those of the
    calibration are drawn from other seeds than the training's."""
    import magic_fast as mf

    recipe = recipe or Recipe()
    found = specialists(folder, recipe)
    models = list(found.experts.values())
    encoder = new_encoder(recipe.width).eval()
    unlabelled = {t: [images] for t, (images, _) in _images(recipe.seed + 7777, SAMPLES).items()}
    judge = _Judge(found, encoder, recipe.seed + 8888)
    merged = {}
    for merge in MERGES:
        plain: State = mf.merge(found.base, models, merge)
        merged[merge, "none"] = judge(plain)
        merged[merge, "WSC"] = judge(mf.calibrate_weights(found.base, models, plain)[0])
        for name, space in (("FSC", "feature"), ("DSC", "dual")):
            state, _ = mf.calibrate_features(
                found.base, found.experts, plain, unlabelled, model=encoder, space=space
            )
            merged[merge, name] = judge(state)
    own = [judge.of_task(state, task) for task, state in found.experts.items()]
    return AccuracyTable(judge(found.base), sum(own) / len(own), merged)


def accuracy_lines(folder: Path) -> list[str]:
    """The table as text; in a process of its own, on one thread: the models are too small for
    two."""
    torch.set_num_threads(1)
    return list(accuracy_table(folder).lines())


def _images(seed: int, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    drawn = {}
    for k, (task, transform) in enumerate(TRANSFORMS.items()):
        images, labels = draw(count, torch.Generator().manual_seed(seed + 1000 * k))
        drawn[task] = (transform(images), labels)
    return drawn


class _Judge:
    def __init__(self, found: Specialists, encoder: torch.nn.Module, seed: int) -> None:
        self._heads, self._encoder = found.heads, encoder
        self._tests = _images(seed, TESTED)

    def of_task(self, state: State, task: str) -> float:
        self._encoder.load_state_dict(state)
        images, labels = self._tests[task]
        with torch.no_grad():
            guess = (self._encoder(images) @ self._heads[task].T).argmax(1)
        return float(guess.eq(labels).double().mean())

    def __call__(self, state: State) -> float:
        return sum(self.of_task(state, task) for task in self._tests) / len(self._tests)
