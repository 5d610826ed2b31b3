"""Plots of what a merge did to each tensor, as plotly figures.

Colours are Okabe and Ito's, which people with any form of colour blindness tell apart; series also
differ in their symbols.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

if TYPE_CHECKING:
    from magic_fast.api.tensors.stats import TensorStatistics

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777")
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star")
_BLOCK = re.compile(r"\.(\d+)\.")
_TICKS = 40  # labels that fit under a plot


class _ByTensor:
    """A plot over tensors or layers in their order, labelled where a block begins."""

    def __init__(self, names: Sequence[str], what: str, *, log: bool = False) -> None:
        self.names = [escape(name) for name in names]
        self.figure = go.Figure(layout=_layout())
        starts = _block_starts(names)
        self.figure.update_xaxes(
            tickvals=list(starts),
            ticktext=[escape(label) for label in starts.values()],
            range=[-0.5, len(names) - 0.5],
            title_text="block",
        )
        self.figure.update_yaxes(title_text=what, type="log" if log else "linear")

    def points(
        self, label: str, values: Sequence[float | None], k: int, **marker: object
    ) -> go.Scatter:
        style = {
            "color": _COLOURS[k % len(_COLOURS)],
            "symbol": _SYMBOLS[k % len(_SYMBOLS)],
            "size": 7,
        }
        trace = go.Scatter(
            x=list(range(len(values))),
            y=list(values),
            text=self.names,
            mode="markers",
            name=escape(label),
            marker=style | marker,
            hovertemplate="%{text}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
        )
        self.figure.add_trace(trace)
        return trace

    def with_one(self) -> go.Figure:
        """Beside it a line where nothing changes."""
        return self.figure.add_hline(y=1, line_dash="dash", line_color="#777777", line_width=1)


def magnitude(statistics: Sequence[TensorStatistics]) -> go.Figure | None:
    """Norm of the merged change over the experts' mean norm, before and after calibration."""
    before = [_positive(t.magnitude_before) for t in statistics]
    after = [_positive(t.magnitude) for t in statistics]
    if not any(after):
        return None
    plot = _ByTensor([t.name for t in statistics], "magnitude", log=True)
    if any(before):
        plot.points("before calibration", before, 1, symbol="circle-open")
    plot.points("after calibration" if any(before) else "merged", after, 0)
    return plot.with_one()


def norms(statistics: Sequence[TensorStatistics], experts: Sequence[str]) -> go.Figure:
    """Norm of each expert's change, and of the merged one."""
    plot = _ByTensor([t.name for t in statistics], "norm of the change", log=True)
    for k, expert in enumerate(experts):
        plot.points(expert, [_positive(t.norms[k]) for t in statistics], k)
    for label, symbol, values in (
        ("merged, before calibration", "line-ew-open", [_before_norm(t) for t in statistics]),
        ("merged", "diamond-tall-open", [t.merged_norm for t in statistics]),
    ):
        shown = [_positive(value) for value in values]
        if any(shown):
            plot.points(label, shown, 0, symbol=symbol, color="#000000", size=9)
    return plot.figure


def coefficients(names: Sequence[str], quantiles: Sequence[Sequence[float]]) -> go.Figure | None:
    """Boxes of the coefficients over the rows of each tensor: quartiles, and 5 to 95 %."""
    if not names:
        return None
    plot = _ByTensor(names, "coefficient of a row", log=True)
    low, first, median, third, high = zip(*quantiles, strict=True)
    plot.figure.add_trace(
        go.Box(
            x=list(range(len(names))),
            lowerfence=low,
            q1=first,
            median=median,
            q3=third,
            upperfence=high,
            marker_color=_COLOURS[0],
            line_width=1,
            name="rows",
            showlegend=False,
            hoverinfo="skip",
        )
    )
    plot.points("median", median, 0, size=5).showlegend = False  # names what it is over
    return plot.with_one()


def conflict(statistics: Sequence[TensorStatistics]) -> go.Figure:
    """Share of the entries where two experts pull to opposite sides."""
    plot = _ByTensor([t.name for t in statistics], "entries in conflict")
    plot.figure.add_trace(
        go.Bar(
            x=list(range(len(statistics))),
            y=[t.sign_conflict for t in statistics],
            marker_color=_COLOURS[0],
            text=plot.names,
            textposition="none",
            hovertemplate="%{text}<br>%{y:.1%}<extra></extra>",
        )
    )
    return plot.figure.update_yaxes(tickformat=".0%", rangemode="tozero")


def cosines(statistics: Sequence[TensorStatistics]) -> go.Figure | None:
    """Mean over the pairs of experts of each tensor, with the smallest and the largest."""
    pairs = [[c for j, row in enumerate(t.cosines) for c in row[j + 1 :]] for t in statistics]
    if not all(pairs):
        return None
    mean = [sum(values) / len(values) for values in pairs]
    plot = _ByTensor([t.name for t in statistics], "cosine of two experts")
    plot.points("mean of the pairs", mean, 0)
    plot.figure.update_traces(
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(v) - m for v, m in zip(pairs, mean, strict=True)],
            "arrayminus": [m - min(v) for v, m in zip(pairs, mean, strict=True)],
            "color": _COLOURS[4],
            "thickness": 1,
        }
    )
    return plot.figure


def alike(statistics: Sequence[TensorStatistics], experts: Sequence[str]) -> go.Figure | None:
    """Cosines between the experts' whole task vectors, all tensors together."""
    if len(experts) < 2:
        return None
    indices = range(len(experts))
    gram = [
        [sum(t.cosines[j][k] * t.norms[j] * t.norms[k] for t in statistics) for k in indices]
        for j in indices
    ]
    size = [gram[k][k] ** 0.5 for k in indices]
    values = [
        [gram[j][k] / (size[j] * size[k]) if size[j] * size[k] else 0.0 for k in indices]
        for j in indices
    ]
    labels = [escape(name) for name in experts]
    figure = go.Figure(layout=_layout())
    figure.add_trace(
        go.Heatmap(
            z=values,
            x=labels,
            y=labels,
            zmin=-1,
            zmax=1,
            colorscale="PuOr",
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(height=160 + 50 * len(experts))


def features(layers: Sequence[Mapping[str, Any]]) -> go.Figure | None:
    """Coefficients in feature space: of each task, and what was applied."""
    found = [layer for layer in layers if not layer["note"]]
    if not found:
        return None
    plot = _ByTensor([layer["name"] for layer in found], "coefficient of a layer", log=True)
    for k, task in enumerate(dict.fromkeys(task for layer in found for task in layer["by_task"])):
        plot.points(task, [_positive(layer["by_task"].get(task)) for layer in found], k)
    applied = [_positive(layer["applied"]) for layer in found]
    plot.points("applied", applied, 0, color="#000000", symbol="line-ew-open", size=10)
    return plot.with_one()


def _block_starts(names: Sequence[str]) -> dict[int, str]:
    """Where a block begins, and its number; of what is in no block, the name of its module."""
    starts: dict[int, str] = {}
    before = None
    for i, name in enumerate(names):
        block = _BLOCK.search(f"{name}.")
        label = block[1] if block else name.removesuffix(".weight").rsplit(".", 1)[-1]
        if label != before:
            starts[i] = before = label
    every = 1 + len(starts) // _TICKS
    return dict(list(starts.items())[::every])


def _layout() -> go.Layout:
    return go.Layout(
        template="plotly_white",
        height=360,
        margin={"l": 70, "r": 20, "t": 20, "b": 50},
        hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )


def _before_norm(tensor: TensorStatistics) -> float | None:
    if tensor.magnitude_before is None:
        return None
    return tensor.magnitude_before * sum(tensor.norms) / len(tensor.norms)


def _positive(value: float | None) -> float | None:
    """What a logarithmic axis can show."""
    return value if value is not None and 0 < value < float("inf") else None
