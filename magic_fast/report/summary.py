"""Plans, reports, statistics and backends as lines and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from magic_fast.report.table import Table
from magic_fast.report.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from magic_fast.api.results import AdapterReport
    from magic_fast.api.tensors.stats import TensorStatistics
    from magic_fast.calibration import SensitivityReport
    from magic_fast.engine.output.report import MergeReport, TensorReport
    from magic_fast.ops import BackendStatus


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """What a merge would do, from ``MergePlan.describe()``."""
    shards, held = plan["shards"], plan.get("held")
    return [
        f"method    {plan['method']} on backend {plan['backend']}",
        f"tensors   {plan['tensors']} in {len(shards)} shard{'s' * (len(shards) != 1)}",
        f"read      {format_bytes(plan['input_bytes'])} from {len(plan['inputs'])} models",
        f"write     {format_bytes(plan['output_bytes'])}",
        f"memory    {format_bytes(plan['peak_memory_bytes'])} at most, for buffers",
        *([f"          {_held(held, plan['memory_allowed_bytes'])}"] if held else []),
        f"disk      {format_bytes(plan['disk_needed_bytes'])} needed, "
        f"{format_bytes(plan['disk_free_bytes'])} free",
    ]


def _held(held: Mapping[str, Any], allowed: int | None) -> str:
    """The largest tensor that must be held whole, and what may be."""
    limit = "" if allowed is None else f"; {format_bytes(allowed)} are allowed in all"
    size = format_bytes(held["bytes"])
    return f"{size} of it for {held['tensor']}, held whole: {held['why']}{limit}"


def input_table(plan: Mapping[str, Any]) -> Table:
    rows = [(str(model["path"]), format_bytes(model["bytes"])) for model in plan["inputs"]]
    return Table("Inputs", ("model", "bytes"), rows)


def shard_table(plan: Mapping[str, Any]) -> Table:
    rows = [
        (str(shard["file"]), str(shard["tensors"]), format_bytes(shard["bytes"]))
        for shard in plan["shards"]
    ]
    return Table("Output", ("file", "tensors", "bytes"), rows)


def adapter_lines(report: AdapterReport) -> list[str]:
    """What was merged into what."""
    ranks = [m.rank for m in report.modules]
    kind = {"lora": "a LoRA", "ia3": "an IA3"}[report.kind]
    span = str(max(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    lines = [
        f"Wrote {report.out}: {_modules(ranks)} of {kind} adapter by {report.method}"
        + (f", rank {span}." if report.kind == "lora" else ".")
    ]
    short = [m for m in report.modules if m.lost > _VISIBLE]
    if short:
        most = max(short, key=lambda m: m.lost)
        lines.append(
            f"The rank leaves out {_share(sum(m.lost for m in short) / len(short))} of the merged "
            f"change of {_modules(short)} in the mean, {_share(most.lost)} of {most.name}, by the "
            "norm."
        )
    calibrated = [m.calibration for m in report.modules if m.calibration is not None]
    done = [c for c in calibrated if c.calibrated]
    if calibrated:
        rows = sum(c.shape[0] for c in done)
        repaired = sum(c.repaired for c in done)
        left = report.modules[len(done) :]
        lines.append(
            f"Calibrated {rows} rows of {_modules(done)}"
            + (f", {repaired} of them left as merged (nothing to scale)" if repaired else "")
            + (f"; left {_modules(left)} as merged." if left else ".")
        )
    return lines + [f"warning: {warning}" for warning in report.warnings]


def adapter_table(report: AdapterReport) -> Table:
    """The modules whose magnitude the calibration changed most."""
    found = [
        (m.name, c.magnitude_before, c.magnitude_after)
        for m in report.modules
        if (c := m.calibration) is not None
        and c.magnitude_before is not None
        and c.magnitude_after is not None
    ]
    found.sort(key=lambda row: -abs(math.log(max(row[2], 1e-30) / max(row[1], 1e-30))))
    rows = [(name, f"{before:.3f}", f"{after:.3f}") for name, before, after in found[:_SHOWN]]
    return Table(
        "Magnitude, 1 as the adapters' mean",
        ("module", "merged", "calibrated"),
        rows,
        note=f"{len(found) - len(rows)} more" if len(found) > len(rows) else "",
    )


_VISIBLE = 1e-6  # a share below it is rounding
_SHOWN = 10


def _modules(some: Sequence[object]) -> str:
    return f"{len(some)} module{'s' * (len(some) != 1)}"


def _share(part: float) -> str:
    return f"{part:.2%}" if part < 0.01 else f"{part:.0%}"


def report_lines(report: MergeReport) -> list[str]:
    """What was merged, how fast, what was calibrated, and every warning."""
    moved = report.bytes_read + report.bytes_written
    lines = [
        f"Wrote {report.out}: {len(report.tensors)} tensors by {report.method} "
        f"on backend {report.backend}.",
        f"{format_seconds(report.seconds)}, {format_bytes(report.bytes_read)} read and "
        f"{format_bytes(report.bytes_written)} written ({format_rate(moved, report.seconds)}), "
        f"peak memory {format_bytes(report.peak_memory_bytes)}.",
    ]
    if report.stages and report.seconds > 0:
        shares = (f"{name} {busy / report.seconds:.0%}" for name, busy in report.stages.items())
        lines.append(f"Busy, overlapping: {', '.join(shares)}.")
    calibrated = [tensor for tensor in report.tensors if tensor.calibrated]
    if calibrated:
        rows = sum(tensor.rows for tensor in calibrated)
        repaired = sum(tensor.rows_repaired for tensor in calibrated)
        lines.append(
            f"Calibrated {rows} rows of {len(calibrated)} tensors"
            + (f", {repaired} of them left as merged (nothing to scale)." if repaired else ".")
        )
    found = [layer for layer in report.layers if not layer["note"]]
    if found:
        applied = [layer["applied"] for layer in found]
        lines.append(
            f"Calibrated the task features of {len(found)} layers by factors of {min(applied):.3f} "
            f"to {max(applied):.3f}; {len(report.layers) - len(found)} left as merged."
        )
    if report.left:
        reasons = "; ".join(f"{share:.1%}: {reason}" for reason, share in report.left.items())
        lines.append(f"Left {sum(report.left.values()):.1%} of the model's parameters ({reasons}).")
    return [*lines, *(f"Warning: {warning}" for warning in report.warnings)]


def deviation_table(tensors: Iterable[TensorReport], top: int = 10) -> Table:
    """The tensors whose magnitude was furthest from 1 before calibration, and what became of them.

    Magnitude is ‖Δ‖_F ÷ mean_k ‖τ_k‖_F; 1 is the size of an expert's own change.
    """
    known = [tensor for tensor in tensors if _is_number(tensor.magnitude_before)]
    known.sort(key=lambda tensor: _distance(tensor.magnitude_before), reverse=True)
    rows = [
        (
            tensor.name,
            _ratio(tensor.magnitude_before),
            _ratio(tensor.magnitude_after),
            _range(tensor.coefficient_min, tensor.coefficient_mean, tensor.coefficient_max),
        )
        for tensor in known[:top]
    ]
    return Table(
        f"Largest deviations in magnitude ({len(rows)} of {len(known)} tensors)",
        ("tensor", "before", "after", "coefficient (min mean max)"),
        rows,
        note="magnitude = norm of the merged change / mean norm of the experts' changes",
    )


def layer_table(layers: Iterable[Mapping[str, Any]], top: int = 10) -> Table:
    """The layers that calibration in feature space changed most."""
    known = [layer for layer in layers if not layer["note"]]
    known.sort(key=lambda layer: _distance(layer["applied"]), reverse=True)
    rows = [
        (
            str(layer["name"]),
            _ratio(layer["coefficient"]),
            _ratio(layer["applied"]),
            " ".join(f"{task} {_ratio(value)}" for task, value in layer["by_task"].items()),
        )
        for layer in known[:top]
    ]
    return Table(
        f"Largest factors in feature space ({len(rows)} of {len(known)} layers)",
        ("layer", "coefficient", "applied", "by task"),
        rows,
        note="coefficient = norm of the experts' task features / norm of the merged model's",
    )


def inspect_table(statistics: Sequence[TensorStatistics], top: int | None = None) -> Table:
    """Norms, cosines and sign conflict of each tensor; the largest task vectors first."""
    ordered = sorted(statistics, key=lambda tensor: max(tensor.norms, default=0.0), reverse=True)
    has_merged = any(tensor.magnitude is not None for tensor in statistics)
    has_before = any(tensor.magnitude_before is not None for tensor in statistics)
    rows = [
        (
            tensor.name,
            "x".join(map(str, tensor.shape)) or "scalar",
            " ".join(f"{norm:.4g}" for norm in tensor.norms),
            _cosine_range(tensor.cosines),
            f"{tensor.sign_conflict:.1%}",
            *([_ratio(tensor.magnitude_before)] if has_before else []),
            *((_ratio(tensor.magnitude), _ratio(tensor.row_deviation)) if has_merged else ()),
        )
        for tensor in ordered[:top]
    ]
    columns = ["tensor", "shape", "norms", "cosines", "sign conflict"]
    if has_before:
        columns.append("magnitude before")
    if has_merged:
        columns += ["magnitude", "row deviation"]
    return Table(
        f"Task vectors ({len(rows)} of {len(statistics)} tensors, the largest first)",
        columns,
        rows,
        left=2,
    )


def sensitivity_table(report: SensitivityReport) -> Table:
    """The sensitive layers, and how sure that is."""
    rows = []
    for name in report.sensitive:
        bounds = report.intervals.get(name)
        rows.append(
            (
                name,
                f"{report.scores[name]:.3e}",
                "–" if bounds is None else f"{bounds[0]:.2e} to {bounds[1]:.2e}",
                "yes" if name in report.significant else "–" if report.noise is None else "no",
            )
        )
    measured = f"of {len(report.scores)} {report.by}s enlarged by {report.perturbation:g}"
    on = "" if report.samples is None else f", on {report.samples} samples"
    return Table(
        f"The {len(rows)} most sensitive {measured}{on}",
        ("name", "score", "less the median score", "beyond chance"),
        rows,
    )


def backend_table(backends: Iterable[BackendStatus]) -> Table:
    """Which backends can run here, and why the others cannot."""
    rows = [
        (
            backend.name,
            "yes" if backend.available else "no",
            ", ".join(backend.devices),
            "; ".join(filter(None, (backend.summary, backend.details)))
            if backend.available
            else str(backend.reason),
        )
        for backend in backends
    ]
    return Table("Backends", ("name", "usable", "devices", "what it is, or why not"), rows, left=4)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _range(*values: float | None) -> str:
    return " ".join(map(_ratio, values)) if values[0] is not None else "–"


def _distance(magnitude: float | None) -> float:
    """How far from 1, halving and doubling being equally far; a vanished tensor is the furthest."""
    return abs(math.log(magnitude)) if magnitude else math.inf


def _cosine_range(cosines: Sequence[Sequence[float]]) -> str:
    pairs = [cosine for j, row in enumerate(cosines) for cosine in row[j + 1 :]]
    if not pairs:
        return "–"
    low, high = min(pairs), max(pairs)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
