"""Tiny models of many architectures, and ξ of their layers by plain evaluation in float64.

Written without the package: inputs are taken by hooks, each sample alone and without padding; a
layer's features are its own forward with the weights of an expert, of the merged model and of the
base.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.func import functional_call

from architectures import shrink
from features.families import TASKS, average, moved

LENGTHS = (8, 5, 8)
#: Classes whose output is linear in their parameters, by their names' ends, and where channels are.
LAYERS = {
    "Linear": -1, "Conv1D": -1, "Embedding": -1, "LayerNorm": -1, "RMSNorm": -1, "Norm": -1,
    "Conv1d": 1, "Conv2d": 1, "Conv3d": 1, "BatchNorm2d": 1, "BatchNorm1d": 1, "GroupNorm": 1,
    "ConvTranspose2d": 1, "NormWithBias": -1, "LayerScale": -1,
}  # fmt: skip
#: Models that run in float32 alone.
FLOAT32 = {
    "fsmt", "inkling2_text", "mra", "switch_transformers", "xglm", "prophetnet", "xlstm",
}  # fmt: skip
_STACKS = re.compile(r"Experts$|ExpertsNaive$")
_ROUTERS = re.compile(r"(TopK)?Router$|Gate$")


@dataclass
class Walk:
    """A family: base, two experts, merged, and batches with padding.

    Attributes:
        alone: task → the same samples one by one, each of its own length.
    """

    base: nn.Module
    experts: list[nn.Module]
    merged: nn.Module
    data: dict[str, list[dict[str, Tensor]]]
    alone: dict[str, list[dict[str, Tensor]]]
    found: dict[str, list[float]] = field(default_factory=dict)


def build(model_type: str, task: str) -> nn.Module:
    """The tiny model of a type, in float64, its experts in plain products."""
    config = shrink.tiny_config(model_type)
    name = shrink.sliced_class(model_type)
    kind = getattr(tf, name) if task == "text" and name else tf.MODEL_MAPPING[type(config)]
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    model = model if model_type in FLOAT32 else model.double()
    for one in [model, *(m for m in model.modules() if isinstance(m, tf.PreTrainedModel))]:
        one.config._experts_implementation = "eager"
        if getattr(one.config, "use_cache", False):
            one.config.use_cache = False
    return model


def texts(model: Any, draw: torch.Generator) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """One batch of text (with what belongs to it), and its samples alone."""
    ids = torch.randint(3, 19, (3, max(LENGTHS)), generator=draw)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    more: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = torch.randint(4, 12, (3, 4), generator=draw)
    vision = getattr(model.config, "vision_config", None)
    if type(model).__name__.endswith("Model") and vision is not None:
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        more["pixel_values"] = torch.randn(3, 3, size, size, generator=draw).to(model.dtype)
    alone = [
        {"input_ids": ids[n : n + 1, :length], **{k: v[n : n + 1] for k, v in more.items()}}
        for n, length in enumerate(LENGTHS)
    ]
    return batch | more, alone


def images(model: Any, draw: torch.Generator) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    size = getattr(model.config, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    channels = getattr(model.config, "num_channels", 3)
    x = torch.randn(3, channels, size, size, generator=draw).double()
    return {"pixel_values": x}, [{"pixel_values": x}]


def sounds(model: Any, draw: torch.Generator) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    x = torch.randn(3, 1600, generator=draw).double()
    lengths = (1600, 1200, 1600)
    mask = torch.zeros(3, 1600, dtype=torch.long)
    for n, length in enumerate(lengths):
        mask[n, :length] = 1
    alone = [{"input_values": x[n : n + 1, :length]} for n, length in enumerate(lengths)]
    return {"input_values": x, "attention_mask": mask}, alone


SAMPLES = {"text": texts, "image": images, "sound": sounds}


def walk(model_type: str, kind: str) -> Walk:
    base = build(model_type, kind)
    experts = [moved(base, seed, 0.02) for seed in (1, 2)]
    draw = torch.Generator().manual_seed(3)
    data: dict[str, list[dict[str, Tensor]]] = {}
    alone: dict[str, list[dict[str, Tensor]]] = {}
    for task in TASKS:
        pairs = [SAMPLES[kind](base, draw) for _ in range(2)]
        data[task] = [batch for batch, _ in pairs]
        alone[task] = [sample for _, own in pairs for sample in own]
    return Walk(base, experts, average(experts), data, alone)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if own and not any(True for m in module.children() for _ in m.parameters()):
            yield name, module


def _end(module: nn.Module, table: dict[str, int]) -> int | None:
    name = type(module).__name__
    found = [end for end in table if name.endswith(end)]
    return table[max(found, key=len)] if found else None


def _first(out: Any) -> Tensor:
    while isinstance(out, tuple | list):
        out = out[0]
    return out  # type: ignore[no-any-return]


@torch.no_grad()
def _rows(
    module: nn.Module, name: str, own: Walk, k: int, call: tuple[Any, Any], dim: int
) -> tuple[Tensor, Tensor]:
    """(h_k − h_0, h_m − h_0) of one call of a layer, [positions, channels]."""
    args, kwargs = call
    start, expert, merged = (
        _first(functional_call(
            module, dict(m.get_submodule(name).named_parameters()), args, kwargs
        ))
        for m in (own.base, own.experts[k], own.merged)
    )  # fmt: skip
    pair = [(x - start).movedim(dim, -1) for x in (expert, merged)]
    return tuple(x.reshape(-1, x.shape[-1]) for x in pair)  # type: ignore[return-value]


@torch.no_grad()
def _stack_rows(
    name: str, own: Walk, k: int, call: tuple[Any, Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(expert's projection, h_k − h_0, h_m − h_0) of the tokens that go to each expert."""
    stacks = [m.get_submodule(name) for m in (own.base, own.experts[k], own.merged)]
    up, down = "gate_up_proj", "down_proj"
    module = stacks[2]
    args = [x for x in (*call[0], *call[1].values()) if isinstance(x, Tensor)]
    hidden = args[0].reshape(-1, args[0].shape[-1])
    if not hasattr(module, up) or len(args) < 2:
        return
    to = args[1].reshape(len(hidden), -1)
    turned = module.gate_up_proj.shape[1] == hidden.shape[1] and (
        module.down_proj.shape[2] == hidden.shape[1]
    )
    square = module.gate_up_proj.shape[1] == module.gate_up_proj.shape[2]
    if square:
        return

    def apply(m: Any, which: str, expert: int, z: Tensor) -> Tensor:
        weight = getattr(m, which)[expert]
        out = z @ weight if turned else F.linear(z, weight)
        bias = getattr(m, f"{which}_bias", None)
        return out if bias is None else out + bias[expert]

    for expert in range(len(module.down_proj)):
        z = hidden[(to == expert).nonzero()[:, 0]]  # one may go there twice
        if not len(z):
            continue
        start, one, end = (apply(m, up, expert, z) for m in stacks)
        yield f"{name}.{up}.{expert}", one - start, end - start
        if hasattr(module, "_apply_gate"):
            gated = module._apply_gate(end)
        else:
            gate, upper = end.chunk(2, -1)
            gated = module.act_fn(gate) * upper
        start, one, end = (apply(m, down, expert, gated) for m in stacks)
        yield f"{name}.{down}.{expert}", one - start, end - start


@torch.no_grad()
def expected(own: Walk, p: float) -> tuple[dict[str, float], dict[str, int], set[str]]:
    """Layer → ξ, layer → positions, and the parameters that they are of."""
    ratios: dict[str, list[float]] = {}
    positions: dict[str, int] = {}
    tensors: set[str] = set()
    named = dict(own.merged.named_parameters(remove_duplicate=False))
    uses: dict[int, list[str]] = {}
    for name, module in _layers(own.merged):
        for local, x in module._parameters.items():
            if x is not None:
                uses.setdefault(id(x), []).append(f"{name}.{local}")
    for k, task in enumerate(TASKS):
        sums: dict[str, list[float]] = {}

        def add(key: str, pair: tuple[Tensor, Tensor], sums: Any = sums) -> None:
            row = sums.setdefault(key, [0.0, 0.0])
            for n, x in enumerate(pair):
                row[n] += float(x.norm(p=p, dim=-1).sum())
            positions[key] = positions.get(key, 0) + len(pair[0])

        calls: list[tuple[str, nn.Module, Any]] = []
        hooks = [
            m.register_forward_pre_hook(
                lambda m, a, kw, n=name, out=calls: out.append((n, m, (a, kw))),
                with_kwargs=True,
            )
            for name, m in _layers(own.merged)
        ]
        for sample in own.alone[task]:
            calls.clear()
            own.merged(**sample)
            for name, module, call in list(calls):
                dim = _end(module, LAYERS)
                if getattr(module, "data_format", "") == "channels_first":
                    dim = 1
                if type(module).__name__ == "SqueezeBertLayerNorm":
                    dim = 1
                if _STACKS.search(type(module).__name__):
                    for key, one, end in _stack_rows(name, own, k, call):
                        add(key, (one, end))
                        stack, _, _ = key.rpartition(".")
                        tensors |= {n for n in (stack, f"{stack}_bias") if n in named}
                elif _ROUTERS.search(type(module).__name__) and hasattr(module, "weight"):
                    continue
                elif dim is not None:
                    module_calls = [h for h in module._forward_pre_hooks]
                    kept = dict(module._forward_pre_hooks)
                    module._forward_pre_hooks.clear()
                    add(name, _rows(module, name, own, k, call, dim))
                    module._forward_pre_hooks.update(kept)
                    assert module_calls
                    tensors |= {
                        f"{name}.{n}" for n, x in module._parameters.items() if x is not None
                    }
        for hook in hooks:
            hook.remove()
        for key, (upper, lower) in sums.items():
            ratios.setdefault(key, []).append(upper / lower if lower else float("nan"))
    found = {}
    for key, row in ratios.items():
        finite = [x for x in row if x == x]
        if finite and _uses_one(key, own.merged, uses):
            found[key] = sum(finite) / len(finite)
    return found, positions, tensors


def _uses_one(key: str, model: nn.Module, uses: dict[int, list[str]]) -> bool:
    """Whether no other layer has a parameter of it: tied layers have one ξ together."""
    try:
        module = model.get_submodule(key)
    except AttributeError:
        return True
    own = [x for x in module._parameters.values() if x is not None]
    return all(len(uses[id(x)]) == 1 for x in own)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
