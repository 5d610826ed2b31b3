"""The algorithm inside FusionBench, against its own. Run by test_environments.py in an environment
that has it (`make peers-fusion-bench`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
from fusion_bench.method.isotropic_merging.iso import ISO_C_Merge
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

import magic_fast as mf
from magic_fast.integrations.fusion_bench import MagicFastAlgorithm


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
    found = {"_pretrained_": base}
    for name in "abc":
        found[name] = copy.deepcopy(base)
        for parameter in found[name].parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return found


def same(a: nn.Module, b: nn.Module, tolerance: float = 2e-6) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("own", "method", "parameters"),
    [
        (lambda: SimpleAverageAlgorithm(), "linear", {}),
        (lambda: TaskArithmeticAlgorithm(0.3), "task_arithmetic", {}),
        (lambda: TaskArithmeticAlgorithm(0.7), "task_arithmetic", {"lambda": 0.7}),
        (lambda: TiesMergingAlgorithm(0.3, 20, [], "sum"), "ties", {}),
        (lambda: TiesMergingAlgorithm(0.5, 60, [], "sum"), "ties", {"density": 0.6, "scale": 0.5}),
        (lambda: ISO_C_Merge(1.0), "iso_c", {}),
    ],
)
def test_agrees_with_fusion_bench(own: Any, method: str, parameters: dict[str, Any]) -> None:
    theirs = own().run(BaseModelPool(models()))
    ours = MagicFastAlgorithm(method, parameters).run(BaseModelPool(models()))
    same(ours, theirs, 2e-5 if method == "iso_c" else 2e-6)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3}),
        ("task_arithmetic", {}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5, "weight": [0.5, 1.0, 0.2]}),
        ("iso_c", {}),
        ("iso_cts", {"common_space_fraction": 0.7}),
        ("tsv_m", {}),
    ],
)
@pytest.mark.parametrize("calibrate", [None, "wsc", {"variant": "sphere", "p": 1}])
def test_is_our_merge(method: str, parameters: dict[str, Any], calibrate: Any) -> None:
    pool = models()
    before = {n: copy.deepcopy(m.state_dict()) for n, m in pool.items()}
    seed = 3 if method.startswith("dare") else None
    found = MagicFastAlgorithm(method, parameters, calibrate, seed=seed).run(pool)
    base, *experts = pool.values()
    given = dict(parameters)
    weights = {"weights": given.pop("weight")} if "weight" in given else {}
    wanted = calibrate if not isinstance(calibrate, dict) else mf.WeightCalibration(**calibrate)
    preset = "fusion_bench" if method in ("ties", "task_arithmetic") else None
    expected = mf.merge(
        base, experts, method, preset=preset, calibrate=wanted, seed=seed, **weights, **given
    )
    same(found, expected, 0.0)
    for name, model in pool.items():
        assert all(torch.equal(t, before[name][n]) for n, t in model.state_dict().items())


def test_from_a_configuration(tmp_path: Path) -> None:
    """As FusionBench's command makes it, and back into a file."""
    text = OmegaConf.create(
        {
            "_target_": "magic_fast.integrations.fusion_bench.MagicFastAlgorithm",
            "merge_method": "ties",
            "parameters": {"density": 0.3, "weight": [1.0, 0.5, 0.5]},
            "calibrate": {"variant": "sphere"},
        }
    )
    algorithm = instantiate(text)
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = MagicFastAlgorithm.from_yaml(tmp_path / "method.yaml")
    expected = MagicFastAlgorithm(
        "ties", {"density": 0.3, "weight": [1.0, 0.5, 0.5]}, {"variant": "sphere"}
    ).run(models())
    for made in (algorithm, again):
        assert isinstance(made, MagicFastAlgorithm)
        same(made.run(BaseModelPool(models())), expected, 0.0)


def test_only_the_target_modules() -> None:
    pool = models()
    for model in pool.values():
        model._fusion_bench_target_modules = ["0"]
    found = MagicFastAlgorithm("task_arithmetic").run(pool)
    whole = MagicFastAlgorithm("task_arithmetic").run(models())
    assert torch.equal(found[0].weight, whole[0].weight)
    assert torch.equal(found[2].weight, pool["_pretrained_"][2].weight)
    assert not torch.equal(found[2].weight, whole[2].weight)


def refusal(pool: Any, *given: Any) -> str:
    with pytest.raises(mf.InputError) as caught:
        MagicFastAlgorithm(*given).run(pool)
    return str(caught.value)


def test_refusals() -> None:
    pool = models()
    alone: dict[str, nn.Module] = {"_pretrained_": pool["_pretrained_"]}
    assert refusal(alone, "ties") == (
        "models of the pool for 'ties': expected at least one beside '_pretrained_', got none."
    )
    without = {name: model for name, model in pool.items() if name != "_pretrained_"}
    assert refusal(without, "ties") == (
        "models of the pool for 'ties': expected '_pretrained_', the model that the others were "
        "trained from, got a, b, c."
    )
    assert refusal(pool, "ties", {"density": 20}).startswith(
        "density for method 'ties': expected a finite number in (0, 1] "
    )
    assert "'densty'" in refusal(pool, "ties", {"densty": 0.2})

    class Lazy(BaseModelPool):  # type: ignore[misc]
        def load_model(self, name: str, *_: Any, **__: Any) -> dict[str, Tensor]:
            return models()[name].state_dict()

    assert refusal(Lazy(pool), "ties") == (
        "model '_pretrained_' of the pool: expected a module, got OrderedDict. Load it as a "
        "module, or merge the checkpoints by `magic-fast merge`, which streams them."
    )
