"""The methods inside mergekit: its own results, ours where they are new, and inputs left alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.integrations import mergekit as ours

DETERMINISTIC: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.2, 0.5, 0.6]},
    "task_arithmetic": {"weight": [0.2, -0.5, 0.6], "lambda": 0.7},
    "ties": {"weight": [1.0, 0.5, 0.7], "density": [0.3, 0.5, 1.0], "int8_mask": True},
    "breadcrumbs": {"weight": 0.5, "density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.6, "gamma": 0.05, "normalize": True},
    "karcher": {},
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def models(dtype: torch.dtype = torch.float32, *shape: int) -> list[Tensor]:
    """A base and three experts."""
    torch.manual_seed(0)
    base = torch.randn(shape or (48, 40))
    return [base.to(dtype), *((base + 0.05 * torch.randn_like(base)).to(dtype) for _ in range(3))]


def run(method: str, tensors: Sequence[Tensor], **parameters: Any) -> Tensor:
    """By mergekit's own function; the first tensor is the base where the method has one."""
    from mergekit.merge_methods import merge_tensors

    whole = method in ("linear", "karcher")
    merged: Tensor = merge_tensors(
        tensors[1:] if whole else tensors,
        method,
        parameters=parameters,
        base_index=None if whole else 0,
    )
    return merged


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_float32_agrees_with_mergekit(registry: dict[str, Any], method: str) -> None:
    tensors = models()
    theirs = run(method, tensors, **DETERMINISTIC[method])
    with ours.install():
        merged = run(method, tensors, **DETERMINISTIC[method])
    torch.testing.assert_close(merged, theirs, rtol=2e-6, atol=2e-6)
    assert not torch.equal(merged, tensors[0])


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "karcher"])
def test_bfloat16_is_its_float32_rounded_once(registry: dict[str, Any], method: str) -> None:
    tensors = models(torch.bfloat16)
    exact = run(method, [t.float() for t in tensors], **DETERMINISTIC[method])
    with ours.install():
        merged = run(method, tensors, **DETERMINISTIC[method])
    assert merged.dtype == torch.bfloat16
    # half a unit in the last place, and float32's own error
    assert ((merged.float() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_follow_torchs_seed(registry: dict[str, Any], method: str) -> None:
    tensors = models()

    def merged(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        first, second = (run(method, tensors, weight=0.5, density=0.5) for _ in range(2))
        return first, second

    with ours.install():
        (one, next_one), (again, _), (other, _) = merged(7), merged(7), merged(8)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one, next_one)


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_have_mergekits_statistics(registry: dict[str, Any], method: str) -> None:
    """Of one expert: the share that stays, and mean and spread of what stays."""
    tensors = models(torch.float32, 200, 500)[:2]

    def change() -> Tensor:
        merged = run(method, tensors, weight=1.0, density=0.4, rescale=True)
        return merged - tensors[0]

    theirs = change()
    with ours.install():
        mine = change()
    count = theirs.numel()
    for found in (theirs, mine):
        share = (found != 0).double().mean().item()
        assert abs(share - 0.4) < 5 * (0.24 / count) ** 0.5
    # rescaled to the norm before: the mean magnitude is that of the whole task vector
    torch.testing.assert_close(mine.abs().mean(), theirs.abs().mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.01, atol=0)


@pytest.mark.parametrize("method", [*DETERMINISTIC, *RANDOM])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides_and_no_input_written(
    registry: dict[str, Any], method: str, layout: str
) -> None:
    parameters = DETERMINISTIC.get(method, {"weight": 0.5, "density": 0.5})
    tensors = models()
    strided = {
        "transposed": [t.T.contiguous().T for t in tensors],
        "sliced": [torch.stack([t, t], -1)[..., 1] for t in tensors],
        "expanded": [t[:1].expand(48, 40) for t in tensors],
    }[layout]
    assert not strided[0].is_contiguous()
    before = [t.clone() for t in strided]
    with ours.install():
        torch.manual_seed(3)
        expected = run(method, [t.contiguous() for t in strided], **parameters)
        torch.manual_seed(3)
        merged = run(method, strided, **parameters)
    assert torch.equal(merged, expected)
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


def test_gradients_are_mergekits(registry: dict[str, Any]) -> None:
    tensors = [t.requires_grad_() for t in models()]

    def gradient() -> tuple[Tensor, ...]:
        merged = run("ties", tensors, **DETERMINISTIC["ties"])
        return torch.autograd.grad(merged.square().sum(), tensors)

    theirs = gradient()
    with ours.install():
        mine = gradient()
        with pytest.raises(mf.InputError) as caught:
            run("ties", tensors, weight=1.0, calibrate="wsc")
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert str(caught.value) == (
        "gradients of 'ties' for 'the tensor': expected none to be wanted, got a tensor that "
        "requires one. Merge inside torch.no_grad()."
    )


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5])
def test_density_out_of_range_is_mergekits_to_judge(registry: dict[str, Any], value: float) -> None:
    def outcome() -> object:
        try:
            return run("ties", models(), weight=1.0, density=value).tolist()
        except Exception as error:
            return repr(error)

    theirs = outcome()
    with ours.install():
        assert outcome() == theirs
        with pytest.raises(mf.InputError, match="density a finite number in") as caught:
            run("ties", models(), weight=1.0, density=value, calibrate="wsc")
    assert str(caught.value).startswith("parameters of method 'ties' for 'the tensor': expected ")


def test_nothing_but_a_base(registry: dict[str, Any]) -> None:
    base = models()[0]
    with ours.install():
        assert run("ties", [base]) is base


@pytest.mark.parametrize(
    ("method", "dtype"), [("ties", torch.float64), ("task_arithmetic", torch.float16)]
)
def test_other_dtypes(registry: dict[str, Any], method: str, dtype: torch.dtype) -> None:
    tensors = models(dtype)
    exact = run(method, [t.double() for t in tensors], **DETERMINISTIC[method])
    with ours.install():
        merged = run(method, tensors, **DETERMINISTIC[method])
    assert merged.dtype == dtype
    ulp = torch.finfo(dtype).eps
    assert ((merged.double() - exact).abs() <= exact.abs() * ulp / 2 * 1.001 + 1e-6).all()


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("wsc", {}),
        ("{variant: sphere, p: 1}", {"variant": "sphere", "p": 1}),
        ("{strength: 0.5, clamp: [0.5, 2]}", {"strength": 0.5, "clamp": (0.5, 2)}),
        ("none", None),
    ],
)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "magmax"])
def test_calibrate(
    registry: dict[str, Any], method: str, text: str, settings: dict[str, Any] | None
) -> None:
    base, *experts = models()
    calibration = None if settings is None else mf.WeightCalibration(**settings)
    expected = mf.merge(base, experts, method, preset="mergekit", calibrate=calibration)
    weight = {"weight": 1.0} if method in ("task_arithmetic", "ties") else {}
    with ours.install():
        merged = run(method, [base, *experts], calibrate=text, **weight)
    assert torch.equal(merged, expected)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("wcs", "an unknown word"),
        ("{varian: sphere}", "varian: Extra inputs are not permitted"),
        ("{variant: [}", "while parsing"),
    ],
)
def test_bad_calibrate(registry: dict[str, Any], text: str, why: str) -> None:
    with ours.install(), pytest.raises(mf.InputError) as caught:
        run("ties", models(), weight=1.0, calibrate=text)
    assert str(caught.value).startswith(
        "calibrate: expected wsc, none or settings in quotes such as '{variant: sphere}', got "
        f"{text!r} ({why}"
    )


def test_rows_follow_the_models_layout(registry: dict[str, Any]) -> None:
    """transformers' Conv1D is [in, out]; mergekit's references know the model type."""
    from mergekit.merge_methods import TensorGroup

    class Reference:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def config(self) -> object:
            return SimpleNamespace(model_type=self.kind)

    base, *experts = models()
    name = "h.0.attn.c_attn.weight"
    with ours.install():
        for kind, axis in (("gpt2", 1), ("llama", 0)):
            ids = [Reference(kind) for _ in range(4)]
            group = TensorGroup.from_tensors([base, *experts], ids=ids, base_index=0, name=name)
            parameters = {"weight": 1.0, "calibrate": "wsc"}
            (merged,) = registry["task_arithmetic"]((group,), parameters=parameters)
            expected = mf.merge(base, experts, "task_arithmetic", calibrate="wsc", row_axis=axis)
            assert torch.equal(merged, expected)


def test_new_methods_run_as_ours(registry: dict[str, Any]) -> None:
    base, *experts = models()
    with ours.install() as done:
        for name in done.added:
            scope = {"scope": "tensor"} if name == "pcb" else {}
            expected = mf.merge(base, experts, name, preset="mergekit", **scope)
            assert torch.equal(run(name, [base, *experts]), expected), name


def test_new_methods_check_their_parameters(registry: dict[str, Any]) -> None:
    with ours.install():
        with pytest.raises(mf.InputError) as caught:
            run("pcb", models(), ratio=2.0)
        assert str(caught.value) == (
            "ratio: expected a finite number in (0, 1], got 2.0. Correct it."
        )
        with pytest.raises(mf.InputError, match=r"ratio: Input should be a valid number, .*'x'"):
            run("pcb", models(), ratio="x")
        with pytest.raises(TypeError, match=r"Unknown parameter\(s\) for pcb: scope"):
            run("pcb", models(), scope="model")  # the whole model first: not inside mergekit
