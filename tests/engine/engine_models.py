"""Checkpoints made to be awkward for streaming, and the same merge with everything in memory."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

MIB = 1 << 20
WORDS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

#: More than one block of 1 MiB each, of lengths that no block size divides; and what is special.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.up_proj.weight": (301, 701),
    "model.layers.0.input_layernorm.weight": (77,),
    "model.layers.0.empty.weight": (0, 8),
    "model.layers.0.temperature": (),
    "model.layers.1.mlp.down_proj.weight": (64, 128),
    "model.layers.1.long.bias": (200_003,),
    "model.layers.1.mlp.conv1d.weight": (5, 61, 401),
    "model.norm.weight": (64,),
}


def state_dict(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    *,
    seed: int,
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A model: the dtypes go round over the tensors. Task vectors are small multiples of a power
    of two, so that many magnitudes are equal and every cut of a trim splits a tie."""
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if base is None:
            x = torch.randint(-512, 512, shape, generator=draw).float() / 256
        else:
            steps = torch.randint(-24, 25, shape, generator=draw).float() / 512
            x = base[name].float() + steps
        found[name] = x.to(dtypes[number % len(dtypes)])
    return found


def write_model(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """One model folder, written by the safetensors library."""
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"toy": True}))
    return folder


class Models:
    """base/ and expert-k/ on disk and in memory.

    Args:
        folder: where they lie.
        shapes: of the tensors.
        dtypes: per model, base first: the dtypes that go round over its tensors.
        extra: tensors that all models share.
        config: of ``config.json``.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
        dtypes: Sequence[Sequence[torch.dtype]] = ((torch.bfloat16,),) * 4,
        extra: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        base = state_dict(shapes, dtypes[0], seed=0)
        experts = [state_dict(shapes, d, seed=k, base=base) for k, d in enumerate(dtypes) if k]
        self.base, *self.experts = [{**m, **(extra or {})} for m in (base, *experts)]
        write_model(folder / "base", self.base, config)
        for k, expert in enumerate(self.experts):
            write_model(folder / f"expert-{k}", expert, config)

    def config(self, method: str, *, parameters: Any = None, **fields: Any) -> str:
        """The YAML of a merge of them all; ``linear`` merges the base as one more model."""
        names = [f"expert-{k}" for k in range(len(self.experts))]
        document: dict[str, Any] = {"merge_method": method}
        if method == "linear":
            names = ["base", *names]
        else:
            document["base_model"] = str(self.folder / "base")
        document["models"] = [{"model": str(self.folder / name)} for name in names]
        document["parameters"] = parameters or {}
        return yaml.safe_dump({**document, **fields})

    def merged(
        self, method: str, *, dtype: str | None = None, out_dtype: str | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """The same with all tensors in memory."""
        base, *experts = [
            {n: t.to(WORDS[dtype]) if dtype and t.is_floating_point() else t for n, t in m.items()}
            for m in (self.base, *self.experts)
        ]
        word = out_dtype or dtype
        out = {
            n: torch.empty_like(t, dtype=WORDS[word] if word and t.is_floating_point() else t.dtype)
            for n, t in base.items()
        }
        start: Any = base
        if method == "linear":
            start, experts = None, [base, *experts]
        return mf.merge(start, experts, method, out=out, **{"preset": "mergekit", **options})


def read_out(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an output, by safetensors' own library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def environment(**more: str) -> dict[str, str]:
    """For a Python of its own that imports what this one imports."""
    here = [str(Path(mf.__file__).parents[1]), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(here), **more}


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and 0 differs from −0."""
    return x.contiguous().flatten().view(torch.uint8) if x.numel() else x.flatten()


def different(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in a bit, in shape or in dtype."""
    assert sorted(got) == sorted(want)
    return [
        n
        for n, t in want.items()
        if got[n].dtype != t.dtype or got[n].shape != t.shape
        or not torch.equal(bits(got[n]), bits(t))
    ]  # fmt: skip
