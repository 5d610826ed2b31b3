"""Tokenizers side by side with mergekit itself: set MAGIC_FAST_MERGEKIT_YAML to its command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import magic_fast as mf
from golden.golden_case import golden_folder

COMMAND = os.environ.get("MAGIC_FAST_MERGEKIT_YAML", "")
SOURCES = {"A": "base", "B": "expert_a", "C": "expert_b"}
ADDED = {"A": "", "B": "<x> <y>", "C": "<y> <z>"}
CASES = {
    "union": "tokenizer_source: union",
    "base": "tokenizer_source: base",
    "model": "tokenizer_source: m/C",
    "tokens": "tokenizer: {pad_to_multiple_of: 16, tokens: {<y>: {source: m/B, force: true}, "
    "<x>: {source: {kind: zero}}, <n>: {source: {kind: model_token, model: m/C, token: <z>}}}}",
}


def write(root: Path, name: str, seed: int) -> None:
    source, out = golden_folder() / "mergekit_e2e" / "models" / SOURCES[name], root / "m" / name
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    generator = torch.Generator().manual_seed(seed)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = torch.randn(136, 64, generator=generator).bfloat16()
    save_file(tensors, out / "model.safetensors")
    data = json.loads((out / "tokenizer.json").read_text())
    for row, token in enumerate(ADDED[name].split()):
        data["added_tokens"].append(data["added_tokens"][0] | {"id": 128 + row, "content": token})
    (out / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((out / "config.json").read_text()) | {"vocab_size": 136}
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND, reason="MAGIC_FAST_MERGEKIT_YAML names no mergekit-yaml")
@pytest.mark.parametrize("case", list(CASES))
def test_same_rows(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token, flag and row; averages (at most half of the weights) rounded to bfloat16."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(SOURCES):
        write(tmp_path, name, seed)
    weights = "".join(f"- {{model: m/{n}, parameters: {{weight: 0.25}}}}\n" for n in SOURCES)
    head = "base_model: m/A\nmerge_method: linear\ndtype: float32\nmodels:\n"
    Path("merge.yml").write_text(head + weights + CASES[case] + "\n")
    mf.merge_checkpoints("merge.yml", "ours")
    subprocess.run(
        [COMMAND, "merge.yml", "theirs", "--no-write-model-card"],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    found = []
    for out in ("ours", "theirs"):
        data = json.loads(Path(out, "tokenizer.json").read_text())
        rows = dict(data["model"]["vocab"]) | {t["content"]: t["id"] for t in data["added_tokens"]}
        special = {t["content"]: t["special"] for t in data["added_tokens"]}
        found.append((rows, special, load_file(Path(out, "model.safetensors"))))
    (ours, special, a), (theirs, want_special, b) = found
    assert (set(ours), special, set(a)) == (set(theirs), want_special, set(b))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert a[name].shape == b[name].shape
        left = a[name][[ours[t] for t in sorted(ours)]]
        right = b[name][[theirs[t] for t in sorted(ours)]]
        torch.testing.assert_close(left, right, rtol=2**-8, atol=2**-7)
