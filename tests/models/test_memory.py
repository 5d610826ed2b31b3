"""What tensors in memory are, and the rows that a calibration takes from it."""

from __future__ import annotations

import pytest
import torch
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
