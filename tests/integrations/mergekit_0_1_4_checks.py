"""The methods inside mergekit 0.1.4. Run by test_environments.py in an environment that has that
release (`make peers-0.1.4`); not collected beside the newer one's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.base import TensorDictWrapper
from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS as TABLE
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch import Tensor

import magic_fast as mf
from magic_fast.cli.demo_data import TINY, write_checkpoints
from magic_fast.integrations import mergekit as ours
from magic_fast.integrations.mergekit.calls import REPLACED

LINE = (
    "mergekit 0.1.4: replaced linear, task_arithmetic, ties, dare_ties, dare_linear, breadcrumbs, "
    "breadcrumbs_ties, della, della_linear, karcher; added average, consensus_ta, emr_unified, "
    "iso_c, iso_cts, magmax, magnitude_prune, pcb, ram, ramplus_tl, star, tsv_m; left as they are: "
    "slerp, nuslerp, passthrough, model_stock, arcee_fusion, multislerp, nearswap, sce"
)
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.2, 0.5, 0.6]},
    "task_arithmetic": {"weight": [0.2, -0.5, 0.6], "lambda": 0.7},
    "ties": {"weight": [1.0, 0.5, 0.7], "density": [0.3, 0.5, 1.0], "int8_mask": True},
    "breadcrumbs": {"weight": 0.5, "density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.6, "gamma": 0.05, "normalize": 1.0},
    "karcher": {},
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
NAMES = ("base", "a", "b", "c")


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    before = dict(TABLE)
    yield
    ours.uninstall()
    assert list(TABLE.items()) == list(before.items())


def models(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A base and three experts."""
    torch.manual_seed(0)
    base = torch.randn(48, 40)
    return [base.to(dtype), *((base + 0.05 * torch.randn_like(base)).to(dtype) for _ in range(3))]


def run(method: str, tensors: Sequence[Tensor], **given: Any) -> Tensor:
    """By the protocol of this release, as its planner calls it."""
    found = TABLE[method]
    whole = method in ("linear", "karcher")
    refs = [ModelReference.model_validate(name) for name in NAMES]
    used = dict(list(zip(refs, tensors, strict=True))[1 if whole else 0 :])
    experts = list(used)[0 if whole else 1 :]
    each = {
        ref: ImmutableMap(
            {
                p.name: (
                    value[experts.index(ref) % len(experts)]
                    if isinstance(value := given.get(p.name, p.default_value), list)
                    and ref in experts
                    else value
                )
                for p in found.tensor_parameters()
            }
        )
        for ref in used
    }
    task = found.make_task(
        output_weight=WeightInfo(name="t.weight"),
        tensors=TensorDictWrapper(tensors=ImmutableMap({})),
        parameters=ImmutableMap(
            {p.name: given.get(p.name, p.default_value) for p in found.parameters()}
        ),
        tensor_parameters=ImmutableMap(each),
        base_model=None if whole else refs[0],
    )
    hash(task)  # the graph keeps tasks in sets
    assert list(task.arguments()) == ["tensors"]
    merged: Tensor = task.execute(tensors=used)
    return merged


def test_replaces_says_so_and_takes_it_back(caplog: pytest.LogCaptureFixture) -> None:
    before = dict(TABLE)
    caplog.set_level(logging.INFO, logger="magic_fast")
    with mf.integrations.mergekit.install() as done:
        assert [record.getMessage() for record in caplog.records] == [LINE]
        assert set(done.replaced) == set(REPLACED)
        for name in done.replaced:
            old, new = before[name], TABLE[name]
            assert (new.name(), new.pretty_name()) == (old.name(), old.pretty_name())
            assert new.tensor_parameters() == old.tensor_parameters()
            gained = [p.name for p in new.parameters()[len(old.parameters()) :]]
            assert gained == ([] if name in ("linear", "karcher") else ["calibrate"])
    assert list(TABLE.items()) == list(before.items())


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_float32_agrees_with_mergekit(method: str) -> None:
    theirs = run(method, models(), **DETERMINISTIC[method])
    with ours.install():
        merged = run(method, models(), **DETERMINISTIC[method])
    torch.testing.assert_close(merged, theirs, rtol=2e-6, atol=2e-6)
    assert not torch.equal(merged, models()[0])


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_of_a_tensor_too_small_for_an_outlier(method: str) -> None:
    """1920 elements, gamma 0.0001: this release leaves nothing of the task vectors."""
    given = {"weight": 0.5, "density": 0.6, "gamma": 0.0001}
    theirs = run(method, models(), **given)
    with ours.install():
        merged = run(method, models(), **given)
    torch.testing.assert_close(merged, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "karcher"])
def test_bfloat16_is_its_float32_rounded_once(method: str) -> None:
    tensors = models(torch.bfloat16)
    exact = run(method, [t.float() for t in tensors], **DETERMINISTIC[method])
    with ours.install():
        merged = run(method, tensors, **DETERMINISTIC[method])
    assert merged.dtype == torch.bfloat16
    # half a unit in the last place, and float32's own error
    assert ((merged.float() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_follow_torchs_seed_and_keep_the_share(method: str) -> None:
    tensors = models()

    def merged(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(method, tensors, weight=0.5, density=0.4)

    def moved(tensor: Tensor) -> float:
        return (tensor != tensors[0]).double().mean().item()

    theirs = merged(7)
    with ours.install():
        one, again, other = merged(7), merged(7), merged(8)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    # 1920 elements, none of three experts drawn with 0.6³: five σ of a difference
    assert abs(moved(one) - moved(theirs)) < 5 * (2 * 0.216 * 0.784 / 1920) ** 0.5


@pytest.mark.parametrize("method", [*DETERMINISTIC, *RANDOM])
def test_any_strides_and_no_input_written(method: str) -> None:
    parameters = DETERMINISTIC.get(method, {"weight": 0.5, "density": 0.5})
    strided = [t.T.contiguous().T for t in models()]
    before = [t.clone() for t in strided]
    plain = models()
    with ours.install():
        torch.manual_seed(3)
        expected = run(method, plain, **parameters)
        torch.manual_seed(3)
        assert torch.equal(run(method, strided, **parameters), expected)
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


def test_what_is_left_to_mergekit() -> None:
    """float64, and embeddings of another size, which it cuts."""
    base, first, second, third = models()
    shorter = [base, first[:47], second, third[:46]]
    for method in ("ties", "linear"):
        parameters = DETERMINISTIC[method] | {"weight": 0.5}
        theirs = run(method, [t.double() for t in models()], **parameters)
        with ours.install():
            assert torch.equal(run(method, [t.double() for t in models()], **parameters), theirs)

    def outcome() -> object:
        try:
            return run("ties", shorter, weight=0.5).tolist()
        except Exception as error:
            return repr(error)

    theirs = outcome()
    with ours.install():
        assert outcome() == theirs


@pytest.mark.parametrize("value", [1.0, "{variant: sphere, p: 1}"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "magmax"])
def test_calibrate(method: str, value: Any) -> None:
    base, *experts = models()
    settings: dict[str, Any] = {} if value == 1.0 else {"variant": "sphere", "p": 1}
    calibration = mf.WeightCalibration(**settings)
    expected = mf.merge(
        base, experts, method, preset="mergekit", calibrate=calibration, name="t.weight"
    )
    weight = {"weight": 1.0} if method != "magmax" else {}
    with ours.install():
        assert torch.equal(run(method, models(), calibrate=value, **weight), expected)


def test_new_methods_run_as_ours_and_check_their_parameters() -> None:
    base, *experts = models()
    with ours.install() as done:
        for name in done.added:
            scope = {"scope": "tensor"} if name == "pcb" else {}
            expected = mf.merge(base, experts, name, preset="mergekit", **scope)
            assert torch.equal(run(name, models()), expected), name
        with pytest.raises(mf.InputError) as caught:
            run("pcb", models(), ratio=2.0)
        assert str(caught.value) == (
            "ratio: expected a finite number in (0, 1], got 2.0. Correct it."
        )
        with pytest.raises(mf.InputError) as caught:
            run("ties", models(), weight=1.0, density=0.0, calibrate=1.0)
        assert str(caught.value).startswith("parameters of method 'ties' for 't.weight': expected ")
        with pytest.raises(mf.InputError, match=r"^calibrate: expected wsc, none or settings"):
            run("ties", models(), weight=1.0, calibrate=0.5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_whole_merge(method: str, tmp_path: Path) -> None:
    """mergekit's planner and graph, with and without, and calibrated as our own command does it."""
    base, *experts = write_checkpoints(tmp_path / "models", TINY, num_experts=3)
    text = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(path)} for path in experts],
        "parameters": {"weight": 0.5, "density": 1.0 if method == "task_arithmetic" else 0.3},
        "dtype": "float32",
    }

    def merged(name: str, **more: Any) -> dict[str, Tensor]:
        document = text | {"parameters": text["parameters"] | more}  # type: ignore[operator]
        config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(document)))
        run_merge(config, str(tmp_path / name), options=MergeOptions(quiet=True))
        (file,) = (tmp_path / name).glob("*.safetensors")
        return dict(load_file(file))

    theirs = merged("theirs")
    with ours.install():
        inside, calibrated = merged("inside"), merged("calibrated", calibrate=True)
    assert inside.keys() == theirs.keys()
    if method == "task_arithmetic":
        for name, tensor in inside.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=2**-22, atol=1e-7, msg=name)
    else:  # but at ties, which the three-way comparison counts
        far = sum(int((~torch.isclose(t, theirs[n], rtol=1e-5)).sum()) for n, t in inside.items())
        assert far < 0.03 * sum(t.numel() for t in inside.values())
    mf.merge_checkpoints(mf.MergeConfig.from_dict(text | {"calibrate": "wsc"}), tmp_path / "own")
    (file,) = (tmp_path / "own").glob("*.safetensors")
    assert all(torch.equal(t, calibrated[n]) for n, t in load_file(file).items())
