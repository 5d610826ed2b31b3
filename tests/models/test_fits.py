"""Whether files hold what their configuration asks for, by the table and by transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, MixtralConfig

import magic_fast as mf
from magic_fast.checkpoint import open_checkpoint
from magic_fast.cli import main
from magic_fast.models import fits, live

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 9,
}
CHANGES = {
    "vocab_size": (11, r"embed_tokens.*\b9\b|vocab_size is 11.* has 9"),
    "num_hidden_layers": (3, r"model\.layers\.2"),
    "tie_word_embeddings": (False, r"'lm_head\.weight'.*missing"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shape = LlamaConfig(tie_word_embeddings=True, **SIZES)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(params=["transformers", "table"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "table":
        monkeypatch.setattr(live, "find_spec", lambda name: None)
    return str(request.param)


def test_a_saved_model_fits(folder: Path, source: str) -> None:
    found = mf.verify_checkpoint(folder)
    assert found.ok
    assert source in found.fits


@pytest.mark.parametrize("field", CHANGES)
def test_what_does_not_fit_is_named(folder: Path, source: str, field: str) -> None:
    value, words = CHANGES[field]
    change(folder, **{field: value})
    found = mf.verify_checkpoint(folder)
    assert not found.ok
    assert re.search(words, "; ".join(found.problems))


def test_widths_are_compared_where_transformers_builds_the_model(folder: Path) -> None:
    change(folder, hidden_size=4)
    (line,) = mf.verify_checkpoint(folder).problems
    assert line.startswith("tensor 'model.embed_tokens.weight' and 1")
    assert line.endswith("shape [9, 8], and config.json makes it [9, 4]")


def test_a_tensor_that_is_lost_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path)
    (line,) = mf.verify_checkpoint(folder).problems
    assert line.startswith("tensor 'model.norm.weight': LlamaForCausalLM has it")


@pytest.mark.parametrize("shape", [BertConfig(**SIZES), MixtralConfig(**SIZES)])
def test_other_layouts_fit(shape: Any, tmp_path: Path) -> None:
    AutoModel.from_config(shape).save_pretrained(tmp_path)
    assert mf.verify_checkpoint(tmp_path).problems == []


def test_an_unknown_type_is_not_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, model_type="of_nobody")
    assert fits.misfits({}, {}, open_checkpoint(folder).roles) == ([], "")
    assert main(["verify", str(folder)]) == 0
    assert "config.json not compared" in capsys.readouterr().out
    change(folder, model_type="llama", num_hidden_layers=5)
    assert main(["verify", str(folder)]) == 2
