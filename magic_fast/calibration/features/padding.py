"""Padding: batches without it, and where that cannot be, which positions of an activation it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.errors import InputError

COUNTED = "padding counted: which positions of its input are padding is not known"
_OWN, _DECODER = "attention_mask", "decoder_attention_mask"
_FURTHER = tuple(  # of sequences beside the text
    f"{which}_attention_mask" for which in ("encoder", "visual", "entity", "qformer", "audio")
)
_SEQUENCES = ("input_ids", "inputs_embeds")
_FOLLOWING = {*_SEQUENCES, "token_type_ids", "position_ids", "bbox", "labels", _OWN}
_BESIDE = ("encoder_", "visual_", "entity_", "qformer_", "audio_", "image_", "pixel_", "video_")


def without_padding(model: nn.Module, batch: Any) -> list[Any]:
    """The samples of a batch one by one, cut to their own lengths.

    So a layer sees what it would see of each sample alone, however it arranges positions: flat,
    by heads, sequence first, sent to experts, or the encoder's in a decoder; and a table of
    positions is looked up for each of them. A batch stays as it is where it has no padding, or
    cannot be cut: its mask has holes, a tensor of it is not of one row a sample, or nothing in it
    has the mask's length.

    Raises:
        InputError: it is padding alone.
    """
    masks = _masks(batch)
    if not masks:
        return [batch]
    samples = len(next(iter(masks.values())))
    spans = {name: _spans(mask) for name, mask in masks.items()}
    axes = _axes(model, batch, masks)
    by_row = all(
        not isinstance(x, Tensor | list | tuple | Mapping)
        or (isinstance(x, Tensor) and _is_by_row(name, x, samples))
        for name, x in batch.items()
    )
    cut = {mask for name, mask in axes.items() if mask is not None and name not in masks}
    if not by_row or None in spans.values() or cut != set(masks) or _is_square(batch, axes, masks):
        return [batch]
    some = [row for row in range(samples) if all(_real(own, row) for own in spans.values())]
    if not some:
        raise InputError(
            f"{' and '.join(masks)} of a batch of {samples} samples: expected at least one token "
            "in some sample, got padding alone."
        )
    return [_cut(batch, row, axes, spans) for row in some]


Spans = Mapping[str, "list[tuple[int, int]] | None"]


def _real(spans: list[tuple[int, int]] | None, row: int) -> bool:
    """Whether a sample is more than padding."""
    return spans is not None and spans[row][1] > spans[row][0]


def _cut(
    batch: Mapping[str, Any], row: int, axes: Mapping[str, str | None], spans: Spans
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim():
            mask = axes[name]
            own = None if mask is None else spans[mask]
            value = value[row : row + 1]
            value = value if own is None else value[:, slice(*own[row])]
        found[name] = value
    return found


def _masks(batch: Any) -> dict[str, Tensor]:
    """The masks of a batch that have padding, by their names."""
    fields = batch if isinstance(batch, Mapping) else {}
    found = {name: _mask(fields.get(name)) for name in (_OWN, _DECODER)}
    return {name: mask for name, mask in found.items() if mask is not None}


def _mask(value: Any) -> Tensor | None:
    if not isinstance(value, Tensor) or value.dim() != 2 or bool(value.bool().all()):
        return None
    return value.bool()


def _pairs(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a batch has a second sequence, a decoder's."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) or any(
        name.startswith("decoder_") for name in batch
    )


def _axes(
    model: nn.Module, batch: Mapping[str, Any], masks: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """Tensor → the mask whose positions are its second axis, or None: of no mask."""
    pairs = _pairs(model, batch)
    found: dict[str, str | None] = {}
    for name, value in batch.items():
        which = _DECODER if name.startswith("decoder_") or (pairs and name == "labels") else _OWN
        mask = masks.get(which)
        if mask is None or not isinstance(value, Tensor) or value.dim() < 2:
            found[name] = None
        elif value.is_floating_point() and value.dim() > 3:  # an image
            found[name] = None
        elif _has_text(batch) and not _is_text(name, value):
            found[name] = None
        else:
            found[name] = which if value.shape[1] == mask.shape[1] else None
    return found


def _has_text(batch: Mapping[str, Any]) -> bool:
    return any(name.removeprefix("decoder_") in _SEQUENCES for name in batch)


def _is_text(name: str, value: Tensor) -> bool:
    """Whether a tensor beside a text goes along with it, and is no sequence of its own."""
    if name.removeprefix("decoder_") in _FOLLOWING:
        return True
    return not name.startswith(_BESIDE) and not (value.is_floating_point() and value.dim() > 2)


def _is_by_row(name: str, value: Tensor, samples: int) -> bool:
    """Whether its first axis is the samples."""
    if name == "position_ids" and value.dim() > 2:  # [axes, samples, length]
        return False
    return not value.dim() or len(value) == samples


def _is_square(
    batch: Mapping[str, Any], axes: Mapping[str, str | None], masks: Mapping[str, Tensor]
) -> bool:
    """Whether what is to be cut has two axes of a mask's length: which of them are positions?"""
    lengths = {mask.shape[1] for mask in masks.values()}
    return any(
        axes[name] is not None
        and x.dim() > 2
        and name.removeprefix("decoder_") not in _FOLLOWING
        and sum(n in lengths for n in x.shape[1:]) > 1
        for name, x in batch.items()
    )


def _spans(mask: Tensor) -> list[tuple[int, int]] | None:
    """(first, behind the last) position of each sample; None: one has holes."""
    found = []
    for row in mask.int().cpu():
        places = row.nonzero().flatten()
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if stop - start != len(places):
            return None
        found.append((start, stop))
    return found


class Masks:
    """Which positions of a batch are samples and not padding, where it could not be cut."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        masks = _masks(batch)
        self._own, self._decoder = masks.get(_OWN), masks.get(_DECODER)
        self._beside = _beside(batch) if isinstance(batch, Mapping) else []
        self._in_decoder: set[int] = set()
        self._decoder_length: int | None = None
        if masks and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            self._in_decoder = {id(m) for m in model.get_decoder().modules()}  # type: ignore[operator]
            lengths = (_length(batch.get(f"decoder_{word}")) for word in _SEQUENCES)
            self._decoder_length = next(filter(None, lengths), _length(batch.get("labels")))

    def of(self, module: nn.Module) -> Tensor | None:
        """The mask of a module's own positions, [samples, length] or None: all count."""
        return self._decoder if id(module) in self._in_decoder else self._own

    def at(self, module: nn.Module) -> Positions:
        """Which positions of the inputs of a module count."""
        if id(module) not in self._in_decoder:
            return Positions([self._own, *self._beside])
        # a decoder sees its own positions and, in cross-attention, the encoder's
        lengths = [self._decoder_length, None if self._own is None else self._own.shape[1]]
        masks = [self._decoder, self._own, *self._beside]
        return Positions(masks, clear=None in lengths or len(set(lengths)) > 1)


def _beside(batch: Mapping[str, Any]) -> list[Tensor]:
    """Which positions count of the sequences that are not the masks' own: by masks of theirs, or
    all."""
    further = {name: batch.get(name) for name in _FURTHER}
    found = [x.bool() for x in further.values() if isinstance(x, Tensor) and x.dim() == 2]
    own = {n: x for n in (_OWN, _DECODER) if isinstance(x := batch.get(n), Tensor) and x.dim() == 2}
    if not found and not _masks(batch):
        return []
    if found:  # padding of theirs: those without any tell where it is not
        found += [x.bool() for x in own.values() if bool(x.bool().all())]
    shapes = {tuple(x.shape) for x in found}
    for name, value in batch.items():
        if name in further or not isinstance(value, Tensor) or value.dim() not in (2, 3):
            continue
        lead = tuple(value.shape[:2])
        if lead not in shapes and not _is_text(name, value) and _has_text(batch):
            shapes.add(lead)
            found.append(torch.ones(lead, dtype=torch.bool, device=value.device))
    return found


def _length(value: Any) -> int | None:
    return value.shape[1] if isinstance(value, Tensor) and value.dim() > 1 else None


class Positions:
    """Which positions of an activation count, by its shape alone, where that tells.

    Attributes:
        unknown: whether it once did not.
    """

    def __init__(self, masks: list[Tensor | None], *, clear: bool = True) -> None:
        found = [m for m in masks if m is not None]
        self._masks = [] if all(bool(m.all()) for m in found) else found
        self._clear = clear
        self.unknown = False

    def of(self, lead: tuple[int, ...]) -> Tensor | None:
        """bool [positions], or None: all count, because there is no padding or because it is not
        known where.

        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> Positions([mask]).of((3, 2)).tolist()
        [True, True, True, True, False, True]
        """
        if not self._masks:
            return None
        found = [m for mask in self._masks for m in _placed(mask, lead)]
        if found and self._clear and all(m.equal(found[0]) for m in found[1:]):
            return None if bool(found[0].all()) else found[0].flatten()
        self.unknown = True
        return None


def _placed(mask: Tensor, lead: tuple[int, ...]) -> Iterator[Tensor]:
    """The mask over ``lead``, in all ways that fit."""
    samples, length = mask.shape
    for axis, extent in enumerate(lead):
        if extent == samples * length and samples > 1:
            shape = [extent if a == axis else 1 for a in range(len(lead))]
            yield mask.reshape(shape).expand(lead)
        for other, width in enumerate(lead):
            if axis != other and (extent, width) == (samples, length):
                own = mask if axis < other else mask.t()
                shape = [n if a in (axis, other) else 1 for a, n in enumerate(lead)]
                yield own.reshape(shape).expand(lead)
