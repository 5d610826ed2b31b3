"""The table's checkpoints: merges, sweeps, series, calibrations and adapters on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import magic_fast as mf
from recorded.inputs import (
    ADAPTED,
    LARGE,
    SHAPES,
    Shapes,
    draw,
    models,
    sized,
    write_ia3,
    write_loras,
    write_models,
    write_tokenizers,
)

#: name, call, backends (a word of ``cases``), whether the bits are every CPU's
Row = tuple[str, Callable[[str | None], Path], str, bool]
MIB = 1 << 20
SMALL = 4 * MIB  # a budget that takes the large tensors in several pieces


def document(method: str, experts: int, **fields: Any) -> dict[str, Any]:
    """What a YAML would hold."""
    base = {} if method in ("linear", "passthrough") else {"base_model": "base"}
    listed = [{"model": f"expert-{k}"} for k in range(experts)]
    return {"merge_method": method, **base, "models": listed, **fields}


def merging(
    method: str, mix: str = "bf16", experts: int = 3, shapes: Shapes = SHAPES, *,
    out: str = "out", options: Mapping[str, Any] | None = None, **fields: Any,
) -> Callable[[str | None], Path]:  # fmt: skip
    """``mf.merge_checkpoints`` of a base and its experts."""

    def call(backend: str | None) -> Path:
        write_models(models(sized(shapes, backend), mix, experts))
        config = document(method, experts, **fields)
        mf.merge_checkpoints(config, out, backend=backend, device="cpu", **(options or {}))
        return Path(out)

    return call


_DELLA = {"density": 0.5, "epsilon": 0.2}
#: name → method, parameters; of small models on every backend, of large ones in pieces
RECIPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"parameters": {"density": 0.3, "weight": 0.7}, "calibrate": "wsc"}),
    "ties_whole_model": ("ties", {"preset": "ties_merging", "parameters": {"density": 0.2}}),
    "ties_peft": ("ties", {"preset": "peft", "parameters": {"density": 0.2, "rescale": "l2"}}),
    "dare_ties": ("dare_ties", {"parameters": {"density": 0.4}, "seed": 7}),
    "della": (
        "della",
        {
            "parameters": {"density": 0.5, "epsilon": 0.2},
            "calibrate": "sphere",
            "preset": "default",
        },
    ),
    "breadcrumbs": ("breadcrumbs", {"parameters": {"density": 0.6, "gamma": 0.1}}),
    "consensus_ta": ("consensus_ta", {"parameters": {"on": "ties", "density": 0.5}}),
    "pcb": ("pcb", {"parameters": {"ratio": 0.2}}),
    "sce": ("sce", {"parameters": {"select_topk": 0.4}, "calibrate": {"clamp": [0.5, 2.0]}}),
    "ramplus_tl": ("ramplus_tl", {"parameters": {"epsilon": 0.02}}),
    "linear": ("linear", {"parameters": {"weight": 0.4}}),
    "manifold_exact": ("task_arithmetic", {"calibrate": {"variant": "manifold_exact"}}),
}
DIRECTIONS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "slerp": ("slerp", 1, {"t": 0.3}),
    "nuslerp": ("nuslerp", 2, {"weight": 0.7, "nuslerp_flatten": False}),
    "multislerp": ("multislerp", 3, {}),
    "karcher": ("karcher", 3, {}),
    "model_stock": ("model_stock", 3, {}),
}


def _merges() -> Iterator[Row]:
    for name, (method, fields) in RECIPES.items():
        yield name, merging(method, **fields), "elements", True
        large = merging(method, "mixed", shapes=LARGE, options={"memory": SMALL}, **fields)
        yield f"{name}-pieces", large, "native", True
    for name, (method, experts, parameters) in DIRECTIONS.items():
        fields: dict[str, Any] = {"parameters": parameters, "calibrate": "wsc"}
        options = {"memory": SMALL}
        call = merging(method, "mixed", experts, LARGE, options=options, **fields)
        yield f"{name}-pieces", call, "cpu", True
    for method in ("iso_c", "iso_cts", "tsv_m", "star"):
        yield method, merging(method, "f32", calibrate="wsc"), "chosen", False
    yield "arcee_fusion", merging("arcee_fusion", experts=1), "chosen", False
    spectral = merging("ties", "f32", calibrate={"variant": "spectral"})
    yield "spectral", spectral, "chosen", False
    yield "f64", merging("ties", "f64", calibrate="wsc"), "chosen", False
    cast = merging("ties", "mixed", dtype="float32", out_dtype="float16", calibrate="wsc")
    yield "dtype", cast, "elements", True
    yield "shards", merging("ties", options={"max_shard_size": 900}), "elements", True
    yield "one_file", merging("ties", out="out.safetensors", calibrate="wsc"), "elements", True
    filtered = [{"filter": "mlp", "value": 0.4}, {"filter": "norm", "value": 1.0}, {"value": 0.7}]
    parameters = {"density": [0.2, 0.9], "weight": filtered, "lambda": 0.8}
    yield "gradients", merging("ties", parameters=parameters), "elements", True


def _other_documents() -> Iterator[Row]:
    def slices(backend: str | None) -> Path:
        write_models(models())
        ranges = [("base", [0, 2]), ("expert-0", [1, 2]), ("expert-1", [0, 1])]
        parts = [{"sources": [{"model": m, "layer_range": r}]} for m, r in ranges]
        document = {"merge_method": "passthrough", "slices": parts, "dtype": "float16"}
        mf.merge_checkpoints(document, "out", backend=backend, device="cpu")
        return Path("out")

    def tokenizers(backend: str | None) -> Path:
        words = {"a": "x y", "b": "y x only_b both", "c": "both x y extra"}
        names = list(write_tokenizers(words))
        listed = [{"model": n, "parameters": {"weight": 0.2 + k}} for k, n in enumerate(names)]
        config = {
            "merge_method": "linear", "base_model": "a", "models": listed, "dtype": "float32",
            "tokenizer_source": "union",
        }  # fmt: skip
        mf.merge_checkpoints(config, "out", backend=backend, device="cpu")
        return Path("out")

    def adapted(backend: str | None) -> Path:
        write_models(models({f"{m}.weight": s for m, s in ADAPTED.items()}, experts=0))
        listed = [{"model": f"base+{lora}"} for lora in write_loras()]
        config = {
            "merge_method": "ties", "base_model": "base", "models": listed, "calibrate": "wsc",
            "parameters": {"density": 0.4},
        }  # fmt: skip
        mf.merge_checkpoints(config, "out", backend=backend, device="cpu")
        return Path("out")

    def series(backend: str | None) -> Path:
        write_models(models())
        Path("series.yml").write_text(_SERIES)
        mf.merge_series("series.yml", "all/out", intermediate="all", backend=backend, device="cpu")
        return Path("all")

    yield "slices", slices, "elements", True
    yield "tokenizers", tokenizers, "elements", True
    yield "adapted", adapted, "cpu", True
    yield "series", series, "cpu", True


_SERIES = """\
merge_method: slerp
base_model: first
models: [{model: second}]
parameters: {t: 0.4}
---
name: second
merge_method: ties
base_model: base
models:
  - {model: first, parameters: {density: 0.5}}
  - {model: expert-2, parameters: {density: 0.5}}
---
name: first
merge_method: linear
models:
  - {model: expert-0, parameters: {weight: 1}}
  - {model: expert-1, parameters: {weight: 2}}
"""

SWEEPS: Mapping[str, tuple[str, dict[str, list[Any]], dict[str, Any]]] = {
    "ties": ("ties", {"density": [0.1, 1.0], "lambda": [0.3, 1.0]}, {}),
    "whole_model": ("ties", {"density": [0.1, 0.4]}, {"preset": "ties_merging"}),
    "random": ("dare_ties", {"lambda": [0.5, 1.0], "seed": [0, 7]}, {}),
    "calibrated": ("ties", {"calibrate.scale": [0.5, 1.0]}, {"calibrate": "wsc"}),
}


def _sweeps() -> Iterator[Row]:
    for name, (method, settings, fields) in SWEEPS.items():

        def call(backend: str | None, m: str = method, s: Any = settings, f: Any = fields) -> Path:
            write_models(models(sized(LARGE, backend), "bf16"))
            config = document(m, 3, **f)
            mf.sweep_checkpoints(config, "out", s, backend=backend, memory=SMALL, device="cpu")
            return Path("out")

        yield f"sweep-{name}", call, "cpu", True


#: name → arguments, whether the bits are every CPU's
CALIBRATED: Mapping[str, tuple[dict[str, Any], bool]] = {
    "wsc": ({}, True),
    "exact": ({"calibration": {"variant": "manifold_exact", "clamp": None}}, True),
    "sphere": ({"calibration": {"variant": "sphere", "granularity": "tensor"}}, True),
    "lines": ({"space": "lines", "alpha": 0.3, "beta": 0.6}, True),
    "lines_norms": ({"space": "lines", "beta": 0.6}, False),
    "svc": ({"space": "svc", "alpha": 0.2}, False),
}


def _calibrations() -> Iterator[Row]:
    for name, (arguments, exact) in CALIBRATED.items():

        def call(backend: str | None, a: Any = arguments, e: bool = exact) -> Path:
            write_models(models(sized(LARGE if e else SHAPES, backend), "bf16", 4))
            Path("expert-3").rename("merged")
            folders = [f"expert-{k}" for k in range(3)]
            options = {"backend": backend, "memory": SMALL, "device": "cpu"}
            mf.calibrate_checkpoints("base", folders, "merged", "out", **a, **options)
            return Path("out")

        yield f"calibrate-{name}", call, "cpu" if exact else "chosen", exact
    for space in ("feature", "dual"):
        yield f"calibrate-{space}", lambda b, s=space: _llama(s), "chosen", False


def _llama(space: str) -> Path:
    """The layers of a real architecture, one at a time."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    names = ("base", "first", "second", "merged")
    for k, name in enumerate(names):
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for own, p in model.named_parameters():
                moved = draw(f"{own} {k}", p.shape, 0.05) if k else torch.zeros(p.shape)
                p.copy_(draw(own, p.shape, 0.3) + moved)
        model.save_pretrained(name)
    ids = {t: (draw(t, (4, 7)).abs() * 10).long().clamp(3, 30) for t in names[1:3]}
    data = {t: [{"input_ids": x, "attention_mask": torch.ones_like(x)}] for t, x in ids.items()}
    mf.calibrate_checkpoints(
        "base", names[1:3], "merged", "out", space=space, data=data, device="cpu"
    )
    return Path("out")


def _adapters() -> Iterator[Row]:
    def of(method: str, rank: int | None = None, **options: Any) -> Callable[[str | None], Path]:
        def call(backend: str | None) -> Path:
            mf.merge_adapters(write_loras(rank=rank), "out", method, backend=backend, **options)
            return Path("out")

        return call

    def ia3(backend: str | None) -> Path:
        mf.merge_adapters(write_ia3(), "out", "linear", weights=[0.3, 0.7], backend=backend)
        return Path("out")

    yield "adapters", of("task_arithmetic", weights=[0.7, -0.4, 0.9]), "chosen", False
    yield "adapters-rank", of("task_arithmetic", calibrate="wsc"), "chosen", False
    yield "adapters-ties", of("ties", density=0.4, calibrate="sphere"), "chosen", False
    yield (
        "adapters-factors",
        of("ties", rank=3, density=0.4, on="factors", preset="peft"),
        "chosen",
        False,
    )
    yield "adapters-ia3", ia3, "chosen", False


def rows() -> Iterator[Row]:
    """All of them."""
    for part in (_merges(), _other_documents(), _sweeps(), _calibrations(), _adapters()):
        yield from part
