"""What nvcc made of every CUDA kernel, without a GPU: registers, stack, shared memory, and the
widest accesses to global memory.

    python benchmarks/gpu/registers.py [--markdown FILE]

Reads the built extension with cuobjdump: the one on the PATH, or the one that Triton ships.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}


@dataclass(frozen=True)
class Kernel:
    """``load`` and ``store``: bytes of the widest global access; ``local``: accesses to local
    memory; ``lines`` of machine code."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    load: int
    store: int
    local: int
    lines: int


def cuobjdump() -> str | None:
    """Path of the program, or None."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        from triton.backends import nvidia
    except ImportError:
        return None
    path = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def extension() -> str | None:
    """Path of the built kernels, or None; they are not loaded."""
    import importlib.util

    spec = importlib.util.find_spec("magic_fast._cuda")
    return None if spec is None else spec.origin


def kernels(program: str, path: str) -> list[Kernel]:
    """Every kernel of every architecture with machine code in ``path``."""
    text = _run(program, "--dump-resource-usage", path)
    code = _run(program, "--dump-sass", path)
    sass = {(arch, name): lines for arch, name, lines in _functions(code)}
    found = []
    for part in re.split(r"^Fatbin elf code:", text, flags=re.M)[1:]:
        arch = re.search(r"arch = (sm_\d+)", part)
        for match in re.finditer(r"Function (\S+):\n\s+(.*)", part):
            use = dict(re.findall(r"(\w+):(\d+)", match[2]))
            assert arch is not None
            lines = sass.get((arch[1], match[1]), [])
            found.append(
                Kernel(
                    arch[1],
                    _readable(match[1]),
                    int(use["REG"]),
                    int(use["STACK"]),
                    int(use["SHARED"]),
                    _widest(lines, r"\bLDG\S*"),
                    _widest(lines, r"\bSTG\S*"),
                    sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in lines),
                    len(lines),
                )
            )
    return sorted(found, key=lambda k: (k.arch, k.name))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _functions(code: str) -> list[tuple[str, str, list[str]]]:
    found, arch = [], ""
    name, lines = "", []
    for line in code.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name, lines = match[1], []
            found.append((arch, name, lines))
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    return found


def _widest(lines: list[str], pattern: str) -> int:
    widest = 0
    for line in lines:
        if match := re.search(pattern, line):
            words = match[0].split(".")
            widest = max(widest, next((_WIDTHS[w] for w in words if w in _WIDTHS), 4))
    return widest


def _readable(symbol: str) -> str:
    """``merge_fast<8, trims>`` of a mangled name: what this namespace contains needs no more."""
    arguments = r"(?:I(?:Li(\d+)E)?(?:Lb([01])E)?E)?"
    match = re.search(r"(\d+)([a-z_]+)" + arguments, symbol.split("cuda", 1)[1])
    assert match is not None, symbol
    name, number, flag = match[2][: int(match[1])], match[3], match[4]
    if number and flag:
        return f"{name}<{number}, {'trims' if flag == '1' else 'plain'}>"
    if number:  # what a search compares
        return f"{name}<{('magnitude', 'variance', 'score')[int(number)]}>"
    if flag:  # d of a row
        return f"{name}<{'stored' if flag == '1' else 'formed again'}>"
    return name


def table(found: list[Kernel]) -> list[str]:
    lines = [
        "| architecture | kernel | registers | stack | shared | widest load | widest store | "
        "local accesses | instructions |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {k.arch} | `{k.name}` | {k.registers} | {k.stack} | {k.shared} | {k.load} | "
        f"{k.store} | {k.local} | {k.lines} |"
        for k in found
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    program, path = cuobjdump(), extension()
    if program is None or path is None:
        what = "cuobjdump" if program is None else "magic_fast._cuda"
        raise SystemExit(f"{what}: expected it here, found none.")
    from magic_fast import _cuda

    lines = [*table(kernels(program, path)), "", f"Built for {_cuda.build()}."]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
