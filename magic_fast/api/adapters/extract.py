"""``extract_adapter``: the LoRA of a rank that brings a base nearest to a fine-tune of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magic_fast.adapters.factors import balanced
from magic_fast.adapters.merged import lora_config, pattern_of
from magic_fast.adapters.names import PEFT_PREFIX
from magic_fast.adapters.opening import CONFIG_NAME, WEIGHTS_NAME
from magic_fast.api.adapters.extracted import ExtractedAdapter, ExtractedModule
from magic_fast.api.adapters.merge import OUT_DTYPES
from magic_fast.api.adapters.written import WORDS
from magic_fast.checkpoint import (
    FORMAT_METADATA,
    Checkpoint,
    OutputFolder,
    TensorInfo,
    TensorSpec,
    open_checkpoint,
    plan_shards,
)
from magic_fast.engine import Progress
from magic_fast.engine.execute.whole import DTYPES, as_bytes
from magic_fast.engine.output.card import adapter_card
from magic_fast.engine.output.record import versions_used
from magic_fast.engine.sources.tied import same_values
from magic_fast.errors import CheckpointError, InputError, NonFiniteError
from magic_fast.models import Kind, Source
from magic_fast.planning.names import settle_names
from magic_fast.planning.outputs import check_out
from magic_fast.spectral import leading

REPORT_NAME = "magic_fast.json"


@dataclass
class _Draft(ExtractedAdapter):
    """An adapter in the making: its tensors, the modules saved whole, and Conv1D among them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    turned: bool = False


def extract_adapter(
    base: str | Path,
    experts: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    rank: int,
    dtype: str = "float32",
    save_vectors: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> list[ExtractedAdapter]:
    """LoRA adapters of PEFT out of full fine-tunes: of each weight's change Δ = W_expert − W_base
    the ``rank`` leading singular triples, σ shared evenly between B and A. Models are read tensor
    by tensor, the base once for all experts.

    Args:
        base: checkpoint, whose names and configuration hold; fine-tunes in other names of one
            module tree meet them (docs/models.md).
        experts: one, whose adapter ``out`` is, or several, whose adapters are folders of ``out``
            named as the experts are.
        out: folder to make, missing or empty.
        rank: of each module, at most.
        dtype: of the factors, ``float32``, ``float16`` or ``bfloat16``.
        save_vectors: norms and other vectors that changed are saved whole (``modules_to_save``);
            else the report names them. Biases of modules that have factors are always named.
        progress: called with each tensor that is done.

    Returns:
        For each expert the errors by module; beside the adapter in ``magic_fast.json`` too.

    Raises:
        CheckpointError: an expert lacks a tensor of the base, or has it in another shape or a
            dtype that is no float; nothing changed.
        InputError: experts of one name, values that do not fit.
        NonFiniteError: NaN or infinity.

    >>> found = extract_adapter("base", "math", "lora/math", rank=32)  # doctest: +SKIP
    >>> found[0].error  # doctest: +SKIP
    0.18
    """
    one = isinstance(experts, str | os.PathLike)
    paths = [experts] if isinstance(experts, str | os.PathLike) else list(experts or ())
    if not paths or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(
            f"experts and rank: expected paths and a whole number of at least 1, got {experts!r} "
            f"and {rank!r}."
        )
    if dtype not in OUT_DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(OUT_DTYPES)}, got {dtype!r}.")
    target = check_out(out, False)
    names = [Path(os.path.abspath(path)).name.removesuffix(".safetensors") for path in paths]
    if len(set(names)) < len(names):
        raise InputError(
            f"experts: expected names that differ, got {names}. Their adapters are folders of the "
            "output: extract them one at a time."
        )
    single = one or len(paths) == 1
    outs = [target if single else os.path.join(target, name) for name in names]
    for path in outs:
        check_out(path, False)
    opened: list[Checkpoint] = []
    try:
        for given in (base, *paths):
            opened.append(open_checkpoint(given))
        drafts = [_Draft(o, os.fspath(p)) for o, p in zip(outs, paths, strict=True)]
        named = settle_names({model.path: model for model in opened}, opened[0].path)
        own = [named[model.path] for model in opened[1:]]
        _read(opened[0], own, drafts, rank, OUT_DTYPES[dtype], progress)
        for draft in drafts:
            _save_whole(draft, opened[0], save_vectors)
            if not draft.ranks:
                raise CheckpointError(
                    f"expert {draft.expert}: expected matrices that differ from those of "
                    f"{os.fspath(base)}, got none. Name a fine-tune of the base."
                )
        settings = {"rank": rank, "dtype": dtype, "save_vectors": save_vectors}
        for draft in drafts:
            _write(draft, opened[0], os.fspath(base), settings)
        return [
            ExtractedAdapter(d.out, d.expert, d.modules, d.saved, d.left, d.unlike, d.warnings)
            for d in drafts
        ]
    finally:
        for checkpoint in opened:
            checkpoint.close()


def _read(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    drafts: Sequence[_Draft],
    rank: int,
    dtype: torch.dtype,
    progress: Callable[[Progress], None] | None,
) -> None:
    total, done = sum(info.nbytes for info in base.tensors.values()), 0
    for expert, draft in zip(experts, drafts, strict=True):
        draft.unlike += [name for name in expert.tensors if name not in base]
    for name, info in base.tensors.items():
        done += info.nbytes
        if info.dtype in _FLOATS:
            own = _tensor(base, name, info)
            for expert, draft in zip(experts, drafts, strict=True):
                if name not in expert or expert.resolve(name).shape != info.shape:
                    got = list(expert.resolve(name).shape) if name in expert else "none"
                    raise CheckpointError(
                        f"tensor '{name}' in {expert.path}: expected {list(info.shape)} as in "
                        f"{base.path}, got {got}. Name a fine-tune of the base."
                    )
                other = _tensor(expert, name, expert.resolve(name))
                delta = other.to(torch.promote_types(own.dtype, other.dtype)) - own
                if delta.count_nonzero():
                    _extract(draft, base, name, delta, other, rank, dtype)
        else:
            for expert, draft in zip(experts, drafts, strict=True):
                if name not in expert or not same_values(base, name, expert, name):
                    draft.unlike.append(name)
        if progress is not None:
            progress(Progress(done, total, name))


_FLOATS = ("F64", "F32", "F16", "BF16")


def _tensor(model: Checkpoint, name: str, info: TensorInfo) -> Tensor:
    """At least float32."""
    quantised = model.quantisation
    if info.dtype not in _FLOATS or (quantised is not None and info.name in quantised.codes):
        raise CheckpointError(
            f"dtype of '{name}' in {model.path}: expected {', '.join(_FLOATS)}, got {info.dtype} "
            "or codes. Name a model whose weights are not quantised."
        )
    x = torch.frombuffer(model.read(info.name), dtype=DTYPES[info.dtype]).view(info.shape)
    if not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"tensor '{name}' in {model.path}: expected finite values, got NaN or infinity. Name a "
            "model without."
        )
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _extract(
    draft: _Draft, base: Checkpoint, name: str, delta: Tensor, expert: Tensor, rank: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    role = base.roles[name]
    module, _, leaf = _place(base, name).rpartition(".")
    norm = float(delta.double().norm())
    if leaf != "weight" or delta.dim() < 2 or not module:
        draft.left[f"{module}.{leaf}" if module else name] = norm
        draft.whole.setdefault(module, {})[f"{module}.{leaf}"] = expert
        return
    embedding = role.kind is Kind.EMBEDDING
    conv1d = role.owner == "Conv1D"
    if embedding and role.canonical in base.roles.tied_heads:
        draft.warnings.append(
            f"{name} is the head, too: PEFT's merge_and_unload gives the fine-tune, its forward "
            "pass changes the embedding alone. Merge the adapter before it is used."
        )
    change = delta.T if embedding or conv1d else delta.flatten(1)
    u, s, v = leading(change.contiguous(), min(rank, *change.shape), label=name)
    kept = max(1, int(s.count_nonzero()))
    made = balanced(u[:, :kept], s[:kept], v[:, :kept])
    up, down = made.up.to(dtype), made.down.to(dtype)
    left = change.double() - up.double() @ down.double()
    draft.modules.append(ExtractedModule(module, kept, norm, float(left.norm()) / norm))
    draft.ranks[module] = kept
    draft.turned |= conv1d
    kinds = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
    if delta.dim() > 2:
        down = down.reshape(kept, *delta.shape[1:])
        up = up.reshape(*up.shape, *[1] * (delta.dim() - 2))
    for kind, x in zip(kinds, (down, up), strict=True):
        draft.tensors[f"{PEFT_PREFIX}{module}.lora_{kind}"] = x.contiguous()


def _place(base: Checkpoint, name: str) -> str:
    """The name in the module tree, where it is known."""
    role = base.roles[name]
    known = base.roles.source is not Source.HEADERS and not role.layout
    return role.canonical if known and role.canonical else name


def _save_whole(draft: _Draft, base: Checkpoint, save_vectors: bool) -> None:
    """Modules without factors that PEFT saves whole, with the tensors that did not change."""
    for module, tensors in list(draft.whole.items()):
        known = all(key.endswith((".weight", ".bias")) for key in tensors)
        if not save_vectors or not module or module in draft.ranks or not known:
            del draft.whole[module]
            continue
        for name, info in base.tensors.items():
            place = _place(base, name)
            if place.rpartition(".")[0] == module and place not in tensors:
                tensors[place] = _tensor(base, name, info)
        draft.saved += tensors
        for key, x in tensors.items():
            draft.left.pop(key, None)
            draft.tensors[f"{PEFT_PREFIX}{key}"] = x.contiguous()


def _targets(ranks: Mapping[str, int], base: Checkpoint) -> str | list[str]:
    """``target_modules``: the last parts of the names, where they name no other module."""
    leaves = {module.rpartition(".")[2] for module in ranks}
    stems = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")}
    matching = sum(stem.rpartition(".")[2] in leaves for stem in stems)
    return sorted(leaves) if matching == len(ranks) else pattern_of(ranks)


def _write(draft: _Draft, base: Checkpoint, name: str, settings: Mapping[str, Any]) -> None:
    targets = _targets(draft.ranks, base)
    config = lora_config(draft.ranks, name, targets, fan_in_fan_out=draft.turned)
    config["modules_to_save"] = sorted(draft.whole) or None
    with OutputFolder(draft.out) as output:
        specs = [TensorSpec(k, WORDS[t.dtype], tuple(t.shape)) for k, t in draft.tensors.items()]
        output.create_shards(plan_shards(specs, file_name=WEIGHTS_NAME, metadata=FORMAT_METADATA))
        for key, tensor in draft.tensors.items():
            output.write(key, as_bytes(tensor))
        output.write_text(CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        recipe = {"extract_adapter": {"base": name, "expert": draft.expert, **settings}}
        report = {**draft.as_dict(), "recipe": recipe, "versions": versions_used()}
        output.write_text(REPORT_NAME, json.dumps(report, indent=1) + "\n")
        sentence = (
            f"The leading singular triples of `{draft.expert}` less `{name}`, by magic_fast; "
            f"what they leave out is {draft.error:.3g} of the change."
        )
        title = os.path.basename(draft.out)
        card = adapter_card(title, sentence, base_model=name, adapters=[], recipe=recipe,
                            versions=versions_used(), warnings=draft.warnings)  # fmt: skip
        output.write_text("README.md", card)
        output.finalise()
