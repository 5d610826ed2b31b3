"""``magic-fast methods [NAME]``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import options


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "methods",
        help="list the merge methods and the calibrations: parameters, defaults, paper, cost, when "
        "to use which",
        description="Lists all merge methods and what calibrates their results; with NAME that "
        "one, with its parameters, their defaults under every preset, its paper, its cost and when "
        "to use it.",
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="one method or calibration, in full"
    )
    options.machine_readable(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    from magic_fast.calibration import catalog as calibrations
    from magic_fast.methods import catalog

    if arguments.name is not None:
        found = calibrations.find_calibrator(arguments.name)
        if found is not None:
            fields, lines = found.as_dict(), calibrations.text(found)
        else:
            entry = catalog.entry(arguments.name, beside=list(calibrations.calibrators()))
            fields, lines = entry.as_dict(), catalog.text(entry)
        if arguments.json:
            options.print_json(fields)
        else:
            print("\n".join(lines))
        return 0
    entries, calibrators = catalog.entries(), list(calibrations.calibrators().values())
    if arguments.json:
        options.print_json(
            {
                "methods": [entry.as_dict() for entry in entries],
                "calibrations": [entry.as_dict() for entry in calibrators],
            }
        )
        return 0
    from magic_fast.report.table import Table, show

    rows = [(e.name, e.summary, e.use_when, e.reads_in_words()) for e in entries]
    show(Table("", ("method", "what it does", "use it when", "reads"), rows, left=4))
    print()
    more = [(c.name, c.summary, c.use_when, c.reads, c.data) for c in calibrators]
    columns = ("calibration", "what it does", "use it when", "reads", "data")
    show(Table("", columns, more, left=5))
    print("\nmagic-fast methods NAME shows parameters, defaults, paper and cost.")
    return 0
