"""``magic-fast verify OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import options
from magic_fast.cli.progress import progress


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "verify",
        help="check a merged model on disk",
        description="Reads OUT whole: headers and index agree, every value is finite, every tensor "
        "has the checksum that the merge recorded, and the tensors are those that config.json asks "
        "for, as far as its model type is known. Exit code 2 where something is wrong.",
    )
    parser.add_argument("out", metavar="OUT", help="folder or .safetensors file")
    options.machine_readable(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    from magic_fast.engine.output.verify import verify_checkpoint
    from magic_fast.report.units import format_bytes

    with progress(quiet=arguments.quiet, title="verify") as report:
        found = verify_checkpoint(arguments.out, progress=report)
    if arguments.json:
        options.print_json(found.as_dict())
    elif not arguments.quiet or not found.ok:
        for problem in found.problems:
            print(problem)
        checked = f"{found.checksums} checksums" if found.checksums else "no checksums recorded"
        verdict = "sound" if found.ok else f"{len(found.problems)} problems"
        print(
            f"{found.out}: {verdict} ({found.tensors} tensors, {format_bytes(found.nbytes)}, "
            f"{checked}, "
            f"{f'config.json by {found.fits}' if found.fits else 'config.json not compared'})"
        )
    return 0 if found.ok else 2
