"""The label-free measure of sensitivity: how far a model's outputs move, sample by sample
(docs/calibration.md)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from magic_fast.calibration.features.batches import (
    arguments_of,
    batches_of,
    run_batch,
    to_device,
)
from magic_fast.calibration.features.padding import Masks
from magic_fast.calibration.features.sites import CHUNK_ELEMENTS
from magic_fast.calibration.plainly import plainly
from magic_fast.calibration.sensitivity.measure import Change, Evaluated, Progress, Unit, in_place
from magic_fast.errors import InputError
from magic_fast.reference.sensitivity import divergence

log = logging.getLogger("magic_fast")

# What several perturbations in one call may take besides the model: logits and enlarged tensors.
_TOGETHER_BYTES = 256 << 20
_TOGETHER = 16  # more gain little: by then the overhead of a call is shared


class Divergences:
    """−KL of the model's outputs from those with a unit enlarged, sample by sample.

    Args:
        model: in evaluation mode.
        change: the enlarged tensors.
        units: of the model.
        output: the model's output → logits [samples, …, classes]; None: ``logits`` (or
            ``logits_per_image``) of it, or the tensor that it is.
        together: how many units are enlarged in one call; None: what fits in memory beside.
    """

    def __init__(
        self,
        model: nn.Module,
        change: Change,
        units: Sequence[Unit],
        output: Callable[[Any], Tensor] | None = None,
        together: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._change, self._units = model, change, list(units)
        self._output, self._together, self._progress = output, together, progress
        self._vmaps = True
        self._done = 0

    def run(self, data: Mapping[str, Any]) -> Tensor:
        """float64 [units, samples of all tasks]."""
        like = next(self._model.parameters())
        batches = [
            (task, number, _as_inputs(batch, like))
            for task in data
            for number, batch in enumerate(batches_of(data, task))
        ]
        total = len(batches) * len(self._units)
        with plainly(self._model), torch.no_grad():  # one path for one call and for several
            return torch.cat([self._batch(*b, total) for b in batches], 1)

    def _batch(self, task: str, number: int, batch: Any, total: int) -> Tensor:
        where = f"batch {number} of task {task!r}"
        plain = self._logits(run_batch(self._model, batch, task, number), where)
        mask = self._mask(batch, plain, where)
        rows: list[Tensor] = []
        for units in self._chunks(plain):
            for unit, logits in zip(units, self._outputs(units, batch, task, number), strict=True):
                rows.append(_minus_divergence(plain, logits, mask, f"{where}, {unit.name!r}"))
            self._done += len(units)
            if self._progress is not None:
                self._progress(Evaluated(self._done, total, units[-1].name))
        return torch.stack(rows)

    def _outputs(
        self, units: Sequence[Unit], batch: Any, task: str, number: int
    ) -> Iterator[Tensor]:
        if len(units) > 1 and self._vmaps:
            try:
                yield from self._side_by_side(units, batch)
                return
            except Exception as error:  # whatever a model's code does not allow
                self._vmaps = False
                log.info("one perturbation at a time: the model does not vmap: %s", error)
        for unit in units:
            with in_place(self._model, self._change, unit) as model:
                yield self._logits(run_batch(model, batch, task, number), "")

    def _side_by_side(self, units: Sequence[Unit], batch: Any) -> Tensor:
        """Logits of all units, [units, samples, …, classes]. What comes before the first enlarged
        tensor is computed once."""
        stacked: dict[str, Tensor] = {}
        for at, unit in enumerate(units):
            for name in unit.tensors:
                own = self._model.get_parameter(name).detach()
                copies = own.expand(len(units), *own.shape).clone()
                copies[at] = self._change(name)
                stacked[name] = copies
        args, kwargs = arguments_of(batch)

        def call(parameters: dict[str, Tensor]) -> Tensor:
            return self._logits(functional_call(self._model, parameters, args, kwargs), "")

        with warnings.catch_warnings():  # of operators that run one after another: attention
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found: Tensor = torch.vmap(call)(stacked)
        return found

    def _chunks(self, logits: Tensor) -> Iterator[list[Unit]]:
        """Units that are enlarged together, in the order of the model."""
        most = self._together
        if most is None:
            most = min(_TOGETHER, _TOGETHER_BYTES // max(1, 3 * logits.nbytes))
        chunk: list[Unit] = []
        held = 0
        for unit in self._units:
            size = sum(self._model.get_parameter(n).nbytes for n in unit.tensors)
            room = self._together is not None or (
                (held + size) * (len(chunk) + 1) <= _TOGETHER_BYTES
            )
            if chunk and (len(chunk) >= most or not room):
                yield chunk
                chunk, held = [], 0
            chunk.append(unit)
            held += size
        yield chunk

    def _logits(self, output: Any, where: str) -> Tensor:
        found = logits_of(output) if self._output is None else self._output(output)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
            raise InputError(
                f"output of the model for {where}: expected logits [samples, …, classes], got "
                f"{_named(output)}. Say where they are (output=), or give an evaluation of your "
                "own (evaluate=)."
            )
        if found.shape[-1] < 2:
            raise InputError(
                f"output of the model for {where}: expected logits of at least two classes, got "
                "one. Give an evaluation of your own (evaluate=)."
            )
        return found

    def _mask(self, batch: Any, logits: Tensor, where: str) -> Tensor | None:
        """The positions that count, [samples, length], or None: all."""
        masks = Masks(self._model, batch)
        decoder = self._model
        if getattr(getattr(decoder, "config", None), "is_encoder_decoder", False):
            decoder = decoder.get_decoder()  # type: ignore[operator]
        mask = masks.of(decoder)
        if mask is None or logits.dim() != 3 or mask.shape != logits.shape[:2]:
            return None
        if not bool(mask.any(1).all()):
            raise InputError(
                f"{where}: expected samples of at least one token, got one of padding alone."
            )
        return mask


def logits_of(output: Any) -> Any:
    for name in ("logits", "logits_per_image"):
        found = getattr(output, name, None)
        if found is None and isinstance(output, Mapping):
            found = output.get(name)
        if isinstance(found, Tensor):
            return found
    return output


def _named(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}, {output.dtype}"
    return type(output).__name__


def _as_inputs(batch: Any, like: Tensor) -> Any:
    """On the model's device, floating values in its dtype."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(like.dtype)
        if isinstance(value, Mapping):
            return {k: cast(v) for k, v in value.items()}
        return type(value)(map(cast, value)) if type(value) in (tuple, list) else value

    return cast(to_device(batch, like.device))


def _minus_divergence(plain: Tensor, logits: Tensor, mask: Tensor | None, where: str) -> Tensor:
    """−KL of each sample, the mean over its positions: float64 [samples], on the CPU."""
    samples, classes = plain.shape[0], plain.shape[-1]
    step = max(1, CHUNK_ELEMENTS // classes)  # in float64 a vocabulary is large
    pairs = (torch.split(x.reshape(-1, classes), step) for x in (plain, logits))
    kl = torch.cat([divergence(*pair) for pair in zip(*pairs, strict=True)]).view(samples, -1)
    if mask is None:
        found = kl.mean(1)
    else:
        found = torch.where(mask, kl, 0.0).sum(1) / mask.sum(1)
    if not bool(found.isfinite().all()):
        raise InputError(
            f"output of the model for {where} enlarged: expected finite logits, got NaN or "
            "infinity."
        )
    return -found.cpu()
