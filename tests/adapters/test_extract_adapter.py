"""Adapters out of fine-tunes: PEFT loads them, and its merge is the expert within the error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import magic_fast as mf
from magic_fast.cli.program import main


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.fc = nn.Linear(12, 24)
        self.head = nn.Linear(24, 16)
        self.conv = nn.Conv2d(6, 8, 3)
        self.norm = nn.LayerNorm(12)


def models(folder: Path, ranks: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and a fine-tune of it whose changes of weights have these ranks; 0: full."""
    torch.manual_seed(1)
    base = {n: t.detach().clone() for n, t in Net().state_dict().items()}
    expert = dict(base)
    for name, rank in ranks.items():
        flat = base[name].flatten(1)
        change = torch.randn_like(flat)
        if rank:
            change = torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1])
        expert[name] = base[name] + change.reshape(base[name].shape) / 8
    expert["norm.weight"] = base["norm.weight"] + 0.5
    for name, tensors in (("base", base), ("expert", expert)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return base, expert


def test_pefts_merge_is_the_expert_within_the_error(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ranks = {"emb.weight": 2, "fc.weight": 0, "conv.weight": 3}
    base, expert = models(tmp_path, ranks)
    out = tmp_path / "lora"
    (found,) = mf.extract_adapter(
        tmp_path / "base", tmp_path / "expert", out, rank=4, save_vectors=True
    )
    model = peft.PeftModel.from_pretrained(_net(base), str(out))
    merged = model.merge_and_unload().state_dict()
    errors = {m.name: m.error for m in found.modules}
    assert set(errors) == {"emb", "fc", "conv"}
    for name in base:
        left = (merged[name] - expert[name]).double().norm()
        change = (expert[name] - base[name]).double().norm()
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in errors:
            assert float(left / change) == pytest.approx(errors[module], rel=1e-3, abs=1e-5)
        else:
            assert left == 0, name
    s = torch.linalg.svdvals((expert["fc.weight"] - base["fc.weight"]).double())
    assert errors["fc"] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-3)
    assert json.loads((out / "magic_fast.json").read_text())["error"] == found.error
    assert "base_model:" in (out / "README.md").read_text()


def _net(base: dict[str, Tensor]) -> Net:
    net = Net()
    net.load_state_dict(base)
    return net


def test_what_is_not_in_the_adapter_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models(tmp_path, {"fc.weight": 2})
    paths = [str(tmp_path / name) for name in ("base", "expert", "lora")]
    assert main(["extract-adapter", *paths, "--rank", "3", "--quiet"]) == 0
    assert main(["extract-adapter", *paths[:2], f"{paths[2]}2", "--rank", "3", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert list(found["left"]) == ["norm.weight"]
    assert [m["rank"] for m in found["modules"]] == [2]
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tuple(t.shape) for t in tensors.values()} == {(2, 12), (24, 2)}


def test_several_experts_are_folders(tmp_path: Path) -> None:
    _, expert = models(tmp_path, {"fc.weight": 2})
    (tmp_path / "other").mkdir()
    save_file({n: 2 * t for n, t in expert.items()}, tmp_path / "other/model.safetensors")
    (tmp_path / "other/config.json").write_text("{}")
    experts = [tmp_path / "expert", tmp_path / "other"]
    found = mf.extract_adapter(tmp_path / "base", experts, tmp_path / "all", rank=2)
    assert [Path(a.out).name for a in found] == ["expert", "other"]
    assert all(
        (tmp_path / "all" / n / "adapter_config.json").is_file() for n in ("expert", "other")
    )


def test_a_base_is_no_expert(tmp_path: Path) -> None:
    models(tmp_path, {"fc.weight": 2})
    with pytest.raises(mf.CheckpointError, match="expected matrices that differ"):
        mf.extract_adapter(tmp_path / "base", tmp_path / "base", tmp_path / "o", rank=2)


def test_what_an_adapter_cannot_hold_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head of its own, and a counter; the fine-tune's names have a wrapper's prefix."""
    base, expert = models(tmp_path, {"fc.weight": 2})
    steps = {"steps": torch.tensor(1)}
    save_file(base | steps, tmp_path / "base/model.safetensors")
    own = {f"module.{n}": t for n, t in (expert | {"steps": torch.tensor(7)}).items()}
    save_file(own | {"own.weight": torch.ones(2, 2)}, tmp_path / "expert/model.safetensors")
    paths = [str(tmp_path / name) for name in ("base", "expert", "lora")]
    assert main(["extract-adapter", *paths, "--rank", "2"]) == 0
    assert "2 tensors are the expert's alone" in capsys.readouterr().out
    found = json.loads((tmp_path / "lora/magic_fast.json").read_text())
    assert found["unlike"] == ["own.weight", "steps"]
    assert [m["name"] for m in found["modules"]] == ["fc"]


@pytest.mark.parametrize("tied", [True, False])
def test_language_models(tied: bool, tmp_path: Path) -> None:
    """PEFT's forward with the adapter is the expert, where the rank holds the change; its merge
    is where the embedding is the head."""
    peft, tr = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    torch.manual_seed(0)
    base = tr.GPT2LMHeadModel(tr.GPT2Config(tie_word_embeddings=tied, **sizes)).eval()
    expert = tr.GPT2LMHeadModel(base.config).eval()
    expert.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, x in expert.named_parameters():
            if x.dim() == 2 and "wpe" not in name:
                x += torch.randn(x.shape[0], 3) @ torch.randn(3, x.shape[1]) / 20
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    (found,) = mf.extract_adapter(tmp_path / "base", tmp_path / "expert", tmp_path / "o", rank=3)
    assert not found.left and not found.unlike and found.error < 1e-5
    assert any("wte.weight is the head, too" in w for w in found.warnings) == tied
    ids = torch.arange(12)[None]
    want = expert(ids).logits
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "o")).eval()
    model = model.merge_and_unload() if tied else model
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
