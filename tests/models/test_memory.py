"""What tensors in memory are, and the rows that a calibration takes from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import magic_fast as mf
from magic_fast.models import Kind
from magic_fast.models.memory import roles_in_memory


def rows_of(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Lengths of the rows along ``axes``."""
    others = [a for a in range(x.dim()) if a not in axes]
    return torch.linalg.vector_norm(x.double(), dim=others)


def check_rows(merged: Tensor, base: Tensor, experts: list[Tensor], axes: tuple[int, ...]) -> None:
    """Sphere gives each row the mean length of the experts' rows."""
    expected = torch.stack([rows_of(e - base, axes) for e in experts]).mean(0)
    assert torch.allclose(rows_of(merged - base, axes), expected, rtol=1e-4)


class Own(nn.Module):
    """A module that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.ConvTranspose2d(4, 6, 3)
        self.plain = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(5)
        self.c_proj = nn.Linear(6, 6, bias=False)


def test_exact_classes_are_believed() -> None:
    model = Own()
    roles = roles_in_memory(model, model.state_dict())
    assert roles["turned.weight"].units == (1,)
    assert roles["plain.weight"].units == roles["c_proj.weight"].units == (0,)
    assert roles["norm.weight"].units == () and roles["norm.weight"].kind is Kind.NORM


def test_rows_of_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    models = [Own() for _ in range(3)]
    merged = mf.merge(models[0], models[1:], "average", calibrate="sphere").state_dict()
    base, *experts = (m.state_dict() for m in models)
    for name, axes in (("turned.weight", (1,)), ("plain.weight", (0,)), ("c_proj.weight", (0,))):
        check_rows(merged[name], base[name], [e[name] for e in experts], axes)


def test_a_subclass_is_not_believed() -> None:
    class Turned(nn.Linear):
        """Its forward may use the weight in any way."""

    model = nn.Sequential()
    model.add_module("c_proj", Turned(6, 6, bias=False))
    assert roles_in_memory(model, model.state_dict())["c_proj.weight"].units is None


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "axes"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 48, 32), (0, 2)),
        ("llama4_text", "model.layers.0.feed_forward.experts.down_proj", (4, 48, 32), (0, 2)),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", (4, 32, 48), (0, 1)),
        ("gpt2", "transformer.h.0.attn.c_proj.weight", (16, 16), (1,)),
    ],
)
def test_rows_of_state_dicts_of_a_named_type(
    model_type: str, name: str, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    base, *experts = ({name: torch.randn(shape)} for _ in range(3))
    merged = mf.merge(base, experts, "average")
    out, report = mf.calibrate_weights(
        base, experts, merged, calibration="sphere", model_type=model_type
    )
    assert report.tensors[0].calibrated
    check_rows(out[name], base[name], [e[name] for e in experts], axes)


def test_a_stack_of_a_model_that_is_not_known_is_refused_where_its_rows_are_needed() -> None:
    name = "layers.0.experts.up_proj"
    base, *experts = ({name: torch.randn(4, 8, 16)} for _ in range(3))
    assert mf.merge(base, experts, "average")[name].shape == (4, 8, 16)
    said = (
        r"output units of 'layers.0.experts.up_proj': .* a stack of matrices \[4, 8, 16\].*row_axis"
    )
    with pytest.raises(mf.InputError, match=said):
        mf.merge(base, experts, "average", calibrate="sphere")
    merged = mf.merge(base, experts, "average", calibrate="sphere", row_axis=(0, 2))
    check_rows(merged[name], base[name], [e[name] for e in experts], (0, 2))
    whole = mf.WeightCalibration("sphere", granularity="tensor")
    assert mf.merge(base, experts, "average", calibrate=whole)[name].shape == (4, 8, 16)


class Visual(nn.Module):
    """What timm's models hold beside their layers, in a class of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2)
        self.mixer = nn.Linear(6, 6)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        self.reg_token = nn.Parameter(torch.randn(1, 2, 6))
        self.registers = nn.Parameter(torch.randn(4, 6))
        self.logit_scale = nn.Parameter(torch.randn(3, 1, 1))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 3))
        self.A_log = nn.Parameter(torch.randn(6, 4))

    def get_classifier(self) -> nn.Module:
        return self.head[1]


def _taken(model: nn.Module, **options: Any) -> list[str]:
    torch.manual_seed(1)
    experts = [type(model)() for _ in range(2)]
    report = mf.calibrate_weights(
        model, experts, mf.merge(model, experts, "average"), calibration="sphere", **options
    )[1]
    return [t.name for t in report.tensors if t.calibrated]


def test_only_weights_of_maps_but_the_head_are_calibrated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Visual()
    assert _taken(model) == ["stem.weight", "mixer.weight"]
    assert (
        "parameters that no layer has, 1 of them (registers), are not calibrated: nothing says "
        "that they are weights of linear maps."
    ) in caplog.text


def test_the_output_embeddings_are_a_head() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.words = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.words

    class Headless(Text):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert _taken(Text()) == ["first.weight"]
    assert _taken(Headless()) == ["first.weight", "words.weight"]


@pytest.mark.parametrize(
    "name", ["fc", "head", "head.fc", "heads.head", "head.l", "output", "proj_out", "head_dist"]
)
def test_heads_of_state_dicts_by_name(name: str) -> None:
    """The last layer, not one of the same name inside."""
    names = (f"{name}.weight", f"blocks.0.{name}.weight", "head.pre_logits.fc.weight")
    base, *experts = ({n: torch.randn(4, 6) for n in names} for _ in range(3))
    merged = mf.merge(base, experts, "average")
    report = mf.calibrate_weights(base, experts, merged, calibration="sphere")[1]
    assert [t.name for t in report.tensors if t.calibrated] == list(names[1:])


def test_tokens_and_scales_of_state_dicts_by_name() -> None:
    shapes = {n: tuple(x.shape) for n, x in Visual().state_dict().items()}
    shapes["register_tokens"] = (4, 6)
    del shapes["registers"], shapes["head.1.weight"]
    base, *experts = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(3))
    merged = mf.merge(base, experts, "average")
    report = mf.calibrate_weights(base, experts, merged, calibration="sphere")[1]
    assert [t.name for t in report.tensors if t.calibrated] == ["stem.weight", "mixer.weight"]


def test_biases_of_stacks_are_none() -> None:
    name = "model.layers.0.mlp.experts.down_proj_bias"
    base, *experts = ({name: torch.randn(4, 16)} for _ in range(3))
    merged = mf.merge(base, experts, "average")
    report = mf.calibrate_weights(
        base, experts, merged, calibration="sphere", model_type="gpt_oss"
    )[1]
    assert not report[name].calibrated


def test_axes_by_patterns_of_names() -> None:
    """The first pattern that fits counts; what none fits is by its layout."""
    torch.manual_seed(0)
    shapes = {"a.weight": (4, 6), "b.weight": (4, 6), "c.experts.up": (3, 4, 6)}
    base, *experts = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(3))
    axes: dict[str, int | list[int]] = {r"^b\.": 1, r"experts": [0, 2], r"weight|experts": 0}
    expected: dict[str, tuple[int, ...]] = {
        "a.weight": (0,), "b.weight": (1,), "c.experts.up": (0, 2),
    }  # fmt: skip
    settings = mf.WeightCalibration("sphere", row_axis=axes)
    average = mf.merge(base, experts, "average")
    into = {n: torch.empty(s) for n, s in shapes.items()}
    taus = [{n: e[n] - base[n] for n in shapes} for e in experts]
    change = mf.merge_task_vectors(taus, "average", calibrate="sphere", row_axis=axes)
    for found in (
        mf.merge(base, experts, "average", calibrate="sphere", row_axis=axes),
        mf.merge(base, experts, "average", calibrate=settings),
        mf.merge_into(into, base, experts, "average", calibrate="sphere", row_axis=axes),
        mf.calibrate_weights(base, experts, average, calibration="sphere", row_axis=axes)[0],
        mf.calibrate_weights(base, experts, average, calibration=settings)[0],
        next(
            iter(
                mf.sweep(base, experts, [{"method": "average"}], calibrate="sphere", row_axis=axes)
            )
        ),
        {n: base[n] + change[n] for n in shapes},
    ):
        for name in shapes:
            check_rows(found[name], base[name], [e[name] for e in experts], expected[name])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {r"^b\.": 1, "up_proj": 0},
            "pattern 'up_proj' of row_axis: expected one that fits the name of a tensor, got one "
            "that fits none of 2. The first is 'a.weight'; patterns are searched in the name.",
        ),
        (
            {"a(": 1},
            "pattern 'a(' of calibration row_axis: expected a regular expression, got an error: "
            "missing ), unterminated subpattern at position 1. Escape special characters with a "
            "backslash.",
        ),
        (
            {"a": "first"},
            "calibration row_axis for pattern 'a': expected an axis or a list of them, got "
            "'first'.",
        ),
        (
            {"a": 2},
            "row_axis for a.weight: expected an axis of a 2-dimensional tensor, got 2.",
        ),
    ],
)
def test_patterns_that_do_nothing_or_are_none(axes: dict[str, Any], message: str) -> None:
    base, *experts = ({n: torch.ones(4, 6) for n in ("a.weight", "b.weight")} for _ in range(3))
    with pytest.raises(mf.InputError, match=f"^{re.escape(message)}$"):
        mf.merge(base, experts, "average", calibrate="sphere", row_axis=axes)


def test_axes_by_patterns_in_checkpoints(tmp_path: Path) -> None:
    """In a YAML's block, and of what was merged before; the record has them."""
    shapes = {"a.weight": (4, 6), "b.weight": (4, 6)}
    models = {}
    for name in ("base", "x", "y"):
        models[name] = {n: torch.randn(s) for n, s in shapes.items()}
        (tmp_path / name).mkdir()
        save_file(models[name], tmp_path / name / "model.safetensors")
    paths = {name: str(tmp_path / name) for name in models}
    axes: dict[str, int | list[int]] = {"^b": 1, "a": [0]}
    mf.merge_checkpoints(
        {
            "merge_method": "task_arithmetic", "base_model": paths["base"],
            "models": [{"model": paths[n], "parameters": {"weight": 0.5}} for n in "xy"],
            "calibrate": {"variant": "sphere", "row_axis": axes},
        },
        tmp_path / "merged",
    )  # fmt: skip
    arguments = (paths["base"], [paths["x"], paths["y"]], tmp_path / "merged")
    settings = {"variant": "sphere", "row_axis": axes}
    mf.calibrate_checkpoints(*arguments, tmp_path / "out", calibration=settings)
    for out in ("merged", "out"):
        found = load_file(tmp_path / out / "model.safetensors")
        record = json.loads((tmp_path / out / "magic_fast.json").read_text())
        assert record["settings"]["calibrate"]["row_axis"] == axes
        for name, own in (("a.weight", (0,)), ("b.weight", (1,))):
            check_rows(found[name], models["base"][name], [models[e][name] for e in "xy"], own)
    with pytest.raises(mf.InputError, match=r"^pattern 'c' of row_axis: expected one that fits"):
        mf.calibrate_checkpoints(
            *arguments, tmp_path / "no", calibration=settings | {"row_axis": {"c": 1}}
        )
