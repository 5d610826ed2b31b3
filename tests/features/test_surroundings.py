"""FSC in half precision, under autocast, of compiled models, in threads, on data of many kinds."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import average, moved


def trio(base: nn.Module, size: float = 0.1) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    experts = [moved(base, seed, size).eval() for seed in (1, 2)]
    return base.eval(), experts, average(experts).eval()


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.InstanceNorm2d(
            4, affine=True, track_running_stats=True
        ), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return net


def images() -> dict[str, list[Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return {t: [torch.randn(4, 3, 6, 6, generator=draw) for _ in range(2)] for t in "ab"}


def coefficients(models: Any, data: Any, **settings: Any) -> dict[str, float]:
    base, experts, merged = models
    report = mf.calibrate_features(base, experts, merged, data, clamp=None, **settings)[1]
    assert not [x.note for x in report.layers if x.note]
    return {x.name: float(x.coefficient) for x in report.layers}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequential", [False, True])
def test_half_precision_with_buffers(dtype: torch.dtype, sequential: bool) -> None:
    """A layer is judged in float32: its buffers are widened with its parameters, and stay."""
    models = trio(network())
    half = tuple(
        [copy.deepcopy(m).to(dtype) for m in own] if isinstance(own, list)
        else copy.deepcopy(own).to(dtype)
        for own in models
    )  # fmt: skip
    data = images()
    got = coefficients(half, {t: [x.to(dtype) for x in b] for t, b in data.items()},
                       sequential=sequential)  # fmt: skip
    want = coefficients(models, data, sequential=sequential)
    assert got == pytest.approx(want, rel=0.03)
    for m in (half[0], *half[1], half[2]):
        assert {x.dtype for x in (*m.parameters(), *m.buffers()) if x.is_floating_point()} == {
            dtype
        }
    # the first layer sees the same input: its task vectors of half precision, in float32
    base, experts, merged = half
    ratios = []
    for k, (_, batches) in enumerate(data.items()):
        sums = [0.0, 0.0]
        for x in batches:
            for n, m in enumerate((experts[k], merged)):
                change = [
                    a.float() - b.float()
                    for a, b in zip(m[0].parameters(), base[0].parameters(), strict=True)
                ]
                out = nn.functional.conv2d(x.to(dtype).float(), *change)
                sums[n] += float(out.abs().double().sum())
        ratios.append(sums[0] / sums[1])
    assert got["0"] == pytest.approx(sum(ratios) / 2, rel=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
def test_autocast_changes_nothing(sequential: bool) -> None:
    models, data = trio(network()), images()
    want = coefficients(models, data, sequential=sequential)
    with torch.autocast("cpu", torch.bfloat16):
        assert coefficients(models, data, sequential=sequential) == want
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("way", ["whole", "inside", "in place"])
@pytest.mark.parametrize("sequential", [False, True])
def test_compiled_models_run_eagerly(way: str, sequential: bool) -> None:
    inner = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
    models = trio(nn.Sequential(nn.Linear(5, 8), inner))
    draw = torch.Generator().manual_seed(1)
    data = {t: [torch.randn(4, 5, generator=draw)] for t in "ab"}
    want = coefficients(models, data, sequential=sequential)

    def compiled(m: Any) -> Any:
        own = copy.deepcopy(m)
        if way == "whole":
            return torch.compile(own, backend="eager")
        if way == "inside":
            own[1] = torch.compile(own[1], backend="eager")
        else:
            own.compile(backend="eager")
        return own

    base, experts, merged = models
    given = (base, [compiled(e) for e in experts], compiled(merged))
    got = coefficients(given, data, sequential=sequential)
    prefix = "_orig_mod."
    assert {n.replace(prefix, ""): x for n, x in got.items()} == want
    found, _ = mf.calibrate_features(*given, data)
    x = data["a"][0]
    plain, _ = mf.calibrate_features(*models, data)
    torch.testing.assert_close(found(x), plain(x))
    report = mf.sensitive_layers(base, given[1], merged=given[2], data={"a": [x]})
    expected = mf.sensitive_layers(base, experts, merged=merged, data={"a": [x]})
    assert list(report.scores.values()) == pytest.approx(list(expected.scores.values()), rel=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_threads_and_the_switch_of_attention(before: bool) -> None:
    """Several calibrations at once give what one gives, and the switch is as it was."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    models = trio(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    data = {t: [torch.randn(3, 4, 8)] for t in "ab"}
    kept = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        want = coefficients(models, data)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: coefficients(models, data), range(8)))
        assert found == [want] * 8
        assert torch.backends.mha.get_fastpath_enabled() is before
    finally:
        torch.backends.mha.set_fastpath_enabled(kept)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("tasks", ["a", "ab"])
def test_not_finite_is_an_error(sequential: bool, tasks: str) -> None:
    base, experts, merged = trio(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    good, bad = torch.randn(4, 5), torch.randn(4, 5)
    bad[1, 2] = torch.nan
    data = {t: [good, bad if t in tasks else good] for t in "ab"}
    with pytest.raises(mf.NonFiniteError) as error:
        mf.calibrate_features(base, experts, merged, data, sequential=sequential)
    assert str(error.value) == (
        "features of layer '0' for batch 1 of task 'a': expected finite numbers, got NaN or "
        "infinity. Look at the samples and at the layers before it; half precision may overflow: "
        "load the models in float32."
    )


def test_an_overflow_inside_is_an_error() -> None:
    models = trio(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    base, experts, merged = (
        [m.half() for m in own] if isinstance(own, list) else own.half() for own in models
    )
    x = torch.full((2, 5), 60000.0).half()
    with pytest.raises(mf.NonFiniteError, match=r"features of layer '2' for batch 0 of task 'a'"):
        mf.calibrate_features(base, experts, merged, {"a": [x], "b": [x]})


def test_a_negative_running_variance_is_told() -> None:
    base, experts, merged = trio(network())
    merged[1].running_var.fill_(-0.4)
    with pytest.raises(mf.NonFiniteError, match=r"features of layer '1' for batch 0 of task 'a'"):
        mf.calibrate_features(base, experts, merged, images())


def test_many_batches_in_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    models = trio(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    draw = torch.Generator().manual_seed(1)
    rows = {t: torch.randn(300, 5, generator=draw) for t in "ab"}
    most = 0
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        nonlocal most
        most = max(most, threading.active_count())
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    before = threading.active_count()
    one = coefficients(models, {t: list(x.split(1)) for t, x in rows.items()}, sequential=True)
    assert most - before <= 64
    monkeypatch.undo()
    whole = coefficients(models, {t: [x] for t, x in rows.items()}, sequential=True)
    assert one == pytest.approx(whole, rel=1e-5)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("make", [Twice, lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_iterators_are_read_once(make: Any, sequential: bool, count: int) -> None:
    torch.manual_seed(0)
    models = trio(make())
    draw = torch.Generator().manual_seed(1)
    rows = {t: [torch.randn(4, 5, generator=draw) for _ in range(count)] for t in "ab"}

    def once(batches: list[Tensor]) -> Iterator[Tensor]:
        yield from batches

    want = coefficients(models, rows, sequential=sequential)
    given = {t: once(b) for t, b in rows.items()}
    assert coefficients(models, given, sequential=sequential) == want


def test_wrapped_experts() -> None:
    base, experts, merged = trio(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    data = {t: [torch.randn(4, 5)] for t in "ab"}
    wrapped = [{f"module.{n}": x for n, x in e.state_dict().items()} for e in experts]
    assert coefficients((base, wrapped, merged), data) == coefficients(
        (base, experts, merged), data
    )
