"""A recorded case: its tensors, its parameters, and the rule by which a result is compared with it.

The folder comes from MAGIC_FAST_GOLDEN (default: ../shared/golden beside the repository); any
folder with a manifest.json of the same structure runs through the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

ENVIRONMENT = "MAGIC_FAST_GOLDEN"
_DEFAULT = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"


def golden_folder() -> Path:
    """Where the recorded cases are looked for."""
    return Path(os.environ.get(ENVIRONMENT) or _DEFAULT).resolve()


def why_absent() -> str | None:
    """Why there are no recorded cases here; None if there are."""
    manifest = golden_folder() / "manifest.json"
    if manifest.is_file():
        return None
    return f"no recorded cases: {manifest} does not exist; set {ENVIRONMENT} to their folder"


def load_cases() -> list[GoldenCase]:
    """Every case of the manifest, in its order; none where the folder is absent."""
    if why_absent() is not None:
        return []
    records = json.loads((golden_folder() / "manifest.json").read_text())["cases"]
    return [GoldenCase(record) for record in records]


@dataclass(frozen=True)
class GoldenCase:
    """One record of the manifest. Tensors are read on first use, after their checksum."""

    record: Mapping[str, Any]
    device: str = "cpu"  # of the inputs

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def op(self) -> str:
        return str(self.record["op"])

    @property
    def params(self) -> Mapping[str, Any]:
        params: Mapping[str, Any] = self.record["params"]
        return params

    @property
    def flags(self) -> list[str]:
        return list(self.record.get("flags") or ())

    @property
    def on_disk(self) -> bool:
        """Whether the case is a folder of checkpoints instead of one file of tensors."""
        return "file" not in self.record

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        data = (golden_folder() / self.record["file"]).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert digest == self.record["sha256"], f"{self.record['file']} is damaged: sha256 {digest}"
        return load(data)

    def _group(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in self._tensors.items() if k.startswith(prefix)}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return {k: v.to(self.device) for k, v in self._group("in.").items()}

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """What the reference returned in the inputs' own dtype."""
        return self._group("out.")

    @cached_property
    def outputs_f32(self) -> dict[str, Tensor]:
        """What the reference returned on the inputs upcast to float32; empty for float32 inputs."""
        return self._group("out_f32.")

    @cached_property
    def ambiguous(self) -> Tensor | None:
        """True where the reference broke a tie by an accident of its sort."""
        found = self._tensors.get("aux.tie_ambiguous")
        return None if found is None else found.bool()

    def model(self, prefix: str) -> dict[str, Tensor]:
        """The inputs ``prefix.<parameter>`` as a state dict."""
        start = prefix + "."
        return {k[len(start) :]: v for k, v in self.inputs.items() if k.startswith(start)}

    def models(self, prefix: str) -> list[dict[str, Tensor]]:
        """The state dicts ``<prefix>0``, ``<prefix>1``, …"""
        found = []
        while state := self.model(f"{prefix}{len(found)}"):
            found.append(state)
        return found

    def masks(self, num_experts: int) -> list[Tensor]:
        """The keep masks that the reference drew."""
        return [self.outputs[f"mask{k}"].to(self.device) for k in range(num_experts)]

    def tolerance(self, output: str, *, float32: bool) -> Mapping[str, Any]:
        outer: Mapping[str, Any] = self.record["tolerance"][output]
        if not float32:
            return outer
        return {**{k: v for k, v in outer.items() if k in ("equal_nan",)}, **outer["f32"]}


def mismatch(
    got: Tensor, want: Tensor, tolerance: Mapping[str, Any], ambiguous: Tensor | None = None
) -> str | None:
    """Why ``got`` is not ``want`` by the rule of the manifest; None if it is.

    |got − want| <= atol + rtol·|want| in float64 in all but ``max_mismatch_frac`` of the elements.
    A NaN meets a NaN, an infinity the same one, where ``equal_nan`` is set; integers are equal.
    """
    got = got.cpu()
    if tuple(got.shape) != tuple(want.shape):
        return f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.is_floating_point():
        wrong = got.to(torch.int64) != want.to(torch.int64)
        allowed = 0.0
    else:
        g, w = got.double(), want.double()
        # `not (error <= bound)`: a NaN fails
        wrong = ~((g - w).abs() <= tolerance["atol"] + tolerance["rtol"] * w.abs())
        special = ~(torch.isfinite(g) & torch.isfinite(w))
        if tolerance.get("equal_nan"):
            same = (torch.isnan(g) & torch.isnan(w)) | (torch.isinf(g) & (g == w))
            wrong = torch.where(special, ~same, wrong)
        else:
            wrong |= special
        allowed = float(tolerance.get("max_mismatch_frac", 0.0))
    if ambiguous is not None and ambiguous.shape == wrong.shape:
        wrong &= ~ambiguous
    count = int(wrong.sum())
    if count <= allowed * max(1, wrong.numel()):
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{count} of {wrong.numel()} elements differ (allowed share {allowed}); first at {first}: "
        f"got {got[first].item()!r}, expected {want[first].item()!r}"
    )
