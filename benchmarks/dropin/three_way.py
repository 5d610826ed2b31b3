"""One YAML three ways: mergekit's own methods, mergekit with ours inside, and our own engine.

    python benchmarks/dropin/three_way.py --make .bench [--size tiny small] [--methods ties …]
        [--markdown FILE]

What differs by more than rounding is counted, element by element, and every count is attributed, in
this order:

* *at ties*: some expert's |task vector| equals its threshold in the dtype that mergekit computes in
  (the configuration's ``dtype``): which of the equals stay is anyone's choice;
* *votes near zero*: the weighted sum that elects the sign is within rounding of zero;
* *its rounding*: mergekit is further than that from mergekit in higher precision (float32; where
  norms or angles count, float64), and we are not;
* *else*: unexplained. differences.py says what rounding may come to.

Left out: `passthrough`, a copy; and `arcee_fusion`, whose choice cannot be compared element by
element. Its importance is a divergence of rows that hardly differ (5e-8 here), which float32 leaves
as noise: the median error is 3.8 times the value, of both.

Random methods are compared by the share of elements that moved and by the size of the change. Needs
mergekit 0.1.5 in the same environment.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import machine  # noqa: E402 - benchmarks/machine.py
from differences import compare, moved  # noqa: E402
from yaml_cases import METHODS, NORMS, RANDOM, configuration  # noqa: E402

WAYS = ("mergekit", "inside", "engine")


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


def results(models: Sequence[Path], method: str, dtype: str, folder: Path) -> dict[str, Path]:
    document = configuration(models, method, dtype)
    (folder / f"{method}-{dtype}.yml").write_text(yaml.safe_dump(document))
    return {way: merge(document, way, folder / f"{method}-{dtype}-{way}") for way in WAYS}


def in_double(models: Sequence[Path], method: str, folder: Path) -> Path:
    """mergekit's own result in float64."""
    document = configuration(models, method, "float64")
    return merge(document, "mergekit", folder / f"{method}-float64")


def rows(models: Sequence[Path], methods: Sequence[str], dtypes: Sequence[str]) -> Iterator[str]:
    """The table of the deterministic methods."""
    yield (
        "| method | dtype | against mergekit | elements | differ | at ties | votes near zero | "
        "its rounding | else |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            exact = in_double(models, method, Path(folder)) if method in NORMS else None
            for dtype in dtypes:
                made = results(models, method, dtype, Path(folder))
                for way, c in compare(models, made, method, dtype, exact).items():
                    yield (
                        f"| `{method}` | {dtype} | {way} | {c.elements} | {c.differ} | {c.ties} of "
                        f"{c.all_ties} | {c.votes} of {c.all_votes} | {c.rounding} | {c.other} |"
                    )
                exact = exact or (made["mergekit"] if dtype == "float32" else None)


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
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["tiny"])
    parser.add_argument("--methods", nargs="*", default=[*METHODS, *RANDOM])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines: list[str] = []
    for size in options.size:
        models = write_checkpoints(options.make / size, SIZES[size], num_experts=3)
        lines += [f"Set {size}, K = 3 (`slerp`, `nearswap` 1, `nuslerp` 2).", ""]
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
