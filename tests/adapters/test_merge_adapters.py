"""``merge_adapters`` against the same merge of dense changes, in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf
from adapters.adapter_files import MODULES, Lora, draw_lora, is_embedding, write_ia3, write_peft
from magic_fast.adapters import open_adapter
from magic_fast.adapters.factors import LowRank, row_stats
from magic_fast.errors import CheckpointError
from magic_fast.reference import calibration as reference

SHAPES: dict[str, tuple[int, ...]] = {**MODULES, "conv": (8, 6, 3, 3), "model.embed": (30, 12)}
RANKS = (2, 4, 3)
WEIGHTS = [0.7, -0.4, 0.9]


@pytest.fixture(scope="module")
def loras() -> list[Lora]:
    """Ranks, scalings and one module differ."""
    found = [
        draw_lora(0, SHAPES, rank=2, alpha_pattern={"q_proj": 3}),
        draw_lora(1, SHAPES, rank=4, use_rslora=True),
        draw_lora(2, SHAPES, rank=3, ranks={"conv": 5}),
    ]
    del found[1].factors["model.layers.0.mlp.down_proj"]
    return found


@pytest.fixture(scope="module")
def paths(loras: list[Lora], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_peft(folder / str(k), lora) for k, lora in enumerate(loras)]


def deltas(loras: Sequence[Lora], module: str) -> list[Tensor]:
    return [lora.delta(module, SHAPES[module]) for lora in loras]


def written(folder: Path) -> dict[str, Tensor]:
    """Module → what its weight changes by, float64, from the files as they are."""
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    factors: dict[str, list[Tensor]] = {}
    for key in sorted(state):  # A before B
        module = key.removeprefix("base_model.model.").split(".lora_")[0]
        factors.setdefault(module, []).append(state[key])
    lora = Lora({m: (a, b) for m, (a, b) in factors.items()}, config)
    return {m: lora.delta(m, SHAPES[m]) for m in factors}


def close(got: Tensor, want: Tensor, bound: float = 1e-6) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) <= bound * float(want.norm()), (got, want)


@pytest.mark.parametrize(
    ("method", "options", "coefficients"),
    [
        ("average", {}, [1 / 3] * 3),
        ("average", {"scale": 0.5}, [1 / 6] * 3),
        ("task_arithmetic", {"weights": WEIGHTS, "scale": 2.0}, [2 * w for w in WEIGHTS]),
        ("linear", {"weights": WEIGHTS}, [w / sum(WEIGHTS) for w in WEIGHTS]),
        ("linear", {"weights": WEIGHTS, "normalize": False}, WEIGHTS),
    ],
)
def test_sums_are_exact(
    paths: list[Path], loras: list[Lora], tmp_path: Path, method: str, options: dict[str, Any],
    coefficients: list[float],
) -> None:  # fmt: skip
    report = mf.merge_adapters(paths, tmp_path / "out", method, **options)
    found = written(tmp_path / "out")
    for module in SHAPES:
        own = deltas(loras, module)
        want = sum(c * delta for c, delta in zip(coefficients, own, strict=True))
        assert isinstance(want, Tensor)
        close(found[module], want)
        ranks = [lora.factors[module][0].shape[0] for lora in loras if module in lora.factors]
        assert report[module].rank == sum(ranks)
        assert report[module].ranks == tuple(ranks)
        assert report[module].lost == 0
    assert report["model.layers.0.mlp.down_proj"].adapters == (0, 2)
    assert report.warnings == [
        "1 of 5 modules are not in every adapter, first model.layers.0.mlp.down_proj; "
        "those without one change nothing there"
    ]


def test_a_weight_of_zero_adds_no_rank(paths: list[Path], tmp_path: Path) -> None:
    report = mf.merge_adapters(paths, tmp_path / "out", "task_arithmetic", weights=[1, 0, 1])
    assert report["model.layers.0.self_attn.q_proj"].rank == 2 + 3


def test_text_encoders_of_diffusers(tmp_path: Path) -> None:
    stem, lora = "text_encoder.layers.0.q_proj.lora_linear_layer", draw_lora(0, {"q": (24, 16)})
    a, b = lora.factors["q"]
    path = tmp_path / "in.safetensors"
    save_file({f"{stem}.down.weight": a, f"{stem}.up.weight": b}, path)
    mf.merge_adapters([path], tmp_path / "out.safetensors", "task_arithmetic", weights=0.5)
    state = load_file(tmp_path / "out.safetensors")
    close(state[f"{stem}.up.weight"] @ state[f"{stem}.down.weight"], 0.5 * b @ a)


def test_a_rank_is_the_nearest(paths: list[Path], loras: list[Lora], tmp_path: Path) -> None:
    report = mf.merge_adapters(paths, tmp_path / "out", "task_arithmetic", rank=3)
    found = written(tmp_path / "out")
    for module in SHAPES:
        whole = torch.stack(deltas(loras, module)).sum(0).flatten(1)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        close(found[module].flatten(1), u[:, :3] * s[:3] @ vh[:3], 1e-5)
        assert report[module].rank == 3
        assert report[module].lost == pytest.approx(float(s[3:].norm() / s.norm()), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.4, "weights": WEIGHTS}),
        ("dare_linear", {"density": 0.5, "seed": 7}),
        ("magmax", {}),
        ("iso_c", {}),
        ("karcher", {}),
        ("pcb", {"scope": "tensor"}),
    ],
)
def test_other_methods_see_the_changes(
    paths: list[Path], loras: list[Lora], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """At full rank the result is the merge of the dense changes."""
    report = mf.merge_adapters(paths, tmp_path / "out", method, rank=100, **options)
    found = written(tmp_path / "out")
    dense = [
        {f"{m}.weight": lora.delta(m, shape).float() for m, shape in SHAPES.items()}
        for lora in loras
    ]
    merged = mf.merge_task_vectors(dense, method, **options)
    for module, shape in SHAPES.items():
        close(found[module], merged[f"{module}.weight"].double(), 1e-5)
        whole = torch.empty(shape).flatten(1)
        assert report[module].rank == min(whole.shape)
        assert report[module].lost < 1e-6


def test_the_rank_of_other_methods(paths: list[Path], loras: list[Lora], tmp_path: Path) -> None:
    """The largest of the adapters, and what it leaves out is told."""
    report = mf.merge_adapters(paths, tmp_path / "out", "ties", density=0.5)
    found = written(tmp_path / "out")
    for module in SHAPES:
        taus = [delta.float() for delta in deltas(loras, module)]
        whole = mf.merge_task_vectors(taus, "ties", density=0.5).double()
        assert report[module].rank == max(report[module].ranks)
        lost = float((found[module] - whole).norm() / whole.norm())
        assert report[module].lost == pytest.approx(lost, rel=1e-3)


CALIBRATIONS: list[dict[str, Any]] = [
    {},
    {"variant": "manifold_exact"},
    {"variant": "sphere"},
    {"variant": "sphere", "p": 1},
    {"variant": "sphere", "p": "inf"},
    {"variant": "sphere", "granularity": "tensor"},
    {"variant": "spectral"},
    {"variant": "spectral", "granularity": "row"},
    {"eps_mode": "absolute", "clamp": None, "strength": 0.5},
    {"sensitive": ["conv.weight", "model.layers.1.self_attn.q_proj"]},
    {"variant": "sphere", "tensors": mf.TensorFilter(include=(".",))},
]


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=str)
def test_calibration_is_that_of_the_dense_changes(
    paths: list[Path], loras: list[Lora], tmp_path: Path, calibration: dict[str, Any], method: str,
    rank: int | None,
) -> None:  # fmt: skip
    """ξ of what the result holds at its rank, from the same sums as of dense matrices."""
    weights = [0.7, 0.0, 0.9]
    options = {"weights": weights, "rank": rank}
    mf.merge_adapters(paths, tmp_path / "plain", method, **options)
    report = mf.merge_adapters(paths, tmp_path / "out", method, calibrate=calibration, **options)
    plain, found = written(tmp_path / "plain"), written(tmp_path / "out")
    settings = mf.WeightCalibration(**calibration)
    for module in SHAPES:
        own = deltas(loras, module)
        rows, longest = (x.flatten(1).norm(dim=1) for x in (plain[module], torch.stack(own, 1)))
        plain[module][rows <= 2.0**-22 * longest] = 0  # nothing but rounding
        wanted, wanted_report = mf.calibrate_weights(
            None, own, plain[module], calibration=settings, weights=weights,
            backend="torch", name=f"{module}.weight",
        )  # fmt: skip
        close(found[module], wanted, 2e-6)
        got, other = report[module].calibration, wanted_report.tensors[0]
        assert got is not None
        assert (got.name, got.shape, got.calibrated) == (other.name, other.shape, other.calibrated)
        assert report[module].rank <= sum(report[module].ranks)
        if not got.calibrated:
            assert is_embedding(module)
            continue
        assert got.coefficient is not None and other.coefficient is not None
        torch.testing.assert_close(got.coefficient, other.coefficient, rtol=1e-4, atol=1e-6)
        assert got.repaired == other.repaired
        assert got.magnitude_before == pytest.approx(other.magnitude_before, rel=1e-5)
        assert got.magnitude_after == pytest.approx(other.magnitude_after, rel=1e-5)


def test_rows_that_cancel_are_left_alone(tmp_path: Path) -> None:
    """What rounding leaves of two equal adapters is no direction to be made longer."""
    lora = draw_lora(0)
    for k in range(2):
        write_peft(tmp_path / str(k), lora)
    report = mf.merge_adapters(
        [tmp_path / "0", tmp_path / "1"], tmp_path / "out", "task_arithmetic", weights=[1, -1],
        calibrate=mf.WeightCalibration(clamp=None), rank=4,
    )  # fmt: skip
    for module, delta in written(tmp_path / "out").items():
        assert float(delta.norm()) < 1e-5 * float(lora.delta(module, SHAPES[module]).norm())
        found = report[module].calibration
        assert found is not None and found.repaired == SHAPES[module][0]


def test_a_small_scaling_in_float16(tmp_path: Path) -> None:
    """c·s of 8e-5 in A alone would lose most of its digits."""
    lora = draw_lora(0, rank=16, dtype=torch.float16, lora_alpha=1)
    path = write_peft(tmp_path / "in", lora)
    mf.merge_adapters([path], tmp_path / "out", "task_arithmetic", weights=0.001)
    for module, delta in written(tmp_path / "out").items():
        close(delta, 0.001 * lora.delta(module, SHAPES[module]), 1e-3)


def test_weights_of_the_base_beside_the_factors(paths: list[Path], tmp_path: Path) -> None:
    """PEFT saves them where an embedding is adapted: the result has them too."""
    key = "base_model.model.model.embed.base_layer.weight"
    folders = [tmp_path / str(k) for k in range(3)]
    for k, folder in enumerate(folders):
        write_peft(folder, draw_lora(k, SHAPES))
        state = load_file(folder / "adapter_model.safetensors")
        copy = torch.full((30, 12), 1.0 + (k == 2))
        save_file(state | {key: copy}, folder / "adapter_model.safetensors")
    mf.merge_adapters(folders[:2], tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert state[key].equal(torch.ones(30, 12))
    with pytest.raises(CheckpointError, match="expected that of the other adapters, got another"):
        mf.merge_adapters(folders, tmp_path / "other")


def test_calibration_along_columns(paths: list[Path], loras: list[Lora], tmp_path: Path) -> None:
    only = mf.TensorFilter(include=("proj",))
    settings = mf.WeightCalibration(
        variant=mf.WeightCalibration().variant, row_axis=1, tensors=only
    )
    mf.merge_adapters(paths, tmp_path / "out", calibrate=settings)
    found = written(tmp_path / "out")
    for module in MODULES:
        own = deltas(loras, module)
        wanted, _ = mf.calibrate_weights(
            None, own, torch.stack(own).mean(0), calibration=settings, name=f"{module}.weight",
            backend="torch",
        )  # fmt: skip
        close(found[module], wanted, 2e-6)


@pytest.mark.parametrize("p", [2, 1, 3, float("inf")])
def test_sums_of_rows(p: float) -> None:
    """From factors as from the products."""
    generator = torch.Generator().manual_seed(3)
    changes = [
        LowRank(torch.randn(9, r, generator=generator), torch.randn(r, 7, generator=generator))
        for r in (1, 3, 0, 2)
    ]
    *own, merged = changes
    got = row_stats(own, merged, p)
    taus = [x.up.double() @ x.down.double() for x in own]
    want = reference.row_stats(taus, merged.up.double() @ merged.down.double(), p)
    for name in ("gram", "dots", "norm2", "powers", "merged_powers"):
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_dtypes(tmp_path: Path) -> None:
    """The result has what the factors promote to, or what was asked for."""
    half = write_peft(tmp_path / "half", draw_lora(0, dtype=torch.bfloat16))
    full = write_peft(tmp_path / "full", draw_lora(1))
    for paths, dtype, want in (
        ([half, half], None, torch.bfloat16),
        ([half, full], None, torch.float32),
        ([half, full], "float16", torch.float16),
    ):
        out = tmp_path / f"{len(paths)}{dtype}{want}"
        mf.merge_adapters(paths, out, dtype=dtype)
        state = load_file(out / "adapter_model.safetensors")
        assert {x.dtype for x in state.values()} == {want}


@pytest.mark.parametrize("names", [("ties", {"density": 0.5}), ("average", {})], ids=lambda n: n[0])
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_other_namings(tmp_path: Path, style: str, names: tuple[str, dict[str, Any]]) -> None:
    """Files of kohya (α beside the factors) and of diffusers; the result has their keys."""
    stem = "lora_unet_down_attn_to_q" if style == "kohya" else "unet.down.attn.to_q"
    parts = (
        ("lora_down.weight", "lora_up.weight")
        if style == "kohya"
        else ("lora_A.weight", "lora_B.weight")
    )
    lora = [draw_lora(k, {"q": (24, 16)}, rank=2 + k, lora_alpha=1 + k) for k in range(2)]
    for k, own in enumerate(lora):
        a, b = own.factors["q"]
        state = {f"{stem}.{parts[0]}": a, f"{stem}.{parts[1]}": b}
        if style == "kohya":
            state[f"{stem}.alpha"] = torch.tensor(float(1 + k))
        else:
            own.config["lora_alpha"] = a.shape[0]
        save_file(state, tmp_path / f"{k}.safetensors")
    method, options = names
    out = tmp_path / "out.safetensors"
    mf.merge_adapters([tmp_path / f"{k}.safetensors" for k in range(2)], out, method,
                      rank=100, calibrate="wsc", **options)  # fmt: skip
    state = load_file(out)
    assert set(state) == {f"{stem}.{part}" for part in parts} | (
        {f"{stem}.alpha"} if style == "kohya" else set()
    )
    adapter = open_adapter(out)
    module = adapter.modules[stem]
    found = (
        module.scaling * state[f"{stem}.{parts[1]}"].double() @ state[f"{stem}.{parts[0]}"].double()
    )
    taus = [own.delta("q", (24, 16)) for own in lora]
    merged = mf.merge_task_vectors([x.float() for x in taus], method, **options)
    wanted, _ = mf.calibrate_weights(None, taus, merged.double(), name="q", backend="torch")
    close(found, wanted, 1e-5)


IA3: dict[str, tuple[int, ...]] = {"k_proj": (6, 1), "down_proj": (1, 9)}


def vectors(tmp_path: Path, count: int = 3) -> tuple[list[Path], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    found = [
        {m: 1 + 0.2 * torch.randn(s, generator=generator) for m, s in IA3.items()}
        for _ in range(count)
    ]
    del found[-1]["down_proj"]
    return [write_ia3(tmp_path / f"ia3-{k}", v) for k, v in enumerate(found)], found


def ia3_of(folder: Path) -> Mapping[str, Tensor]:
    state = load_file(folder / "adapter_model.safetensors")
    return {k.removeprefix("base_model.model.").removesuffix(".ia3_l"): x for k, x in state.items()}


def test_ia3(tmp_path: Path) -> None:
    """Methods see l − 1; where an adapter has no vector, that is 0."""
    paths, own = vectors(tmp_path)
    report = mf.merge_adapters(paths, tmp_path / "out", "ties", density=0.5, weights=[1, 2, 1])
    found = ia3_of(tmp_path / "out")
    for module, shape in IA3.items():
        taus = [v.get(module, torch.ones(shape)) - 1 for v in own]
        wanted = 1 + mf.merge_task_vectors(taus, "ties", density=0.5, weights=[1, 2, 1])
        torch.testing.assert_close(found[module], wanted)
    assert report.kind == "ia3"
    assert (report["down_proj"].adapters, report["down_proj"].rank) == ((0, 1), 0)


def test_ia3_calibrated_as_the_weights(tmp_path: Path) -> None:
    """An entry of a vector of outputs scales a row, whose length cancels in ξ."""
    paths, own = vectors(tmp_path)
    report = mf.merge_adapters(paths, tmp_path / "out", "task_arithmetic", calibrate="wsc")
    found = ia3_of(tmp_path / "out")["k_proj"]
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    taus = [(v["k_proj"].double() - 1) * weight for v in own]
    wanted, _ = mf.calibrate_weights(
        None, taus, torch.stack(taus).sum(0), name="k_proj.weight", backend="torch"
    )
    close((found.double() - 1) * weight, wanted, 1e-5)
    assert report["k_proj"].calibration is not None and report["k_proj"].calibration.calibrated
    assert report["down_proj"].calibration is None  # its rows mix: not without the weight


def test_a_merged_adapter_is_one_more_adapter(paths: list[Path], tmp_path: Path) -> None:
    """Merged once more it stays what it is: its scaling is in its factors."""
    mf.merge_adapters(paths, tmp_path / "out", "task_arithmetic", calibrate="sphere", rank=3)
    opened = open_adapter(tmp_path / "out")
    assert {m.scaling for m in opened.modules.values()} == {1.0}
    assert {m.rank for m in opened.modules.values()} == {3}
    mf.merge_adapters([tmp_path / "out"] * 2, tmp_path / "again")
    once, again = written(tmp_path / "out"), written(tmp_path / "again")
    for module in SHAPES:
        close(again[module], once[module])
