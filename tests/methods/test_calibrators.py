"""What restores magnitudes after any merger, on sharded checkpoints merged from a YAML: svc, lines,
and norms by row or tensor (WSC ``sphere``)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf
from magic_fast.cli import main

METHODS = ("average", "ties", "slerp", "iso_c", "tsv_m")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def merged(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One result of each method, in several shards."""
    folder = tmp_path_factory.mktemp("merged")
    for method in METHODS:
        count = 1 if method == "slerp" else 3
        config = {
            "merge_method": method,
            "base_model": str(tiny_models / "base"),
            "models": [{"model": str(tiny_models / f"expert-{k}")} for k in range(count)],
            "parameters": {"t": 0.4} if method == "slerp" else {},
        }
        mf.merge_checkpoints(yaml.safe_dump(config), folder / method, max_shard_size=128 * 1024)
        assert len(list((folder / method).glob("*.safetensors"))) > 1
    return folder


def load(folder: Path) -> State:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def states(tiny_models: Path, merged: Path) -> tuple[State, list[State], State]:
    experts = [load(tiny_models / f"expert-{k}") for k in range(3)]
    return load(tiny_models / "base"), experts, load(merged)


def same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


def command(tiny_models: Path, merged: Path, out: Path, *more: str) -> list[str]:
    experts = [str(tiny_models / f"expert-{k}") for k in range(3)]
    return ["calibrate", "--base", str(tiny_models / "base"), "--experts", *experts, "--merged",
            str(merged), "-q", str(out), *more]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_svc_of_checkpoints(method: str, merged: Path, tiny_models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(tiny_models, merged / method, out, "--space", "svc", "--alpha", "0.3")) == 0
    base, experts, before = states(tiny_models, merged / method)
    same(load(out), mf.svc(base, experts, before, alpha=0.3))
    assert torch.equal(load(out)["model.norm.weight"], before["model.norm.weight"])
    # the default, and the formula for one matrix, as it is written down
    mf.calibrate_checkpoints(
        tiny_models / "base", [tiny_models / f"expert-{k}" for k in range(3)], merged / method,
        tmp_path / "default.safetensors", space="svc",
    )  # fmt: skip
    name = "model.layers.1.self_attn.q_proj.weight"
    taus = [(e[name].float() - base[name].float()).double() for e in experts]
    u, s, vh = torch.linalg.svd((before[name].float() - base[name].float()).double())
    delta = torch.zeros_like(taus[0])
    for r in range(len(s)):
        shares = 0.0
        for tau in taus:
            a = u[:, r] @ tau
            shares += max(0.1, float(s[r] * (vh[r] @ a) / max(float(a @ a), 1e-12)))
        delta += s[r] * 3 / shares * torch.outer(u[:, r], vh[r])
    want = base[name].double() + delta
    got = load_file(tmp_path / "default.safetensors")[name]
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-9)  # half an ulp


@pytest.mark.parametrize("alpha", [0.5, None])
@pytest.mark.parametrize("method", METHODS)
def test_lines_of_checkpoints(
    method: str, alpha: float | None, merged: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """The model says how many blocks it has; without alpha all tensors are read for it."""
    more = ["--space", "lines", "--beta", "0.8"] + (["--alpha", str(alpha)] if alpha else [])
    assert main(command(tiny_models, merged / method, tmp_path / "out", *more)) == 0
    base, experts, before = states(tiny_models, merged / method)
    want = mf.lines(base, experts, before, beta=0.8, num_blocks=2, alpha=alpha)
    got = load(tmp_path / "out")
    # alpha found in pieces is a sum in another order: the last bit may differ
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=0 if alpha else 2**-7, atol=0)
    assert alpha is None or not torch.equal(got["lm_head.weight"], before["lm_head.weight"])


def test_what_is_no_matrix_or_no_float(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    models = []
    for k in range(4):
        tensors = {"h.0.w": torch.randn(6, 9, generator=g), "h.1.b": torch.randn(9, generator=g),
                   "ids": torch.arange(4), "none": torch.zeros(0, 3)}  # fmt: skip
        save_file(tensors, tmp_path / f"{k}.safetensors")
        models.append(tensors)
    base, a, b, merged = (tmp_path / f"{k}.safetensors" for k in range(4))
    mf.calibrate_checkpoints(base, [a, b], merged, tmp_path / "svc.safetensors", space="svc")
    same(load_file(tmp_path / "svc.safetensors"), mf.svc(models[0], models[1:3], models[3]))
    out = tmp_path / "lines.safetensors"
    mf.calibrate_checkpoints(base, [a, b], merged, out, space="lines", beta=1.0, num_blocks=2,
                             alpha=0.5)  # fmt: skip
    same(
        load_file(out),
        mf.lines(models[0], models[1:3], models[3], beta=1.0, num_blocks=2, alpha=0.5),
    )


def test_continued(merged: Path, tiny_models: Path, tmp_path: Path) -> None:
    """A finished result is verified; other numbers are refused."""
    line = command(tiny_models, merged / "average", tmp_path / "out", "--space", "lines")
    assert main([*line, "--beta", "0.5"]) == 0
    assert main([*line, "--beta", "0.5", "--resume"]) == 0
    assert main([*line, "--beta", "0.6", "--resume"]) == 2


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_norms_restored(
    granularity: str, p: int | str, merged: Path, tiny_models: Path, tmp_path: Path
) -> None:
    """Every row, or every matrix, of the change has the experts' mean norm."""
    more = ["--variant", "sphere", "--norm", str(p), "--granularity", granularity]
    more += ["--clamp", "none"]
    wide = tmp_path / "wide"  # float32, so that rounding hides nothing
    shutil.copytree(merged / "ties", wide)
    for file in wide.glob("*.safetensors"):
        save_file({n: t.float() for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert main(command(tiny_models, wide, tmp_path / "out", *more)) == 0
    base, experts, _ = states(tiny_models, wide)
    got, name = load(tmp_path / "out"), "model.layers.0.mlp.down_proj.weight"
    axis = 1 if granularity == "row" else None

    def norm(x: Tensor) -> Tensor:
        delta = x.double() - base[name].double()
        found: Tensor = torch.linalg.vector_norm(delta, float(p), dim=axis)
        return found

    want = torch.stack([norm(e[name]) for e in experts]).mean(0)
    torch.testing.assert_close(norm(got[name]), want, rtol=1e-4, atol=0)


def test_spectral_norms_restored(merged: Path, tiny_models: Path, tmp_path: Path) -> None:
    """``--variant spectral`` alone is one number a tensor, not rows by another name."""
    wide = tmp_path / "wide"
    shutil.copytree(merged / "ties", wide)
    for file in wide.glob("*.safetensors"):
        save_file({n: t.float() for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert main(command(tiny_models, wide, tmp_path / "out", "--variant", "spectral")) == 0
    base, experts, _ = states(tiny_models, wide)
    got, name = load(tmp_path / "out"), "model.layers.0.mlp.down_proj.weight"

    def norm(x: Tensor) -> float:
        return float(torch.linalg.matrix_norm(x.double() - base[name].double(), 2))

    assert norm(got[name]) == pytest.approx(sum(norm(e[name]) for e in experts) / 3, rel=1e-4)


MISTAKES = [
    (["--space", "svc", "--alpha", "0"], "alpha for svc: expected a finite number > 0, got 0.0."),
    (
        ["--space", "lines"],
        "beta for lines: expected a finite number, got none. Give what the last block gets "
        "beyond alpha.",
    ),
    (
        ["--space", "lines", "--beta", "nan"],
        "beta for lines: expected a finite number, got nan.",
    ),
    (
        ["--space", "svc", "--beta", "1"],
        "--beta: expected it with --space 'lines', got --space svc. Leave it out, or choose "
        "another space.",
    ),
    (
        ["--space", "lines", "--beta", "1", "--strength", "0.5"],
        "--strength: expected it with --space 'weight', 'feature' or 'dual', got --space lines. "
        "Leave it out, or choose another space.",
    ),
    (
        ["--alpha", "1"],
        "--alpha: expected it with --space 'svc' or 'lines', got --space weight. Leave it out, or "
        "choose another space.",
    ),
    (
        ["--norm", "1"],
        "--norm: expected it with --variant 'sphere', got --variant manifold. Leave it out, or "
        "choose that variant.",
    ),
    (
        ["--variant", "sphere", "--norm", "0"],
        "calibration p: expected an integer >= 1 or 'inf', got 0.",
    ),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes(
    more: list[str], message: str, merged: Path, tiny_models: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(command(tiny_models, merged / "average", tmp_path / "out", *more)) == 2
    assert capsys.readouterr().err == f"magic-fast: error: {message}\n"
    assert not list(tmp_path.iterdir())


def test_mistakes_in_python(merged: Path, tiny_models: Path, tmp_path: Path) -> None:
    base, out = tiny_models / "base", tmp_path / "out"
    call = (base, [tiny_models / "expert-0"], merged / "average", out)
    with pytest.raises(
        mf.InputError, match=r"^space: expected one of weight, feature, dual, svc, "
    ):
        mf.calibrate_checkpoints(*call, space="spectrum")
    with pytest.raises(
        mf.InputError, match=r"^num_blocks: expected none for space 'svc', got 2. It belongs to "
    ):
        mf.calibrate_checkpoints(*call, space="svc", num_blocks=2)
    save_file({"w": torch.ones(2, 2)}, tmp_path / "flat.safetensors")
    flat = tmp_path / "flat.safetensors"
    with pytest.raises(mf.InputError, match=r"^num_blocks for lines: expected one stack of"):
        mf.calibrate_checkpoints(flat, [flat], flat, out, space="lines", beta=1.0)
    moved, nan = tmp_path / "moved.safetensors", tmp_path / "nan.safetensors"
    save_file({"w": torch.full((2, 2), 2.0)}, moved)
    save_file({"w": torch.full((2, 2), torch.nan)}, nan)
    with pytest.raises(mf.InputError, match=r"^alpha for lines: expected finite norms to find it"):
        mf.calibrate_checkpoints(flat, [nan], moved, out, space="lines", beta=1.0, num_blocks=1)
    assert not out.exists()


@pytest.mark.parametrize("name", ["svc", "lines", "fsc", "dsc"])
def test_what_needs_the_merged_model_first(name: str, tiny_models: Path, tmp_path: Path) -> None:
    config = {
        "merge_method": "average",
        "base_model": str(tiny_models / "base"),
        "models": [{"model": str(tiny_models / "expert-0")}],
        "calibrate": name,
    }
    with pytest.raises(
        mf.ConfigError, match=f"got '{name}', which runs on a merged model: `magic-fast methods "
    ):
        mf.merge_checkpoints(yaml.safe_dump(config), tmp_path / "out")
    with pytest.raises(mf.InputError, match="svc and lines run on a merged model: `magic-fast"):
        mf.merge(torch.zeros(2, 2), [torch.ones(2, 2)], "average", calibrate=name)


def test_a_variant_by_one_word(tiny_models: Path, tmp_path: Path) -> None:
    config = {
        "merge_method": "average",
        "base_model": str(tiny_models / "base"),
        "models": [{"model": str(tiny_models / f"expert-{k}")} for k in range(2)],
        "calibrate": "sphere",
    }
    mf.merge_checkpoints(yaml.safe_dump(config), tmp_path / "word")
    config["calibrate"] = {"variant": "sphere"}
    mf.merge_checkpoints(yaml.safe_dump(config), tmp_path / "settings")
    same(load(tmp_path / "word"), load(tmp_path / "settings"))
