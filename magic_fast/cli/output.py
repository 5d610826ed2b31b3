"""What a merge or a calibration prints at its end, or instead of running."""

from __future__ import annotations

from typing import TYPE_CHECKING

from magic_fast.cli.options import print_json

if TYPE_CHECKING:
    from magic_fast.engine.output.report import MergeReport
    from magic_fast.engine.plan.plan import MergePlan


def show_plan(plan: MergePlan, *, json: bool) -> None:
    from magic_fast.report import summary
    from magic_fast.report.table import show

    description = plan.describe()
    if json:
        print_json(description)
        return
    print("\n".join(summary.plan_lines(description)))
    print()
    show(summary.input_table(description))
    print()
    show(summary.shard_table(description))


def show_report(report: MergeReport, *, quiet: bool, json: bool) -> None:
    from magic_fast.report import summary
    from magic_fast.report.table import show

    if json:
        print_json(report.as_dict())
    elif not quiet:
        print("\n".join(summary.report_lines(report)))
        if report.layers:
            print()
            show(summary.layer_table(report.layers))
        deviations = summary.deviation_table(report.tensors)
        if deviations.rows:
            print()
            show(deviations)
