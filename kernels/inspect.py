"""What the compiler makes of every kernel, without a GPU: registers, spills, shared memory, width
of the accesses.

    python -m magic_fast.kernels.inspect [--arch 80 90] [--experts 1 3 8] [--dtype bf16] [--json]

Triton ships its own ptxas and cuobjdump, so this runs anywhere it installs (not under
TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import cut, launch, merge, norms, ranked, rows, select, sums, table, words


def _rule(**fields: Any) -> words.Rule:
    """RULE from words and flags."""
    return words.Rule(**{name: getattr(x, "value", x) for name, x in fields.items()})


_PLAIN = _rule(contributors=words.EVERYBODY)
_MASS_MEAN = {"vote": words.MASS, "reduce": words.WEIGHTED_MEAN, "weighted": 1}
#: Trim of every expert, and RULE. TIES, SCE: mass, weighted mean; DARE: ÷ density, mass, sum.
_RECIPES = {
    "sum": (words.KEEP_ALL, _PLAIN),
    "ties": (words.ABOVE, _rule(**_MASS_MEAN, scaled=1)),
    "dare_ties": (words.RANDOM, _rule(vote=words.MASS, factored=1, weighted=1)),
    "sce": (words.VARIED, _rule(**_MASS_MEAN, unweighted=1)),
    "ramplus_tl": (words.ABOVE, _rule(contributors=words.NONZERO, reduce=words.MEAN, singled=1)),
    "pcb": (
        words.KEEP_ALL,
        _rule(contributors=words.EVERYBODY, reduce=words.WEIGHTED_MEAN, scaled=1, scored=1),
    ),
}
_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_DTYPES = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}
#: columns of the row that the fused kernel is compiled for
COLS = 8192


@dataclass(frozen=True)
class Case:
    """One kernel as it would be launched. ``types``: what is not a number or a constexpr."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constexprs: dict[str, Any]
    warps: int
    experts: int


@dataclass(frozen=True)
class Report:
    """Registers a thread, bytes of stack (spills) and of shared memory; widest global load and
    store in bytes; lines of SASS."""

    kernel: str
    experts: int
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    load_bytes: int
    store_bytes: int
    instructions: int


def cases(k: int, dtype: str) -> Iterator[Case]:
    """Every kernel for K = ``k`` and inputs and output of ``dtype``."""
    p, size = f"*{dtype}", _SIZES[dtype]
    shape = launch.block_shape(k, size)
    many, masks = (p,) * k, ("*u8",) * k
    lanes = {"LANES": shape.lanes, "VEC": shape.vec}
    notes = {"integers": "*i64", "numbers": "*fp32", "counts": "*i32", "report": "*i64"}
    common = {
        "base": p, "experts": many, "merged": p, "out": p, "masks": masks, "task_masks": masks,
        **notes,
    }  # fmt: skip
    plain = {"K": k, "HAS_BASE": True, "ALIGNED": True, **lanes}
    recipes = {
        word: {"KINDS": (kind.value,) * k, "RULE": rule, "WORDS": (k + 1) // 2 if kind.value else 0}
        for word, (kind, rule) in _RECIPES.items()
    }
    for word, recipe in recipes.items():
        block = launch.block_shape(k, size, word != "sum")
        yield Case(
            f"merge_blocks {word}", merge.merge_blocks, {**common, "factors": "*fp32"},
            {**plain, **recipe, "FACTORS": False, "KEEPS": False, "VEC": block.vec}, block.warps, k,
        )  # fmt: skip
        of_row = launch.row_shape(k, size, COLS, word != "sum", word == "pcb")
        if of_row is None:
            continue
        kernel = rows.merge_rows if of_row.kept else rows.merge_rows_scratch
        depth = (
            {"CHUNKS": of_row.chunks} if of_row.kept else {"STAGES": launch.stages(word != "sum")}
        )
        fused = {
            **plain, **depth, "LANES": of_row.lanes, "VEC": of_row.vec,
            "SUMS": (k + 1) * (k + 2) // 2,
            "CHOSEN": tuple(range(k)), "VARIANT": words.MANIFOLD.value,
            "EPS_MODE": words.EPS_RELATIVE.value, "GUARDS": True,
            "CLAMPS": True, "POWER": False, "DIRECTION": words.FREE.value, "KEEPS": False,
        }  # fmt: skip
        more = {
            "policy": "*fp64",
            "coefficients": "*fp32",
            "repairs": "*u8",
            "norms2": "*fp64",
            "scratch": "*fp32",
        }
        yield Case(
            f"{kernel.fn.__name__} {word}", kernel, {**common, **more}, {**fused, **recipe},
            of_row.warps, k,
        )  # fmt: skip
    partials = {"partial": "*fp64", "powers": "*fp64"}
    for word, wide in (("", False), (" wide", True)):
        yield Case(
            f"sum_rows{word}", sums.sum_rows, {**common, **partials},
            {**plain, **recipes["sum"], "GRAM": True, "P": -1, "WIDE": wide}, shape.warps, k,
        )  # fmt: skip
    side = min(k, launch.GRAM_TILE)
    yield Case(
        "sum_gram_tile", sums.sum_gram_tile,
        {"base": p, "left": (p,) * side, "right": (p,) * side, "partial": "*fp64"},
        {"A": side, "B": side, "HAS_BASE": True, "WIDE": False, **lanes}, shape.warps, k,
    )  # fmt: skip
    yield Case(
        "scale_blocks", merge.scale_blocks, {"base": p, "merged": p, "out": p, "factors": "*fp32"},
        {"HAS_BASE": True, **lanes}, shape.warps, k,
    )  # fmt: skip
    yield Case(
        "merge_table sum", table.merge_table,
        {"table": "*i64", "block_job": "*i64", "block_start": "*i64", **notes},
        {**plain, **recipes["sum"], "DTYPES": (_DTYPES[dtype],) * (k + 2), "WIDE": True},
        shape.warps, k,
    )  # fmt: skip
    yield from _selecting(k, dtype, shape)
    yield Case(
        "norm_sums", norms.norm_sums, {**common, "partial": "*fp64"},
        {**plain, **recipes["ties"], "RULE": _PLAIN, "P": 1}, shape.warps, k,
    )  # fmt: skip
    yield Case(
        "held_counts", norms.held_counts, {**common, "partial": "*i32"},
        {**plain, **recipes["ramplus_tl"]}, shape.warps, k,
    )  # fmt: skip
    yield Case(
        "vote_sums", norms.vote_sums, {**common, "partial": "*i32"},
        {**plain, **recipes["ties"]}, shape.warps, k,
    )  # fmt: skip
    yield Case(
        "magnitudes", ranked.magnitudes, {"base": p, "expert": p, "bits": "*i32"},
        {"HAS_BASE": True, **lanes}, 4, k,
    )  # fmt: skip
    yield Case(
        "keep_ranked", ranked.keep_ranked,
        {"order": "*i64", "mask": "*u8", "integers": "*i64", "chances": "*fp64"},
        {"K": k, "BLOCK": 1024}, 4, k,
    )  # fmt: skip


def _selecting(k: int, dtype: str, shape: launch.Shape) -> Iterator[Case]:
    p = f"*{dtype}"
    types = {
        "base": p, "experts": (p,) * k, "sample": "*i32", "sorted_sample": "*i32", "places": "*i64",
        "state": "*i64", "heavy": "*i32", "owners": "*i64", "bins": "*i32", "above": "*i64",
        "equals": "*i32", "counts": "*i64", "integers": "*i64",
    }  # fmt: skip
    keyed = {"K": k, "HAS_BASE": True, "KEY": words.BY_MAGNITUDE.value}
    targets = {**keyed, "TARGETS": k, "OWNERS": tuple(range(k))}
    lanes = {"LANES": shape.lanes, "VEC": shape.vec}
    rules = {"RULES": (words.EXACT.value,) * k}
    varied = {**targets, "TARGETS": 1, "OWNERS": (0,), "KEY": words.BY_VARIANCE.value}
    scored = {**targets, "TARGETS": 2 * k, "OWNERS": tuple(i // 2 for i in range(2 * k))}
    scored["KEY"] = words.BY_SCORE.value
    fewer = {**lanes, "VEC": launch.vector(2 * k, _SIZES[dtype]), "LOG_BINS": 16}
    for name, kernel, constexprs, warps in (
        ("sample_keys", select.sample_keys, {**keyed, "WIDTH_OF": k, "RUNS": 64, "RUN": 16}, 4),
        ("open_brackets", select.open_brackets, {"TARGETS": k, "LOG_BINS": 16}, 4),
        ("scan", select.scan, {**targets, "LOG_BINS": 16, **lanes}, shape.warps),
        ("scan variance", select.scan, {**varied, **fewer}, shape.warps),
        ("scan score", select.scan, {**scored, **fewer}, shape.warps),
        ("locate", select.locate, {"TARGETS": k, "LOG_BINS": 16, "BLOCK": 4096}, 8),
        ("count_equals", cut.count_equals, {**targets, **rules, **lanes}, shape.warps),
        ("find_cuts", cut.find_cuts,
         {**targets, **rules, "TOPS": (0,) * k, "BLOCK": 1024}, shape.warps),
    ):  # fmt: skip
        yield Case(name, kernel, types, constexprs, warps, k)


def compiled(case: Case, arch: int) -> Any:
    """Compiles one case for ``arch``; pointers and sizes are taken as multiples of 16."""
    names = case.kernel.arg_names
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
        elif name in case.types:
            signature[name] = case.types[name]
            inner = range(len(case.types[name])) if isinstance(case.types[name], tuple) else None
            paths = [(i,)] if inner is None else [(i, j) for j in inner]
            attrs.update({path: [["tt.divisibility", 16]] for path in paths})
        else:
            signature[name] = "i32"
            attrs[(i,)] = [["tt.divisibility", 16]]
    known_words = {n: v for n, v in case.constexprs.items() if n in names}
    places = {(names.index(name),): value for name, value in known_words.items()}
    source = ASTSource(case.kernel, signature, places, attrs)
    options = {"num_warps": case.warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _widest(ptx: str, word: str) -> int:
    """Bytes of the widest ``ld.global`` or ``st.global``."""
    found = [0]
    for vector, bits in re.findall(rf"{word}\.global\S*?(?:\.v(\d))?\.b(\d+) ", ptx):
        found.append(int(vector or 1) * int(bits) // 8)
    return max(found)


def inspect(case: Case, arch: int) -> Report:
    """Compiles and measures one case."""
    kernel = compiled(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(*flags: str) -> str:
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            command = [str(tool), *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack = (int(re.search(rf"{w}:(\d+)", usage)[1]) for w in ("REG", "STACK"))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", sass, re.M)
    ptx = kernel.asm["ptx"]
    return Report(
        case.name, case.experts, arch, case.warps, registers, stack, kernel.metadata.shared,
        _widest(ptx, "ld"), _widest(ptx, "st"), len(lines),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--dtype", choices=sorted(_SIZES), default="bf16")
    parser.add_argument("--kernel", default="", help="only names that start with this")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    reports = [
        inspect(case, arch)
        for arch in args.arch
        for k in args.experts
        for case in cases(k, args.dtype)
        if case.name.startswith(args.kernel)
    ]
    if args.json:
        json.dump([asdict(r) for r in reports], sys.stdout, indent=1)
        return 0
    columns = list(asdict(reports[0]))
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for r in reports:
        print("| " + " | ".join(str(x) for x in asdict(r).values()) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
