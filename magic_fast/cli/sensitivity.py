"""``magic-fast sensitivity --base B --experts E1 E2 … --data TASK=PATH … OUT.json``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import calibration_options, options
from magic_fast.cli.progress import evaluations
from magic_fast.errors import InputError

_RULES = ("all", "general", "magic")


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "sensitivity",
        help="which layers must not grow: the list that --sensitive and `sensitive:` read",
        description="Enlarges one tensor's part of the merged change at a time, by a tenth, and "
        "measures on samples, without labels, how far the model's outputs move from what they "
        "were. Writes the scores of all tensors to the new file OUT; the lowest are sensitive, "
        "and OUT says whether that list is more than noise.",
        epilog="example: magic-fast sensitivity --base base --experts math code "
        "--data math=math.jsonl --data code=code.jsonl sensitive.json && magic-fast calibrate "
        "--base base --experts math code --merged merged --sensitive sensitive.json calibrated",
    )
    options.models(parser, experts=False)
    parser.add_argument(
        "--merged", metavar="MODEL", help="a merged model, instead of the experts' average"
    )
    parser.add_argument("out", metavar="OUT", help="JSON file to make")
    group = parser.add_argument_group("samples")
    calibration_options.samples(group, "again for more tasks")
    group = parser.add_argument_group("measure")
    group.add_argument(
        "--by",
        choices=("tensor", "module"),
        default="tensor",
        help="what is enlarged at a time (default: tensor)",
    )
    group.add_argument(
        "--perturbation",
        type=float,
        default=1.1,
        metavar="FACTOR",
        help="on its part of the change (1.1)",
    )
    group.add_argument(
        "--top", type=options.positive, default=10, metavar="N", help="how many are sensitive (10)"
    )
    group.add_argument(
        "--tensors",
        nargs="+",
        default=["all"],
        metavar="RULE|NAME",
        help="all (default), general (weights but embeddings and heads), magic (the authors' "
        "rule), or names",
    )
    group.add_argument(
        "--together",
        type=options.positive,
        metavar="N",
        help="enlarged ones in one call of the model (default: as many as fit in 256 MiB)",
    )
    group.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="P",
        help="of all intervals together (0.95)",
    )
    group.add_argument(
        "--resamples", type=options.positive, default=2000, metavar="N", help="for them (2000)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    options.reports(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    from magic_fast.api.checkpoints.sensitive_layers import sensitive_layers_of_checkpoints
    from magic_fast.cli.calibrate import data
    from magic_fast.planning.outputs import check_new_file

    out = check_new_file(arguments.out)
    with evaluations(
        quiet=arguments.quiet, title="sensitivity", style=arguments.progress
    ) as progress:
        report = sensitive_layers_of_checkpoints(
            arguments.base,
            arguments.experts,
            data(arguments),
            tensors=tensors(arguments.tensors),
            progress=progress,
            **options.given(arguments, "merged", "by", "perturbation", "top", "together"),
            **options.given(arguments, "resamples", "confidence", "seed", "device"),
            **options.given(arguments, "samples", "batch_size", "max_length"),
        )
    report.save(out)
    if arguments.json:
        options.print_json(report.as_dict())
    elif not arguments.quiet:
        from magic_fast.report.summary import sensitivity_table
        from magic_fast.report.table import show

        show(sensitivity_table(report))
    return 0


def tensors(words: list[str]) -> str | list[str] | None:
    """A rule, or names."""
    if len(words) == 1 and words[0] in _RULES:
        return None if words[0] == "all" else words[0]
    rule = next((w for w in words if w in _RULES), None)
    if rule is not None:
        raise InputError(f"--tensors {rule}: expected it alone, got names beside it.")
    return words
