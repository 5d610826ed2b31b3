"""``add_weighted_adapter`` with the replacement, against PEFT's own on the same adapters."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")

import peft
from transformers.pytorch_utils import Conv1D

from magic_fast.integrations import peft as front
from magic_fast.integrations.peft import svd, trial

TARGETS = ["emb", "fc1", "wide", "conv", "point"]


class Network(nn.Module):
    """One layer of each kind that is combined by its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 12)
        self.fc1 = nn.Linear(12, 20)
        self.wide = Conv1D(16, 20)  # weights [in, out]
        self.conv = nn.Conv2d(3, 14, 3)
        self.point = nn.Conv2d(14, 16, 1)


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    yield
    front.uninstall()


def model_with(ranks: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Adapters a, b, … of these ranks, each of its own scaling."""
    torch.manual_seed(0)
    model = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, rank in zip("abcd", ranks, strict=False):
            config = peft.LoraConfig(
                r=rank, lora_alpha=3 * rank + len(name), target_modules=TARGETS,
                init_lora_weights=False, **options,
            )  # fmt: skip
            if model is None:
                model = peft.get_peft_model(Network(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    assert model is not None
    return model.to(dtype)


def factors(model: Any, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """layer → (A, B) of one adapter, as PEFT keeps them."""
    found = {}
    for key, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if name in layer.lora_A:
            found[key] = (layer.lora_A[name].weight.data, layer.lora_B[name].weight.data)
        elif name in layer.lora_embedding_A:
            found[key] = (layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data)
    return found


def _product(pair: tuple[Tensor, Tensor]) -> Tensor:
    down, up = (x.flatten(1).double() for x in pair)
    return up @ down


def _both(
    model: Any, names: list[str], weights: list[float], kind: str, **options: Any
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    results = []
    for ours in (False, True):
        twin = copy.deepcopy(model)
        if ours:
            front.install()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)
            twin.add_weighted_adapter(names, weights, "merged", kind, **options)
        results.append(factors(twin, "merged"))
    front.uninstall()
    own, found = results
    assert own.keys() == found.keys() == set(TARGETS)
    for name in own:
        for a, b in zip(own[name], found[name], strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, name
    return own, found


KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "ties": {"density": 0.4},
    "magnitude_prune": {"density": 0.4},
    "svd": {},
    "svd of rank 2": {"svd_rank": 2},
    "ties_svd": {"density": 0.4, "majority_sign_method": "frequency"},
    "magnitude_prune_svd": {"density": 0.4},
}


@pytest.mark.parametrize("weights", [[0.5, 0.7], [1, 1], [1.0, -0.8]], ids=str)
@pytest.mark.parametrize("word", KINDS)
def test_the_same_change_of_every_layer(word: str, weights: list[float]) -> None:
    model = model_with((4, 4), use_rslora=True)
    own, ours = _both(model, ["a", "b"], weights, word.split()[0], **KINDS[word])
    for name in own:
        expected, found = _product(own[name]), _product(ours[name])
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max())), name


@pytest.mark.parametrize("ranks", [(2, 5), (3, 3, 3)], ids=str)
def test_svd_of_other_ranks(ranks: tuple[int, ...]) -> None:
    names = list("abc")[: len(ranks)]
    own, ours = _both(model_with(ranks), names, [0.6, 0.3, -1.0][: len(ranks)], "svd")
    for name in own:
        expected, found = _product(own[name]), _product(ours[name])
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max())), name
        down, up = (x.flatten(1).double() for x in ours[name])
        eye = torch.eye(len(down), dtype=torch.float64)
        assert torch.allclose(down @ down.T, eye, atol=1e-5)  # as PEFT: U·S and Vᵀ
        gram = up.T @ up
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-3)


def test_a_rank_beyond_that_of_the_sum_stays_trainable() -> None:
    """Directions that the sum lacks: orthonormal rows, and columns of zeros."""
    own, ours = _both(model_with((2, 3)), ["a", "b"], [0.5, 0.5], "svd", svd_rank=8)
    for name in own:
        expected, found = _product(own[name]), _product(ours[name])
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max())), name
        down, up = (x.flatten(1).double() for x in ours[name])
        assert torch.allclose(down @ down.T, torch.eye(8, dtype=torch.float64), atol=1e-5)
        assert not up[:, 5:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_svd_of_narrow_adapters(dtype: torch.dtype) -> None:
    """PEFT rounds the change of each adapter to their dtype before it adds; factors do not."""
    model = model_with((4, 4), dtype)
    own, ours = _both(model, ["a", "b"], [0.5, 0.7], "svd")
    for name in own:
        expected, found = _product(own[name]), _product(ours[name])
        eps = torch.finfo(dtype).eps
        assert float((found - expected).norm()) < 2 * eps * float(expected.norm()), name


def _decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that are decomposed from now on."""
    seen: list[tuple[int, ...]] = []
    own = torch.linalg.svd

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(x.shape))
        return own(x, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    return seen


def test_only_small_matrices_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with((2, 3))
    with front.install():
        seen = _decomposed(monkeypatch)
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", "svd")
    assert seen == [(5, 5)] * len(TARGETS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("svd", {"svd_clamp": 0.9}), ("ties_svd", {"density": 0.5})],
    ids=["clamp", "ties"],
)
def test_what_is_left_to_peft(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with((4, 4))
    with front.install():
        seen = _decomposed(monkeypatch)
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", kind, **options)
    assert max(max(shape) for shape in seen) > 8


def test_clamped_as_by_peft() -> None:
    """PEFT's own code runs, with the arguments that it was given: the thin decomposition differs
    from the full one in last bits on some CPUs (a Xeon with AMX)."""
    own, ours = _both(model_with((4, 4)), ["a", "b"], [0.5, 0.5], "svd", svd_clamp=0.9)
    for name in own:
        assert all(torch.equal(a, b) for a, b in zip(own[name], ours[name], strict=True))


def test_an_adapter_that_is_not_finite_is_left_to_peft() -> None:
    model = model_with((4, 4))
    factors(model, "b")["fc1"][0][0, 0] = float("inf")
    for ours in (False, True):
        if ours:
            front.install()
        with pytest.raises(RuntimeError):
            copy.deepcopy(model).add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", "svd")


def test_the_scaling_is_applied_as_often_as_by_the_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0.20 applies it twice."""
    own = svd.OWN
    assert own is not None and trial.scaling_power() == 1

    @functools.wraps(own)
    def twice(self: Any, kind: Any, adapters: Any, weights: Any, rank: Any, target: Any,
              *rest: Any, **options: Any) -> Any:  # fmt: skip
        scaled = [w * target.scaling[a] for w, a in zip(weights, adapters, strict=True)]
        return own(self, kind, adapters, scaled, rank, target, *rest, **options)

    monkeypatch.setattr(svd, "OWN", twice)
    assert trial.scaling_power() == 2
    monkeypatch.setattr(svd, "OWN", lambda self: None)
    assert trial.scaling_power() == "other arguments"
    monkeypatch.setattr(svd, "OWN", None)
    assert trial.scaling_power() == "it has none"


def test_random_combinations_run() -> None:
    model = model_with((4, 4))
    with front.install():
        for kind in ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"):
            for name in ("x", "y"):
                torch.manual_seed(0)
                model.add_weighted_adapter(["a", "b"], [0.5, 0.5], kind + name, kind, density=0.5)
            x, y = factors(model, kind + "x"), factors(model, kind + "y")
            assert all(torch.equal(x[n][0], y[n][0]) for n in x)
            assert any(bool(b.any()) for _, b in x.values())
