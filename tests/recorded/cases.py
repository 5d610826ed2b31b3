"""The table: merges and calibrations by public calls, from inputs of fixed bits.

A case is a function of a backend's name. It runs in a folder that is empty and its alone, and
returns what was made: values, or the path of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import magic_fast as mf
from recorded import checkpoints
from recorded.inputs import (
    SHAPES,
    Shapes,
    change,
    draw,
    integers,
    models,
    networks,
    samples,
    sized,
    task_vectors,
    uneven,
)

#: what every backend ranks as mergekit does
MATRICES: Shapes = {n: s for n, s in SHAPES.items() if len(s) < 3}
Call = Callable[[str | None], Any]
#: backends that run a recipe; those that run a mean of directions; where the call has no choice
ELEMENTS = ("native", "torch", "cuda", "triton")
DIRECTIONS = ("native", "torch")
CPU = ("native", "torch")
CHOSEN = ("auto",)


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: of the row, unique.
        call: from a backend (None where the call chooses) to a result.
        backends: those that it runs on.
        exact: the native backend (or plain element-wise PyTorch) gives these bits on every CPU, so
            that their hashes are committed; else they come from BLAS, LAPACK or sums of PyTorch.
    """

    name: str
    call: Call
    backends: tuple[str, ...] = ELEMENTS
    exact: bool = True

    @property
    def recorded(self) -> str | None:
        """The backend whose hashes are committed, or None."""
        where = [b for b in ("native", "auto") if b in self.backends]
        return where[0] if self.exact and where else None


WEIGHTS = {"weights": [0.7, -0.4, 0.9]}
#: method → parameters that act on changes this small
METHODS: Mapping[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {**WEIGHTS, "scale": 0.7},
    "ties": {**WEIGHTS, "density": 0.3},
    "dare_linear": {"density": 0.4, "seed": 7},
    "dare_ties": {"density": 0.4, "seed": 2**40 + 3, **WEIGHTS},
    "della": {"density": 0.5, "epsilon": 0.2, "seed": 7},
    "della_linear": {"density": 0.5, "epsilon": 0.1, "seed": 7, **WEIGHTS},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.05, **WEIGHTS},
    "magnitude_prune": {"density": 0.4, **WEIGHTS},
    "magmax": {"scale": 0.5},
    "consensus_ta": {"scale": 0.5, "min_tasks": 2},
    "emr_unified": {"scale": 0.8},
    "sce": {"select_topk": 0.4},
    "ram": {"epsilon": 0.02, "rescale": "l1"},
    "ramplus_tl": {"r": 0.5, "alpha": 0.9, "epsilon": 0.02},
    "pcb": {"ratio": 0.2},
}
#: method → presets besides mergekit's and ours
PRESETS = {
    "average": ("fusion_bench", "magic"),
    "task_arithmetic": ("peft", "magic"),
    "ties": ("peft", "ties_merging", "fusion_bench", "magic", "sd_mecha"),
    "dare_linear": ("peft",),
    "dare_ties": ("peft",),
    "magnitude_prune": ("peft",),
    "consensus_ta": ("magic",),
}
#: word → (method, number of experts, parameters)
MEANS_OF_DIRECTIONS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "slerp": ("slerp", 1, {"t": 0.3}),
    "slerp_rows": ("slerp", 1, {"t": 0.6, "per_row": True}),
    "nuslerp": ("nuslerp", 2, {"weights": [0.7, 0.3]}),
    "nuslerp_rows": ("nuslerp", 2, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": ("multislerp", 3, {}),
    "karcher": ("karcher", 3, {}),
    "model_stock": ("model_stock", 3, {}),
    "model_stock_filters": ("model_stock", 3, {"filter_wise": True}),
}
#: word → (method, experts, parameters): by PyTorch's factorisations and sums
WHOLE_TENSORS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "iso_c": ("iso_c", 3, {}),
    "iso_cts": ("iso_cts", 3, {}),
    "tsv_m": ("tsv_m", 3, {}),
    "star": ("star", 3, {}),
    "arcee_fusion": ("arcee_fusion", 1, {}),
}
CALIBRATIONS: Mapping[str, dict[str, Any]] = {
    "wsc": {},
    "tensor": {"granularity": "tensor"},
    "absolute": {"eps_mode": "absolute"},
    "unguarded": {"eps_mode": "absolute", "guards": False, "clamp": None},
    "unbounded": {"eps_mode": "none", "clamp": None},
    "clamped": {"clamp": (0.9, 1.1)},
    "strength": {"strength": 0.5, "scale": 0.8},
    "grow": {"direction": "grow"},
    "shrink": {"direction": "shrink"},
    "sensitive": {"sensitive": ("model.layers.0.mlp.up_proj.weight",)},
    "magic_tensors": {"tensors": "magic"},
    "patterns": {"tensors": mf.TensorFilter(include=("mlp",), exclude=("conv1d",))},
    "exact": {"variant": "manifold_exact"},
    "sphere": {"variant": "sphere"},
    "sphere_1": {"variant": "sphere", "p": 1},
    "sphere_3": {"variant": "sphere", "p": 3},
    "sphere_inf": {"variant": "sphere", "p": float("inf"), "granularity": "tensor"},
    "spectral": {"variant": "spectral"},
    "spectral_rows": {"variant": "spectral", "granularity": "row"},
}
TRIMS: Mapping[str, dict[str, Any]] = {
    "magnitude": {"q": 0.3},
    "magnitude_plus_one": {"q": 0.3, "rescale": "l1"},
    "magnitude_complement": {"q": 0.3},
    "magnitude_drop": {"q": 0.3, "side": "smallest"},
    "random": {"q": 0.5, "rescale": "keep_probability", "seed": 5, "name": "a"},
    "ranked": {"q": 0.5, "seed": 5, "rescale": "linf"},
    "band": {"q": 0.6, "gamma": 0.1},
    "std": {"q": 1.0},
    "norm_fraction": {"q": 0.8},
}


def merging(
    method: str, mix: str, experts: int = 3, *, shapes: Shapes = SHAPES, base: bool = True,
    **options: Any,
) -> Call:  # fmt: skip
    """``mf.merge`` of state dicts."""

    def call(backend: str | None) -> Any:
        start, *others = models(sized(shapes, backend), mix, experts)
        return mf.merge(start if base else None, others, method, backend=backend, **options)

    return call


def _merges() -> Iterator[Case]:
    for method, options in METHODS.items():
        yield Case(f"{method}-f32", merging(method, "f32", **options))
        shapes = MATRICES if method.startswith("della") else SHAPES  # ranks along dimension 1
        call = merging(method, "bf16", preset="mergekit", shapes=shapes, **options)
        yield Case(f"{method}-mergekit-bf16", call)
        yield Case(f"{method}-f64", merging(method, "f64", **options), ("torch",))
        for preset in PRESETS.get(method, ()):
            call = merging(method, "mixed", preset=preset, **options)
            yield Case(f"{method}-{preset}-mixed", call)
    for mix in ("f16", "mixed"):
        for calibrate in (None, "wsc"):
            options = {"calibrate": calibrate, **METHODS["ties"]}
            yield Case(f"ties-{calibrate}-{mix}", merging("ties", mix, **options))
    for k in (1, 2, 8, 17):
        yield Case(f"ties-K{k}-bf16", merging("ties", "bf16", k, density=0.4, calibrate="wsc"))
    for rule, words in {
        "rescale": ("keep_probability", "l1", "l2", "linf"), "vote": ("count",),
        "reduce": ("sum", "weighted_mean", "max"), "align": ("min_norm",),
    }.items():  # fmt: skip
        for word in words:
            options = {**METHODS["ties"], rule: word}
            yield Case(f"ties-{rule}-{word}-f32", merging("ties", "f32", **options))
    call = merging("breadcrumbs", "f32", density=0.95, gamma=0.1, compat="mergekit-0.1.4")
    yield Case("breadcrumbs-compat-f32", call)
    call = merging("consensus_ta", "bf16", on="ties", density=0.5, calibrate="wsc")
    yield Case("consensus_ta-ties-bf16", call)
    yield Case("pcb-tensor-f32", merging("pcb", "f32", ratio=0.3, scope="tensor"))
    yield Case("nearswap-f32", merging("nearswap", "f32", 1, t=0.05))
    for mix in ("f32", "bf16"):
        weights = [0.2, 0.5, 0.9]
        yield Case(f"linear-{mix}", merging("linear", mix, base=False, weights=weights))
        call = merging("passthrough", mix, 1, base=False, scale=1.3)
        yield Case(f"passthrough-{mix}", call)
    for word, (method, experts, options) in MEANS_OF_DIRECTIONS.items():
        rows = "nuslerp_row_wise" in options  # summed in PyTorch
        for mix, preset in (("f32", "default"), ("bf16", "mergekit"), ("mixed", "default")):
            call = merging(method, mix, experts, preset=preset, **options)
            backends = ("torch",) if rows else DIRECTIONS
            yield Case(f"{word}-{preset}-{mix}", call, backends)
    for word, (method, experts, options) in WHOLE_TENSORS.items():
        for mix in ("f32", "bf16"):
            call = merging(method, mix, experts, **options)
            yield Case(f"{word}-{mix}", call, CHOSEN, exact=False)
    for method in ("iso_c", "iso_cts", "tsv_m", "slerp"):
        options = {"preset": "magic"} if method != "slerp" else {"preset": "magic", "t": 0.5}
        call = merging(method, "f32", 2 if method == "slerp" else 3, **options)
        yield Case(f"{method}-magic-f32", call, CHOSEN, exact=False)
    for method in ("ties", "dare_ties", "della", "sce", "slerp", "karcher"):
        shapes = {"a": (257, 521), "b": (70_001,)}
        options = MEANS_OF_DIRECTIONS[method][2] if method in MEANS_OF_DIRECTIONS else (
            {**METHODS[method], "calibrate": "wsc"})  # fmt: skip
        experts = MEANS_OF_DIRECTIONS[method][1] if method in MEANS_OF_DIRECTIONS else 3
        call = merging(method, "bf16", experts, shapes=shapes, **options)
        yield Case(f"{method}-large-bf16", call, ("native",))


def _calibrations() -> Iterator[Case]:
    for word, settings in CALIBRATIONS.items():
        exact = settings.get("variant") != "spectral"
        for method, mix in (("task_arithmetic", "f32"), ("ties", "bf16")):
            call = _calibrating(method, mix, settings)
            yield Case(f"{method}-{word}-{mix}", call, ELEMENTS if exact else CHOSEN, exact)
        call = _calibrated(settings)
        yield Case(f"calibrate_weights-{word}-mixed", call, ELEMENTS if exact else CHOSEN, exact)
    call = merging("dare_linear", "f32", calibrate="wsc", row_axis=(0, 1), seed=3, density=0.5,
                   shapes={"a": (3, 5, 40), "b": (4, 31)})  # fmt: skip
    yield Case("dare_linear-row_axes-f32", call)
    yield Case("slerp-wsc-bf16", merging("slerp", "bf16", 1, t=0.3, calibrate="wsc"), DIRECTIONS)
    yield Case("iso_c-wsc-f32", merging("iso_c", "f32", calibrate="wsc"), CHOSEN, exact=False)


def _calibrating(method: str, mix: str, settings: Mapping[str, Any]) -> Call:
    def call(backend: str | None) -> Any:
        base, *experts = uneven(models(sized(SHAPES, backend), mix))
        options = {**METHODS[method], "calibrate": mf.WeightCalibration(**settings)}
        return mf.merge(base, experts, method, backend=backend, **options)

    return call


def _calibrated(settings: Mapping[str, Any]) -> Call:
    def call(backend: str | None) -> Any:
        base, *experts = uneven(models(sized(SHAPES, backend), "mixed"))
        merged = mf.merge(base, experts, "task_arithmetic", scale=0.4, backend="torch")
        settings_ = mf.WeightCalibration(**settings)
        return mf.calibrate_weights(
            base, experts, merged, calibration=settings_, weights=[0.5, 1.0, 2.0], backend=backend
        )

    return call


def _more_of_merging() -> Iterator[Case]:
    """Bare tensors, task vectors, masks, details, modules, sweeps."""

    def details(backend: str | None) -> Any:
        base, *experts = models(mix="bf16")
        options = {**METHODS["ties"], "calibrate": "wsc", "details": True}
        return mf.merge(base, experts, "ties", backend=backend, **options)

    def vectors(backend: str | None) -> Any:
        found = task_vectors(sized(SHAPES, backend), "f16")
        return mf.merge_task_vectors(found, "della", seed=3, calibrate="sphere", backend=backend)

    def bare(backend: str | None) -> Any:
        experts = [change(f"bare {k}", (31, 67)).float() for k in range(4)]
        masks = [integers(f"mask {k}", 31 * 67).view(31, 67) > 0 for k in range(4)]
        options = {"masks": masks, "name": "layer.weight", "calibrate": "wsc", "backend": backend}
        return mf.merge_task_vectors(torch.stack(experts), "dare_linear", **options)

    def task_masked(backend: str | None) -> Any:
        base, *experts = models(sized(SHAPES, backend), "bf16")
        masks = mf.task_masks(base, experts, tall_mask_lambda=[0.2, 0.4, 0.6])
        return mf.merge(base, experts, "consensus_ta", masks=masks, backend=backend)

    def out(backend: str | None) -> Any:
        shapes = sized(SHAPES, backend)
        base, *experts = models(shapes, "f32")
        target = {n: torch.empty_like(t) for n, t in models(shapes, "bf16")[0].items()}
        mf.merge(base, experts, "ties", out=target, calibrate="wsc", backend=backend)
        return target

    def into(backend: str | None) -> Any:
        base, *experts = networks()
        mf.merge_into(base, base, experts, "ties", density=0.3, calibrate="wsc", backend=backend)
        return base

    def module(backend: str | None) -> Any:
        base, *experts = networks()
        return mf.merge(base, experts, "ties", preset="ties_merging", backend=backend)

    def transposed(backend: str | None) -> Any:
        base, *experts = (draw(f"strided {k}", (24, 40)).float().T for k in range(4))
        return mf.merge(base, experts, "breadcrumbs", calibrate="wsc", backend=backend)

    def sweep(backend: str | None) -> Any:
        base, *experts = models({"w": (128, 521), "norm": (7,)}, "bf16")
        recipes = [
            *({"method": "ties", "density": d, "scale": s} for d in (0.1, 1.0) for s in (0.3, 1)),
            *({"method": "ties", "preset": "magic", "scale": s} for s in (0.3, 1)),
            *({"method": "dare_ties", "seed": s, "scale": 0.5} for s in (0, 7)),
            {"method": "average", "calibrate": "wsc"},
        ]
        return mf.sweep(base, experts, recipes, backend=backend)

    yield Case("details-ties-bf16", details, ("torch",))
    yield Case("merge_task_vectors-della-f16", vectors)
    yield Case("merge_task_vectors-masks-f32", bare)
    yield Case("consensus_ta-masks-bf16", task_masked)
    yield Case("out-ties-bf16", out)
    yield Case("merge_into-ties-f32", into)
    yield Case("module-ties-f32", module)
    yield Case("strided-breadcrumbs-f32", transposed, ("torch",))
    yield Case("sweep-bf16", sweep, CPU)


def _without_a_backend() -> Iterator[Case]:
    for rule, options in TRIMS.items():
        exact = rule not in ("std", "norm_fraction")
        yield Case(
            f"trim-{rule}",
            lambda b, r=rule, o=options: mf.trim(change("trimmed", (13, 41)).float(), r, **o),
            CHOSEN,
            exact,
        )

    def masks(backend: str | None) -> Any:
        base, *experts = models(mix="bf16")
        found = mf.task_masks(base, experts, tall_mask_lambda=0.3)
        return found, mf.consensus_mask(found, min_tasks=2)

    def emr(backend: str | None) -> Any:
        base, *experts = models(mix="mixed")
        found = mf.emr(base, experts)
        return found, found.task_model(base, 1)

    def lines(backend: str | None, alpha: float | None = 0.3) -> Any:
        base, *experts = models(mix="bf16")
        merged = mf.merge(base, experts, "task_arithmetic", scale=0.5)
        return mf.lines(base, experts, merged, alpha=alpha, beta=0.6, num_blocks=2)

    def svc(backend: str | None) -> Any:
        base, *experts = models()
        return mf.svc(base, experts, mf.merge(base, experts, "task_arithmetic"), alpha=0.2)

    def stats(backend: str | None) -> Any:
        base, *experts = models()
        return mf.task_vector_stats(base, experts, mf.merge(base, experts, "average"))

    def rows(backend: str | None) -> Any:
        base, *experts = (draw(f"rows {k}", (19, 37)).float() for k in range(4))
        sums = mf.row_stats(base, experts, experts[0] / 2, backend=backend)
        return sums, mf.kth_magnitude(base, 100)

    def norms(backend: str | None) -> Any:
        return [mf.row_norms(draw("rows", (19, 37)).float(), p) for p in (1, 2, 3, float("inf"))]

    yield Case("task_masks-bf16", masks, CHOSEN)
    yield Case("emr-mixed", emr, CHOSEN, exact=False)
    yield Case("lines-bf16", lines, CHOSEN)
    yield Case("lines-norms-bf16", lambda b: lines(b, None), CHOSEN, exact=False)
    yield Case("svc-f32", svc, CHOSEN, exact=False)
    yield Case("task_vector_stats-f32", stats, CHOSEN, exact=False)
    yield Case("row_stats-f32", rows)
    yield Case("row_norms-f32", norms, CHOSEN, exact=False)


def _features() -> Iterator[Case]:
    """FSC and DSC: activations are products of matrices."""

    def calibrated(**settings: Any) -> Call:
        def call(backend: str | None) -> Any:
            base, *experts = networks(2)
            merged = mf.merge(base, experts, "average")
            data = samples(("first", "second"))
            return mf.calibrate_features(base, experts, merged, data, **settings)

        return call

    def sensitive(backend: str | None) -> Any:
        base, *experts = networks(2)
        return mf.sensitive_layers(base, experts, data=samples(("first", "second")), resamples=200)

    for word, settings in {
        "layer": {},
        "channel": {"granularity": "channel", "reduction": "mean", "p": 2},
        "sequential": {"sequential": True, "reduction": "median", "clamp": None},
        "dual": {"space": "dual", "sensitive": ["hidden"], "strength": 0.5},
        "hooks": {"deploy": "hooks", "preset": "magic"},
    }.items():
        yield Case(f"calibrate_features-{word}", calibrated(**settings), CHOSEN, exact=False)
    yield Case("sensitive_layers", sensitive, CHOSEN, exact=False)


def _checkpoints() -> Iterator[Case]:
    for name, call, where, exact in checkpoints.rows():
        backends = {"elements": ELEMENTS, "cpu": CPU, "native": ("native",), "chosen": CHOSEN}[
            where
        ]
        yield Case(f"checkpoints-{name}", call, backends, exact)


def _table() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for rows in (
        _merges(), _calibrations(), _more_of_merging(), _without_a_backend(), _features(),
        _checkpoints(),
    ):  # fmt: skip
        for case in rows:
            assert case.name not in found, f"two cases are called {case.name}"
            found[case.name] = case
    return found


CASES: Mapping[str, Case] = _table()
