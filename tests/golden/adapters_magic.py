"""The MAGIC authors' functions, through the public calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import magic_fast as mf
from golden.adapters import adapter, target, upcast
from golden.golden_case import GoldenCase

# As the authors wrote it: every ratio applied, nothing guarded, nothing limited.
_PARITY: dict[str, Any] = {"guards": False, "clamp": None, "tensors": "magic"}
_P = {"L1": 1, "L2": 2, "L3": 3, "Linf": "inf"}


def _fraction(threshold: float) -> float:
    """The authors read a number above 1 as percent; we never do."""
    return threshold / 100 if threshold > 1 else threshold


def _calibrate(
    merged: Tensor, experts: Tensor, backend: str, wide: bool, name: str = "conv", **settings: Any
) -> tuple[Tensor, Tensor]:
    """(calibrated, raw ξ per row) of bare task vectors."""
    calibrated, report = mf.calibrate_weights(
        None,
        list(experts),
        merged,
        calibration=mf.WeightCalibration(**_PARITY, **settings),
        out=target(merged, wide),
        nonfinite="propagate",
        name=name,
        backend=backend,
    )
    return calibrated, report.tensors[0].coefficient


@adapter("magic.wsc_batch_mixed")
def wsc_batch_mixed(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    x = case.inputs
    scaled, ratio = _calibrate(x["Wm"], x["Wts"], backend, wide, eps_mode="absolute")
    return {"scaled": scaled, "ratio": ratio}


@adapter("magic.wsc_flat_mixed")
def wsc_flat_mixed(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    x = case.inputs
    row, stacked = x["Wm"][None], x["Wts"][:, None]
    scaled, ratio = _calibrate(row, stacked, backend, wide, eps_mode="none")
    return {"scaled": scaled[0], "ratio": ratio[0]}


@adapter("magic.wsc_sphere")
def wsc_sphere(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    x, p = case.inputs, _P[case.params["norm"]]
    scaled, ratio = _calibrate(x["Wm"], x["Wts"], backend, wide, variant="sphere", p=p)
    return {"scaled": scaled, "ratio": ratio}


@adapter("magic.wsc_spectral", torch_only=True)
def wsc_spectral(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    x = case.inputs
    scaled, ratio = _calibrate(x["Wm"], x["Wts"], backend, wide, variant="spectral")
    return {"scaled": scaled, "ratio": ratio[0]}


def _space(letter: str) -> dict[str, str]:
    """The authors' letter as our settings: S is spectral, W and D the mixed manifold."""
    return {"variant": "spectral"} if letter == "S" else {"eps_mode": "absolute"}


def _after_repair(raw: Tensor) -> Tensor:
    """Our reports hold the raw ξ; the authors return it with NaN replaced by 1."""
    return torch.where(torch.isnan(raw), torch.ones_like(raw), raw)


@adapter("magic.post_rectification_v2")
def post_rectification(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    x, weak, space = case.inputs, case.params["weak_comps"], case.params["space"]
    rectified, raw = _calibrate(
        x["Wm"],
        x["Wts"],
        "torch" if space == "S" else backend,
        wide,
        name=case.params["layer_name"],
        sensitive=weak,
        **_space(space),
    )
    ratio = _after_repair(raw)
    return {"rectified": rectified, "ratio": ratio[0] if space == "S" else ratio[:, None]}


@adapter("magic.layer_wise_rectify")
def layer_wise_rectify(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    merged, experts, params = case.model("merged"), case.models("expert"), case.params
    chosen = params.get("target")
    weights = None if chosen is None else [float(k == chosen) for k in range(len(experts))]
    calibrated, report = mf.calibrate_weights(
        None,
        experts,
        merged,
        calibration=mf.WeightCalibration(
            **_PARITY, sensitive=params["weak_comps"], **_space(params["space"])
        ),
        weights=weights,
        out={name: target(t, wide) for name, t in merged.items()},
        nonfinite="propagate",
        backend="torch" if params["space"] == "S" else backend,
    )
    skipped = sorted(t.name for t in report.tensors if not t.calibrated)
    assert skipped == case.record["meta"]["skipped"]
    outputs = {f"tv.{name}": t for name, t in calibrated.items()}
    for t in report.tensors:
        ratio = torch.ones(()) if t.coefficient is None else _after_repair(t.coefficient).mean()
        outputs[f"ratio.{t.name}"] = ratio
    return outputs


@adapter("magic.topk_values_mask", torch_only=True)
def topk_values_mask(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    m, params = case.inputs["M"], case.params
    side = "smallest" if params.get("reverse") else "largest"
    density, relative = _fraction(params["K"]), case.inputs.get("flat_ptm")
    pairs = [
        mf.trim(upcast(row, wide), "magnitude_plus_one", density, relative_to=relative, side=side)
        for row in m.reshape(-1, m.shape[-1])
    ]
    trimmed = torch.stack([t for t, _ in pairs]).reshape(m.shape)
    mask = torch.stack([keep for _, keep in pairs]).reshape(m.shape)
    # the authors' second value: the mask as floats, or per row its mean where there is one row
    single_row = m.dim() == 2 and m.shape[0] == 1
    frac = mask.float().mean(1) if single_row else mask.float()
    found = {"trimmed": trimmed, "frac": frac, "mask": mask.to(torch.uint8)}
    return {name: found[name] for name in case.outputs}


@adapter("magic.ties_merging")
def ties_merging(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    experts, params = list(case.inputs["W"]), case.params
    density = _fraction(params["reset_thresh"])
    reduce = params["merge_func"].removeprefix("dis-")
    merged = mf.merge_task_vectors(
        experts, "ties", preset="magic", density=density, reduce=reduce, backend=backend,
        out=target(experts[0], wide),
    )  # fmt: skip
    found = mf.merge_task_vectors(experts, "ties", preset="magic", density=density, details=True)
    masks = [
        torch.ones_like(e) if m is None else m
        for e, m in zip(experts, found.keep_masks, strict=True)
    ]
    return {
        "merged": merged,
        "mask": torch.stack(masks).to(torch.uint8),
        "sign": found.elected_sign,
    }


@adapter("magic.layer_wise_TIES")
def layer_wise_ties(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    return mf.merge_task_vectors(case.models("expert"), "ties", preset="magic", backend=backend)


@adapter("magic.TIES_global")
def ties_global(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    base = case.model("base")
    # fusion_bench is the same rule, over the whole model, summed; only its λ is 0.3
    merged = mf.merge(
        base, case.models("expert"), "ties", preset="fusion_bench", scale=1.0, backend=backend,
        out={name: target(t, True) for name, t in base.items()},
    )  # fmt: skip
    return {name: merged[name] - base[name] for name in base}


@adapter("magic.WA_TA")
def wa_ta(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    experts = list(case.inputs["W"])
    like = experts[0]

    def run(method: str, **params: Any) -> Tensor:
        return mf.merge_task_vectors(
            experts, method, backend=backend, out=target(like, wide), **params
        )

    def coefficient(method: str, plain: Tensor) -> Tensor:
        """λ of the method's own default under the preset, as it shows in the result."""
        scaled = mf.merge_task_vectors(
            [e.double() for e in experts], method, preset="magic", backend="torch"
        )
        exact = mf.merge_task_vectors(
            [e.double() for e in experts], method, preset="magic", scale=1.0, backend="torch"
        )
        largest = exact.abs().argmax()
        return (scaled.flatten()[largest] / exact.flatten()[largest]).reshape(plain.shape[:0])

    wa, ta = run("average", preset="magic"), run("task_arithmetic", preset="magic", scale=1.0)
    return {
        "wa": wa,
        "ta": ta,
        "wa_scaling_coef": coefficient("average", wa),
        "ta_scaling_coef": coefficient("task_arithmetic", ta),
    }


@adapter("magic.SLERP")
def slerp(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    w = case.inputs["W"]
    merged = mf.merge_task_vectors(
        list(w), "slerp", preset="magic", t=0.5, nonfinite="propagate", backend=backend,
        out=target(w[0], wide),
    )  # fmt: skip
    return {"merged": merged}


@adapter("magic.mask_input_with_mask_rate", torch_only=True)
def mask_input(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    w, params = upcast(case.inputs["W"], wide), case.params
    density = 1 - params["mask_rate"]
    rescale = "keep_probability" if params["use_rescale"] else None
    if params["mask_strategy"] == "magnitude":
        return {"masked": mf.trim(w, "magnitude_drop", density, rescale=rescale)[0]}
    keep = case.inputs["drop"] == 0
    rows = [
        mf.trim(x, "random", density, rescale=rescale, mask=mask)[0]
        for x, mask in zip(w, keep, strict=True)
    ]
    return {"masked": torch.stack(rows)}


@adapter("magic.DARE")
def dare(case: GoldenCase, backend: str, wide: bool) -> dict[str, Tensor]:
    """Drops 10 %, as the authors' function does (they pass 1 − 0.9 as the rate)."""
    w = list(case.inputs["W"])
    merged = mf.merge_task_vectors(
        w, "dare_linear", density=0.9, weights=1 / len(w), masks=list(case.inputs["drop"] == 0),
        rescale="keep_probability", backend=backend, out=target(w[0], wide),
    )  # fmt: skip
    return {"merged": merged}
