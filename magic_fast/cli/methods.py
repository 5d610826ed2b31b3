"""``magic-fast methods [NAME]``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import options


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "methods",
        help="list the merge methods: parameters, defaults, paper, cost, when to use which",
        description="Lists all merge methods; with NAME that one, with its parameters, their "
        "defaults under every preset, its paper, its cost and when to use it.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one method, in full")
    options.machine_readable(parser)
    options.common(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from magic_fast.methods import catalog

    if arguments.name is not None:
        entry = catalog.entry(arguments.name)
        if arguments.json:
            options.print_json(entry.as_dict())
        else:
            print("\n".join(catalog.text(entry)))
        return 0
    entries = catalog.entries()
    if arguments.json:
        options.print_json({"methods": [entry.as_dict() for entry in entries]})
        return 0
    from magic_fast.report.table import Table, show

    rows = [(e.name, e.summary, e.use_when, e.reads_in_words()) for e in entries]
    show(Table("", ("method", "what it does", "use it when", "reads"), rows, left=4))
    print("\nmagic-fast methods NAME shows parameters, defaults, paper and cost.")
    return 0
