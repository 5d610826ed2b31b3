"""FSC of many architectures against plain evaluation, sample by sample, without padding."""

from __future__ import annotations

import math
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402

import magic_fast as mf  # noqa: E402
from architectures import shrink  # noqa: E402
from features import walking  # noqa: E402
from magic_fast.models import table  # noqa: E402

#: In `make test`: one of each kind.
SOME = (
    ("llama", "text"), ("gpt2", "text"), ("qwen3", "text"), ("gemma3_text", "text"),
    ("mixtral", "text"), ("gpt_oss", "text"), ("qwen3_moe", "text"), ("mamba", "text"),
    ("bert", "text"), ("t5", "text"), ("bart", "text"), ("opt", "text"), ("clip", "text"),
    ("modernbert", "text"), ("vit", "image"), ("convnext", "image"), ("resnet", "image"),
    ("swinv2", "image"), ("beit", "image"), ("wav2vec2", "sound"),
)  # fmt: skip
#: Layers that the report names by their parameters: no module of a layer's kind has them.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "cpmant": ("cpmant.position_bias",),  # a table and more in one module
    "deepseek_v4": ("self_attn.o_a_proj",),  # by groups of rows
    "hunyuan_v1_moe": (".experts.",),  # a stack of one expert is one weight
    "perceiver": ("perceiver.input_preprocessor.embeddings",),  # its head reads them too
    "longcat_flash": (".experts.",),  # some go to experts without weights
}
#: Not walked here, and why.
LEFT_OUT = {
    "align": "its text part and projection do not fit when they are shrunk",
    "blip-2": "wants inputs of its own",
    "gemma3n": "needs timm",
    "siglip2": "wants inputs of its own",
    "swin": "its windows do not fit its images when they are shrunk",
    "videoprism": "wants inputs of its own",
    "voxtral_realtime": "wants inputs of its own",
}
IMAGES = (
    "vit", "deit", "beit", "dinov2", "convnext", "convnextv2", "resnet", "swin", "swinv2",
    "regnet", "mobilenet_v2", "segformer", "poolformer", "levit", "data2vec-vision", "ijepa",
)  # fmt: skip
SOUNDS = ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "sew")
TEXTS = tuple(t for t in table.model_types() if shrink.sliced_class(t))


def check(model_type: str, kind: str, p: float = 1) -> dict[str, float]:
    transformers.logging.set_verbosity_error()
    own = walking.walk(model_type, kind)
    want, positions, tensors = walking.expected(own, p)
    found, report = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, p=p, clamp=None
    )
    layers = {layer.name: layer for layer in report.layers}
    assert len(want) >= 3
    near = 2e-3 if model_type in walking.FLOAT32 else 1e-5
    missing = [name for name in want if name not in layers]
    assert not [
        n for n in missing if not any(part in n for part in OTHER_NAMES.get(model_type, ()))
    ]
    for name, xi in want.items():
        if name in missing:
            continue
        layer = layers[name]
        assert layer.coefficient is not None, (name, layer.note)
        assert float(layer.coefficient) == pytest.approx(xi, rel=near), name
        assert layer.positions == positions[name], name
    calibrated = {
        t for layer in report.layers if layer.coefficient is not None for t in layer.tensors
    }
    assert not {t for t in tensors if _has_value(t, want)} - calibrated
    hooked, _ = mf.calibrate_features(
        own.base, own.experts, own.merged, own.data, p=p, clamp=None, deploy="hooks"
    )
    with torch.no_grad():
        for sample in own.alone["first"][:2]:
            one, two = (walking._first(tuple(m(**sample).values())) for m in (found, hooked))
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    left = true_left(own.merged, report.layers)
    assert sum(report.left.values()) == pytest.approx(left, abs=1e-9)
    return {"layers": len(report.layers), "compared": len(want), "left": left}


def true_left(model: torch.nn.Module, layers: list[Any]) -> float:
    """The share of the parameters that no layer with a coefficient has, experts one by one."""
    named = dict(model.named_parameters(remove_duplicate=False))
    size = {id(x): float(x.numel()) for x in named.values()}
    total = sum(size.values())
    done = {id(named[t]) for x in layers if x.coefficient is not None for t in x.tensors}
    left = sum(n for key, n in size.items() if key not in done)
    for layer in layers:
        if layer.note == "no sample reaches this expert":
            own = [named[t] for t in layer.tensors if id(named[t]) in done]
            left += sum(x.numel() / len(x) for x in own)
    return left / total


def _has_value(tensor: str, want: dict[str, float]) -> bool:
    name = tensor.rpartition(".")[0]
    return name in want and math.isfinite(want[name])


@pytest.mark.parametrize(("model_type", "kind"), SOME)
def test_some(model_type: str, kind: str) -> None:
    check(model_type, kind)


ALL = (
    *((t, "text") for t in TEXTS), *((t, "image") for t in IMAGES), *((t, "sound") for t in SOUNDS),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "kind"), [pair for pair in ALL if pair[0] not in LEFT_OUT])
def test_all(model_type: str, kind: str) -> None:
    check(model_type, kind, p=2)


def test_how_many() -> None:
    assert LEFT_OUT.keys() <= {t for t, _ in ALL}
    assert len(ALL) - len(LEFT_OUT) >= 200
