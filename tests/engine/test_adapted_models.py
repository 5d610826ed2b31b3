"""``model+adapter`` of real models: tied heads, copies that PEFT saves beside its factors, names of
other releases, square layers, resized vocabularies. What is right is PEFT's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'magic_fast[peft]'")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
TOKENS = torch.arange(10)[None]


def llama(tied: bool) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    )


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, tie_word_embeddings=False
    )
    return transformers.GPT2LMHeadModel(config)


def trained(folder: Path, model: Any, save: Any = "auto", **lora: Any) -> tuple[Any, Tensor]:
    """A model and its adapter, written; its class, and the logits of PEFT's forward."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "base")
    kind = type(model)
    own = peft.get_peft_model(
        kind.from_pretrained(folder / "base"),
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **lora),
    )
    for name, parameter in own.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    own.save_pretrained(folder / "lora", save_embedding_layers=save)
    with torch.no_grad():
        return kind, own.eval()(TOKENS).logits


def logits_of(folder: Path, kind: Any) -> Tensor:
    """Of ``base+lora`` as one model, loaded by transformers, which finds every key."""
    config = {"merge_method": "passthrough", "models": [{"model": f"{folder}/base+{folder}/lora"}]}
    mf.merge_checkpoints(config, folder / "out")
    model, told = kind.from_pretrained(
        folder / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        logits: Tensor = model.eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("save", ["auto", False])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"],
                ["q_proj", "embed_tokens", "lm_head"]], ids=["head", "embedding", "both"],
)  # fmt: skip
def test_embeddings_and_heads(targets: list[str], tied: bool, save: Any, tmp_path: Path) -> None:
    kind, expected = trained(tmp_path, llama(tied), save, target_modules=targets)
    torch.testing.assert_close(logits_of(tmp_path, kind), expected, rtol=1e-4, atol=1e-5)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" in written  # on one side of a tie: the two are no longer one
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_layers_alone_leave_the_tie(tmp_path: Path) -> None:
    kind, expected = trained(tmp_path, llama(True), target_modules=["q_proj"])
    torch.testing.assert_close(logits_of(tmp_path, kind), expected, rtol=1e-4, atol=1e-5)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_that_were_trained_whole(tied: bool, saved: list[str], tmp_path: Path) -> None:
    kind, expected = trained(
        tmp_path, llama(tied), target_modules=["q_proj"], modules_to_save=saved
    )
    torch.testing.assert_close(logits_of(tmp_path, kind), expected, rtol=1e-4, atol=1e-5)


def test_trained_biases(tmp_path: Path) -> None:
    kind, expected = trained(tmp_path, gpt2(), target_modules=["c_attn"], bias="all",
                             fan_in_fan_out=True)  # fmt: skip
    torch.testing.assert_close(logits_of(tmp_path, kind), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_attn", "c_proj", "lm_head"]])
def test_square_layers_follow_the_class_of_their_owner(targets: list[str], tmp_path: Path) -> None:
    """PEFT writes one fan_in_fan_out for Conv1D and Linear alike."""
    kind, expected = trained(tmp_path, gpt2(), False, target_modules=targets)
    torch.testing.assert_close(logits_of(tmp_path, kind), expected, rtol=1e-4, atol=1e-5)


OLD, NEW = "language_model.model.", "model.language_model."
PLAIN = "model."


@pytest.mark.parametrize("module", [OLD, NEW])
@pytest.mark.parametrize(
    ("disk", "stated"),  # LLaVA's text model always has a part of its own
    [(OLD, True), (NEW, True), (OLD, False), (NEW, False), (PLAIN, False)],
)
def test_nestings_of_other_releases(disk: str, stated: bool, module: str, tmp_path: Path) -> None:
    weight, a, b = torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 2)
    path = "layers.0.self_attn.q_proj"
    (tmp_path / "base").mkdir()
    name = f"{disk}{path}.weight"
    vision = "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight"
    others = {vision: torch.randn(8, 8)}
    save_file({name: weight, **others}, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}} if stated else {}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lora").mkdir()
    key = f"base_model.model.{module}{path}"
    factors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    document = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tmp_path}/base+{tmp_path}/lora"}],
    }
    mf.merge_checkpoints(document, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {name, *others}
    torch.testing.assert_close(found[name], weight + b @ a)


def test_two_modules_on_one_tensor_are_refused(tmp_path: Path) -> None:
    """Neither overwrites the other."""
    trained(tmp_path, llama(False), target_modules=["q_proj"])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    factors = load_file(path)
    more = {k.replace("model.model.", "model.", 1): v.clone() for k, v in factors.items()}
    save_file({**factors, **more}, path)
    document = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tmp_path}/base+{tmp_path}/lora"}],
    }
    with pytest.raises(mf.CheckpointError, match=r"expected one for each tensor of .*got both for"):
        mf.merge_checkpoints(document, tmp_path / "out")


def resized(tmp_path: Path, targets: list[str]) -> tuple[Any, Tensor]:
    """An adapter of a model that got two more words; its class, and its logits."""
    model = llama(False)
    model.save_pretrained(tmp_path / "base")
    kind = type(model)
    larger = kind.from_pretrained(tmp_path / "base")
    larger.resize_token_embeddings(66)
    lora = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
    own = peft.get_peft_model(larger, lora)
    own.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    (tmp_path / "base" / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (tmp_path / "lora" / "tokenizer.json").write_text('{"model": {"vocab": {"new": 65}}}')
    with torch.no_grad():
        return kind, own.eval()(TOKENS).logits


def test_a_vocabulary_that_was_resized(tmp_path: Path) -> None:
    """Its rows, its number in the configuration, its tokenizer."""
    kind, expected = resized(tmp_path, ["q_proj", "embed_tokens", "lm_head"])
    torch.testing.assert_close(logits_of(tmp_path, kind), expected, rtol=1e-4, atol=1e-5)
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 66
    assert "new" in (out / "tokenizer.json").read_text()


def test_a_head_that_was_not_saved_is_missed(tmp_path: Path) -> None:
    kind, _ = resized(tmp_path, ["q_proj", "embed_tokens"])
    said = r"vocabulary of .*lora: expected 66 words .* got 64 in 'lm_head.weight'"
    with pytest.raises(mf.CheckpointError, match=said):
        logits_of(tmp_path, kind)
