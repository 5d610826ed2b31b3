"""``magic-fast merge-by-data --experts E1 E2 … --data TASK=PATH … OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import calibration_options, options, output
from magic_fast.cli.progress import progress


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "merge-by-data",
        help="merge by what samples tell of each weight: RegMean, Fisher",
        description="Runs each expert on its own samples, without labels, and merges every matrix "
        "by what it receives there: into the one whose outputs are nearest to the experts' "
        "(regmean), or into the mean weighted by how much each input counts (fisher). What no "
        "sample tells of is the experts' mean. Writes the result to the new folder OUT.",
        epilog="example: magic-fast merge-by-data --experts math code --data math=math.jsonl "
        "--data code=code.jsonl merged",
    )
    parser.add_argument(
        "--experts", required=True, nargs="+", action="extend", metavar="MODEL",
        help="fine-tuned models of one architecture",
    )  # fmt: skip
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", choices=("regmean", "fisher"), default="regmean", help="(default: regmean)"
    )
    group.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of the experts (default: equal)"
    )
    group.add_argument(
        "--off-diagonal", type=float, metavar="FACTOR",
        help="of regmean: on the inner products of different inputs, 0 to 1 (0.9)",
    )  # fmt: skip
    group = parser.add_argument_group("samples")
    calibration_options.samples(group, "one for each expert, by the name of its folder, else in "
                                "order")  # fmt: skip
    parser.add_argument(
        "--device", default=argparse.SUPPRESS, help="where the models run: cpu, cuda:N or auto"
    )
    parser.add_argument(
        "--max-shard-size", type=options.size, default=argparse.SUPPRESS, metavar="SIZE",
        help="of an output file (5GB)",
    )  # fmt: skip
    options.reports(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    import magic_fast as mf
    from magic_fast.cli.calibrate import data

    given = [n for n in ("device", "max_shard_size") if hasattr(arguments, n)]
    with progress(quiet=arguments.quiet, title="merge", style=arguments.progress) as report:
        merged = mf.merge_checkpoints_by_data(
            arguments.experts, arguments.out, data(arguments), progress=report,
            **options.given(arguments, "method", "weights", "off_diagonal", *given),
            **options.given(arguments, "samples", "batch_size", "max_length"),
        )  # fmt: skip
    output.show_report(merged, quiet=arguments.quiet, json=arguments.json)
    return 0
