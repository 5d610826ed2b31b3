"""Every tensor that counts words follows the tokenizer, whatever its name and axis are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

FIRST = ["<unk>", *(f"w{i}" for i in range(11))]
SECOND = ["<unk>", *(f"w{i}" for i in reversed(range(11))), "more"]

#: model type and class → name → (shape with None for the words, axis of the words or None)
Kinds = dict[str, tuple[tuple[int | None, ...], int | None]]
CASES: dict[str, Kinds] = {
    "bert BertForMaskedLM": {
        "bert.embeddings.word_embeddings.weight": ((None, 8), 0),
        "bert.embeddings.position_embeddings.weight": ((12, 8), None),
        "bert.embeddings.token_type_embeddings.weight": ((2, 8), None),
        "cls.predictions.bias": ((None,), 0),
    },
    "bart BartForConditionalGeneration": {
        "final_logits_bias": ((1, None), 1),
        "model.shared.weight": ((None, 8), 0),
        "model.decoder.layers.0.fc1.weight": ((12, 8), None),
    },
    "modernbert ModernBertForMaskedLM": {
        "model.embeddings.tok_embeddings.weight": ((None, 8), 0),
        "decoder.bias": ((None,), 0),
    },
    "nemotron_h NemotronHForCausalLM": {
        "backbone.embeddings.weight": ((None, 8), 0),
        "lm_head.weight": ((None, 8), 0),
    },
    "clip CLIPModel": {
        "text_model.embeddings.token_embedding.weight": ((None, 8), 0),
        "text_model.embeddings.position_embedding.weight": ((12, 8), None),
        "visual_projection.weight": ((12, 8), None),
    },
    "csm CsmForConditionalGeneration": {
        "backbone_model.embed_tokens.embed_audio_tokens.weight": ((7, 8), None),
        "embed_text_tokens.weight": ((None, 8), 0),
    },
}


def write(folder: Path, kinds: Kinds, words: list[str], kind: str, dtype: torch.dtype) -> Path:
    model_type, architecture = kind.split()
    folder.mkdir()
    shapes = {
        name: tuple(len(words) if n is None else n for n in shape)
        for name, (shape, _) in kinds.items()
    }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture]}
    where = "text_config" if model_type == "clip" else None
    size = {"vocab_size": len(words)} if model_type != "csm" else {"text_vocab_size": len(words)}
    config |= {where: size} if where else size
    (folder / "config.json").write_text(json.dumps(config))
    data = {"model": {"vocab": {word: row for row, word in enumerate(words)}}}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_words_take_the_places_of_the_output(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """base + 1·(expert − base) is the expert, word by word."""
    torch.manual_seed(0)
    kinds = CASES[kind]
    base = write(tmp_path / "base", kinds, FIRST, kind, torch.float32)
    expert = write(tmp_path / "expert", kinds, SECOND, kind, dtype)
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(expert), "parameters": {"weight": 1.0}}],
        "tokenizer_source": "union",
    }
    mf.merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    known = dict(vocabulary["model"]["vocab"])
    known |= {t["content"]: t["id"] for t in vocabulary.get("added_tokens", ())}
    order = torch.tensor([SECOND.index(word) for word in sorted(known, key=known.__getitem__)])
    assert len(order) == len(SECOND)
    stored = load_file(expert / "model.safetensors")
    for name, (_, axis) in kinds.items():
        x: Tensor = stored[name].float()
        expected = x if axis is None else x.index_select(axis, order)
        assert found[name].shape == expected.shape, name
        assert torch.allclose(found[name], expected, atol=1e-5), name


def test_one_tensor_read_in_pieces(tmp_path: Path) -> None:
    """Words along the second axis, from any byte on."""
    from magic_fast.checkpoint import open_checkpoint
    from magic_fast.engine.sources.vocabulary import AlignedCheckpoint

    kind, name = "bart BartForConditionalGeneration", "final_logits_bias"
    kinds: Kinds = {name: ((1, None), 1)}
    base = write(tmp_path / "base", kinds, FIRST, kind, torch.float32)
    other = write(tmp_path / "other", kinds, SECOND, kind, torch.bfloat16)
    models = {"base": open_checkpoint(base), "other": open_checkpoint(other)}
    rows = [(("other", 3),), (("base", 1),), (), (("base", 2), ("other", 2)), None]
    aligned = AlignedCheckpoint(models["base"], rows, models)
    mine, theirs = (load_file(p / "model.safetensors")[name][0].float() for p in (base, other))
    words = [theirs[3], mine[1], torch.tensor(0.0), (mine[2].double() + theirs[2]).float() / 2]
    expected = torch.stack([*words, torch.stack(words).double().mean().float()])
    whole = torch.frombuffer(aligned.read(name), dtype=torch.float32)
    assert torch.allclose(whole, expected, atol=1e-6)
    for start in range(20):
        part = bytearray(20 - start)
        aligned.read_into(name, part, start)
        assert part == aligned.read(name)[start:]
    for model in models.values():
        model.close()
