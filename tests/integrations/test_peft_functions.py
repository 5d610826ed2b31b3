"""PEFT's functions and their replacements: the same arguments, dtypes and results, but for ties and
rounding; what the fused merge does not take is PEFT's own."""

from __future__ import annotations

import inspect
import math
import sys
import types
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.errors import InputError

pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")

from peft.tuners.lora import model as lora_model
from peft.utils import merge_utils

from magic_fast.integrations import peft as front
from magic_fast.integrations.peft import functions, trial

CALLS = [
    *product(("magnitude_prune", "ties", "frequency"), (0.001, 0.2, 0.5, 1.0, 1.5)),
    ("task_arithmetic", 1.0),
]
MERGES = ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")


@pytest.fixture
def installed() -> Iterator[front.Installation]:
    with front.install() as installation:
        yield installation
    assert {n: getattr(merge_utils, n) for n in functions.OWN} == functions.OWN


def _tensors(k: int, dtype: torch.dtype, seed: int = 0, shape: Any = (37, 41)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(k)]


def _call(table: Any, name: str, tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    rest = () if name == "task_arithmetic" else (density,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = table[name](tensors, weights, *rest)
    return found


def _tied(tensors: list[Tensor], density: float) -> Tensor:
    """Where an expert's entry equals the least kept magnitude: PEFT keeps any of those."""
    found = torch.zeros(tensors[0].shape, dtype=torch.bool)
    k = int(density * tensors[0].numel())
    if density < 1 and k:
        for x in tensors:
            found |= x.abs() == x.abs().flatten().sort(descending=True).values[k - 1]
    return found


def _rounding(tensors: list[Tensor], weights: Tensor) -> Tensor:
    """What PEFT's own roundings may make out: each product, sum and quotient once."""
    reach = sum(
        (x.abs().double() * abs(float(w)) for x, w in zip(tensors, weights, strict=True)),
        torch.zeros(tensors[0].shape, dtype=torch.float64),
    )
    narrow = torch.promote_types(tensors[0].dtype, weights.dtype)
    return reach * torch.finfo(narrow).eps * 2 + 1e-30


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "density"), CALLS)
def test_same_results(
    name: str, dtype: torch.dtype, weights_dtype: torch.dtype, density: float
) -> None:
    tensors = _tensors(3, dtype)
    weights = torch.tensor([1, -2, 3]).to(weights_dtype)
    results = []
    for table in (functions.OWN, functions.OURS):
        if name == "frequency":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(table["ties"](tensors, weights, density, "frequency"))
        else:
            results.append(_call(table, name, tensors, weights, density))
    own, ours = results
    assert ours.dtype == own.dtype and ours.shape == own.shape
    off = (own.double() - ours.double()).abs() > _rounding(tensors, weights)
    tied = _tied(tensors, density) if name != "task_arithmetic" else torch.zeros_like(off)
    assert not (off & ~tied).any()
    if dtype == torch.float32:
        assert int(tied.sum()) <= 3  # one entry of each expert is its threshold
        assert not off.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor(dtype: torch.dtype) -> None:
    (x,) = _tensors(1, dtype)
    own = functions.OWN["magnitude_based_pruning"](x, 0.3)
    ours = functions.OURS["magnitude_based_pruning"](x, 0.3)
    assert ours.dtype == dtype and int((ours != 0).sum()) == int(0.3 * x.numel())
    assert not ((ours != own) & ~_tied([x], 0.3)).any()
    assert torch.equal(functions.OURS["prune"](x, 0.3, "magnitude"), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_votes_and_disjoint_means(dtype: torch.dtype, method: str) -> None:
    stack = torch.stack(_tensors(4, torch.float32)).mul(3).to(dtype)
    stack[:, 0] = 0
    stack[:2, 1] = torch.tensor([[1], [-1]], dtype=dtype)  # a vote of exactly zero
    stack[2:, 1] = 0
    own, ours = (t["calculate_majority_sign_mask"] for t in (functions.OWN, functions.OURS))
    mask = ours(stack, method)
    assert mask.dtype == torch.bool and torch.equal(mask, own(stack, method))
    merged, expected = (t["disjoint_merge"](stack, mask) for t in (functions.OURS, functions.OWN))
    assert merged.dtype == expected.dtype
    assert torch.allclose(merged, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)


def test_more_experts_than_a_byte_counts() -> None:
    stack = torch.ones(300, 2, 2)
    merged = functions.OURS["disjoint_merge"](stack, stack > 0)
    assert torch.equal(merged, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "random_pruning"])
def test_random_trims_agree_in_distribution(name: str) -> None:
    """Kept share and mean of large tensors, both within five standard deviations."""
    n, density = 400_000, 0.3
    x = torch.full((n,), 2.0)
    w = torch.tensor([0.5])
    given: Any = (x, density, True) if name == "random_pruning" else ([x], w, density)
    for table in (functions.OWN, functions.OURS):
        torch.manual_seed(3)
        merged = table[name](*given)
        value = 2.0 / density * (1.0 if name == "random_pruning" else 0.5)
        kept = merged != 0
        spread = 5 * math.sqrt(density * (1 - density) / n)
        assert abs(float(kept.float().mean()) - density) < spread
        assert torch.allclose(merged[kept], torch.tensor(value))


def test_two_experts_are_trimmed_independently() -> None:
    n, density = 400_000, 0.5
    ones = [torch.ones(n), torch.full((n,), 10.0)]
    merged = functions.OURS["dare_linear"](ones, torch.ones(2), density)
    shares = [float((merged == v).float().mean()) for v in (0.0, 2.0, 20.0, 22.0)]
    assert all(abs(s - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n) for s in shares)


def test_a_seed_repeats_and_calls_differ() -> None:
    (x,) = _tensors(1, torch.float32)
    torch.manual_seed(5)
    first, second = (functions.OURS["random_pruning"](x, 0.5, False) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(functions.OURS["random_pruning"](x, 0.5, False), first)
    assert not torch.equal(first, second)
    kept = first != 0
    assert torch.equal(first[kept], x[kept])


def test_what_stays_differentiable() -> None:
    tensors = [t.requires_grad_() for t in _tensors(2, torch.float32)]
    merged = functions.OURS["ties"](tensors, torch.ones(2), 0.5)
    merged.sum().backward()
    assert tensors[0].grad is not None
    with torch.no_grad():
        assert not functions.OURS["ties"](tensors, torch.ones(2), 0.5).requires_grad


ODD: dict[str, tuple[Any, Any, float]] = {
    "float64": ([t.double() for t in _tensors(2, torch.float32)], torch.ones(2), 0.5),
    "float64 weights": (_tensors(2, torch.float32), torch.ones(2).double(), 0.5),
    "mixed dtypes": ([torch.ones(4), torch.ones(4).bfloat16()], torch.ones(2), 0.5),
    "nothing kept": (_tensors(2, torch.float32), torch.ones(2), 0.0),
    "empty": ([torch.ones(0)] * 2, torch.ones(2), 0.5),
    "scalars": ([torch.tensor(1.0), torch.tensor(2.0)], torch.ones(2), 1.0),
    "infinite weight": (_tensors(2, torch.float32), torch.tensor([math.inf, 1.0]), 1.0),
    "NaN": ([torch.tensor([1.0, math.nan, 3.0]), torch.ones(3)], torch.ones(2), 1.0),
    "overflow": ([torch.full((4,), 6e4).half()] * 2, torch.ones(2).half(), 1.0),
    "strided": ([t.T for t in _tensors(2, torch.float32)], torch.ones(2), 0.5),
    "column of weights": (_tensors(2, torch.float32), torch.ones(2, 1), 0.5),
}


@pytest.mark.parametrize("word", ODD)
@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "ties"])
def test_odd_arguments_give_what_peft_gives(name: str, word: str) -> None:
    tensors, weights, density = ODD[word]
    own, ours = (
        _call(table, name, tensors, weights, density) for table in (functions.OWN, functions.OURS)
    )
    assert own.dtype == ours.dtype
    if (name, word) == ("ties", "overflow"):  # of a sum on the way to a mean: not so here
        assert own.isinf().all() and torch.equal(ours, tensors[0].float())
    else:
        assert torch.allclose(own, ours, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda f: f["prune"](torch.ones(2), -0.1, "magnitude"),
            ValueError,
            "Density should be >= 0, got -0.1",
        ),
        (lambda f: f["prune"](torch.ones(2), 0.5, "top"), ValueError, "Unknown method top"),
        (
            lambda f: f["calculate_majority_sign_mask"](torch.ones(2, 2), "mean"),
            RuntimeError,
            'Unimplemented mask method "mean"',
        ),
        (
            lambda f: f["ties"]([torch.ones(2)] * 2, torch.ones(2), 0.5, "mean"),
            RuntimeError,
            'Unimplemented mask method "mean"',
        ),
    ],
    ids=["density", "method", "mask method", "vote"],
)
def test_mistakes_are_those_of_peft(call: Any, kind: type[Exception], message: str) -> None:
    for table in (functions.OWN, functions.OURS):
        with pytest.raises(kind) as caught:
            call(table)
        assert str(caught.value) == message


def test_a_density_of_one_warns_as_often() -> None:
    given = ([torch.ones(2)] * 3, torch.ones(3), 1)
    seen = []
    for table in (functions.OWN, functions.OURS):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table["ties"](*given)
        seen.append([str(w.message) for w in caught])
    assert seen[0] == seen[1] and len(seen[0]) == 3


def test_signatures_and_docstrings_are_those_of_peft() -> None:
    assert set(functions.OURS) | set(functions.LEFT) == set(functions.OWN)
    assert len(functions.OWN) == 11
    for name, ours in functions.OURS.items():
        own = functions.OWN[name]
        assert inspect.signature(ours) == inspect.signature(own)
        assert (ours.__doc__, ours.__name__) == (own.__doc__, name)


def test_replaced_wherever_peft_holds_them(installed: front.Installation) -> None:
    assert installed.replaced == (*functions.OURS, "svd")
    for name in functions.OURS:
        assert getattr(merge_utils, name) is functions.OURS[name]
    for name in MERGES:
        assert getattr(lora_model, name) is functions.OURS[name]
    assert merge_utils.reshape_weight_task_tensors is functions.OWN["reshape_weight_task_tensors"]


def test_modules_loaded_later_are_put_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    late = types.ModuleType("peft.tuners.late")
    with front.install():
        late.ties = merge_utils.ties  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert late.ties is functions.OWN["ties"]


def test_installing_twice_is_installing_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="magic_fast"):
        outer = mf.integrations.peft.install()
        with mf.integrations.peft.install() as inner:
            assert inner.replaced == outer.replaced
        assert merge_utils.ties is functions.OURS["ties"]  # the inner one took nothing back
        mf.integrations.peft.uninstall()
        mf.integrations.peft.uninstall()
    assert merge_utils.ties is functions.OWN["ties"]
    import peft

    lines = [r.message for r in caplog.records if r.message.startswith("peft")]
    assert lines == [
        f"peft {peft.__version__}: replaced magnitude_based_pruning, random_pruning, prune, "
        "calculate_majority_sign_mask, disjoint_merge, task_arithmetic, magnitude_prune, ties, "
        "dare_linear, dare_ties, svd; left as they are: reshape_weight_task_tensors (a view)"
    ]


def test_a_release_that_differs_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def ties(task_tensors: Any, weights: Any, density: Any, vote: str = "total") -> Tensor:
        return torch.zeros(5, 7)

    def linear(task_tensors: Any, weights: Any) -> Tensor:
        return functions.OURS["task_arithmetic"](task_tensors, weights) * 2

    own = {**functions.OWN, "ties": ties, "task_arithmetic": linear}
    del own["disjoint_merge"]
    monkeypatch.setattr(functions, "OWN", own)
    assert trial.differing() == {
        "ties": "other arguments",
        "task_arithmetic": "other results",
        "disjoint_merge": "it has none",
    }
    with front.install() as installation:
        assert installation.left["ties"] == "other arguments"
        assert "ties" not in installation.replaced and "magnitude_prune" in installation.replaced


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (
            "peft",
            "package 'peft': expected it for magic_fast.integrations.peft, got none installed. "
            "Install the extra: pip install 'magic_fast[peft]'.",
        ),
        (
            "peft.utils.merge_utils",
            "version of peft: expected 0.9 or later, which merges adapters by functions, got "
            "0.8.2. Upgrade it.",
        ),
    ],
)
def test_without_peft(absent: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    monkeypatch.setattr(peft, "__version__", "0.8.2")
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(InputError) as caught:
        front.install()
    assert str(caught.value) == message


def test_importing_the_front_imports_nothing_of_peft() -> None:
    import subprocess

    code = (
        "import sys, magic_fast as mf; mf.integrations.peft.install; "
        "print(*(m for m in ('peft', 'torch', 'transformers') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
