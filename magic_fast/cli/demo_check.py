"""Reads a merged folder back with its users' libraries, and merges one tensor again in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from magic_fast.errors import InternalError

if TYPE_CHECKING:
    import torch

    from magic_fast.config import MergeConfig

PROBE = "model.layers.1.self_attn.q_proj.weight"


def verify(merged: Path, config: MergeConfig, *, backend: str) -> Iterator[str]:
    """One line for each thing that holds; raises InternalError at the first that does not."""
    import torch

    assert config.base_model is not None and config.models is not None
    base = config.resolve_path(config.base_model)
    experts = [config.resolve_path(entry.model) for entry in config.models]
    names = _shapes(base)
    _demand(_shapes(merged) == names, "names, shapes and dtypes", "those of the base", "others")
    yield f"safetensors: {len(names)} tensors, with the base's names, shapes and dtypes"

    for name in names:
        _demand(bool(torch.isfinite(_load(merged, name)).all()), name, "finite values", "others")
    yield "every value is finite"

    import magic_fast as mf

    density = float(config.parameters["density"])
    again = mf.merge(
        {PROBE: _load(base, PROBE)},
        [{PROBE: _load(expert, PROBE)} for expert in experts],
        config.merge_method,
        density=density,
        preset=config.preset,
        calibrate="wsc",
        backend=backend,
    )[PROBE]
    differing = int((again != _load(merged, PROBE)).sum())
    _demand(differing == 0, PROBE, "the bits of mf.merge in memory", f"{differing} others")
    yield f"{PROBE} is what mf.merge gives in memory, bit for bit"
    yield _open_with_transformers(merged)


def _open_with_transformers(folder: Path) -> str:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return "transformers is not installed: not tried with it"
    import torch

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 9, 13]])).logits
    _demand(bool(torch.isfinite(logits).all()), "logits", "finite values", "others")
    return f"transformers: {type(model).__name__} opens it and runs"


def _shapes(folder: Path) -> dict[str, tuple[list[int], str]]:
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                part = shard.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def _load(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            if name in shard.keys():
                tensor: torch.Tensor = shard.get_tensor(name)
                return tensor
    raise InternalError(f"missing tensor for {name}: expected it in {folder}, got none. Report it.")


def _demand(holds: bool, what: str, expected: str, got: str) -> None:
    if not holds:
        raise InternalError(
            f"wrong result for {what}: expected {expected}, got {got}. Please report it."
        )
