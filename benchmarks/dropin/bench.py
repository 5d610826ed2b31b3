"""The same YAML by mergekit, by mergekit with our methods inside, and by our engine: wall time.

    python benchmarks/dropin/bench.py --make .bench [--size small] [--rounds 1] [--markdown FILE]

TIES, K = 3, the same flags, start-up and files included, each a process of its own, interleaved.
The aims: `magic-fast mergekit-yaml` at least 3.5 times as fast as mergekit-yaml (loading, planning
and writing remain mergekit's), `magic-fast merge` at least 30 times. Needs mergekit 0.1.5 in the
same environment. A pass over the files comes before, so that all three find them in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import machine  # noqa: E402 - benchmarks/machine.py

#: way → (module and words before CONFIG OUT, what the line in the table says, the aim)
WAYS = {
    "mergekit": (["mergekit.scripts.run_yaml"], "mergekit-yaml CONFIG OUT", None),
    "inside": (["magic_fast", "mergekit-yaml"], "magic-fast mergekit-yaml CONFIG OUT", 3.5),
    "engine": (["magic_fast", "merge"], "magic-fast merge CONFIG OUT", 30.0),
}
# compiled modules, as whatever is installed has them, and no look at a network
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1"}


def configuration(models: list[Path], folder: Path) -> Path:
    base, *experts = map(str, models)
    document = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": e, "parameters": {"weight": 0.5, "density": 0.2}} for e in experts],
        "dtype": "bfloat16",
    }
    path = folder / "ties.yml"
    path.write_text(yaml.safe_dump(document))
    return path


def seconds(way: str, config: Path, out: Path) -> float:
    command = [sys.executable, "-W", "ignore", "-m", *WAYS[way][0], str(config), str(out)]
    started = time.perf_counter()
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}")
    return time.perf_counter() - started


def table(found: dict[str, list[float]]) -> list[str]:
    lines = ["| command | seconds | times as fast as mergekit | aim |", "|---|---|---|---|"]
    stock = statistics.median(found["mergekit"])
    for way, times in found.items():
        median = statistics.median(times)
        _, words, aim = WAYS[way]
        ratio = f"{stock / median:.1f}" if aim else "1"
        lines.append(f"| `{words}` | {median:.2f} | {ratio} | {aim or ''} |")
    return lines


def main() -> None:
    from magic_fast.cli.demo_data import SIZES, write_checkpoints

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    models = write_checkpoints(options.make / options.size, SIZES[options.size], num_experts=3)
    for path in (file for model in models for file in model.glob("*.safetensors")):
        path.read_bytes()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, times in found.items():
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                config = configuration(models, Path(folder))
                times.append(seconds(way, config, Path(folder) / "out"))
    size = sum(f.stat().st_size for m in models for f in m.glob("*.safetensors"))
    lines = [
        f"TIES, K = 3, {options.size} preset ({size / 1e6:.0f} MB read), bfloat16, CPU; medians of "
        f"{options.rounds} interleaved run(s), `make bench-dropin`.",
        "",
        *table(found),
        "",
        machine.line(machine.facts("mergekit", "torch")),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
