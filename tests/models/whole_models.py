"""Tiny models of any type: fine-tunes on disk, merged, loaded again by transformers, and the same
by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import magic_fast as mf
from architectures import shrink
from architectures.shrink import TASKS, tiny_config
from magic_fast.checkpoint import Checkpoint, open_checkpoint
from magic_fast.models import Kind, table
from magic_fast.models.built import classes
from magic_fast.planning.stacks import structure_of
from models.architectures import as_in_file, owners, units_by_class
from support.models import load

STATISTICS = ("running_mean", "running_var")
WEIGHTS = (0.4, 0.35)
EPS = 2.0**-23
MOST = 8_000_000  # parameters of a tiny model


class TransformersCannot(Exception):
    """transformers does not read what it wrote."""


@dataclass
class Family:
    """A tiny model and two fine-tunes of it, in folders ``base``, ``one`` and ``two``."""

    model_type: str
    folder: Path
    architecture: str = ""
    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        entry = table.entry_of(self.model_type)
        assert entry is not None
        self.architecture = self.architecture or entry["class"]
        torch.manual_seed(0)
        config = tiny_config(self.model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in self.kind(config).parameters())
        assert size < MOST, f"{size} parameters"
        self.model = self.kind(tiny_config(self.model_type)).float().eval()
        vary(self.model, 0.1)
        self.save("base")
        base = self.states["base"]
        for name in ("one", "two"):
            vary(self.model, 0.02, base)
            self.save(name)

    @property
    def kind(self) -> Any:
        return classes.class_of(self.architecture)

    def save(self, name: str) -> None:
        self.states[name] = {n: t.clone() for n, t in parameters(self.model).items()}
        self.model.save_pretrained(self.folder / name)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder / "base")

    def merge(self, out: str, **settings: Any) -> Any:
        config = {
            "merge_method": "task_arithmetic", "base_model": str(self.folder / "base"),
            "models": [{"model": str(self.folder / name), "parameters": {"weight": weight}}
                       for name, weight in zip(("one", "two"), WEIGHTS, strict=True)],
            "dtype": "float32",
        }  # fmt: skip
        return mf.merge_checkpoints(config, self.folder / out, **settings)

    def loaded(self, name: str) -> tuple[Any, dict[str, list[str]]]:
        """A folder as transformers loads it, and the keys that were missing or not expected."""
        model, told = self.kind.from_pretrained(
            self.folder / name, dtype=torch.float32, output_loading_info=True
        )
        keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
        return model.eval(), {key: sorted(told[key]) for key in keys if told[key]}

    def check_control(self) -> None:
        """Raises where transformers does not read its own base."""
        model, told = self.loaded("base")
        found = parameters(model)
        wrong = [n for n, t in self.states["base"].items() if not torch.equal(found.get(n, t), t)]
        if told or wrong or found.keys() != self.states["base"].keys():
            raise TransformersCannot(f"{told} {wrong[:3]}")


def parameters(model: Any) -> dict[str, Tensor]:
    """Parameters and running statistics by name, without those that transformers does not write."""
    found = {n: p.detach() for n, p in model.named_parameters()}
    found |= {n: b for n, b in model.named_buffers() if n.endswith(STATISTICS)}
    left_out = re.compile("|".join(getattr(model, "_keys_to_ignore_on_save", None) or ["$^"]))
    return {n: t for n, t in found.items() if not left_out.search(n)}


def vary(model: Any, by: float, start: Mapping[str, Tensor] | None = None) -> None:
    """Every parameter becomes that of ``start`` (else nothing) and noise."""
    for name, tensor in parameters(model).items():
        tensor.copy_(torch.randn(tensor.shape) * by)
        if start is not None:
            tensor.add_(start[name])
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5 if start is None else 0)


def by_hand(base: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Task arithmetic in float64, and how far rounding in float32 may lead."""
    taus = [(t.double() - base.double()) * w for t, w in zip((one, two), WEIGHTS, strict=True)]
    room = 2 * EPS * (base.double().abs() + sum(tau.abs() for tau in taus))
    return base.double() + sum(taus), room


def check_merge(family: Family) -> None:
    """Every parameter is that of the merge by hand, no key is missing or unexpected."""
    family.merge("merged")
    model, told = family.loaded("merged")
    found = parameters(model)
    try:
        assert not told
        assert found.keys() == family.states["base"].keys()
        for name, got in found.items():
            want, room = by_hand(*(family.states[k][name] for k in ("base", "one", "two")))
            assert bool(((got.double() - want).abs() <= room).all()), name
    except AssertionError:
        family.check_control()
        raise


def numbered(model: Any) -> dict[str, Tensor]:
    """A state dict in which every element is the number of its output unit, which no other unit of
    the model has, by the classes of the modules; NaN where a class does not tell."""
    state = {n: torch.full(t.shape, math.nan, dtype=torch.float64)
             for n, t in model.state_dict().items()}  # fmt: skip
    first = 0
    for name, module, local, tensor in owners(model):
        units = units_by_class(module, local)
        if units and name in state:
            sizes = [n if axis in units else 1 for axis, n in enumerate(tensor.shape)]
            numbers = torch.arange(first, first + math.prod(sizes), dtype=torch.float64)
            state[name] = numbers.view(sizes).expand(tensor.shape).contiguous()
            first += math.prod(sizes)
    return state


def check_rows(family: Family) -> None:
    """Roles against the classes of the modules, and a calibrated merge against the same by hand,
    row by row."""
    roles = family.checkpoint.roles
    assert not roles.assumed, roles.assumed
    stored = {name: load(family.folder / name) for name in ("base", "one", "two")}
    units = as_in_file(family.model, numbered(family.model))
    unknown = [name for name in stored["base"] if roles[name].units is None]
    filtered = mf.TensorFilter(exclude=tuple(f"^{n.replace('.', '[.]')}$" for n in unknown))
    report = family.merge(
        "calibrated",
        calibrate=mf.WeightCalibration(variant="sphere", clamp=None, tensors=filtered),
    )
    merged = load(family.folder / "calibrated")
    done = {one.name: one for one in report.tensors}
    for name, base in stored["base"].items():
        if not base.is_floating_point() or not base.isfinite().all():
            assert torch.equal(merged[name], base), name
            continue
        if not base.numel():
            continue
        role, numbers = roles[name], units.get(name)
        if numbers is None or numbers.shape != base.shape or bool(numbers.isnan().any()):
            axes = role.units or ()
            sizes = [n if axis in axes else 1 for axis, n in enumerate(base.shape)]
            numbers = torch.arange(math.prod(sizes)).view(sizes).expand(base.shape)
        elif base.dim() > 1:
            assert role.units is not None, name
            others = [axis for axis in range(base.dim()) if axis not in role.units]
            low, high = (numbers.amin(others), numbers.amax(others)) if others else (numbers,) * 2
            assert torch.equal(low, high) and len(low.unique()) == low.numel(), (name, role.units)
        want, room = by_hand(base, stored["one"][name], stored["two"][name])
        heads = role.kind in (Kind.HEAD, Kind.CLASSIFIER)
        is_bias = role.kind is Kind.BIAS  # of a stack of experts
        calibrated = base.dim() > 1 and bool(role.units) and not heads and not is_bias
        assert done[name].calibrated == calibrated, name
        if calibrated:
            _, row = numbers.reshape(-1).unique(return_inverse=True)
            assert done[name].rows == int(row.max()) + 1, name
            taus = [stored[k][name].double() - base.double() for k in ("one", "two")]
            delta = want - base.double()
            norms = [_norms(t, row) for t in (*taus, delta)]
            factor = (norms[0] + norms[1]) / 2 / norms[2]
            want = base.double() + delta * factor[row].view(base.shape)
            room = room + 1e-5 * (want - base.double()).abs()
        assert bool(((merged[name].double() - want).abs() <= room).all()), name


def check_words(family: Family) -> None:
    """Embeddings and heads that transformers names as such have a row for each word."""
    roles, names = family.checkpoint.roles, {id(p): n for n, p in family.model.named_parameters()}
    by_canonical = {role.canonical: role for role in roles.values()}
    for get in (family.model.get_input_embeddings, family.model.get_output_embeddings):
        try:
            module = get()
        except (AttributeError, NotImplementedError, TypeError):  # there is no such module
            continue
        if isinstance(module, nn.Embedding | nn.Linear) and len(module.weight) == shrink.WORDS:
            role = by_canonical.get(names[id(module.weight)])
            assert role is None or role.vocabulary == 0, names[id(module.weight)]


def _norms(tensor: Tensor, row: Tensor) -> Tensor:
    squares = torch.zeros(int(row.max()) + 1, dtype=torch.float64)
    return squares.index_add_(0, row, tensor.reshape(-1) ** 2).sqrt()


def check_passthrough(family: Family) -> None:
    """A passthrough of all its own layers, in two slices, gives the model's own logits; of an
    encoder and a decoder that the configuration counts apart, both."""
    model, checkpoint = family.model, family.checkpoint
    structure = structure_of(checkpoint, "base")

    def sliced(count: int) -> dict[str, Any]:
        pieces = [{"sources": [{"model": str(family.folder / "base"), "layer_range": layers}]}
                  for layers in ([0, 1], [1, count])]  # fmt: skip
        return {"slices": pieces}

    if structure.main is not None:
        parts = sliced(structure.declared or structure.main.count)
    else:
        sides = {"decoder" if "decoder" in prefix else "default": sliced(stack.count)
                 for prefix, stack in structure.stacks.items()}  # fmt: skip
        assert len(sides) == len(structure.stacks) == 2, list(structure.stacks)
        parts = {"modules": sides}
    mf.merge_checkpoints({"merge_method": "passthrough", **parts}, family.folder / "own")
    found, told = family.loaded("own")
    assert not told, told
    for name, tensor in parameters(model).items():
        tensor.copy_(family.states["base"][name])
    own = parameters(model)
    assert all(torch.equal(tensor, own[name]) for name, tensor in parameters(found).items())
    # the same numbers at other addresses: products may differ in the last bits
    want = logits(model, family.model_type)
    room = 1e-6 * float(want.abs().max())
    torch.testing.assert_close(logits(found, family.model_type), want, rtol=0, atol=room)


def logits(model: Any, model_type: str) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": torch.arange(3, 19)[None]}
    if type(model).__name__ == classes.tasks()[TASKS[-1]].get(model_type):
        size = model.config.vision_config.image_size
        size = size if isinstance(size, int) else size[0]
        draw = torch.Generator().manual_seed(1)
        inputs["pixel_values"] = torch.randn(1, 3, size, size, generator=draw)
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(4, 12)[None]
    else:
        inputs["use_cache"] = False
    out = model(**inputs, return_dict=True)
    found: Tensor = out.logits_per_text if "logits_per_text" in out else out.logits
    assert bool(found.isfinite().all()) and bool(found.abs().max() > 0)
    return found
