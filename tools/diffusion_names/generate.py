"""Writes the names of diffusion models (magic_fast/models/diffusion/names.json): diffusers' own
converters are run on tensors of tagged rows, so that names, ranges of rows and permutations come
out. No weights, no network.

    make diffusion-names

What a converter is fed, `originals.py` says; that it is right shows in what comes out: every
parameter of diffusers' model once, and every row of every original tensor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import originals  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAMES = ROOT / "magic_fast" / "models" / "diffusion" / "names.json"

#: Canonical name, original name, and what is canonical of the original's rows: "", "T" for its
#: transpose, or [parts, [start, stop], …] of as many equal parts.
Pair = tuple[str, str, Any]


def tagged(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors whose values say which one they are of, and where they stand."""
    return {
        name: (i << 40) + torch.arange(math.prod(shape)).reshape(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def pairs(shapes: Mapping[str, tuple[int, ...]], converted: Mapping[str, Tensor]) -> list[Pair]:
    """Where each converted tensor comes from."""
    names, used = list(shapes), dict.fromkeys(shapes, 0)
    found: list[Pair] = []
    for name, tags in converted.items():
        ids = (tags >> 40).unique().tolist()
        assert len(ids) == 1, f"{name} is of several tensors"
        original = names[ids[0]]
        used[original] += tags.numel()
        shape = shapes[original]
        places = (tags & (1 << 40) - 1).reshape(tags.shape[0], -1)
        found.append((name, original, rows_of(places, shape)))
    assert used == {n: math.prod(shape) for n, shape in shapes.items()}, "left or used twice"
    return found


def rows_of(places: Tensor, shape: tuple[int, ...]) -> Any:
    """What places in the original are, as a `Pair` says it."""
    whole = torch.arange(math.prod(shape)).reshape(shape[0], -1)
    if places.equal(whole):
        return ""
    if places.equal(whole.T):
        return "T"
    rows = places[:, 0] // whole.shape[1]
    assert places.equal(whole[rows]), "no rows"
    cuts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    runs = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in itertools.pairwise(cuts)]
    unit = math.gcd(shape[0], *(n for run in runs for n in run))
    return [shape[0] // unit, *([a // unit, b // unit] for a, b in runs)]


def folded(found: list[Pair]) -> dict[str, Any]:
    """Patterns over numbers; where the leading ones differ between the two, a table has them."""
    groups: dict[tuple[str, str, str], list[tuple[list[str], list[str]]]] = {}
    for canonical, original, rows in dict.fromkeys(_leafless(found)):
        (c, cs), (o, os_) = starred(canonical), starred(original)
        groups.setdefault((c, o, rows), []).append((cs, os_))
    tables: list[dict[str, str]] = []
    names = []
    for (c, o, rows), numbers in groups.items():
        pattern, ours = literal(c, [n for n, _ in numbers])
        other, theirs = literal(o, [n for _, n in numbers])
        tail = _common_tail(ours, theirs)
        head = {
            " ".join(a[: len(a) - tail]): " ".join(b[: len(b) - tail])
            for a, b in zip(ours, theirs, strict=True)
        }
        record: list[Any] = [pattern, other, -1, json.loads(rows)]
        if head != {"": ""}:
            if head not in tables:
                tables.append(head)
            record[2] = tables.index(head)
        while record[-1] in ("", -1):
            record.pop()
        names.append(record[:1] if record == [pattern, pattern] else record)
    return {"tables": tables, "names": names}


def _leafless(found: list[Pair]) -> Iterator[tuple[str, str, str]]:
    """Weights and biases that go the same way are one: ``module.@``."""
    for canonical, original, rows in found:
        (stem, _, leaf), (other, _, last) = canonical.rpartition("."), original.rpartition(".")
        if leaf == last and leaf in ("weight", "bias"):
            canonical, original = f"{stem}.@", f"{other}.@"
        yield canonical, original, json.dumps(rows)


def starred(name: str) -> tuple[str, list[str]]:
    parts = name.split(".")
    return ".".join("*" if p.isdigit() else p for p in parts), [p for p in parts if p.isdigit()]


def literal(pattern: str, numbers: list[list[str]]) -> tuple[str, list[list[str]]]:
    """With the numbers that are always the same in place of their stars."""
    always = [len(set(column)) == 1 for column in zip(*numbers, strict=True)]
    first = iter(zip(always, numbers[0], strict=True))

    def put(star: re.Match[str]) -> str:
        same, number = next(first)
        return number if same else star[0]

    kept = [[n for n, same in zip(row, always, strict=True) if not same] for row in numbers]
    return re.sub(r"\*", put, pattern), kept


def _common_tail(ours: list[list[str]], theirs: list[list[str]]) -> int:
    """How many of the last numbers are the same in both."""
    columns = zip(
        reversed([*zip(*ours, strict=True)]), reversed([*zip(*theirs, strict=True)]), strict=False
    )
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], columns)])


def part(name: str) -> dict[str, Any]:
    """One map, from every model that has these names."""
    found: list[Pair] = []
    for model in originals.PARTS[name]():
        converted = model.convert(tagged(model.shapes))
        rows = {n: t.shape[0] for n, t in converted.items()}
        assert rows == model.rows, f"{name} is another model"
        found += [
            (ours, theirs.removeprefix(model.prefix), rows)
            for ours, theirs, rows in pairs(model.shapes, converted)
        ]
    return folded(found)


def generated(names: list[str] | None = None) -> dict[str, Any]:
    """What the file holds."""
    return {
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "maps": {name: part(name) for name in names or originals.PARTS},
    }


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=NAMES)
    output = parser.parse_args().output
    found = generated()
    lines = [f'"{key}": {json.dumps(found[key])}' for key in ("diffusers", "transformers")]
    maps = (f"{json.dumps(n)}: {_compact(one)}" for n, one in found["maps"].items())
    lines.append('"maps": {\n' + ",\n".join(maps) + "\n}")
    output.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(found['maps'])} maps, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
