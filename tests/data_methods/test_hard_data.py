"""Merges by data of weights that are used in odd ways, and of data that does not suit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import magic_fast as mf


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


class Rows(nn.Module):
    """Rows of one weight, each a map."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(8, 4), matrix(8)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (
            F.linear(x, w, b) for w, b in zip(self.w.chunk(2), self.b.chunk(2), strict=True)
        )
        return one * torch.tanh(two)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"w": x}


class Heads(nn.Module):
    """[in, heads, width] by einsum; of the second one a copy is multiplied, which stays the
    mean."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = matrix(4, 2, 3), matrix(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("bh,hnd->bnd", x, self.w))
        return torch.einsum("bnd,hnd->bh", h, self.o)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"w": x}


def as_matrix(w: Tensor) -> Tensor:
    """[out, in]"""
    return w.flatten(1).t() if w.dim() == 3 else w


class Back(nn.Module):
    """A weight and its transpose: no one matrix is nearest for both."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(4, 4), matrix(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w)), self.w.t()) @ self.v

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {}


class Tied(nn.Module):
    """The same of a layer and what reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(x)), self.inner.weight.t())

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {}


def models(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(1)
    return [kind().to(dtype) for _ in range(2)]


def samples(dtype: torch.dtype = torch.float64) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return {
        task: [torch.randn(9, 4, generator=generator).to(dtype) for _ in range(2)]
        for task in ("one", "two")
    }


@pytest.mark.parametrize("kind", [Rows, Heads])
def test_regmean_of_odd_maps(kind: type[nn.Module]) -> None:
    """W = (Σ G_k)⁻¹ Σ G_k W_k, G_k = mean zzᵀ with off-diagonals scaled."""
    experts, data = models(kind), samples()
    merged, report = mf.merge_by_data(experts, data, off_diagonal=0.9)
    assert report.averaged == (["o"] if kind is Heads else ["b"])
    with torch.no_grad():
        for name in experts[0].inputs(data["one"][0]):
            left, right = torch.zeros(()), torch.zeros(())
            for expert, batches in zip(experts, data.values(), strict=True):
                z = torch.cat([expert.inputs(x)[name] for x in batches])
                gram = z.t() @ z / len(z)
                gram = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
                left = left + gram
                right = right + gram @ as_matrix(expert.get_parameter(name)).t()
            want = torch.linalg.solve(left, right).t()
            got = as_matrix(merged.get_parameter(name))
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [Back, Tied])
def test_a_weight_of_two_directions_is_the_mean(kind: type[nn.Module]) -> None:
    experts = models(kind)
    merged, report = mf.merge_by_data(experts, samples())
    name = next(n for n, _ in merged.named_parameters())
    want = (experts[0].get_parameter(name) + experts[1].get_parameter(name)) / 2
    torch.testing.assert_close(merged.get_parameter(name), want)
    assert name in report.averaged


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
def test_inputs_that_are_not_finite(bad: float) -> None:
    """1e25 is finite in float32, its square is not."""
    experts, data = models(Rows, torch.float32), samples(torch.float32)
    data["two"][1][3, 2] = bad
    with pytest.raises(
        mf.NonFiniteError, match=r"^inputs of layer 'w\[0:4\]' for batch 1 of task 'two'"
    ):
        mf.merge_by_data(experts, data)


class Classes(nn.Module):
    """Logits [samples, length, classes] of each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(self.words(input_ids))


def test_gradients_that_are_not_finite() -> None:
    experts = models(Classes, torch.float32)
    with torch.no_grad():
        experts[1].words.weight[7] = 1e30
        experts[1].out.weight[0] = 1e30
    data = {
        task: [{"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.ones(1, 2)}]
        for task in ("one", "two")
    }
    with pytest.raises(mf.NonFiniteError, match=r"^output of the model for batch 0 of task 'two'"):
        mf.merge_by_data(experts, data, "fisher", gradients=True)


def test_fisher_does_not_count_padding_in_holes() -> None:
    """A batch that cannot be cut: the outputs at its padding have no part."""
    experts = models(Classes)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 11, (2, 5), generator=generator)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 1, 1]])
    holes = {task: [{"input_ids": ids, "attention_mask": mask}] for task in ("one", "two")}
    other = copy.deepcopy(holes)
    for batches in other.values():
        batches[0]["input_ids"] = torch.where(mask.bool(), ids, 0)
    for settings in ({}, {"preset": "fusion_bench"}):
        one, two = (
            mf.merge_by_data(experts, data, "fisher", gradients=True, **settings)[0]
            for data in (holes, other)
        )
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(
                a[1:] if a.shape == (11, 4) else a, b[1:] if b.shape == (11, 4) else b
            )


def test_low_precision_modules() -> None:
    """Sums are taken in float32, the result is rounded once."""
    experts, data = models(Rows, torch.bfloat16), samples(torch.bfloat16)
    got, _ = mf.merge_by_data(experts, data)
    wide = [copy.deepcopy(e).float() for e in experts]
    want, _ = mf.merge_by_data(wide, {t: [x.float() for x in b] for t, b in data.items()})
    assert got.w.dtype == torch.bfloat16
    torch.testing.assert_close(got.w.float(), want.w, rtol=2**-7, atol=2**-8)
