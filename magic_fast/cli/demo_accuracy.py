"""What calibration does to accuracy, on tiny specialists that are trained on the spot: drawn glyphs
and a small encoder, in seconds.

The base names ten glyphs (the digits of a seven-segment display, drawn with jitter, shift and noise
on 8 × 8 pixels) under several transforms. The expert of a task learns a frozen random head for the
glyphs under one of the transforms, as after fine-tuning for another set of labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MERGES = ("average", "task_arithmetic", "ties", "tsv_m")
CALIBRATIONS = ("none", "WSC", "FSC", "DSC")
SAMPLES = 32  # unlabelled images of each task, for FSC and DSC
TESTED = 1000  # images of each task
GLYPHS = 10
#: Rows and columns of the segments a to g.
_SEGMENTS = (
    (slice(1, 2), slice(2, 6)), (slice(1, 4), slice(5, 6)), (slice(4, 7), slice(5, 6)),
    (slice(6, 7), slice(2, 6)), (slice(4, 7), slice(2, 3)), (slice(1, 4), slice(2, 3)),
    (slice(3, 4), slice(2, 6)),
)  # fmt: skip
_LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
_NOISE = 0.1

State = dict[str, Tensor]
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "mirrored": lambda x: x.flip(2),
    "inverted": lambda x: 1 - x,
    "upside down": lambda x: x.flip(1),
    "transposed": lambda x: x.transpose(1, 2),
}


@dataclass(frozen=True)
class Recipe:
    """How much is trained; part of the cache's stamp."""

    width: int = 128
    base_steps: int = 1200
    expert_steps: int = 200
    batch: int = 64
    seed: int = 0


@dataclass
class Specialists:
    """A base, an expert for each task, and the tasks' frozen heads [glyphs, width]."""

    base: State
    experts: dict[str, State]
    heads: dict[str, Tensor]


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 8, 8] and which glyph each shows."""
    labels = torch.randint(GLYPHS, (count,), generator=generator)
    strength = 0.5 + 0.5 * torch.rand(count, len(_SEGMENTS), generator=generator)
    lit = torch.tensor([[float(s in word) for s in "abcdefg"] for word in _LIT])[labels]
    images = torch.zeros(count, 8, 8)
    for i, (rows, columns) in enumerate(_SEGMENTS):
        value = (strength[:, i] * lit[:, i])[:, None, None]
        images[:, rows, columns] = torch.maximum(images[:, rows, columns], value)
    shifts = torch.randint(-1, 2, (count, 2), generator=generator)
    down, across = ((torch.arange(8) - shifts[:, axis : axis + 1]) % 8 for axis in (0, 1))
    images = images[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]]
    return images + _NOISE * torch.randn(images.shape, generator=generator), labels


def new_encoder(width: int) -> nn.Module:
    """Images [n, 8, 8] → features [n, width]."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(3):
        layers += [nn.Linear(64 if i == 0 else width, width), nn.LayerNorm(width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, width))


def specialists(folder: Path, recipe: Recipe | None = None) -> Specialists:
    """Trains base and experts, or loads those that an earlier call with the same recipe left in
    ``folder``."""
    from safetensors.torch import load_file, save_file

    recipe = recipe or Recipe()
    file, stamp = folder / "specialists.safetensors", folder / "specialists.json"
    made_of = {**asdict(recipe), "tasks": list(TRANSFORMS), "version": 1}
    if stamp.is_file() and json.loads(stamp.read_text()) == made_of and file.is_file():
        return _unpacked(load_file(file))
    found = _train(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)  # written last: what lacks it is not whole
    save_file(_packed(found), file)
    stamp.write_text(json.dumps(made_of, indent=2) + "\n")
    return found


def _train(recipe: Recipe) -> Specialists:
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = new_encoder(recipe.width)
    head = nn.Parameter(torch.randn(GLYPHS, recipe.width, generator=generator) / recipe.width**0.5)
    _fit(encoder, head, list(TRANSFORMS), recipe.base_steps, 2e-3, recipe.batch, generator)
    base = _state(encoder)
    found = Specialists(base, {}, {})
    for k, task in enumerate(TRANSFORMS):
        own = torch.Generator().manual_seed(1000 * recipe.seed + k + 1)
        frozen = torch.randn(GLYPHS, recipe.width, generator=own) * (0.5 / recipe.width**0.5)
        encoder.load_state_dict(base)
        _fit(encoder, frozen, [task], recipe.expert_steps, 5e-4, recipe.batch, own)
        found.experts[task], found.heads[task] = _state(encoder), frozen
    return found


def _fit(
    encoder: nn.Module,
    head: Tensor,
    tasks: list[str],
    steps: int,
    rate: float,
    batch: int,
    generator: torch.Generator,
) -> None:
    learnt = [*encoder.parameters(), *([head] if head.requires_grad else [])]
    optimizer = torch.optim.AdamW(learnt, rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        images, labels = draw(batch, generator)
        shown = TRANSFORMS[tasks[step % len(tasks)]](images)
        loss = F.cross_entropy(encoder(shown) @ head.T, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def _state(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _packed(found: Specialists) -> State:
    models = {"base": found.base, **{f"expert/{t}": s for t, s in found.experts.items()}}
    flat = {f"{model}/{n}": t for model, state in models.items() for n, t in state.items()}
    return flat | {f"head/{task}": head for task, head in found.heads.items()}


def _unpacked(flat: State) -> Specialists:
    def under(prefix: str) -> State:
        return {n.removeprefix(prefix): t for n, t in flat.items() if n.startswith(prefix)}

    experts = {task: under(f"expert/{task}/") for task in TRANSFORMS}
    return Specialists(under("base/"), experts, under("head/"))


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
