"""The MAGIC authors' feature space calibration, and their whole pipeline, through the public
calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter
from golden.golden_case import GoldenCase
from golden.networks import calibration_data, network, outputs_of
from magic_fast.api.results import CalibrationReport

_P = {"L1": 1, "L2": 2, "Linf": "inf"}


def _calibrate(
    case: GoldenCase,
    base: dict[str, Tensor],
    experts: list[dict[str, Tensor]],
    merged: dict[str, Tensor],
    weak: list[str] | None,
) -> tuple[Any, CalibrationReport]:
    return mf.calibrate_features(
        base,
        experts,
        network(case, merged),
        calibration_data(case),
        preset="magic",
        deploy="hooks",
        p=_P[case.params["norm"]],
        sensitive=weak,
    )


@adapter("magic.fsc", torch_only=True)
def fsc(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    base, experts, merged = case.model("base"), case.models("expert"), case.model("merged")
    hooked, report = _calibrate(case, base, experts, merged, case.params["weak_comps"])
    names = [layer.name for layer in report.layers]
    assert names == case.record["meta"]["layers"]
    plain = outputs_of(network(case, merged), case.inputs["probe"], [])
    after = outputs_of(hooked, case.inputs["probe"], names)
    found = {"y_uncalibrated": plain[""], "y_calibrated": after[""]}
    for layer in report.layers:
        found[f"ratio.{layer.name}"] = layer.applied
        found[f"layer_out.{layer.name}"] = after[layer.name]
        for task, alpha in layer.by_task.items():
            found[f"alpha.task{task.removeprefix('T')}.{layer.name}"] = alpha
    return found


_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "WA": ("average", {}),
    "TA": ("average", {"scale": 0.3}),  # the sum is computed there, and dropped
    "TIES": ("ties", {"preset": "magic"}),
    "SLERP": ("slerp", {"preset": "magic"}),
    "TSV-M": ("tsv_m", {"preset": "magic"}),
    "Iso-C": ("iso_c", {"preset": "magic"}),
    "Iso-CTS": ("iso_cts", {"preset": "magic"}),
}


def _weak(case: GoldenCase) -> list[str] | None:
    """The parameters with the lowest scores, as many as the authors' Alpha."""
    scores = case.params["component2acc"]
    return None if scores is None else sorted(scores, key=scores.get)[: case.params["Alpha"]]


@adapter("magic.merging", torch_only=True)
def merging(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    base, experts, space = case.model("base"), case.models("expert"), case.params["space"]
    taus = [{n: e[n] - base[n] for n in base} for e in experts]
    method, arguments = _METHODS[case.params["merge"]]
    if space in "WD":  # there the coefficient is 1
        arguments = {k: v for k, v in arguments.items() if k != "scale"}
    delta = mf.merge_task_vectors(taus, method, **arguments)
    weak = _weak(case)
    assert weak is None or set(weak) == set(case.record["meta"]["weak_comps"])
    if space in "WD":
        delta, _ = mf.calibrate_weights(
            None,
            taus,
            delta,
            calibration=mf.WeightCalibration(
                eps_mode="absolute", guards=False, clamp=None, tensors="magic", sensitive=weak
            ),
            nonfinite="propagate",
        )
    merged = {n: base[n] + delta[n] for n in base}
    found = {f"sd.{n}": t for n, t in merged.items()}
    model: Any = network(case, merged)
    if space in "FD":
        model, report = _calibrate(case, base, experts, merged, weak)
        found |= {f"ratio.{layer.name}": layer.applied for layer in report.layers}
    with torch.no_grad():
        found["y"] = model(case.inputs["probe"])
    return found
