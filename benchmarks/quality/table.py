"""The tables: markdown of what the records hold, and the same figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality import collect, sections
from quality.arms import MERGES
from quality.collect import METRICS, Record
from quality.results import HOW, Results, columns_of

INTRODUCTION = (
    "What is measured, and how: [PROTOCOL.md](../quality/PROTOCOL.md). Written by "
    "`make quality-full`.",
    "Scores (accuracy, or exact match) are means over the kept tasks of the test part, then mean ± "
    "standard deviation over seeds.",
    "Differences are paired by seed × task, with 95 % bootstrap intervals; bold: the interval "
    "leaves out 0.",
)


def write(records: Sequence[Record], *, markdown: Path | None, summary: Path | None) -> None:
    """Prints the tables; writes them and a summary as JSON where asked."""
    results = Results(records)
    text = "\n".join(lines_of(results)) + "\n"
    if markdown is None:
        print(text)
    else:
        markdown.write_text(text)
    if summary is not None:
        summary.write_text(as_json(summary_of(results)))


def lines_of(results: Results) -> Iterator[str]:
    yield "# Does calibration help? Results"
    yield ""
    yield from INTRODUCTION
    yield ""
    yield from sections.run_lines(results)
    yield from sections.overview(results)
    for how in HOW:
        yield from sections.headline(results, how)
    yield from sections.controls(results)
    yield from sections.deviation_lines(results)
    yield from sections.spread_lines(results)
    yield from sections.edge_lines(results)
    yield from sections.default_lines(results)
    for scenario in results.scenarios:
        yield from sections.scenario_lines(results, scenario)


def rounded(value: Any) -> Any:
    """Every float in it to four places, small ones to three digits."""
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 1e-2 else float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


def as_json(found: dict[str, Any]) -> str:
    """JSON with an arm a line."""
    blocks = []
    for scenario, facts in found.items():
        facts = rounded(facts)
        arms = ",\n".join("   " + json.dumps(arm, ensure_ascii=False) for arm in facts.pop("arms"))
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in facts.items()]
        lines.append(f'  "arms": [\n{arms}\n  ]')
        blocks.append(f" {json.dumps(scenario)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def summary_of(results: Results) -> dict[str, Any]:
    """The figures of the tables, for programs."""
    found: dict[str, Any] = {}
    for scenario in results.scenarios:
        of = results.of(scenario)
        arms: list[dict[str, Any]] = []
        for merge in MERGES:
            for calibration in (*columns_of(scenario),):
                row: dict[str, Any] = {"merge": merge, "calibration": calibration}
                for how in HOW:
                    none = results.cells(scenario, merge, "none", how)
                    for number, metric in enumerate(METRICS):
                        own = results.cells(scenario, merge, calibration, how, number)
                        row[f"{metric}, {how}"] = collect.over_seeds(own)
                    d = results.versus(results.cells(scenario, merge, calibration, how), none)
                    row[f"difference, {how}"] = None if d is None else asdict(d)
                arms.append(row)
        found[scenario] = {
            "seeds": [r["seed"] for r in of],
            "kept": {r["seed"]: dict(zip(r["tasks"], r["kept"], strict=True)) for r in of},
            "cosine": [r["cosine"] for r in of],
            "element_std": [r["element_std"] for r in of],
            "base": collect.over_seeds(collect.bound(of, "base")),
            "experts": collect.over_seeds(collect.bound(of, "experts")),
            "arms": arms,
        }
    return found
