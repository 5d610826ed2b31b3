"""``magic-fast extract-adapter BASE EXPERT [EXPERT…] OUT --rank R``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import options
from magic_fast.cli.progress import progress


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "extract-adapter",
        help="make LoRA adapters out of full fine-tunes of one base",
        description="Makes of each EXPERT, a fine-tune of BASE, the LoRA adapter of PEFT that is "
        "nearest to it at a rank, and tells what it leaves out. Of one expert OUT is the adapter; "
        "of several it holds a folder for each, named as the expert is; the base is read once.",
    )
    parser.add_argument("base", metavar="BASE", help="checkpoint")
    parser.add_argument("experts", nargs="+", metavar="EXPERT", help="fine-tune of the base")
    parser.add_argument("out", metavar="OUT", help="folder to make, missing or empty")
    parser.add_argument(
        "--rank", type=options.positive, metavar="R", required=True, help="of each module, at most"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the factors (default: float32)",
    )
    parser.add_argument(
        "--save-vectors",
        action="store_true",
        help="save norms and other vectors that changed whole (modules_to_save); else they are "
        "named and left out",
    )
    options.reports(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    from magic_fast.api.adapters.extract import extract_adapter

    with progress(quiet=arguments.quiet, title="extract", style=arguments.progress) as report:
        found = extract_adapter(
            arguments.base,
            arguments.experts,
            arguments.out,
            rank=arguments.rank,
            save_vectors=arguments.save_vectors,
            progress=report,
            dtype=arguments.dtype,
        )
    if arguments.json:
        options.print_json([adapter.as_dict() for adapter in found])
    elif not arguments.quiet:
        for adapter in found:
            print(
                f"{adapter.out}: {len(adapter.modules)} modules of {adapter.expert}; "
                f"{adapter.error:.3g} of the change is left out"
            )
            for module in adapter.worst:
                print(f"  {module.error:.3g}  {module.name}, rank {module.rank}")
            if adapter.left:
                print(
                    f"warning: {len(adapter.left)} tensors changed and are not in the adapter, "
                    f"first {next(iter(adapter.left))}; --save-vectors saves norms and vectors"
                )
            for warning in adapter.warnings:
                print(f"warning: {warning}")
            if adapter.unlike:
                print(
                    f"warning: {len(adapter.unlike)} tensors are the expert's alone, or differ and "
                    f"are no floats, and are not in the adapter, first {adapter.unlike[0]}"
                )
    return 0
