"""Tiny specialists to try calibration on: drawn glyphs, a small encoder, trained here in seconds.

The base names ten glyphs (the digits of a seven-segment display, drawn with jitter, shift and noise
on 8 × 8 pixels) under several transforms. The expert of a task learns a frozen random head for the
glyphs under one of the transforms, as after fine-tuning for another set of labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
