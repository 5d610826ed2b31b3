"""The steps of ``svc`` and ``lines`` on checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from magic_fast.calibration.spectrum import SVC_ALPHA, check_lines, check_svc
from magic_fast.checkpoint import Checkpoint
from magic_fast.config.blocks import find_blocks
from magic_fast.engine import Input, Step, common_shape
from magic_fast.engine.plan.step import FLOATS
from magic_fast.errors import InputError
from magic_fast.planning.steps import input_of
from magic_fast.recipe import Recipe
from magic_fast.reference import spectral

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 22  # elements of each model that are held to find alpha


def svc_steps(
    models: Mapping[str, Checkpoint], names: Sequence[str], alpha: float | None
) -> tuple[list[Step], dict[str, Any]]:
    """Steps, and the settings as they will be used.

    Args:
        names: merged, base, experts.
        alpha: None: the default of ``svc``.
    """
    chosen = {"alpha": SVC_ALPHA if alpha is None else alpha}
    check_svc(chosen["alpha"])
    steps = []
    for plain, row in _rows(models, names):
        if len(plain.shape) != 2 or not row:
            steps.append(plain)
            continue
        merged, base, *experts = row
        # the merged model stands among the experts, so that it passes the same checks
        sources = (*experts, merged)
        place = plain.name, plain.shape, plain.dtype
        steps.append(Step(*place, base, sources, method="svc", arguments=chosen))
    return steps, chosen


def lines_steps(
    models: Mapping[str, Checkpoint],
    names: Sequence[str],
    alpha: float | None,
    beta: float | None,
    num_blocks: int | None,
) -> tuple[list[Step], dict[str, Any]]:
    """The same; ``num_blocks`` None: as many as the merged model has."""
    rows = list(_rows(models, names))
    if num_blocks is None:
        num_blocks = _blocks_of(models[names[0]], names[0])
    check_lines(alpha, beta, num_blocks)
    assert beta is not None
    if alpha is None:
        alpha = spectral.lines_alpha(_pieces(models, [row for _, row in rows if row]))
        if not math.isfinite(alpha):
            raise InputError(
                f"alpha for lines: expected finite norms to find it from, got {alpha}. A model has "
                "NaN or infinity; or give alpha."
            )
    steps = []
    for plain, row in rows:
        if not row:
            steps.append(plain)
            continue
        merged, base, *_ = row
        block = spectral.block_of(plain.name, num_blocks)
        factor = spectral.lines_factor(alpha, beta, block, num_blocks)
        recipe = Recipe((1.0,), scale=factor)
        steps.append(
            Step(plain.name, plain.shape, plain.dtype, base, (merged,), recipe, method="lines")
        )
    return steps, {"alpha": alpha, "beta": beta, "num_blocks": num_blocks}


def _rows(
    models: Mapping[str, Checkpoint], names: Sequence[str]
) -> Iterator[tuple[Step, list[Input]]]:
    """A step that copies each tensor of the merged model, and (merged, base, experts …) of those
    that are floating."""
    merged = names[0]
    for name in models[merged]:
        own = input_of(models, merged, name)
        dtype = models[merged].stored_dtype(name)
        row = []
        if own.info.dtype in FLOATS:
            row = [own, *(input_of(models, m, name) for m in names[1:])]
            common_shape(name, row)
        yield Step(name, own.info.shape, dtype, None, (own,), copy=True), row


def _blocks_of(merged: Checkpoint, name: str) -> int:
    main = find_blocks(list(merged), merged.config, name).main
    if main is None:
        raise InputError(
            f"num_blocks for lines: expected one stack of numbered blocks in {name}, got none or "
            "several. Say how many blocks there are."
        )
    return main.count


def _pieces(
    models: Mapping[str, Checkpoint], rows: Sequence[Sequence[Input]]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """(task vectors, Δ) of all tensors, a few million elements at a time."""
    import torch

    from magic_fast.engine.execute.whole import DTYPES
    from magic_fast.reference.merge import decision_dtype, task_vectors

    def read(source: Input, start: int, count: int) -> Tensor:
        dtype = DTYPES[source.info.dtype]
        data = bytearray(count * dtype.itemsize)
        models[source.model].read_into(source.info.name, data, start * dtype.itemsize, len(data))
        return torch.frombuffer(data, dtype=dtype)

    for row in rows:
        numel = math.prod(row[0].shape)
        for start in range(0, numel, _PIECE):
            merged, base, *experts = (read(i, start, min(_PIECE, numel - start)) for i in row)
            dtype = decision_dtype(base, [merged, *experts])
            *taus, delta = task_vectors(base, [*experts, merged], dtype)
            yield taus, delta
