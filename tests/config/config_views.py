"""Checkpoints that exist only as names: what the layout reads."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from magic_fast.models import Kind, roles_of

GOLDEN = Path(
    os.environ.get("MAGIC_FAST_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")
)
BLOCK = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


class View:
    """Names, a config and the names that are tied to others."""

    def __init__(
        self,
        names: Iterable[str],
        config: Mapping[str, Any] | None = None,
        tied: Iterable[str] = (),
    ) -> None:
        self._names = list(names)
        self._all = {*self._names, *tied}
        self.config: Mapping[str, Any] = config or {}

    def names(self) -> list[str]:
        return self._names

    def has(self, name: str) -> bool:
        return name in self._all

    def counted_stack(self) -> str | None:
        return None

    def is_derived(self, name: str) -> bool:
        return roles_of({}, {name: ((), "F32")})[name].kind is Kind.DERIVED

    def left_out(self) -> frozenset[str]:
        return frozenset()

    def is_loaded(self, name: str) -> bool:
        return True


def llama_names(layers: int, *, head: bool = True, block: Iterable[str] = BLOCK) -> list[str]:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += ["lm_head.weight"] if head else []
    return names + [f"model.layers.{i}.{rest}" for i in range(layers) for rest in block]


def llama(layers: int) -> View:
    return View(llama_names(layers), {"num_hidden_layers": layers})


def view_of(folder: Path) -> View:
    """The names in a folder of safetensors files, and its config."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        names += [name for name in header if name != "__metadata__"]
    config = json.loads((folder / "config.json").read_text())
    tied = ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
    return View(names, config, tied)
