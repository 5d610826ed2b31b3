"""LoHa, LoKr, DoRA and differences on a model, against PEFT's merge_and_unload and plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import magic_fast as mf

try:
    import peft
except ImportError:
    peft = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.fc = nn.Linear(12, 24)
        self.sq = nn.Linear(24, 24)
        self.conv = nn.Conv2d(6, 8, 3)
        self.conv1 = nn.Conv1d(6, 8, 3)


LINEAR, CONVS = ["fc", "sq"], ["conv", "conv1"]
CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR + CONVS),
    "loha_effective": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=["fc", "conv"], use_effective_conv2d=True
    ),
    "lokr": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=LINEAR + CONVS, alpha_pattern={"sq": 3}
    ),
    "lokr_full": lambda: peft.LoKrConfig(
        r=40, alpha=5, target_modules=LINEAR + CONVS, rank_pattern={"sq": 2}
    ),
    "lokr_both": lambda: peft.LoKrConfig(
        r=1, alpha=5, target_modules=[*LINEAR, "conv"], decompose_both=True,
        use_effective_conv2d=True,
    ),
    "dora": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=LINEAR + CONVS + ["emb"]
    ),
}  # fmt: skip


def trained(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's tensors and PEFT's merged ones; writes base and adapter."""
    if peft is None:
        pytest.skip("no PEFT here: `make venv` brings it")
    torch.manual_seed(3)
    net = Net()
    (folder / "base").mkdir()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    save_file(base, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text("{}")
    model = peft.get_peft_model(net, CONFIGS[name]())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn_like(p) / 4
                p.copy_(p * (1 + noise) if "magnitude" in n else noise)
    model.save_pretrained(str(folder / "adapter"))
    merged = model.merge_and_unload().state_dict()
    return base, {n: merged[n].detach().clone() for n in base}


def on_model(folder: Path, adapter: Path) -> dict[str, Tensor]:
    config = {
        "merge_method": "passthrough",
        "models": [{"model": f"{folder}/base+{adapter}"}],
        "out_dtype": "float32",
    }
    mf.merge_checkpoints(yaml.safe_dump(config), folder / "out")
    return load_file(folder / "out/model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_model_it_is_pefts_merge(name: str, tmp_path: Path) -> None:
    base, expected = trained(name, tmp_path)
    got = on_model(tmp_path, tmp_path / "adapter")
    changed = 0
    for n, value in expected.items():
        torch.testing.assert_close(got[n], value, rtol=2e-5, atol=2e-6, msg=n)
        changed += not torch.equal(value, base[n])
    assert changed >= 2


@pytest.mark.parametrize("name", CONFIGS)
def test_into_one_adapter_it_is_the_change_at_the_rank(name: str, tmp_path: Path) -> None:
    _, expected = trained(name, tmp_path)
    source, out = tmp_path / "adapter", tmp_path / "one"
    report = mf.merge_adapters(
        [source, source], out, "linear", weights=[0.25, 0.75], rank=60, base=tmp_path / "base"
    )
    assert max(m.lost for m in report.modules) < 1e-5
    torch.manual_seed(3)
    merged = peft.PeftModel.from_pretrained(Net(), str(out)).merge_and_unload().state_dict()
    for n, value in expected.items():
        torch.testing.assert_close(merged[n], value, rtol=1e-4, atol=1e-4, msg=n)


def lycoris(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and a file in LyCORIS' names, with what it adds by plain torch in float64."""
    torch.manual_seed(5)
    draw = torch.randn
    base = {
        "a.weight": draw(8, 12), "a.bias": draw(8), "b.weight": draw(8, 6, 3, 3),
        "c.weight": draw(8, 12), "d.weight": draw(8, 12), "n.weight": draw(8), "n.bias": draw(8),
        "e.weight": draw(9, 9), "f.weight": draw(8, 6, 3, 3), "g.weight": draw(8, 12),
    }  # fmt: skip
    t: dict[str, Tensor] = {
        "a.hada_w1_a": draw(8, 2), "a.hada_w1_b": draw(2, 12), "a.hada_w2_a": draw(8, 2),
        "a.hada_w2_b": draw(2, 12), "a.alpha": torch.tensor(3.0), "a.diff_b": draw(8),
        "b.hada_t1": draw(2, 2, 3, 3), "b.hada_t2": draw(2, 2, 3, 3), "b.hada_w1_a": draw(2, 8),
        "b.hada_w1_b": draw(2, 6), "b.hada_w2_a": draw(2, 8), "b.hada_w2_b": draw(2, 6),
        "b.alpha": torch.tensor(3.0),
        "c.lokr_w1": draw(2, 3), "c.lokr_w2": draw(4, 4), "c.alpha": torch.tensor(9.0),
        "d.lokr_w1": draw(2, 3), "d.lokr_w2_a": draw(4, 2), "d.lokr_w2_b": draw(2, 4),
        "d.alpha": torch.tensor(3.0), "n.w_norm": draw(8), "n.b_norm": draw(8),
        "e.lora_down.weight": draw(2, 9), "e.lora_up.weight": draw(9, 2),
        "e.alpha": torch.tensor(4.0), "e.dora_scale": draw(1, 9).abs() + 1,
        "f.lora_down.weight": draw(2, 6, 1, 1), "f.lora_up.weight": draw(8, 3, 1, 1),
        "f.lora_mid.weight": draw(3, 2, 3, 3), "f.alpha": torch.tensor(1.0), "g.diff": draw(8, 12),
    }  # fmt: skip
    d = {n: x.double() for n, x in t.items()}

    def tucker(n: int) -> Tensor:
        names = f"b.hada_t{n}", f"b.hada_w{n}_a", f"b.hada_w{n}_b"
        return torch.einsum("ijkl,ip,jr->prkl", *(d[x] for x in names))

    e = base["e.weight"].double() + 2 * d["e.lora_up.weight"] @ d["e.lora_down.weight"]
    added = {
        "a.weight": 1.5 * (d["a.hada_w1_a"] @ d["a.hada_w1_b"])
        * (d["a.hada_w2_a"] @ d["a.hada_w2_b"]),
        "a.bias": d["a.diff_b"],
        "b.weight": 1.5 * tucker(1) * tucker(2),
        "c.weight": torch.kron(d["c.lokr_w1"], d["c.lokr_w2"]),
        "d.weight": 1.5 * torch.kron(d["d.lokr_w1"], d["d.lokr_w2_a"] @ d["d.lokr_w2_b"]),
        "n.weight": d["n.w_norm"],
        "n.bias": d["n.b_norm"],
        "e.weight": e / e.norm(dim=0, keepdim=True) * d["e.dora_scale"] - base["e.weight"].double(),
        "f.weight": 0.5 * torch.einsum(
            "mnkl,om,ni->oikl", d["f.lora_mid.weight"], d["f.lora_up.weight"].flatten(1),
            d["f.lora_down.weight"].flatten(1),
        ),
        "g.weight": d["g.diff"],
    }  # fmt: skip
    (folder / "base").mkdir()
    save_file(base, folder / "base/model.safetensors")
    (folder / "base/config.json").write_text("{}")
    save_file({f"lycoris_{n}": x for n, x in t.items()}, folder / "lyco.safetensors")
    return base, added


def test_forms_of_lycoris_on_a_model(tmp_path: Path) -> None:
    base, added = lycoris(tmp_path)
    got = on_model(tmp_path, tmp_path / "lyco.safetensors")
    for name, value in base.items():
        torch.testing.assert_close(
            got[name].double(), value.double() + added[name], rtol=1e-5, atol=1e-5, msg=name
        )


def test_forms_of_lycoris_into_one_adapter(tmp_path: Path) -> None:
    base, added = lycoris(tmp_path)
    one = tmp_path / "one.safetensors"
    source = tmp_path / "lyco.safetensors"
    mf.merge_adapters([source, source], one, rank=40, base=tmp_path / "base", dtype="float32")
    got = on_model(tmp_path, one)
    for name, value in base.items():
        torch.testing.assert_close(
            got[name].double(), value.double() + added[name], rtol=1e-4, atol=1e-4, msg=name
        )


def test_dora_without_its_base_and_forms_without_a_rank_are_refused(tmp_path: Path) -> None:
    lycoris(tmp_path)
    source = tmp_path / "lyco.safetensors"
    with pytest.raises(mf.InputError, match=r"(?s)rank for 'lycoris_.*expected one, as it is"):
        mf.merge_adapters([source], tmp_path / "o.safetensors", base=tmp_path / "base")
    with pytest.raises(mf.InputError, match=r"base for 'lycoris_e'.*DoRA \(lycoris_e.dora_scale\)"):
        mf.merge_adapters([source], tmp_path / "o.safetensors", rank=4)


def test_factors_that_do_not_multiply_are_refused(tmp_path: Path) -> None:
    parts = {"lycoris_a.hada_w1_a": torch.ones(4, 2), "lycoris_a.hada_w1_b": torch.ones(3, 4)}
    save_file(parts, tmp_path / "x.safetensors")
    with pytest.raises(mf.CheckpointError, match="expected factors that multiply"):
        mf.merge_adapters([tmp_path / "x.safetensors"], tmp_path / "o.safetensors", rank=2)
