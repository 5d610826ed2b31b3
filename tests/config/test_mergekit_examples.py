"""mergekit's own `examples/`, with tiny models in the place of theirs: each runs, or is refused by
a sentence. Set MAGIC_FAST_MERGEKIT_EXAMPLES to that folder of its source."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import magic_fast as mf
from magic_fast.config.references import references

VARIABLE = "MAGIC_FAST_MERGEKIT_EXAMPLES"
LAYERS = 40  # of the 13B models that the examples slice
FOLDER = Path(os.environ.get(VARIABLE, ""))
FILES = sorted(FOLDER.glob("*.y*ml")) if os.environ.get(VARIABLE) else []


def write_model(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (12, 4), "lm_head.weight": (12, 4)}
    for layer in range(LAYERS):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (4, 4)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (8, 4)
    path.mkdir()
    tensors = {n: torch.randn(s, generator=generator).half() for n, s in shapes.items()}
    save_file(tensors | {"model.norm.weight": torch.ones(4).half()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))


@pytest.mark.skipif(not FILES, reason=f"{VARIABLE} names no folder of mergekit's examples")
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_example(path: Path, tmp_path: Path) -> None:
    from magic_fast.config.document import read_document

    text = path.read_text()
    named = dict.fromkeys(model for _, model in references(read_document(text).data))
    assert named
    for seed, model in enumerate(sorted(named, key=len, reverse=True)):
        write_model(tmp_path / f"model-{seed}", seed)
        text = text.replace(model, str(tmp_path / f"model-{seed}"))
    try:
        report = mf.merge_checkpoints(text, tmp_path / "out")
    except mf.MagicFastError as refusal:
        assert ": expected " in str(refusal) and str(refusal).endswith(".")
        pytest.skip(f"refused: {refusal}")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert len(merged) == len(report.tensors)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
