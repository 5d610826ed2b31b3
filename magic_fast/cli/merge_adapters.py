"""``magic-fast merge-adapters A1 A2 … OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from magic_fast.cli import calibration_options, options
from magic_fast.cli.progress import progress
from magic_fast.errors import InputError


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "merge-adapters",
        help="merge LoRA or IA3 adapters of one model into one adapter",
        description="Merges adapters of PEFT (folders), kohya or diffusers (.safetensors) that "
        "were trained on one model into the new adapter OUT of the same kind, which appears once, "
        "whole. Full models are merged by `magic-fast merge`, which takes MODEL+ADAPTER for one.",
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="folder or .safetensors file of an adapter"
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder to make, missing or empty; of kohya and diffusers a .safetensors file too",
    )
    parser.add_argument(
        "--method", default="average", help="see magic-fast methods (default: average)"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the method, such as density=0.3, weights=[1,0.5] or scale=0.7; "
        "calibrate.NAME for one of the calibration; again for more",
    )
    calibration_options.calibrate(parser, "restore the magnitudes of rows")
    parser.add_argument(
        "--rank",
        type=options.positive,
        metavar="R",
        help="of the result, at most (default: the exact one of methods that add up, else the "
        "largest of the adapters)",
    )
    parser.add_argument(
        "--on",
        choices=("weights", "factors"),
        default="weights",
        help="what the method merges: the changes of the weights (default), or A and B by "
        "themselves, as PEFT does (with --preset peft)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the result (default: that of the adapters)",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model that all were trained on: DoRA's change is of its weights, and it says "
        "what is a convolution in files of LoHa and LoKr",
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="what all were trained on, where configurations or headers spell it differently",
    )
    parser.add_argument("--preset", help="whose defaults and rules hold: peft, mergekit, …")
    parser.add_argument("--backend", help="refused where it cannot run (see doctor)")
    parser.add_argument("--seed", type=int, help="of the random trims")
    options.reports(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    import magic_fast as mf

    parameters, calibration = read_parameters(arguments.settings)
    with progress(quiet=arguments.quiet, title="merge", style=arguments.progress) as report:
        merged = mf.merge_adapters(
            arguments.adapters,
            arguments.out,
            arguments.method,
            calibrate=_calibration(arguments.calibrate, calibration),
            progress=report,
            **options.given(arguments, "rank", "on", "dtype", "base", "base_model"),
            **options.given(arguments, "preset", "backend", "seed"),
            **parameters,
        )
    if arguments.json:
        options.print_json(merged.as_dict())
    elif not arguments.quiet:
        from magic_fast.report import summary
        from magic_fast.report.table import show

        print("\n".join(summary.adapter_lines(merged)))
        table = summary.adapter_table(merged)
        if table.rows:
            print()
            show(table)
    return 0


_WITHOUT_OPTION = ("adapters", "out", "masks")
#: What has an option of its own.
_TAKEN = (
    "method", "calibrate", "rank", "on", "dtype", "base", "base_model", "preset", "backend", "seed",
    "progress",
)  # fmt: skip


def read_parameters(texts: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``density=0.3`` → ({"density": 0.3}, {}); ``calibrate.p=1`` → ({}, {"p": 1})."""
    parameters: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    for name, values in options.settings(texts).items():
        if len(values) != 1:
            raise InputError(
                f"--set {name}: expected one value, got {len(values)}. Put a list in brackets: "
                f"{name}=[…]."
            )
        prefix, dot, inner = name.partition(".")
        if name in _WITHOUT_OPTION:
            raise InputError(f"--set {name}: expected a parameter of the method, got another word.")
        if name in _TAKEN:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"--set {name}: expected a parameter, got an option. Use {option}.")
        if name == "calibrate.variant":
            raise InputError("--set calibrate.variant: expected it by --calibrate VARIANT.")
        if prefix == "calibrate" and dot:
            calibration[inner] = values[0]
        else:
            parameters[name] = values[0]
    return parameters, calibration


def _calibration(word: str | None, settings: dict[str, Any]) -> Any:
    """None, a word, or settings with the variant that the word is."""
    if not settings:
        return word
    if word is None:
        raise InputError(
            f"--set calibrate.{next(iter(settings))}: expected it with --calibrate, got none. "
            "Choose a calibration, or leave it out."
        )
    return settings if word == "wsc" else {"variant": word, **settings}
