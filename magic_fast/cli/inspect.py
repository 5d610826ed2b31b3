"""``magic-fast inspect --base B --experts E1 E2 … [--merged M] [--html FILE]``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import options
from magic_fast.cli.progress import progress


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "inspect",
        help="norms, cosines and sign conflicts of the experts' changes; what a merge left of them",
        description="Shows, tensor by tensor, how far each expert moved from the base (norm), how "
        "alike the moves are (cosine), and the share of entries whose signs disagree. With "
        "--merged also the magnitude of the merged change: its norm over the mean of the experts'.",
    )
    options.models(parser)
    parser.add_argument("--merged", metavar="MODEL", help="what was merged from them")
    parser.add_argument(
        "--before",
        metavar="MODEL",
        help="what MERGED was before it was calibrated, where its own magic_fast.json does not say",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write a page of plots too (needs the extra 'report': plotly)",
    )
    parser.add_argument(
        "--top",
        type=options.positive,
        default=20,
        metavar="N",
        help="rows of the table (default: 20)",
    )
    options.machine_readable(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses

    import magic_fast as mf
    from magic_fast.api.checkpoints.inspect import record_of
    from magic_fast.report.page import check_page, write_page
    from magic_fast.report.summary import inspect_table
    from magic_fast.report.table import show

    if arguments.html is not None:
        check_page(arguments.html)  # before the work
    with progress(quiet=arguments.quiet, title="inspect") as report:
        statistics = mf.inspect_checkpoints(
            arguments.base,
            arguments.experts,
            arguments.merged,
            before=arguments.before,
            progress=report,
        )
    if arguments.html is not None:
        write_page(
            arguments.html,
            statistics,
            **options.given(arguments, "base", "experts", "merged"),
            record=record_of(arguments.merged),
        )
    if arguments.json:
        options.print_json({"tensors": [dataclasses.asdict(tensor) for tensor in statistics]})
    elif not arguments.quiet or arguments.html is None:
        show(inspect_table(statistics, arguments.top))
    return 0
