"""``magic-fast sweep CONFIG OUT --set density=0.1,0.2 --set scale=0.3,1.0``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import options
from magic_fast.cli.merge import read_config
from magic_fast.cli.progress import progress


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "sweep",
        help="merge in many combinations of parameters, from one read of the checkpoints",
        description="Merges checkpoints as CONFIG says once for every combination of the values "
        "given by --set, into sub-folders of the new folder OUT, which appears once, whole.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        required=True,
        metavar="NAME=VALUE,VALUE…",
        help="a name of the configuration's `parameters:`, seed, or calibrate.NAME, and its "
        "values; again for more names: all combinations, at most 256",
    )
    options.device(parser)
    options.executor(parser)
    parser.add_argument(
        "--calibrate", choices=("wsc",), help="calibrate, though the configuration does not say so"
    )
    options.compatibility(parser)
    options.reports(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    from magic_fast.api.checkpoints.sweep import sweep_checkpoints

    settings = options.settings(arguments.settings)
    config = read_config(arguments.config)
    with progress(quiet=arguments.quiet, title="sweep", style=arguments.progress) as report:
        swept = sweep_checkpoints(
            config,
            arguments.out,
            settings,
            progress=report,
            **options.given(arguments, "compat", "calibrate", "allow_embedding_truncation"),
            **options.run_options(arguments),
        )
    if arguments.json:
        options.print_json(swept.as_dict())
    elif not arguments.quiet:
        from magic_fast.report.units import format_bytes, format_seconds

        first = swept.reports[0]
        written = sum(r.bytes_written for r in swept.reports)
        print(
            f"{swept.out}: {len(swept.reports)} models by {swept.method} ({first.backend}) in "
            f"{format_seconds(swept.seconds)}; read {format_bytes(first.bytes_read)}, wrote "
            f"{format_bytes(written)}"
        )
        for combination in swept.combinations:
            print(f"  {combination.name}")
        for warning in swept.warnings:
            print(f"warning: {warning}")
    return 0
