"""The sections of the results, in markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean

from quality import collect
from quality.arms import CALIBRATIONS, DATA_OF, FEATURE, MERGES, SCALAR, TENSOR
from quality.collect import AS_IT_COMES, BEST, METRICS
from quality.defaults import PACKAGE, Setting, choose, compared
from quality.results import (
    COLUMNS,
    HOW,
    PACKAGE_CLAMP,
    Results,
    columns_of,
    plus_minus,
    signed,
    table,
)


def run_lines(results: Results) -> Iterator[str]:
    everything = results.records + results.development
    seconds = sum(r["cpu_seconds"] for r in everything)
    clock = sum(r["seconds"] for r in everything)
    yield (
        f"{len(everything)} runs (a scenario with a seed): {seconds / 60:.0f} minutes of one core, "
        f"{clock / 60:.0f} minutes by the clock of a shared machine, added up."
    )
    opened = [r["reloaded"] for r in everything if r["reloaded"] is not None]
    yield (
        f"Saved after DSC and opened by plain transformers, {sum(opened)} of {len(opened)} models "
        "gave the same scores to the last bit."
    )
    yield ""


def overview(results: Results) -> Iterator[str]:
    yield "## The scenarios"
    yield ""
    rows = []
    for scenario in results.scenarios:
        of = results.of(scenario)
        average = results.cells(scenario, "average", "none", AS_IT_COMES)
        experts = collect.bound(of, "experts")
        ratio = {k: average[k] / experts[k] for k in average}
        mean_ratio = collect.over_seeds(ratio)
        rows.append(
            [
                scenario,
                str(len(of)),
                f"{sum(sum(r['kept']) for r in of)} of {sum(len(r['kept']) for r in of)}",
                plus_minus(collect.over_seeds(collect.bound(of, "base"))),
                plus_minus(collect.over_seeds(average)),
                plus_minus(collect.over_seeds(experts)),
                "–" if mean_ratio is None else f"{100 * mean_ratio[0]:.0f} %",
                f"{fmean(r['cosine'] for r in of):.2f}",
                f"{fmean(r['element_std'] for r in of):.1e}",
            ]
        )
    yield from table(
        [
            "scenario",
            "seeds",
            "tasks kept",
            "base",
            "average",
            "experts",
            "recovery",
            "cosine",
            "element std",
        ],
        rows,
    )


def headline(results: Results, how: str) -> Iterator[str]:
    yield f"## Difference to no calibration, all merges together: {HOW[how]}"
    yield ""
    names = [c for c in COLUMNS if c != "none"]
    if how == BEST:
        names = [c for c in names if c != SCALAR]
    rows = []
    for scenario in results.scenarios:
        none = results.pooled(scenario, "none", how)
        rows.append(
            [scenario]
            + [signed(results.versus(results.pooled(scenario, c, how), none)) for c in names]
        )
    yield from table(["scenario", *names], rows)


def controls(results: Results) -> Iterator[str]:
    yield "## Rows, or a mere rescale? All merges together"
    yield ""
    pairs = [
        ("WSC manifold", AS_IT_COMES, "manifold permuted", AS_IT_COMES),
        ("WSC sphere", AS_IT_COMES, "sphere permuted", AS_IT_COMES),
        ("WSC sphere", AS_IT_COMES, TENSOR, AS_IT_COMES),
        ("WSC sphere", BEST, TENSOR, BEST),
        ("WSC manifold", BEST, "manifold permuted", BEST),
        ("WSC sphere", BEST, "none", BEST),
        ("FSC", AS_IT_COMES, SCALAR, AS_IT_COMES),
        ("FSC", AS_IT_COMES, "none", BEST),
        ("DSC", AS_IT_COMES, "FSC", AS_IT_COMES),
    ]
    rows = []
    for a, how_a, b, how_b in pairs:
        found = []
        for scenario in results.scenarios:
            first = results.pooled(scenario, a, how_a)
            found.append(signed(results.versus(first, results.pooled(scenario, b, how_b))))
        label = {AS_IT_COMES: "", BEST: " at its best λ"}
        rows.append([f"{a}{label[how_a]} − {_name(b, how_b)}{label[how_b]}", *found])
    yield from table(["difference", *results.scenarios], rows)


def _name(calibration: str, how: str) -> str:
    return "one scalar for the model" if calibration == "none" and how == BEST else calibration


def deviation_lines(results: Results) -> Iterator[str]:
    yield "## Deviation of feature magnitudes (held-out samples, p = 2)"
    yield ""
    yield (
        "|log₂| of merged ÷ expert, mean over layers and merges: 0 is an expert's magnitude, 1 is "
        "twice or half of it."
    )
    yield ""
    rows = []
    for scenario in results.scenarios:
        row = [scenario]
        for calibration in ("none", *CALIBRATIONS):
            values = [
                value[0]
                for merge in MERGES
                for value in collect.deviations(results.of(scenario), merge, calibration).values()
            ]
            row.append(f"{fmean(values):.2f}" if values else "–")
        rows.append(row)
    yield from table(["scenario", "none", *CALIBRATIONS], rows)
    for scenario in results.scenarios:
        yield f"### {scenario}: average, layer by layer"
        yield ""
        found = {
            c: collect.deviations(results.of(scenario), "average", c)
            for c in ("none", *CALIBRATIONS)
        }
        rows = [
            [
                f"`{layer}`",
                *(f"{found[c][layer][0]:.2f}" if layer in found[c] else "–" for c in found),
            ]
            for layer in found["none"]
        ]
        yield from table(["layer", *found], rows)


def spread_lines(results: Results) -> Iterator[str]:
    yield "## Spread within a seed (standard deviation of the mean score, as it comes)"
    yield ""
    rows = []
    for scenario in results.scenarios:
        masks = collect.within_seed_spread(results.of(scenario), "mask", "none", AS_IT_COMES)
        row = [scenario, "–" if masks is None else f"{masks:.4f}"]
        for calibration in FEATURE:
            value = collect.within_seed_spread(
                results.of(scenario), "draw", calibration, AS_IT_COMES
            )
            row.append("–" if value is None else f"{value:.4f}")
        rows.append(row)
    yield from table(
        ["scenario", "DARE masks, no calibration", *(f"draws, {c}" for c in FEATURE)], rows
    )


def edge_lines(results: Results) -> Iterator[str]:
    yield "## Best λ at an edge of its grid"
    yield ""
    tuned = [c for c in COLUMNS if c != SCALAR]
    rows = []
    for scenario in results.scenarios:
        counts = [collect.edges(results.of(scenario), c) for c in tuned]
        rows.append([scenario, *(f"{a} of {b}" for a, b in counts)])
    yield from table(["scenario", *tuned], rows)


def default_lines(results: Results) -> Iterator[str]:
    if not results.development:
        return
    seeds = sorted({r["seed"] for r in results.development})
    yield f"## Defaults, chosen on development seeds {', '.join(map(str, seeds))} and tasks"
    yield ""
    chosen = choose(results.development)
    yield from table(
        ["", "chosen", "mean validation score of every setting tried", "of every clamp with it"],
        [
            [
                name,
                f"**{choice.setting}; {choice.clamp or PACKAGE_CLAMP}**",
                "; ".join(f"{s}: {v:.3f}" for s, v in choice.tried),
                "; ".join(f"{c or PACKAGE_CLAMP}: {v:.3f}" for c, v in choice.clamps),
            ]
            for name, choice in chosen.items()
        ],
    )
    yield "On the reported seeds and tasks, test part, chosen − the package's default:"
    yield ""
    rows = []
    for name, choice in chosen.items():
        plain = Setting(choice.setting.calibration)
        pairs = {
            f"{choice.setting} − {Setting(PACKAGE[name])}": (
                choice.setting,
                Setting(PACKAGE[name]),
            ),
            f"{replace(plain, clamp=choice.clamp)} − {plain}": (
                replace(plain, clamp=choice.clamp),
                plain,
            ),
        }
        for label, (a, b) in pairs.items():
            if a != b:
                found = [compared(results.of(s), a, b) for s in results.scenarios]
                rows.append([label, *(signed(results.versus(*cells)) for cells in found)])
    yield from table(["difference", *results.scenarios], rows)


def scenario_lines(results: Results, scenario: str) -> Iterator[str]:
    yield f"## {scenario}"
    yield ""
    columns = columns_of(scenario)
    yield (
        "Data: "
        + "; ".join(f"{c}: {DATA_OF.get(c, 'none')}" for c in columns[1:])
        + ". Best λ: labelled, in every column."
    )
    yield ""
    for how, words in HOW.items():
        for number, metric in enumerate(METRICS):
            yield f"**{metric}, {words}**"
            yield ""
            shown = columns if number == 0 else ("none", *CALIBRATIONS)
            yield from table(
                ["merge", *shown],
                [
                    [
                        m,
                        *(
                            plus_minus(
                                collect.over_seeds(results.cells(scenario, m, c, how, number))
                            )
                            for c in shown
                        ),
                    ]
                    for m in MERGES
                ],
            )
        yield f"**Difference to none, {words}**"
        yield ""
        yield from table(
            ["merge", *CALIBRATIONS],
            [
                [
                    m,
                    *(
                        signed(
                            results.versus(
                                results.cells(scenario, m, c, how),
                                results.cells(scenario, m, "none", how),
                            )
                        )
                        for c in CALIBRATIONS
                    ),
                ]
                for m in MERGES
            ],
        )
