"""The statistics of a merge as one page of HTML that needs no network."""

from __future__ import annotations

import math
import os
import statistics as numbers
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magic_fast.errors import InputError, OutputError
from magic_fast.report.summary import inspect_table

if TYPE_CHECKING:
    from magic_fast.api.tensors.stats import TensorStatistics


def write_page(
    path: str | Path,
    statistics: Sequence[TensorStatistics],
    *,
    base: str,
    experts: Sequence[str],
    merged: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page to ``path``, which appears once, whole.

    Args:
        path: a name that ends in ``.html``; an earlier page there is replaced.
        statistics: of the tensors, in the model's order.
        base, experts, merged: what people call the models.
        record: ``magic_fast.json`` of the merged model: its method and warnings, and the layers
            that were calibrated in feature space.

    Raises:
        InputError: another ending, or plotly is not installed.
        OutputError: it cannot be written.
    """
    path = check_page(path)
    text = page(statistics, base=base, experts=experts, merged=merged, record=record)
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(
            f"report {str(path)!r}: expected a file that can be written, got {error.strerror}. "
            "Name another."
        ) from None


def check_page(path: str | Path) -> Path:
    """``path``, refused where a page cannot be made or cannot stand there."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(
            f"report {str(path)!r}: expected a name that ends in .html, got {path.suffix!r}. "
            "Name another."
        )
    if not path.absolute().parent.is_dir():
        raise InputError(
            f"report {str(path)!r}: expected a folder that exists, got {str(path.parent)!r}. "
            "Make it first."
        )
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise InputError(
            f"report {str(path)!r}: expected plotly to draw it, got none. "
            "Install it with: pip install 'magic_fast[report]'."
        ) from None
    return path


def page(
    statistics: Sequence[TensorStatistics],
    *,
    base: str,
    experts: Sequence[str],
    merged: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; the arguments are those of :func:`write_page`."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    record = record or {}
    template = resources.files("magic_fast.report").joinpath("page.html").read_text("utf-8")
    labels = _short(experts)
    about = [f"Base {base}. " + ", ".join(f"Expert {e}" for e in experts) + "."]
    if merged is not None:
        by = f", by {record['method']}" if record.get("method") else ""
        about.append(f"Merged: {merged}{by}.")
    about += [f"Warning: {warning}" for warning in record.get("warnings", ())]
    environment = Environment(autoescape=True)
    return environment.from_string(template).render(
        title=f"What merging did to {_short([merged])[0]}" if merged else "Task vectors",
        plotly=Markup(get_plotlyjs()),
        about=about,
        facts=_facts(statistics, labels),
        sections=list(_sections(sorted(statistics, key=_reading_order), labels, record)),
        table=inspect_table(statistics),
    )


def _short(names: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart.

    >>> _short(["a/math", "b/code"]), _short(["math/last", "code/last"])
    (['math', 'code'], ['math/last', 'code/last'])
    """
    parts = [Path(name).parts or (name,) for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def _reading_order(tensor: TensorStatistics) -> list[tuple[int, str]]:
    """By name, block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in tensor.name.split(".")]


def _facts(statistics: Sequence[TensorStatistics], experts: Sequence[str]) -> list[tuple[str, str]]:
    entries = [math.prod(t.shape) for t in statistics]
    total = sum(entries)
    clash = sum(n * t.sign_conflict for n, t in zip(entries, statistics, strict=True))
    facts = [
        ("experts", str(len(experts))),
        ("tensors", str(len(statistics))),
        ("parameters", f"{total:,}"),
        ("entries in sign conflict", f"{clash / total:.1%}" if total else "–"),
    ]
    for label, values in (
        ("median magnitude before calibration", [t.magnitude_before for t in statistics]),
        ("median magnitude", [t.magnitude for t in statistics]),
    ):
        known = [v for v in values if v is not None and math.isfinite(v)]
        if known:
            facts.append((label, f"{numbers.median(known):.3f}"))
    return facts


def _sections(
    statistics: Sequence[TensorStatistics], experts: Sequence[str], record: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The plots there is something to show for, each with what it means."""
    from markupsafe import Markup

    from magic_fast.report import figures

    calibrated = any(t.calibrated for t in statistics)
    rows = [t for t in statistics if t.coefficients and t.calibrated == calibrated]
    spread = "The box holds the middle half of the rows, the whiskers 90 % of them. "
    for key, title, about, figure in (
        (
            "magnitude",
            "Magnitude of the merged change",
            "Norm of the merged change over the mean norm of the experts' changes. 1, dashed: the "
            "merge kept the experts' magnitude.",
            figures.magnitude(statistics),
        ),
        (
            "coefficients",
            "Coefficients of weight space calibration",
            spread
            + (
                "What each row of the merged change was multiplied by (before clamping)."
                if calibrated
                else "What weight space calibration (manifold) would multiply each row by."
            ),
            figures.coefficients([t.name for t in rows], [t.coefficients or () for t in rows]),
        ),
        (
            "features",
            "Coefficients of feature space calibration",
            "What each layer's change was multiplied by, and what each task alone asked for.",
            figures.features(record.get("layers", ())),
        ),
        (
            "norms",
            "Norms of the task vectors",
            "How far each expert moved from the base, tensor by tensor. Tensors that did not move "
            "have no point.",
            figures.norms(statistics, experts),
        ),
        (
            "conflict",
            "Sign conflict",
            "Share of the entries where at least two experts pull to opposite sides.",
            figures.conflict(statistics),
        ),
        (
            "cosines",
            "Cosines between experts, tensor by tensor",
            "Mean over all pairs of experts, with the smallest and the largest pair.",
            figures.cosines(statistics),
        ),
        (
            "alike",
            "Cosines between experts, over the whole model",
            "1: the same direction; 0: nothing in common; −1: opposite.",
            figures.alike(statistics, experts),
        ),
    ):
        if figure is not None:
            plot = figure.to_html(
                full_html=False,
                include_plotlyjs=False,
                div_id=f"plot-{key}",  # a fixed one: the same statistics give the same page
                config={"displaylogo": False, "responsive": True},
            )
            yield {"id": key, "title": title, "about": about, "plot": Markup(plot)}
