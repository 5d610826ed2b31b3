"""Which tensors are merged, and whose small files the result takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf
from magic_fast.cli import main
from magic_fast.models import TensorChoice, roles_of

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
UP, ROUTER = "model.layers.{}.mlp.up_proj.weight", "model.layers.0.mlp.gate.weight"
VISION, TEXT = "model.visual.blocks.0.attn.proj.weight", "model.language_model.norm.weight"


def tensors(seed: int, layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBED: (6, 4), NORM: (4,)} | {UP.format(i): (8, 4) for i in range(layers)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, name: str, model: dict[str, Tensor], **config: Any) -> None:
    path = folder / name
    path.mkdir()
    save_file(model, path / "model.safetensors")
    data: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 6}
    data |= {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]} | config
    (path / "config.json").write_text(json.dumps(data))
    (path / "generation_config.json").write_text(json.dumps({"of": name}))
    (path / "notes.txt").write_text(name)
    vocab = {f"{word}": row for row, word in enumerate("uvwxyz")}
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "of": name}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("abc"):
        write(tmp_path, name, tensors(number), bos_token_id=number)
    return tmp_path


def config(method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "bc"]
    return {"merge_method": method, "models": models} | more


def merged(out: str, **more: Any) -> dict[str, Tensor]:
    mf.merge_checkpoints(config(**more), out)
    return load_file(f"{out}/model.safetensors")


def by_hand(chosen: set[str]) -> dict[str, Tensor]:
    a, b, c = (tensors(n) for n in range(3))
    return {n: x + 0.5 * (b[n] - x) + 0.5 * (c[n] - x) if n in chosen else x for n, x in a.items()}


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ((), "head", {NORM, UP.format(0), UP.format(1)}),  # tied: the embedding is the head
        ((), ("embedding", "norm"), {UP.format(0), UP.format(1)}),
        ("norm", (), {NORM}),
        (r"layers\.1\.", (), {UP.format(1)}),
        (("mlp", "norm"), r"layers\.0", {NORM, UP.format(1)}),
    ],
)
def test_what_is_left_out_stays_the_base(
    folder: Path, include: Any, exclude: Any, chosen: set[str]
) -> None:
    want = by_hand(chosen)
    disk = merged("out", base_model="a", include=include, exclude=exclude)
    memory = mf.merge(
        tensors(0), [tensors(1), tensors(2)], "task_arithmetic", weights=0.5,
        include=include, exclude=exclude,
    ) if "head" not in exclude else want  # fmt: skip
    for found in (disk, memory):
        assert found.keys() == want.keys()
        for name, x in want.items():
            torch.testing.assert_close(found[name], x)
            if name not in chosen:
                assert torch.equal(found[name], x)
    record = json.loads(Path("out/magic_fast.json").read_text())
    assert "clude" in record["recipe"]


def test_without_a_base_it_stays_the_first_model(folder: Path) -> None:
    found = merged("out", method="linear", exclude="mlp")
    b, c = tensors(1), tensors(2)
    assert torch.equal(found[UP.format(0)], b[UP.format(0)])
    torch.testing.assert_close(found[NORM], (b[NORM] + c[NORM]) / 2)
    left = mf.merge(None, [b, c], "linear", exclude="mlp")
    assert list(left) == list(b)
    assert torch.equal(left[UP.format(1)], b[UP.format(1)])


def test_slices_leave_out_by_the_layer_that_is_read(folder: Path) -> None:
    sources = [{"model": m, "layer_range": [first, first + 1]} for m, first in (("b", 1), ("c", 0))]
    more = {"slices": [{"sources": sources}], "models": None, "parameters": {"weight": 0.5}}
    found = merged("out", method="linear", exclude=r"layers\.1", **more)
    assert torch.equal(found[UP.format(0)], tensors(1)[UP.format(1)])


def test_models_need_not_have_what_is_left_out(folder: Path) -> None:
    small = {name: x for name, x in tensors(5).items() if name != EMBED}
    write(folder, "d", small | {EMBED: torch.randn(9, 4)}, vocab_size=9)
    own = config(base_model="a") | {"models": [{"model": "d", "parameters": {"weight": 1}}]}
    mf.merge_checkpoints(own | {"exclude": "embedding"}, "out")
    found = load_file("out/model.safetensors")
    assert torch.equal(found[EMBED], tensors(0)[EMBED])
    torch.testing.assert_close(found[NORM], small[NORM])
    memory = mf.merge(tensors(0), [small], "task_arithmetic", exclude="embed")
    torch.testing.assert_close(memory, found)
    with pytest.raises(mf.InputError, match=EMBED):
        mf.merge(tensors(0), [small], "task_arithmetic")


def test_task_vectors_and_places() -> None:
    vectors = [{"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2)}]
    found = mf.merge_task_vectors(vectors, "average", exclude="^b$")
    torch.testing.assert_close(found, {"a": torch.ones(2), "b": torch.zeros(3)})
    base = {"a": torch.zeros(2), "b": torch.full((3,), 7.0)}
    out = {"a": torch.empty(2), "b": torch.empty(3)}
    mf.merge(base, vectors, "average", exclude="^b$", out=out)
    torch.testing.assert_close(out, {"a": torch.ones(2), "b": base["b"]})
    mf.merge_into(out, {"a": torch.ones(2), "b": base["b"]}, vectors, "average", include="a")
    torch.testing.assert_close(out, {"a": torch.ones(2), "b": base["b"]})
    with pytest.raises(mf.InputError, match="shape of 'b'"):
        mf.merge_into({"a": torch.ones(2), "b": torch.ones(1)}, base, vectors, include="a")


def test_modules_that_tie() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    shape = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    base, one, two = (LlamaForCausalLM(shape) for _ in range(3))
    made = mf.merge(base, [one, two], "average", exclude="head")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(made.lm_head.weight, base.lm_head.weight)
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(made.state_dict()[up], base.state_dict()[up])
    headless = {n: x for n, x in two.state_dict().items() if n not in (EMBED, HEAD)}
    mf.merge_into(made, base, [one, headless], "average", exclude="embedding")
    assert torch.equal(made.lm_head.weight, base.lm_head.weight)


def test_words() -> None:
    names = [EMBED, HEAD, ROUTER, VISION, TEXT]
    shapes = {name: ((4, 4) if name not in (TEXT,) else (4,), "F32") for name in names}
    moe = roles_of({"model_type": "qwen3_moe"}, {n: shapes[n] for n in (EMBED, HEAD, ROUTER)})
    assert TensorChoice(exclude="router").left_out(moe) == {ROUTER}
    assert TensorChoice(include="head").left_out(moe) == {EMBED, ROUTER}
    both = roles_of({"model_type": "qwen2_5_vl"}, {n: shapes[n] for n in (VISION, TEXT, HEAD)})
    assert both.parts == {"text": "model.language_model", "vision": "model.visual"}
    assert TensorChoice(exclude="vision").left_out(both) == {VISION}
    assert TensorChoice(include="vision").left_out(both) == {TEXT, HEAD}
    assert TensorChoice(include="language").left_out(both) == {VISION}
    plain = roles_of({}, {"vision_tower.weight": ((4, 4), "F32"), "x": ((4,), "F32")})
    assert TensorChoice(include="vision").left_out(plain) == {"x"}  # a pattern, there


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"include": "nothing"}, "include 'nothing': expected some tensor.*embedding.*router"),
        ({"exclude": ["norm", "("]}, r"exclude\[1\].*regular expression"),
        ({"exclude": 3}, "exclude"),
        ({"config_from": "nowhere"}, "missing checkpoint for nowhere"),
        ({"config_from": "c.yml"}, "small files.*expected a folder"),
        ({"tokenizer_from": "b", "tokenizer_source": "base"}, "two tokenizers"),
    ],
)
def test_mistakes(folder: Path, more: dict[str, Any], words: str) -> None:
    Path("c.yml").write_text("x")
    with pytest.raises(mf.MagicFastError, match=f"(?is){words}"):
        mf.merge_checkpoints(config(base_model="a") | more, "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("wrong", [3, ["a", 3], "("])
def test_mistakes_in_memory(wrong: Any) -> None:
    with pytest.raises(mf.InputError, match="include"):
        mf.merge({"a": torch.ones(2)}, [{"a": torch.ones(2)}], include=wrong)
    with pytest.raises(mf.InputError, match="state dicts and modules"):
        mf.merge(torch.ones(2), [torch.ones(2)], exclude="a")


def test_configuration_of_another_model(folder: Path) -> None:
    merged("out", base_model="a", config_from="b")
    assert json.loads(Path("out/config.json").read_text())["bos_token_id"] == 1
    assert json.loads(Path("out/generation_config.json").read_text()) == {"of": "b"}
    assert Path("out/notes.txt").read_text() == "b"
    assert json.loads(Path("out/tokenizer.json").read_text())["of"] == "a"


def test_tokenizer_of_another_model(folder: Path) -> None:
    merged("out", base_model="a", tokenizer_from="b")
    assert json.loads(Path("out/tokenizer.json").read_text())["of"] == "b"
    assert json.loads(Path("out/config.json").read_text())["bos_token_id"] == 1  # a row of it
    assert json.loads(Path("out/generation_config.json").read_text()) == {"of": "b"}
    assert Path("out/notes.txt").read_text() == "a"


def test_files_of_a_folder_without_weights(folder: Path) -> None:
    Path("c/model.safetensors").rename("w.safetensors")
    Path("c.yml").write_text(
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n"
        "- {model: b, parameters: {weight: 1}}\n"
    )
    chosen = ["--config-from", "c", "--tokenizer-from", "c", "--exclude", "norm", "mlp"]
    assert main(["merge", "c.yml", "out", *chosen, "--nonfinite", "propagate"]) == 0
    assert Path("out/notes.txt").read_text() == "c"
    assert json.loads(Path("out/tokenizer.json").read_text())["of"] == "c"
    assert torch.equal(load_file("out/model.safetensors")[NORM], tensors(0)[NORM])
    assert main(["merge", "c.yml", "dry", *chosen, "--dry-run", "--nonfinite", "error"]) == 0


def test_rows_of_another_tokenizer(folder: Path) -> None:
    def rows(vocab: dict[str, int]) -> None:
        Path("b/tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))

    rows({"v": 0, "u": 1, "w": 2})
    plan = mf.plan_checkpoints(config(base_model="a", tokenizer_from="b"), "out")
    assert any("2 tokens of b" in line for line in plan.warnings)
    rows({"u": 6})
    with pytest.raises(mf.ConfigError, match=r"at most 6 tokens.*got 7"):
        mf.plan_checkpoints(config(base_model="a", tokenizer_from="b"), "out")
    Path("b/tokenizer.json").unlink()
    plan = mf.plan_checkpoints(config(base_model="a", tokenizer_from="b"), "out")
    assert any("not checked" in line for line in plan.warnings)


def test_a_series_may_take_the_files_of_its_results(folder: Path) -> None:
    Path("c.yml").write_text(
        "name: first\nmerge_method: passthrough\nmodels: [{model: c}]\n---\n"
        "merge_method: linear\nconfig_from: first\n"
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    )
    mf.merge_series("c.yml", "out")
    assert Path("out/notes.txt").read_text() == "c"
