"""``model+adapter``: an adapter's model read as a checkpoint, and merged as one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import magic_fast as mf
from adapters.adapter_files import Lora, draw_lora, write_ia3, write_peft
from engine.engine_models import MIB, different, read_out, write_model
from magic_fast.cli import main
from magic_fast.engine.sources.adapted import AdaptedCheckpoint
from magic_fast.errors import CheckpointError, ConfigError
from magic_fast.planning.sources import open_model

SHAPES = {
    "model.embed_tokens": (90, 24),
    "model.layers.0.self_attn.q_proj": (700, 501),  # three blocks, none of them whole
    "model.layers.0.conv": (20, 6, 3, 3),
    "model.layers.0.mlp.down_proj": (24, 24),
}
PLAIN = {"model.norm.weight": (24,), "lm_head.weight": (90, 24)}
NAMES = {f"{m}.weight": s for m, s in SHAPES.items()} | PLAIN


def base_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in NAMES.items()}


def adapted(base: dict[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """W + s·B·A, in float32 (of float64 weights float64), from float64."""
    found = dict(base)
    for module in lora.factors:
        w = base[f"{module}.weight"]
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        found[f"{module}.weight"] = (w.double() + lora.delta(module, w.shape)).to(wide)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", base_tensors(torch.bfloat16))
    for k in range(3):
        write_peft(tmp_path / f"lora-{k}", draw_lora(k, SHAPES, rank=4 + k))
    return tmp_path


WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.half: "F16"}


def read(model: Any, name: str, start: int = 0, count: int | None = None) -> Tensor:
    info = model.resolve(name)
    data = bytearray(info.nbytes - start if count is None else count)
    model.read_into(name, data, start, len(data))
    dtypes = {word: dtype for dtype, word in WORDS.items()}
    return torch.frombuffer(data, dtype=dtypes[info.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_with_the_adapter(tmp_path: Path, dtype: torch.dtype, factors: torch.dtype) -> None:
    base = base_tensors(dtype)
    lora = draw_lora(0, SHAPES, dtype=factors, alpha_pattern={"mlp.down_proj": 3}, use_rslora=True)
    write_model(tmp_path / "base", base)
    write_peft(tmp_path / "lora", lora)
    want = adapted(base, lora)
    with open_model(tmp_path / "base", tmp_path / "lora") as model:
        for name, tensor in want.items():
            got = read(model, name).view(tensor.shape)
            assert model.stored_dtype(name) == WORDS[dtype]
            assert got.dtype == tensor.dtype
            if name.removesuffix(".weight") not in lora.factors:
                assert torch.equal(got, tensor)
            else:  # a product in float32 and one rounding of the sum
                eps = torch.finfo(tensor.dtype).eps
                torch.testing.assert_close(got, tensor, rtol=2 * eps, atol=4 * eps)


def test_bits_do_not_depend_on_where_a_read_begins(folder: Path) -> None:
    with open_model(folder / "base", folder / "lora-0") as model:
        for module in SHAPES:
            name = f"{module}.weight"
            whole = read(model, name)
            size = whole.element_size()
            for start, count in ((0, 7), (501, 502), (whole.numel() // 3, whole.numel() // 2)):
                count = min(count, whole.numel() - start)
                part = read(model, name, start * size, count * size)
                assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.3, "weight": 0.7}), ("task_arithmetic", {"weight": 0.4})],
)
@pytest.mark.parametrize("calibrate", [None, "wsc"])
def test_merged_as_full_checkpoints(
    folder: Path, tmp_path: Path, method: str, parameters: dict[str, Any], calibrate: str | None
) -> None:
    """The same bits as a merge of the full models in float32, written out, whatever the memory."""
    base = base_tensors(torch.bfloat16)
    experts = []
    for k in range(3):
        with open_model(folder / "base", folder / f"lora-{k}") as model:
            experts.append({n: read(model, n).view(base[n].shape) for n in base})
        write_model(folder / f"full-{k}", experts[-1])
    config = {"merge_method": method, "base_model": str(folder / "base"), "parameters": parameters}
    config |= {"calibrate": calibrate} if calibrate else {}

    def run(out: str, experts: list[str], **options: Any) -> dict[str, Tensor]:
        models = [{"model": str(folder / e)} for e in experts]
        mf.merge_checkpoints({**config, "models": models}, folder / out, **options)
        return read_out(folder / out)

    want = run("full", [f"full-{k}" for k in range(3)])
    assert {t.dtype for t in want.values()} == {torch.bfloat16}
    for memory in (4 * MIB, 64 * MIB):
        got = run(f"out-{memory}", [f"base+{folder}/lora-{k}" for k in range(3)], memory=memory)
        assert different(got, want) == []
    if method == "task_arithmetic" and calibrate is None:  # torch takes seconds a merge
        experts_of = {"got": "base+{folder}/lora-{k}", "want": "full-{k}"}
        found = [
            run(
                f"torch-{what}",
                [name.format(folder=folder, k=k) for k in range(3)],
                backend="torch",
            )
            for what, name in experts_of.items()
        ]
        assert different(*found) == []


def test_an_adapter_is_baked_in_by_passthrough(folder: Path) -> None:
    """Rounded once, to the dtype of the model; tasks of shards open it again by themselves."""
    out = folder / "out"
    models = [{"model": {"model": {"path": str(folder / "base")}, "lora": str(folder / "lora-1")}}]
    config = {"merge_method": "passthrough", "models": models}
    mf.merge_checkpoints(config, out)
    want = adapted(base_tensors(torch.bfloat16), draw_lora(1, SHAPES, rank=5))
    for name, tensor in read_out(out).items():
        torch.testing.assert_close(tensor, want[name].bfloat16(), rtol=2**-7, atol=0)
    with open_model(folder / "base", folder / "lora-1") as model:
        again = pickle.loads(pickle.dumps(model.opener()))()
        assert isinstance(again, AdaptedCheckpoint)
        assert torch.equal(
            read(again, "model.embed_tokens.weight"), read(model, "model.embed_tokens.weight")
        )
        again.close()


def test_resumed_run_knows_its_adapter(folder: Path) -> None:
    config = {
        "merge_method": "task_arithmetic", "base_model": str(folder / "base"),
        "models": [{"model": f"{folder}/base+{folder}/lora-0"}], "parameters": {"weight": 1.0},
    }  # fmt: skip
    mf.merge_checkpoints(config, folder / "out")
    mf.merge_checkpoints(config, folder / "out", resume=True)
    path = folder / "lora-0" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(mf.InputError, match=r"adapter_config\.json"):
        mf.merge_checkpoints(config, folder / "out", resume=True)


def test_tensors_trained_whole(folder: Path) -> None:
    """``modules_to_save`` takes the place of the model's own tensor."""
    lora = draw_lora(0, {"model.layers.0.mlp.down_proj": (24, 24)})
    path = write_peft(folder / "saved", lora, modules_to_save=["lm_head"])
    a, b = lora.factors["model.layers.0.mlp.down_proj"]
    stem = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    head = torch.full((90, 24), 0.5)
    save_file(
        {stem + "A.weight": a, stem + "B.weight": b, "base_model.model.lm_head.weight": head},
        path / "adapter_model.safetensors",
    )
    with open_model(folder / "base", path) as model:
        assert torch.equal(read(model, "lm_head.weight").view(90, 24), head)


def test_names_that_differ_by_a_prefix(tmp_path: Path) -> None:
    """GPT-2's checkpoints lack the ``transformer.`` of its modules; its weights are [in, out]."""
    weight = torch.randn(16, 24)
    write_model(
        tmp_path / "base", {"h.0.mlp.c_fc.weight": weight, "h.0.ln_1.weight": torch.ones(16)}
    )
    lora = draw_lora(0, {"transformer.h.0.mlp.c_fc": (24, 16)})
    write_peft(tmp_path / "lora", lora, fan_in_fan_out=True)
    with open_model(tmp_path / "base", tmp_path / "lora") as model:
        got = read(model, "h.0.mlp.c_fc.weight").view(16, 24)
    want = weight + lora.delta("transformer.h.0.mlp.c_fc", (24, 16)).T.float()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_memory_of_factors_is_counted(folder: Path) -> None:
    models = [{"model": f"{folder}/base+{folder}/lora-0"}]
    config = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models}
    plan = mf.plan_checkpoints(config, folder / "out", memory=64 * MIB)
    assert plan.budget.beside > 0
    assert plan.budget.blocks + plan.budget.beside <= 64 * MIB


def message(error: type[Exception], call: Any) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_misfits_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def opened(name: str) -> Any:
        return lambda: open_model(folder / "base", folder / name)

    write_peft(folder / "other", draw_lora(0, {"model.layers.7.mlp.gate": (8, 4)}))
    assert "module 'model.layers.7.mlp.gate'" in message(CheckpointError, opened("other"))
    write_peft(folder / "wide", draw_lora(0, {"model.layers.0.mlp.down_proj": (8, 4)}))
    assert "expected factors of [24, 24]" in message(CheckpointError, opened("wide"))
    write_peft(folder / "dora", draw_lora(0), use_dora=True)
    assert "DoRA" in message(CheckpointError, opened("dora"))
    write_ia3(folder / "ia3", {"model.layers.0.mlp.down_proj": torch.ones(1, 24)})
    assert "expected LoRA on a model of a full merge, got IA3" in message(
        CheckpointError, opened("ia3")
    )
    config = {"merge_method": "ties", "base_model": str(folder / "base"),
              "models": [{"model": f"{folder}/base+nowhere"}]}  # fmt: skip
    wrong = message(ConfigError, lambda: mf.merge_checkpoints(config, folder / "out"))
    assert "base+nowhere: expected both parts of model+adapter" in wrong
    (folder / "merge.yml").write_text(json.dumps(config))
    assert main(["merge", str(folder / "merge.yml"), str(folder / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (folder / "out").exists()
