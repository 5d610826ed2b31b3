"""How much of a model is left, and the module that takes the result."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from features.families import average, moved


class Tied(nn.Module):
    """Two names of one weight, a layer that is never called, a bare parameter, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.unused = nn.Linear(6, 5)
        self.offset = nn.Parameter(torch.zeros(6))
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x + self.offset))))
        found: Tensor = self.attn(h, h, h)[0]
        return found


def models(size: float = 0.05) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    torch.manual_seed(0)
    base = Tied().eval()
    experts = [moved(base, seed, size) for seed in (1, 2)]
    return base, experts, average(experts)


DATA = {
    task: [torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed))]
    for seed, task in enumerate("ab")
}
# 2 tied (36 + 6 + 6), attention (108 + 18 + 36 + 6), unused (30 + 5), offset 6
TOTAL = 48 + 168 + 35 + 6


@pytest.mark.parametrize("sequential", [False, True], ids=["", "sequential"])
def test_left_by_reason(sequential: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "magic_fast"):
        report = mf.calibrate_features(*models(), DATA, sequential=sequential)[1]
    expected = {
        "never called": 35 / TOTAL,
        "no linear map has it for a parameter": 6 / TOTAL,
    }
    assert list(report.left) == list(expected)
    assert report.left == pytest.approx(expected)
    (warning,) = report.warnings
    assert warning == (
        "16% of the model's parameters are not calibrated in feature space (13.6%: never called; "
        "2.3%: no linear map has it for a parameter). The report's layers have the reason of each"
    )
    assert warning in caplog.text
    plain = report.as_dict()
    assert plain["left"] == report.left and plain["warnings"] == [warning]


def test_little_left_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Wide(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(1, 1)

    torch.manual_seed(0)
    base = Wide()
    experts = [moved(base, seed) for seed in (1, 2)]
    report = mf.calibrate_features(base, experts, average(experts), DATA)[1]
    assert sum(report.left.values()) == pytest.approx(8 / (TOTAL - 33))
    assert not report.warnings and "not calibrated" not in caplog.text


def test_rows_of_one_parameter_are_counted_apart() -> None:
    """Only the queries of the attention are the base's."""
    base, experts, merged = models()
    with torch.no_grad():
        for name in ("in_proj_weight", "in_proj_bias"):
            own, start = (m.get_parameter(f"attn.{name}") for m in (merged, base))
            own[:6] = start[:6]
    left = mf.calibrate_features(base, experts, merged, DATA)[1].left
    assert left["the merged model's features are the base's"] == pytest.approx(42 / TOTAL)


def test_tied_names_of_which_one_is_in_no_map() -> None:
    """It is calibrated by its other name, and not left."""

    class Shared(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.offset = self.first.bias

    torch.manual_seed(0)
    base = Shared()
    experts = [moved(base, seed) for seed in (1, 2)]
    report = mf.calibrate_features(base, experts, average(experts), DATA)[1]
    assert report.left == pytest.approx({"never called": 35 / (TOTAL - 6)})


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sequential": True},
    {"granularity": "channel"},
    {"space": "dual"},
    {"space": "dual", "sequential": True},
    {"deploy": "hooks"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_out_is_the_result(options: dict[str, Any]) -> None:
    base, experts, merged = models()
    want = mf.calibrate_features(base, experts, merged, DATA, **options)[0]
    before = {n: x.clone() for n, x in merged.state_dict().items()}
    x = DATA["a"][0]
    other = Tied().train()
    got = mf.calibrate_features(base, experts, merged, DATA, out=other, **options)[0]
    assert got is other and other.training
    assert all(torch.equal(v, before[n]) for n, v in merged.state_dict().items())
    assert torch.equal(got.eval()(x), want(x))
    given = merged.state_dict()
    third = Tied()
    got = mf.calibrate_features(base, experts, given, DATA, out=third, **options)[0]
    assert got is third and torch.equal(got.eval()(x), want(x))
    merged.get_parameter("offset").requires_grad_(False)
    got = mf.calibrate_features(base, experts, merged, DATA, out=merged, **options)[0]
    assert got is merged and torch.equal(got(x), want(x))
    assert not merged.get_parameter("offset").requires_grad
    assert merged.get_parameter("unused.weight").requires_grad
    for name, value in want.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_merged_as_out_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts, merged = models()
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a copy was made"))
    mf.calibrate_features(base, experts, merged, DATA, out=merged)


def _refused(out: Any, message: str, **options: Any) -> None:
    base, experts, merged = models()
    given = {"base": base, "expert": experts[1], "merged": merged}.get(str(out), out)
    with pytest.raises(mf.InputError, match=f"^{re.escape(message)}$"):
        mf.calibrate_features(base, experts, merged, DATA, out=given, **options)


def test_out_that_does_not_fit() -> None:
    _refused({}, "out: expected a module that takes the result, got dict.")
    _refused(
        nn.Linear(6, 6),
        "tensor 'offset' in out: expected one as in merged, got none. All models must have "
        "the same architecture.",
    )
    narrow = Tied()
    narrow.unused = nn.Linear(6, 4)
    _refused(
        narrow,
        "shape of 'unused.weight' in out: expected (5, 6) as in merged, got (4, 6). All models "
        "must have the same architecture.",
    )
    _refused(
        Tied().double(),
        "dtype of 'offset' in out: expected torch.float32 as in merged, got torch.float64. Convert "
        "the module first.",
    )
    for word, what in (("base", "base"), ("expert", "experts[1]")):
        _refused(
            word,
            "tensor 'offset' of out: expected memory of its own, got that of 'offset' in "
            f"{what}, which is still to be read. Pass another module.",
        )
    _refused(
        "merged",
        "out: expected another module than merged with deploy 'hooks' and sequential, which need "
        "its values as they were, got merged. Leave it out.",
        deploy="hooks", sequential=True,
    )  # fmt: skip
