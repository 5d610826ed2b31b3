"""mergekit end to end: a stored YAML, unchanged, gives the tensors that `mergekit-yaml` wrote.

Deviations from the recordings (docs of the presets):
* `breadcrumbs`: release 0.1.4 zeroes small tensors; matched with compat only.
* `slices_uneven_sources`: the recording lacks a source in final norm and lm_head; not compared.
* `embed_size_mismatch`: embeddings are cut only on request; without it the merge is refused.
* `sce`: the recording breaks ties of the variance by an accident of its sort, we by index; the
  tied elements at the cut are not compared.
* `arcee_fusion_f32`: in tensors of one dimension some importances equal the threshold; there the
  recording has what rounding made of it, which differs by CPU. These elements are not compared.
* `arcee_fusion_bf16`: the recording is float32 by promotion; our dtype is the one asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import magic_fast as mf
from golden.golden_case import GoldenCase, golden_folder, load_cases, mismatch, why_absent
from magic_fast.cli import main
from magic_fast.config import MergeConfig
from magic_fast.methods.registry import built_in
from support.backends import available_backends

_CASES = [case for case in load_cases() if case.on_disk]
_COMPAT = {"breadcrumbs": "mergekit-0.1.4"}
_TRUNCATED = {"embed_size_mismatch"}
_NOT_COMPARED = {"slices_uneven_sources": ("model.norm.weight", "lm_head.weight")}
_OWN_DTYPE = {"arcee_fusion_bf16": "bfloat16"}
_CONFIG_KEYS = (
    "num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "dtype",
)  # fmt: skip


def _folder(case: GoldenCase, key: str) -> Path:
    return golden_folder() / case.record[key]


def _word(case: GoldenCase) -> str:
    return case.id.rsplit("/", 1)[1]


def _not_yet(case: GoldenCase) -> str | None:
    """What of the stored YAML has no implementation yet."""
    text = _folder(case, "config").read_text()
    words = {
        line.split(":", 1)[0].strip(): line.split(":", 1)[-1].strip() for line in text.splitlines()
    }
    method = words["merge_method"]
    if method not in built_in():
        return f"method {method}"
    return None


def _read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by safetensors' own library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def _ambiguous(case: GoldenCase) -> dict[str, Tensor]:
    """Flat indices per tensor where a cut of the reference split a group of equal magnitudes."""
    if not case.record.get("tie_ambiguous"):
        return {}
    with safe_open(str(_folder(case, "tie_ambiguous")), "pt") as file:
        return {name: file.get_tensor(name).long() for name in file.keys()}


def _mask(indices: Tensor | None, shape: torch.Size) -> Tensor | None:
    if indices is None:
        return None
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[indices.flatten()] = True
    return mask.reshape(shape)


def _tied_variances(case: GoldenCase) -> dict[str, Tensor]:
    """Flat indices per tensor whose variance over the experts equals that of the cut of SCE, where
    the cut splits them."""
    config, found = MergeConfig.from_yaml(_folder(case, "config").read_text()), {}
    base, *experts = (_read(Path(model)) for model in config.model_references)
    for name, start in base.items():
        taus = torch.stack([e[name].float() - start.float() for e in experts])
        variance = taus.var(0, unbiased=False).flatten()
        count = int(int(variance.count_nonzero()) * config.parameters["select_topk"])
        ordered = variance.sort(descending=True).values
        if 0 < count < len(ordered) and ordered[count - 1] == ordered[count]:
            found[name] = (variance == ordered[count]).nonzero().flatten()
    return found


def _importances_at_the_threshold(case: GoldenCase) -> dict[str, Tensor]:
    """Flat indices per tensor of one dimension where |b − a| equals Q(½) + 1.5·(Q(¾) − Q(¼)) of
    Arcee Fusion: the one KL of the tensor is a factor of both sides."""
    config, found = MergeConfig.from_yaml(_folder(case, "config").read_text()), {}
    base, expert = (_read(Path(model)) for model in config.model_references)
    for name, start in base.items():
        if start.dim() == 1:
            moved = (expert[name].double() - start.double()).abs()
            ordered, last = moved.sort().values, moved.numel() - 1
            low, middle, high = (ordered[int(u * last)] for u in (0.25, 0.5, 0.75))
            found[name] = (moved == middle + 1.5 * (high - low)).nonzero().flatten()
    return found


_COMPUTED = {"sce": _tied_variances, "arcee_fusion_f32": _importances_at_the_threshold}


def _check(case: GoldenCase, out: Path) -> None:
    got, want = _read(out), _read(_folder(case, "expected"))
    assert sorted(got) == sorted(want)
    tolerance, word = case.record["tolerance"], _word(case)
    ambiguous = _COMPUTED.get(word, _ambiguous)(case)
    faults = []
    for name, expected in want.items():
        if name in _NOT_COMPARED.get(word, ()):
            continue
        dtype = getattr(torch, _OWN_DTYPE.get(word, str(expected.dtype).removeprefix("torch.")))
        if got[name].dtype != dtype:
            faults.append(f"{name}: {got[name].dtype}, expected {dtype}")
        fault = mismatch(got[name], expected, tolerance, _mask(ambiguous.get(name), expected.shape))
        if fault:
            faults.append(f"{name}: {fault}")
    assert not faults, "\n".join(faults)
    _check_config(case, out)
    _check_shards(case, out, want)


def _check_config(case: GoldenCase, out: Path) -> None:
    got = json.loads((out / "config.json").read_text())
    want = json.loads((_folder(case, "expected") / "config.json").read_text())
    for key in _CONFIG_KEYS:
        if key == "vocab_size" and "config_depends_on_hashseed" in case.flags:
            continue
        found = got.get(key, got.get("torch_dtype")) if key == "dtype" else got.get(key)
        assert found == want[key], key


def _check_shards(case: GoldenCase, out: Path, want: dict[str, Tensor]) -> None:
    index = out / "model.safetensors.index.json"
    sharded = (_folder(case, "expected") / index.name).exists()
    assert index.exists() == sharded
    if sharded:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert sorted(weight_map) == sorted(want)
        assert len(set(weight_map.values())) > 1
        assert all((out / file).is_file() for file in weight_map.values())


def _params() -> list[object]:
    params = [
        pytest.param(case, name, id=f"{case.id}-{name}")
        for case in _CASES
        for name in available_backends()
    ]
    if not params:
        reason = why_absent() or "no end-to-end case in the manifest"
        params.append(
            pytest.param(None, "torch", id="absent", marks=pytest.mark.skip(reason=reason))
        )
    return params


#: Methods whose experts are compared before they are added: native and in torch.
_ACROSS = ("sce", "ramplus_tl")


def _backend(case: GoldenCase, name: str) -> str | None:
    """The backend asked for; methods that it does not run choose theirs."""
    method = MergeConfig.from_yaml(_folder(case, "config").read_text()).merge_method
    gpu = name in ("cuda", "triton")
    spec = built_in()[method]
    refused = spec.function is not None or (
        gpu and (spec.directions is not None or method in _ACROSS)
    )
    return None if refused else name


def _shard_size(case: GoldenCase) -> str | None:
    options = list(case.record["cli_options"])
    return options[options.index("--out-shard-size") + 1] if "--out-shard-size" in options else None


@pytest.fixture
def in_models_folder(case: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored YAMLs name their models relative to this folder."""
    if reason := _not_yet(case):
        pytest.skip(f"operation mergekit.yaml has no implementation yet: {reason}")
    monkeypatch.chdir(golden_folder() / case.record["models_root"])


@pytest.mark.parametrize(("case", "backend"), _params())
@pytest.mark.usefixtures("in_models_folder")
def test_golden_e2e_python(case: GoldenCase, backend: str, tmp_path: Path) -> None:
    text, out, word = _folder(case, "config").read_text(), tmp_path / "out", _word(case)
    options: dict[str, Any] = {"backend": _backend(case, backend), "compat": _COMPAT.get(word)}
    if _shard_size(case):
        options["max_shard_size"] = 100_000
    if word in _TRUNCATED:
        with pytest.raises(mf.InputError, match="shape"):
            mf.merge_checkpoints(text, out, **options)
        assert not out.exists()
        options["allow_embedding_truncation"] = True
    report = mf.merge_checkpoints(text, out, **options)
    if options["backend"] is not None:  # asked for by name: never replaced
        assert report.backend == backend
    _check(case, out)


@pytest.mark.parametrize(("case", "backend"), _params())
@pytest.mark.usefixtures("in_models_folder")
def test_golden_e2e_command_line(case: GoldenCase, backend: str, tmp_path: Path) -> None:
    out, word = tmp_path / "out", _word(case)
    arguments = ["merge", str(_folder(case, "config")), str(out), "-q"]
    if chosen := _backend(case, backend):
        arguments += ["--backend", chosen]
    if word in _COMPAT:
        arguments += ["--compat", _COMPAT[word]]
    if word in _TRUNCATED:
        arguments += ["--allow-embedding-truncation"]
    if size := _shard_size(case):
        arguments += [
            "--max-shard-size",
            size.replace("K", "KB"),
        ]  # mergekit's 100K is 100 000 bytes
    assert main(arguments) == 0
    _check(case, out)
