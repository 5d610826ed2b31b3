"""Batches with padding give what their samples give alone, or the layer says that padding
counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import TASKS, Case, case_of

COUNTED = "padding counted: which positions of its input are padding is not known"
Batch = dict[str, Tensor]


class Reader(nn.Module):
    """One attention over text, with what else text may come with, and pictures beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(31, 6), nn.Embedding(2, 6)
        self.places, self.boxes = nn.Embedding(12, 6), nn.Embedding(9, 6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.pixels, self.look = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, 6)
        self.regions, self.patches = nn.Linear(5, 6), nn.Linear(4, 6)
        self.out = nn.Linear(6, 3)

    def forward(
        self,
        attention_mask: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        bbox: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_feats: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        patches: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        h = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            h = h + self.types(token_type_ids)
        if position_ids is not None:
            own = position_ids.sum(0) if position_ids.dim() == 3 else position_ids
            h = h + self.places(own)
        if bbox is not None:
            h = h + self.boxes(bbox).sum(-2)
        keep = attention_mask.bool()
        scores = self.q(h) @ self.k(h).transpose(1, 2) * scale
        scores = scores.masked_fill(~keep[:, None], -1e9).softmax(-1)
        h = torch.tanh(h + scores @ self.v(h))
        if pixel_values is not None:
            seen = self.look(torch.tanh(self.pixels(pixel_values).flatten(2).transpose(1, 2)))
            h = h + seen.mean(1, keepdim=True)
        if visual_feats is not None:
            seen = self.regions(visual_feats)
            if visual_attention_mask is not None:
                seen = seen * visual_attention_mask[..., None].to(seen)
            h = h + seen.sum(1, keepdim=True)
        if patches is not None:  # of all pictures, flat
            h = h + self.patches(patches).mean(0)
        out: Tensor = self.out(h)
        return out


MASKS: dict[str, list[list[int]]] = {
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    "both": [[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]],
    "alone": [[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]],
    "square": [[1, 1, 0], [1, 0, 0], [1, 1, 1]],
    "one": [[1], [0], [1]],
    "single": [[1, 1, 1, 0, 0]],
    "four": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
    "five": [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]],
}


def text(mask: Tensor, generator: torch.Generator) -> Batch:
    return {"input_ids": torch.randint(3, 31, mask.shape, generator=generator)}


def everything(mask: Tensor, generator: torch.Generator) -> Batch:
    samples, length = mask.shape
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return text(mask, generator) | {
        "token_type_ids": torch.randint(0, 2, mask.shape, generator=generator),
        "position_ids": places,
        "bbox": torch.randint(0, 9, (samples, length, 4), generator=generator),
    }


def embedded(mask: Tensor, generator: torch.Generator) -> Batch:
    return {"inputs_embeds": torch.randn(*mask.shape, 6, generator=generator).double()}


def pictures(mask: Tensor, generator: torch.Generator) -> Batch:
    shape = (len(mask), 3, 6, 6)
    return text(mask, generator) | {
        "pixel_values": torch.randn(shape, generator=generator).double()
    }


def regions(mask: Tensor, generator: torch.Generator) -> Batch:
    """As many regions of a picture as there are tokens."""
    shape = (*mask.shape, 5)
    return text(mask, generator) | {
        "visual_feats": torch.randn(shape, generator=generator).double()
    }


def masked_regions(mask: Tensor, generator: torch.Generator) -> Batch:
    keep = mask.new_ones(len(mask), 9)
    keep[:, -1] = 0
    seen = torch.randn(*keep.shape, 5, generator=generator).double()
    return text(mask, generator) | {"visual_feats": seen, "visual_attention_mask": keep}


FOLLOW = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "bbox", "inputs_embeds")


def alone(batch: Batch) -> Iterator[Batch]:
    """Its samples, each by itself and without padding."""
    for row, mask in enumerate(batch["attention_mask"].bool()):
        if mask.any():
            yield {
                name: x[row : row + 1][:, mask] if name in FOLLOW else x[row : row + 1]
                for name, x in batch.items()
            }


def made(
    samples: Callable[[Tensor, torch.Generator], Batch],
    mask: str,
    dtype: torch.dtype = torch.int64,
) -> Case:
    rows = torch.tensor(MASKS[mask])

    def batch(generator: torch.Generator) -> Batch:
        return samples(rows, generator) | {"attention_mask": rows.to(dtype)}

    return case_of(lambda: Reader().double(), batch)


def layers(own: Case, data: Any, **settings: Any) -> dict[str, Any]:
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, data, clamp=None, **settings
    )
    return {x.name: x for x in report.layers}


def compare(found: dict[str, Any], wanted: dict[str, Any], counted: tuple[str, ...] = ()) -> None:
    for name, want in wanted.items():
        got = found[name]
        assert (COUNTED in got.note) == (name in counted), name
        if name in counted:
            continue
        if want.coefficient is None:
            assert got.coefficient is None
        else:
            assert got.positions == want.positions, name
            assert float(got.coefficient) == pytest.approx(float(want.coefficient), rel=1e-9), name


@pytest.mark.parametrize("samples", [text, everything, embedded, pictures, regions])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sequential", [False, True])
def test_as_alone(samples: Any, mask: str, sequential: bool) -> None:
    own = made(samples, mask)
    found = layers(own, own.data, sequential=sequential)
    single = {task: [x for b in own.data[task] for x in alone(b)] for task in TASKS}
    compare(found, layers(own, single, sequential=sequential))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    own = made(text, "both", dtype)
    single = {task: [x for b in own.data[task] for x in alone(b)] for task in TASKS}
    compare(layers(own, own.data), layers(own, single))


def test_regions_with_a_mask_of_their_own() -> None:
    """Their padding does not count either."""
    own = made(masked_regions, "right")
    found = layers(own, own.data)
    single = {
        task: [
            x | {n: x[n][:, :-1] for n in ("visual_feats", "visual_attention_mask")}
            for b in own.data[task]
            for x in alone(b)
        ]
        for task in TASKS
    }
    compare(found, layers(own, single))


def holed(rows: list[list[int]], samples: Any = text) -> Case:
    mask = torch.tensor(rows)

    def batch(generator: torch.Generator) -> Batch:
        return samples(mask, generator) | {"attention_mask": mask}

    return case_of(lambda: Reader().double(), batch)


def test_a_mask_with_holes() -> None:
    own = holed([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]])
    single = {task: [x for b in own.data[task] for x in alone(b)] for task in TASKS}
    compare(layers(own, own.data), layers(own, single))


def test_holes_in_a_square_mask() -> None:
    """As many samples as positions: which axis is which is not known."""
    own = holed([[1, 0, 1], [1, 1, 1], [1, 1, 0]])
    single = {task: [x for b in own.data[task] for x in alone(b)] for task in TASKS}
    counted = ("words", "q", "k", "v", "out")
    compare(layers(own, own.data), layers(own, single), counted)


def test_holes_beside_as_many_regions() -> None:
    """Text and regions have one shape: whose mask it is is not known."""
    own = holed([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]], regions)
    single = {task: [x for b in own.data[task] for x in alone(b)] for task in TASKS}
    counted = ("words", "q", "k", "v", "out", "regions")
    compare(layers(own, own.data), layers(own, single), counted)


def test_patches_of_all_pictures() -> None:
    """Rows that are not samples: the batch stays, and its mask is laid on."""

    def patches(mask: Tensor, generator: torch.Generator) -> Batch:
        return text(mask, generator) | {"patches": torch.randn(10, 4, generator=generator).double()}

    own = made(patches, "right")
    found = layers(own, own.data)
    assert found["words"].positions == 2 * 2 * 15 and found["patches"].positions == 2 * 2 * 10
    assert [x.name for x in found.values() if COUNTED in x.note] == ["patches"]


def test_positions_of_three_axes() -> None:
    """[3, samples, length], as many samples as axes."""

    def three(mask: Tensor, generator: torch.Generator) -> Batch:
        places = torch.randint(0, 4, (3, *mask.shape), generator=generator)
        return text(mask, generator) | {"position_ids": places}

    own = made(three, "right")
    single = {
        task: [
            x | {"position_ids": b["position_ids"][:, r : r + 1, b["attention_mask"][r].bool()]}
            for b in own.data[task]
            for r, x in enumerate(alone({n: v for n, v in b.items() if n != "position_ids"}))
        ]
        for task in TASKS
    }
    compare(layers(own, own.data), layers(own, single))


def test_nothing_but_padding() -> None:
    own = holed([[0, 0, 0], [0, 0, 0]])
    with pytest.raises(mf.InputError, match=r"^attention_mask of a batch of 2 samples: expected "):
        layers(own, own.data)
