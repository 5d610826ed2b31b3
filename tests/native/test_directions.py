"""Sums with weights of their own for each row: one result, whatever the way through the loops, the
number of threads and the instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from magic_fast import _native
from magic_fast.errors import InternalError
from magic_fast.ops.directions import Directions, RowWeights
from magic_fast.ops.job import Job
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.native.directions import Gram
from magic_fast.recipe import Recipe, RowCalibration

ISAS = list(_native.build_config()["supported_isas"])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = Directions(lambda gram: gram.new_zeros(gram.shape[:-1]), axis=-1)


def models(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=g).to(dtype)
    return base, [
        (base.float() + 0.1 * torch.randn(shape, generator=g)).to(dtype) for _ in range(count)
    ]


def weights(shape: tuple[int, ...], count: int, *, base: bool) -> RowWeights:
    rows = shape[0] if len(shape) > 1 else 1
    values = torch.randn(rows, count + 1, generator=torch.Generator().manual_seed(1))
    if not base:
        values[:, -1] = 0
    return RowWeights(values, shape[-1])


def summed(base: Tensor | None, experts: list[Tensor], own: RowWeights) -> Tensor:
    """In plain float32, in the order of the experts."""
    start = None if base is None else base.float()
    total = torch.zeros(experts[0].shape)
    for k, expert in enumerate(experts):
        x = expert.float() if start is None else expert.float() - start
        total += own.values[:, k, None] * x
    if start is not None:
        total += own.values[:, -1:] * start
        total = start + total
    return total.to(experts[0].dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 8, 9, 10])
@pytest.mark.parametrize("shape", [(5, 4099), (40, 257), (33, 129), (50, 7), (3, 1)], ids=str)
def test_weights_of_rows(isa: str, dtype: torch.dtype, count: int, shape: tuple[int, ...]) -> None:
    backend = NativeBackend(isa=isa)
    base, experts = models(shape, dtype, count)
    wide = [e.float() for e in experts]
    for start, own in (
        (base, weights(shape, count, base=True)),
        (base, weights(shape, count, base=False)),
        (None, weights(shape, count, base=False)),
    ):
        job = Job(start, experts, Recipe((1.0,) * count), torch.empty_like(base))
        job.directions, job.weights = ROWS, own
        backend.merge(job)
        want = summed(start, experts, own)
        assert torch.equal(job.out, want)
        mixed = replace(job, experts=[*wide[:1], *experts[1:]], out=torch.empty_like(base))
        backend.merge(mixed)  # the same values, tile by tile
        assert torch.equal(mixed.out, want)


@pytest.mark.parametrize("count", [*range(1, 12), 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "cols"),
    [((3, 140_000), 420_000), ((9, 2049), 2049), ((200, 5), 5), ((5, 66_000), 66_000)],
)
def test_inner_products(count: int, dtype: torch.dtype, shape: tuple[int, ...], cols: int) -> None:
    """The same bits on every instruction set and number of threads; those of float64 but for
    the rounding of float32 within 512 elements."""
    base, experts = models(shape, dtype, count)
    rows = base.numel() // cols
    found = []
    for isa in ISAS:
        for threads in (1, 3):
            gram = Gram(count, rows, threads=threads, isa=_native.isa_number(isa))
            gram.feed(base, experts, cols)
            found.append(gram.values)
    assert all(torch.equal(found[0], other) for other in found)
    x = torch.stack([(e.float() - base.float()).reshape(rows, cols) for e in experts], 1).double()
    want = x @ x.transpose(1, 2)
    scale = want.diagonal(dim1=1, dim2=2).sqrt()
    error = (found[0] - want).abs() / (scale.unsqueeze(1) * scale.unsqueeze(2))
    assert float(error.max()) <= 2e-7
    wide = Gram(count, rows)
    wide._wide = True
    wide.feed(base, experts, cols)
    torch.testing.assert_close(wide.values, want, rtol=1e-12, atol=1e-12)


def test_a_row_in_pieces() -> None:
    base, experts = models((300_001,), torch.bfloat16, 3)
    whole = Gram(3, 1)
    whole.feed(base, experts, base.numel())
    for step in (65_536, 131_072):
        pieces = Gram(3, 1)
        for at in range(0, base.numel(), step):
            part = slice(at, at + step)
            rows = [e[part] for e in experts]
            pieces.feed(base[part], rows, rows[0].numel(), offset=at)
        assert torch.equal(pieces.values, whole.values)
    with pytest.raises(InternalError, match="expected element 300001, got 65536"):
        whole.feed(base[:1], [e[:1] for e in experts], 1, offset=65_536)


def test_any_number_of_threads_and_a_calibration() -> None:
    base, experts = models((64, 999), torch.bfloat16, 3)
    own, found = weights((64, 999), 3, base=True), []
    for isa in ISAS:
        for threads in (1, 2, 5):
            job = Job(
                base, experts, Recipe((1.0,) * 3), torch.empty_like(base),
                calibration=RowCalibration(64, 999), directions=ROWS, weights=own,
            )  # fmt: skip
            stats = NativeBackend(threads=threads, isa=isa).merge(job)
            found.append((job.out, torch.tensor(stats.coefficient)))
    for out, coefficient in found:
        assert torch.equal(out, found[0][0]) and torch.equal(coefficient, found[0][1])


def test_weights_are_those_of_a_plain_sum() -> None:
    base, experts = models((4, 6), torch.float32, 2)
    job = Job(base, experts, Recipe((1.0, 1.0), scale=0.5), torch.empty_like(base))
    job.weights = RowWeights(torch.zeros(4, 3), 6)
    with pytest.raises(ValueError, match="weights of rows are those of a plain sum"):
        NativeBackend().merge(job)
    job = replace(job, recipe=Recipe((1.0, 1.0)), weights=RowWeights(torch.zeros(4, 3), 5))
    with pytest.raises(ValueError, match="weight_cols must divide the tensor"):
        NativeBackend().merge(job)
