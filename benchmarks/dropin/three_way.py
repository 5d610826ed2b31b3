"""One YAML three ways: mergekit's own methods, mergekit with ours inside, and our own engine.

    python benchmarks/dropin/three_way.py --make .bench [--size tiny] [--methods ties …]
        [--markdown FILE]

What differs by more than rounding is counted, element by element, and every count is attributed, in
this order:

* *at ties*: some expert's |task vector| equals its threshold in the dtype that mergekit computes in
  (the configuration's ``dtype``): which of the equals stay is anyone's choice;
* *votes near zero*: the weighted sum that elects the sign is within rounding of zero;
* *its rounding*: mergekit in bfloat16 is further than that from mergekit in float32, and we are not
  (norms and angles that it rounds to bfloat16);
* *else*: unexplained.

Rounding is, in bfloat16, one unit in the last place (2^-7) of the result and of the task vectors
that went into it, which mergekit rounds at each step; in float32 2^-16 of the same, as sums over a
tensor and angles between nearly parallel vectors leave it. Random methods are compared by the share
of elements that moved and by the size of the change. Needs mergekit 0.1.5 in the same environment.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py

WAYS = ("mergekit", "inside", "engine")
#: Parameters at the top of the YAML; for nuslerp two experts, for the methods on pairs one.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.7, "density": 0.3},
    "breadcrumbs": {"weight": 0.5, "density": 0.7, "gamma": 0.02},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.7, "gamma": 0.02},
    "sce": {},
    "model_stock": {},
    "karcher": {},
    "multislerp": {"weight": 0.4},
    "ram": {},
    "slerp": {"t": 0.4},
    "nuslerp": {"weight": 0.5},
    "nearswap": {"t": 0.001},
}
RANDOM: dict[str, dict[str, Any]] = {
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "della_linear": {"weight": 0.5, "density": 0.5},
}
_EXPERTS = {"slerp": 1, "nearswap": 1, "nuslerp": 2}
_WHOLE = ("linear", "karcher", "multislerp", "nuslerp")  # no base here
_VOTES = ("ties", "breadcrumbs_ties", "sce")
#: What rounding leaves between two ways, relative.
_ROUNDING = {"float32": 2.0**-16, "bfloat16": 2.0**-7}


@dataclass
class Counts:
    """Elements of a pair of ways."""

    elements: int = 0
    differ: int = 0
    ties: int = 0
    votes: int = 0
    rounding: int = 0

    @property
    def other(self) -> int:
        return self.differ - self.ties - self.votes - self.rounding

    def add(self, differ: Tensor, ties: Tensor, votes: Tensor, rounding: Tensor) -> None:
        self.elements += differ.numel()
        self.differ += int(differ.sum())
        for name, mask in (("ties", ties), ("votes", votes), ("rounding", rounding)):
            setattr(self, name, getattr(self, name) + int((differ & mask).sum()))
            differ = differ & ~mask


def configuration(models: Sequence[Path], method: str, dtype: str) -> dict[str, Any]:
    """The YAML of one merge."""
    base, *experts = models
    experts = experts[: _EXPERTS.get(method)]
    parameters = dict((METHODS | RANDOM)[method])
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(path)} for path in experts],
        "dtype": dtype,
        "parameters": parameters,
    }
    if method in ("slerp", "nearswap"):  # mergekit wants the base among the models
        document["models"].insert(0, {"model": str(base)})
    if method not in _WHOLE:
        document["base_model"] = str(base)
    return document


def merge(document: Mapping[str, Any], way: str, out: Path, seed: int = 0) -> Path:
    """Runs it in this process, by the functions that the commands call."""
    import magic_fast as mf

    if way == "engine":
        config = mf.MergeConfig.from_dict(dict(document))
        random = document["merge_method"] in RANDOM
        mf.merge_checkpoints(config, out, **({"seed": seed} if random else {}))
        return out
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.manual_seed(seed)
    inside = mf.integrations.mergekit.install() if way == "inside" else nullcontext()
    with inside:
        config = MergeConfiguration.model_validate(dict(document))
        run_merge(config, str(out), options=MergeOptions(quiet=True))
    return out


class Model:
    """Tensors of a folder by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _cuts(magnitude: Tensor, method: str, parameters: Mapping[str, Any]) -> list[Tensor]:
    """The magnitudes at which the trim of a method cuts."""
    n, density = magnitude.numel(), parameters.get("density", 1.0)
    kept = max(1, int(density * n)) if method == "ties" else int(density * n)
    top = 0 if method == "ties" else min(int(parameters["gamma"] * n), n - kept)
    flat = magnitude.flatten()
    ranks = [r for r in (top, top + kept) if 0 < r < n]  # largest first
    return [flat.kthvalue(n - r + 1).values for r in ranks]


def doubtful(
    base: Tensor | None, experts: Sequence[Tensor], method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(at ties, votes near zero, Σ|τ|) of one tensor, as ``dtype`` sees it."""
    parameters = METHODS[method]
    deltas = [e.to(dtype) - (0 if base is None else base.to(dtype)) for e in experts]
    ties = torch.zeros(experts[0].shape, dtype=torch.bool)
    kept = [d.float() for d in deltas]
    if "density" in parameters:
        for k, delta in enumerate(deltas):
            magnitude = delta.abs()
            cuts = _cuts(magnitude, method, parameters)
            for cut in cuts:
                ties |= magnitude == cut
            low = cuts[-1] if cuts else magnitude.min()
            keep = magnitude >= low
            if method != "ties" and len(cuts) > 1:
                keep &= magnitude <= cuts[0]
            kept[k] = kept[k] * keep
    size = torch.zeros(experts[0].shape)
    if base is not None or dtype == torch.float32:  # whole weights may cancel in float32, too
        size = torch.stack([d.float().abs() for d in deltas]).sum(0)
    votes = torch.zeros_like(ties)
    if method in _VOTES:
        total, mass = sum(kept), sum(d.abs() for d in kept)
        votes = total.abs() <= mass * torch.finfo(dtype).eps * 2
    return ties, votes, size


def far(a: Tensor, b: Tensor, size: Tensor, rounding: float) -> Tensor:
    """Where two results differ by more than rounding."""
    a, b = a.float(), b.float()
    return ~((a - b).abs() <= rounding * (torch.maximum(a.abs(), b.abs()) + size))


def compare(
    models: Sequence[Path],
    results: Mapping[str, Path],
    method: str,
    dtype: str,
    exact: Path | None = None,
) -> dict[str, Counts]:
    """``inside`` and ``engine`` against ``mergekit``; ``exact`` is mergekit's float32 result."""
    kind: torch.dtype = getattr(torch, dtype)
    inputs = [Model(path) for path in models[: 1 + _EXPERTS.get(method, len(models))]]
    outputs = {way: Model(path) for way, path in results.items()}
    truth = None if exact is None else Model(exact)
    found = {way: Counts() for way in results if way != "mergekit"}
    for name in outputs["mergekit"].names:
        base, *experts = (model[name] for model in inputs)
        start = None if method in _WHOLE else base
        ties, votes, size = doubtful(start, experts, method, kind)
        theirs = outputs["mergekit"][name]
        assert theirs.dtype == kind, (name, theirs.dtype)
        for way, counts in found.items():
            ours = outputs[way][name]
            assert ours.dtype == kind and ours.shape == theirs.shape, name
            differ = far(ours, theirs, size, _ROUNDING[dtype])
            its = torch.zeros_like(differ)
            if truth is not None:
                its = ~far(ours, truth[name], torch.zeros_like(size), _ROUNDING[dtype])
            counts.add(differ, ties, votes, its)
    return found


def moved(models: Sequence[Path], result: Path) -> tuple[float, float]:
    """Share of elements that differ from the base, and the L1 norm of the change."""
    base, merged = Model(models[0]), Model(result)
    count = changed = 0
    norm = 0.0
    for name in merged.names:
        change = merged[name].float() - base[name].float()
        count += change.numel()
        changed += int(change.count_nonzero())
        norm += float(change.abs().double().sum())
    return changed / count, norm


def results(models: Sequence[Path], method: str, dtype: str, folder: Path) -> dict[str, Path]:
    document = configuration(models, method, dtype)
    (folder / f"{method}-{dtype}.yml").write_text(yaml.safe_dump(document))
    return {way: merge(document, way, folder / f"{method}-{dtype}-{way}") for way in WAYS}


def rows(models: Sequence[Path], methods: Sequence[str], dtypes: Sequence[str]) -> Iterator[str]:
    """The table of the deterministic methods."""
    yield (
        "| method | dtype | against mergekit | elements | differ | at ties | votes near zero | "
        "its rounding | else |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            exact = None
            for dtype in dtypes:
                made = results(models, method, dtype, Path(folder))
                for way, c in compare(models, made, method, dtype, exact).items():
                    yield (
                        f"| `{method}` | {dtype} | {way} | {c.elements} | {c.differ} | {c.ties} | "
                        f"{c.votes} | {c.rounding} | {c.other} |"
                    )
                exact = made["mergekit"] if dtype == "float32" else None


def random_rows(
    models: Sequence[Path], methods: Sequence[str], dtypes: Sequence[str]
) -> Iterator[str]:
    """The table of the random methods."""
    yield "| method | dtype | way | share moved | change, L1 |"
    yield "|---|---|---|---|---|"
    for method in methods:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                made = results(models, method, dtype, Path(folder))
                for way, path in made.items():
                    share, norm = moved(models, path)
                    yield f"| `{method}` | {dtype} | {way} | {share:.4f} | {norm:.5g} |"


def main() -> None:
    from magic_fast.cli.demo_data import SIZES, write_checkpoints

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *RANDOM])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    models = write_checkpoints(options.make / options.size, SIZES[options.size], num_experts=3)
    lines = [f"Set {options.size}, K = 3 (`slerp`, `nearswap` 1, `nuslerp` 2).", ""]
    for part, table in ((METHODS, rows), (RANDOM, random_rows)):
        chosen = [m for m in options.methods if m in part]
        for line in table(models, chosen, options.dtypes) if chosen else ():
            print(line, flush=True)
            lines.append(line)
        lines.append("")
    lines.append(machine.line(machine.facts("mergekit", "torch")))
    print(lines[-1])
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
