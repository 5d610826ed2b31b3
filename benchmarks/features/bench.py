"""Memory of feature space calibration: one layer at a time against all models at once.

    python benchmarks/features/bench.py --make .bench [--size 1b] [--markdown FILE]

Each way is a process of its own; its peak is the largest resident set that the system saw.
``all models`` loads base, merged and experts by transformers, in their own bfloat16, and runs
``mf.calibrate_features``; ``layer by layer`` is ``mf.calibrate_checkpoints(space="feature")``,
which also writes the result. Their factors are compared: bfloat16 activations in one, float32 in
the other. ``weights alone`` is what the tensors of all models take: no way that holds them needs
less. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import machine

from magic_fast.cli.demo_data import SIZES, LlamaShape, write_checkpoints

SIZES_HERE = SIZES | {"1b": LlamaShape(2048, 22, 5632, 32000, 32, 4, 10**9)}
EXPERTS = 3


def batches(samples: int, length: int, vocab: int) -> dict[str, list[object]]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return {
        f"expert-{k}": [
            {"input_ids": torch.randint(0, vocab, (samples, length), generator=draw)}
        ]
        for k in range(EXPERTS)
    }  # fmt: skip


def layer_by_layer(folder: Path, data: dict[str, list[object]]) -> list[dict[str, object]]:
    import magic_fast as mf

    out = folder / "features-out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        return mf.calibrate_checkpoints(
            folder / "base", [folder / t for t in data], folder / "merged", out,
            space="feature", data=data,
        ).layers  # fmt: skip
    finally:
        shutil.rmtree(out, ignore_errors=True)


def all_models(folder: Path, data: dict[str, list[object]]) -> list[dict[str, object]]:
    from transformers import AutoModelForCausalLM

    import magic_fast as mf

    base, merged, *experts = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype="auto")
        for name in ("base", "merged", *data)
    )
    _, report = mf.calibrate_features(base, experts, merged, data)
    return [layer.as_dict() for layer in report.layers]


def imports_alone(folder: Path, data: dict[str, list[object]]) -> list[dict[str, object]]:
    from transformers import LlamaForCausalLM  # noqa: F401

    import magic_fast as mf

    assert mf.calibrate_features
    return []


WAYS = {
    "libraries alone": imports_alone,
    "layer by layer": layer_by_layer,
    "all models": all_models,
}


def measure(way: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One way in a process of its own."""
    command = [
        sys.executable, __file__, "--way", way, "--make", str(folder.parent), "--size",
        options.size, "--samples", str(options.samples), "--length", str(options.length),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(options: argparse.Namespace, folder: Path) -> None:
    data = batches(options.samples, options.length, SIZES_HERE[options.size].vocab)
    started = time.perf_counter()
    layers = WAYS[options.way](folder, data)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "applied": {x["name"]: x["applied"] for x in layers},
            }
        )
    )


def make(folder: Path, size: str) -> None:
    """base, experts and their average."""
    import magic_fast as mf

    write_checkpoints(folder, SIZES_HERE[size], num_experts=EXPERTS)
    if not (folder / "merged").exists():
        experts = [{"model": str(folder / f"expert-{k}")} for k in range(EXPERTS)]
        config = {
            "merge_method": "average", "base_model": str(folder / "base"), "models": experts,
        }  # fmt: skip
        mf.merge_checkpoints(config, folder / "merged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, required=True, metavar="DIR", help="make models there")
    parser.add_argument("--size", default="small", choices=list(SIZES_HERE))
    parser.add_argument("--samples", type=int, default=4, help="of each task")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sample")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.make / options.size
    if options.way:
        child(options, folder)
        return
    make(folder, options.size)
    facts = machine.facts("torch", "transformers")
    found = {way: measure(way, options, folder) for way in WAYS}
    shape = SIZES_HERE[options.size]
    weights = 2 * shape.parameters * (EXPERTS + 2)
    lines = [
        machine.line(facts),
        "",
        f"{shape.parameters / 1e6:.0f} M parameters in bfloat16, base, merged and {EXPERTS} "
        f"experts; {EXPERTS} tasks of {options.samples} samples of {options.length} tokens. "
        f"Weights alone: {weights / 2**20:.0f} MiB.",
        "",
        "| way | peak memory | of the weights alone | seconds |",
        "|---|---|---|---|",
    ]
    for way, row in found.items():
        peak = float(str(row["peak"]))
        seconds = f"{float(str(row['seconds'])):.1f}" if row["applied"] else "–"
        lines.append(f"| {way} | {peak / 2**20:.0f} MiB | {peak / weights:.1%} | {seconds} |")
    one, two = (found[w]["applied"] for w in ("layer by layer", "all models"))
    assert isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys()
    error = max(abs(one[n] / two[n] - 1) for n in one)
    ratio = float(str(found["layer by layer"]["peak"])) / float(str(found["all models"]["peak"]))
    lines += [
        "",
        f"Layer by layer takes {ratio:.1%} of the memory of all models at once. Largest difference "
        f"of a factor: {error:.1e} (bfloat16 activations against float32).",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text("# Calibration in feature space: memory\n\n" + text)


if __name__ == "__main__":
    main()
