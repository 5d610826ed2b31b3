"""Weights that are used in odd ways: what is found of them is what a plain evaluation gives, or
they are left with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import magic_fast as mf
from features.families import TASKS, case_of

Features = dict[str, list[Tensor]]  # layer → what it gives at each of its uses, features last


class Odd(nn.Module):
    """A module whose parameters are used by operations, on x [samples, length, 6]."""

    left: ClassVar[dict[str, str]] = {}  # parameter → why it is left

    def features(self, x: Tensor, own: Any) -> Features:
        """What each layer gives on what this module hands it, with the parameters of ``own``."""
        raise NotImplementedError


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


class Data(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(4, 6), matrix(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.data, self.b.detach())

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w.t() + own.b]}


class Rows(Odd):
    """Rows of one weight and bias, by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(18, 6), matrix(18)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.w.chunk(3), self.b.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b) for w, b in pairs)
        return F.scaled_dot_product_attention(q, k, v)

    def features(self, x: Tensor, own: Any) -> Features:
        full = x @ own.w.t() + own.b
        return {f"w[{n}:{n + 6}]": [full[..., n : n + 6]] for n in (0, 6, 12)}


class Columns(Odd):
    """Columns of a weight [in, out], by chunk: one ξ of all."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 18), matrix(18)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.w.chunk(3, 1), self.b.chunk(3), strict=True)
        q, k, v = (torch.addmm(b, x.flatten(0, 1), w).view(x.shape) for w, b in pairs)
        return F.scaled_dot_product_attention(q, k, v)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": list((x @ own.w + own.b).chunk(3, -1))}


class Back(Odd):
    """A weight and its transpose: an autoencoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = matrix(6, 6), matrix(6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.w.t(), self.c)

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(F.linear(x, self.w, self.b))
        return {"w": [F.linear(x, own.w, own.b), F.linear(h, own.w.t(), own.c)]}


class Heads(Odd):
    """A weight for each head, [heads, in, out], multiplied with broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.w = matrix(2, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] @ self.w

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x[:, None] @ own.w]}


class HeadsByEinsum(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = matrix(6, 2, 3), matrix(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ibh,hnd->ibnd", x, self.w)
        return torch.einsum("ibnd,hnd->ibh", torch.tanh(h), self.o)

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(torch.einsum("ibh,hnd->ibnd", x, self.w))
        return {
            "w": [torch.einsum("ibh,hnd->ibnd", x, own.w).flatten(2)],
            "o": [torch.einsum("ibnd,hnd->ibh", h, own.o)],
        }


class TwoBiases(Odd):
    """One product, with two biases each for itself: XLNet's queries."""

    left: ClassVar = dict.fromkeys("bc", "its use in add is no linear map")

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = matrix(6, 6), matrix(6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        return torch.tanh(y + self.b) * (y + self.c)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class SumOfBiases(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = matrix(6, 6), matrix(6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        y += self.b
        return torch.tanh(y + self.c)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w + own.b + own.c]}


class SomeUses(Odd):
    """A bias that one use of the weight has alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.w)

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(F.linear(x, self.w, self.b))
        return {"w": [x @ own.w.t() + own.b, h @ own.w.t()]}


class SomeAdded(Odd):
    """What is added to some results alone."""

    left: ClassVar = {"b": "not all uses of its weight have it"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + self.b) @ self.w

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(x @ self.w + self.b)
        return {"w": [x @ own.w, h @ own.w]}


class FirstPosition(Odd):
    """What is added to some positions is no bias."""

    left: ClassVar = {"b": "its use in add is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        return torch.tanh(y[:, 0] + self.b)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class ByPosition(Odd):
    """A number for each of as many positions as there are features."""

    left: ClassVar = {"b": "its use in add is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 4), matrix(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.matmul(x, self.w) + self.b)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class FromTheLeft(Odd):
    """W x: features are the rows of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(5, 6), matrix(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w @ x.transpose(1, 2) + self.b

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w.t() + own.b[:, 0]]}


class TableAdded(Odd):
    """addmm with a number for each position and feature."""

    left: ClassVar = {"b": "its use in addmm is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 6), matrix(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(self.b, x.flatten(0, 1), self.w))

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class SharedBias(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = matrix(6, 6), matrix(6, 6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.w, self.b)), self.v, self.b)

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(F.linear(x, self.w, self.b))
        return {"w": [F.linear(x, own.w, own.b), F.linear(h, own.v, own.b)]}


class Grouped(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.t = matrix(6, 3, 2), matrix(6), matrix(6, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.conv1d(x.transpose(1, 2), self.w, self.b, groups=2))
        return F.conv_transpose1d(h, self.t, groups=3, stride=2)

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(F.conv1d(x.transpose(1, 2), self.w, self.b, groups=2))
        return {
            "w": [F.conv1d(x.transpose(1, 2), own.w, own.b, groups=2).transpose(1, 2)],
            "t": [F.conv_transpose1d(h, own.t, groups=3, stride=2).transpose(1, 2)],
        }


class Bilinear(Odd):
    left: ClassVar = {"v": "its use in _trilinear is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(2, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.bilinear(x, x @ self.w, self.v)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class Picked(Odd):
    """Experts gathered for each sample."""

    left: ClassVar = {"v": "its use in index is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(3, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x @ self.w, self.v[torch.tensor([0, 2, 1])])

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class Written(Odd):
    """A copy of a weight that is written to is no longer known."""

    left: ClassVar = {"v": "its use in mul_ is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v.clone()
        v[0].mul_(3)
        return torch.tanh(x @ self.w) @ v

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class Overwritten(Odd):
    """A copy of a weight that gets other values in its place."""

    left: ClassVar = {"v": "its use in zero_ is no linear map"}

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v.clone()
        v[:, :2].zero_()
        return torch.tanh(x @ self.w) @ v

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w]}


class Half(Odd):
    """Casts of a model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.bfloat16() @ self.w.bfloat16()).to(x) @ self.v

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(x.bfloat16() @ self.w.bfloat16()).to(x)
        return {"w": [x.bfloat16().to(x) @ own.w], "v": [h @ own.v]}


class Inference(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.linear(torch.tanh(x @ self.w), self.v)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w], "v": [F.linear(torch.tanh(x @ self.w), own.v)]}


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x @ w


class Custom(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(6, 6), matrix(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        def second(h: Tensor) -> Tensor:
            return h @ self.v

        h = torch.tanh(_Product.apply(x, self.w))
        return torch.utils.checkpoint.checkpoint(second, h, use_reentrant=False)  # type: ignore

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [x @ own.w], "v": [torch.tanh(x @ self.w) @ own.v]}


class Scaled(Odd):
    """Multiples: w / √6 in an equalised layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = matrix(6, 6), matrix(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * 6**-0.5, self.b * 0.5)

    def features(self, x: Tensor, own: Any) -> Features:
        return {"w": [F.linear(x, own.w * 6**-0.5, own.b * 0.5)]}


class Looked(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = matrix(5, 6), matrix(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x.abs().sum(-1).long() % 4, self.w[1:]) @ self.v

    def features(self, x: Tensor, own: Any) -> Features:
        ids = x.abs().sum(-1).long() % 4
        return {
            "w": [F.embedding(ids, own.w[1:])],
            "v": [F.embedding(ids, self.w[1:]) @ own.v],
        }


class Buffers(Odd):
    """Rows of zeros are room that a batched product did not need."""

    def __init__(self) -> None:
        super().__init__()
        self.w = matrix(2, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        room = x.new_zeros(2, 12, 6)
        room[0, :5] = x.flatten(0, 1)[:5]
        room[1, :7] = x.flatten(0, 1)[5:]
        return torch.bmm(room, self.w)

    def features(self, x: Tensor, own: Any) -> Features:
        flat = x.flatten(0, 1)
        return {"w.0": [flat[:5] @ own.w[0]], "w.1": [flat[5:] @ own.w[1]]}


class Wide(Back):
    """A weight and its transpose, of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = matrix(8, 6), matrix(8), matrix(6)


class Distances(Odd):
    """Rows of a table, as many as there are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.t = matrix(6, 6), matrix(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.t[-x.shape[1] :].t()

    def features(self, x: Tensor, own: Any) -> Features:
        h = torch.tanh(x @ self.w)
        return {"w": [x @ own.w], "t": [h @ own.t[-x.shape[1] :].t()]}


KINDS = [
    Data, Rows, Columns, Back, Heads, HeadsByEinsum, TwoBiases, SumOfBiases, SomeUses, SomeAdded,
    FirstPosition, ByPosition, FromTheLeft, TableAdded, SharedBias, Grouped, Bilinear, Picked,
    Written, Overwritten, Half, Inference, Custom, Scaled, Looked, Buffers, Wide, Distances,
]  # fmt: skip


class Reader(nn.Module):
    """Uses the parameters of a module that it does not call."""

    def __init__(self, kind: Callable[[], Odd]) -> None:
        super().__init__()
        self.first, self.odd = nn.Linear(5, 6), kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.odd.forward(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Caller(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return self.odd(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def samples(generator: torch.Generator, length: int = 4) -> Tensor:
    return torch.randn(3, length, 5, generator=generator, dtype=torch.float64)


def of_any_length(generator: torch.Generator) -> Tensor:
    return samples(generator, int(torch.randint(3, 6, (), generator=generator)))


def samples_of(kind: type[Odd]) -> Callable[[torch.Generator], Tensor]:
    return samples if kind in (ByPosition, TableAdded, Buffers) else of_any_length


SEVERAL = (Columns, Back, SomeUses, SomeAdded, SharedBias, Wide)


@pytest.mark.parametrize("way", [Caller, Reader])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_odd(kind: type[Odd], way: type[Reader], p: int, sequential: bool) -> None:
    own = case_of(lambda: way(kind).double(), samples_of(kind))
    model, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, p=p, clamp=None, sequential=sequential
    )
    layers = {x.name: x for x in report.layers if x.name != "first"}
    wanted: dict[str, list[float]] = {}
    counted: dict[str, int] = {}
    for k, task in enumerate(TASKS):
        sums: dict[str, list[float]] = {}
        for x in own.data[task]:
            # what has several uses takes its ξ from a first run
            running = model if sequential and kind not in SEVERAL else own.merged
            every = [task_features(running, x, m) for m in (own.base, own.experts[k], own.merged)]
            for name in every[0]:
                for start, one, end in zip(*(e[name] for e in every), strict=True):
                    pair = sums.setdefault(name, [0.0, 0.0])
                    for n, h in enumerate((one, end)):
                        pair[n] += float((h - start).norm(p=p, dim=-1).sum())
                    counted[name] = counted.get(name, 0) + start[..., 0].numel()
        for name, (upper, lower) in sums.items():
            wanted.setdefault(name, []).append(upper / lower)
    told = {name.removeprefix("odd."): x.note for name, x in layers.items() if x.note}
    assert told == kind.left
    assert {n.removeprefix("odd.") for n in layers} - set(told) == set(wanted)
    for name, values in wanted.items():
        layer = layers[f"odd.{name}"]
        assert float(layer.coefficient) == pytest.approx(sum(values) / 2, rel=1e-9), name
        assert layer.positions == counted[name]


@torch.no_grad()
def task_features(running: nn.Module, x: Tensor, own: nn.Module) -> Features:
    found: Features = running.odd.features(torch.tanh(running.first(x)), own.odd)
    return found


@pytest.mark.parametrize("way", [Caller, Reader])
@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_odd_maps(kind: type[Odd], way: type[Reader]) -> None:
    """One ξ for each where an axis of the weight is the features, else one of all."""
    own = case_of(lambda: way(kind).double(), samples_of(kind))
    model, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, granularity="channel"
    )
    for layer in report.layers:
        if not layer.applied.dim():
            assert layer.note
        elif len(layer.tensors) == 1 and "[" not in layer.name:
            (name,) = layer.tensors
            start, end, got = (m.get_parameter(name) for m in (own.base, own.merged, model))
            axes = [a for a in range(start.dim()) if start.shape[a] == len(layer.applied)]
            shapes = [[-1 if a == axis else 1 for a in range(start.dim())] for axis in axes]
            wants = [start + layer.applied.view(s) * (end - start) for s in shapes]
            assert any(torch.allclose(got, want, rtol=1e-6) for want in wants), name


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()


@pytest.mark.parametrize("sequential", [False, True])
def test_a_linear_parametrisation(sequential: bool) -> None:
    """The weight is a multiple of a parameter: counted where the layer multiplies with it."""
    own = case_of(lambda: parametrised(Doubled()), samples)
    _, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, clamp=None, sequential=sequential
    )
    layer = next(x for x in report.layers if x.name == "0.parametrizations.weight.original")
    assert layer.tensors == ["0.parametrizations.weight.original", "0.bias"] and not layer.note
    want = []
    for k, task in enumerate(TASKS):
        upper, lower = 0.0, 0.0
        for x in own.data[task]:
            with torch.no_grad():
                start, one, end = (m[0](x) for m in (own.base, own.experts[k], own.merged))
            upper += float((one - start).abs().sum())
            lower += float((end - start).abs().sum())
        want.append(upper / lower)
    assert float(layer.coefficient) == pytest.approx(sum(want) / 2, rel=1e-9)


def test_a_parametrisation_of_another_kind_is_left() -> None:
    own = case_of(lambda: parametrised(Symmetric()), samples)
    model, report = mf.calibrate_features(own.base, own.experts, own.merged, own.data)
    notes = {x.name: x.note for x in report.layers if x.note}
    assert notes == {
        "0.parametrizations.weight": "a weight is computed from it before each call",
        "0.bias": "no linear map has it for a parameter",
    }
    name = "0.parametrizations.weight.original"
    assert torch.equal(model.get_parameter(name), own.merged.get_parameter(name))


def parametrised(how: nn.Module) -> nn.Module:
    first = nn.Linear(5, 5)
    parametrize.register_parametrization(first, "weight", how)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(5, 2)).double()
