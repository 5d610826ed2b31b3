"""Padding: batches without it, and where that cannot be, which positions of an activation it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

COUNTED = "padding counted: which positions of its input are padding is not known"
_OWN, _DECODER = "attention_mask", "decoder_attention_mask"


def without_padding(model: nn.Module, batch: Any) -> list[Any]:
    """The samples of a batch one by one, cut to their own lengths.

    So a layer sees what it would see of each sample alone, however it arranges positions: flat,
    by heads, sequence first, sent to experts, or the encoder's in a decoder; and a table of
    positions is looked up for each of them. A batch stays as it is where it has no padding, or
    cannot be cut: its mask has holes, a tensor of it is not of one row a sample, or nothing in it
    has the mask's length.
    """
    masks = _masks(batch)
    if not masks:
        return [batch]
    samples = len(next(iter(masks.values())))
    spans = {name: _spans(mask) for name, mask in masks.items()}
    pairs = _pairs(model, batch)
    axes = {name: _cut_by(name, value, masks, pairs) for name, value in batch.items()}
    by_row = all(
        not isinstance(x, Tensor | list | tuple | Mapping)
        or (isinstance(x, Tensor) and (not x.dim() or len(x) == samples))
        for x in batch.values()
    )
    cut = {mask for name, mask in axes.items() if mask is not None and name not in masks}
    if not by_row or None in spans.values() or cut != set(masks) or _is_square(batch, masks):
        return [batch]
    some = [row for row in range(samples) if all(_real(own, row) for own in spans.values())]
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


def _cut_by(name: str, value: Any, masks: Mapping[str, Tensor], pairs: bool) -> str | None:
    """The mask whose positions are a tensor's second axis."""
    which = _DECODER if name.startswith("decoder_") or (pairs and name == "labels") else _OWN
    mask = masks.get(which)
    if mask is None or not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if value.is_floating_point() and value.dim() > 3:  # an image
        return None
    return which if value.shape[1] == mask.shape[1] else None


def _is_square(batch: Mapping[str, Any], masks: Mapping[str, Tensor]) -> bool:
    """Whether a tensor has two axes of a mask's length: which of them are positions?"""
    lengths = {mask.shape[1] for mask in masks.values()}
    return any(
        isinstance(x, Tensor) and x.dim() > 2 and sum(n in lengths for n in x.shape[1:]) > 1
        for x in batch.values()
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
            return Positions([self._own])
        # a decoder sees its own positions and, in cross-attention, the encoder's
        lengths = [self._decoder_length, None if self._own is None else self._own.shape[1]]
        return Positions([self._decoder, self._own], clear=None in lengths or len(set(lengths)) > 1)


_SEQUENCES = ("input_ids", "inputs_embeds")


def _length(value: Any) -> int | None:
    return value.shape[1] if isinstance(value, Tensor) and value.dim() > 1 else None


class Positions:
    """Which positions of an activation count, by its shape alone, where that tells.

    Attributes:
        unknown: whether it once did not.
    """

    def __init__(self, masks: list[Tensor | None], *, clear: bool = True) -> None:
        self._masks = [m for m in masks if m is not None]
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
        if len(found) == 1 and self._clear:
            return found[0].flatten()
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
