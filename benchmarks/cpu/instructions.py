"""Instructions of each native loop in this tree against another checkout, as ratios.

    make bench-instructions BEFORE=path          builds both programs and runs this
    instructions.py BEFORE AFTER [--isas avx2 baseline] [--markdown FILE] [--most 1.01]

BEFORE and AFTER are programs built from counters.cpp. Where the CPU counts instructions for us they
are its own; elsewhere callgrind counts them (it knows no AVX-512). A row that counts nothing, or
more than ``--most`` times the instructions of before, is a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ISAS = ("avx512", "avx2", "baseline")
SHAPE = "4 x 4096"  # what counters.cpp takes by default; it fits the L2 cache


@dataclass(frozen=True)
class Count:
    """Instructions of one call, by instruction set and row of counters.cpp."""

    isa: str
    work: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


def cpu_counts(program: Path, isa: str) -> dict[str, float] | None:
    """Instructions per 8 elements and expert by row; None where this CPU cannot run ``isa``."""
    done = _run([str(program), "4", "8"], isa)
    if done.returncode:
        return None
    rows = re.findall(r"^\| (.+?) \| (\d+) \| [\d.]+ \| ([\d.]+) \|", done.stdout, re.M)
    return {f"{work}, K = {k}": float(count) for work, k, count in rows}


def callgrind_counts(program: Path, isa: str) -> dict[str, float]:
    """The same, of whole calls, by callgrind: the least of two calls of each row."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--quiet"]
        command += [f"--callgrind-out-file={folder}/out", str(program), "4", "2"]
        done = _run(command, isa)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        counts: dict[str, float] = {}
        for path in sorted(Path(folder).glob("out.*"), key=lambda p: int(p.suffix[1:])):
            text = path.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.M)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            if name and total:
                counts[name[1]] = min(counts.get(name[1], int(total[1])), int(total[1]))
    return counts


def _run(command: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MAGIC_FAST_CPU_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compared(before: Path, after: Path, isas: list[str] | None) -> tuple[str, list[Count]]:
    """Who counted, and every row of both programs on ``isas`` (None: AVX-512 and AVX2, as far as
    they run)."""
    by_cpu = any((cpu_counts(after, "baseline") or {}).values())
    isas = isas or (["avx512", "avx2"] if by_cpu else ["avx2"])
    if not by_cpu and shutil.which("valgrind") is None:
        raise SystemExit("instructions: neither this CPU's counters nor valgrind can be used here.")
    found = []
    for isa in isas:
        pair = [cpu_counts(p, isa) if by_cpu else callgrind_counts(p, isa) for p in (before, after)]
        if pair[0] is None or pair[1] is None:
            print(f"{isa}: this CPU does not run it.", file=sys.stderr)
            continue
        if pair[0].keys() != pair[1].keys() or not pair[0]:
            raise SystemExit(f"instructions: {isa}: the two programs have other rows, or none.")
        found += [Count(isa, work, count, pair[1][work]) for work, count in pair[0].items()]
    return ("the CPU's counters" if by_cpu else "callgrind"), found


def table(counts: list[Count]) -> list[str]:
    isas = sorted({c.isa for c in counts}, key=ISAS.index)
    by_work: dict[str, dict[str, Count]] = {}
    for c in counts:
        by_work.setdefault(c.work, {})[c.isa] = c
    lines = ["| work | " + " | ".join(f"{i}: before | after | ratio" for i in isas) + " |"]
    lines.append("|---" + "|--:" * 3 * len(isas) + "|")
    for work in by_work:
        row = by_work[work]
        cells = [f"{row[i].before:,} | {row[i].after:,} | {row[i].ratio:.4f}" for i in isas]
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--isas", nargs="+", choices=ISAS, metavar="ISA")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--most", type=float, default=1.01, metavar="RATIO")
    options = parser.parse_args()
    counter, counts = compared(options.before.resolve(), options.after.resolve(), options.isas)
    if not counts:
        raise SystemExit("instructions: none of the instruction sets runs here.")
    if empty := [f"{c.isa}: {c.work}" for c in counts if not (c.before and c.after)]:
        raise SystemExit("instructions: nothing was counted for " + "; ".join(empty))
    ratios = [c.ratio for c in counts]
    lines = [
        "# Instructions of the native loops, before and after",
        "",
        f"`make bench-instructions BEFORE=path`: counted by {counter}, one thread, bf16, {SHAPE}. "
        f"Ratios lie between {min(ratios):.4f} and {max(ratios):.4f}.",
        "",
        *table(counts),
    ]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    if more := [f"{c.isa}: {c.work} ({c.ratio:.4f})" for c in counts if c.ratio > options.most]:
        raise SystemExit(f"instructions: more than {options.most} of before in " + "; ".join(more))


if __name__ == "__main__":
    sys.exit(main())
