"""``magic-fast calibrate --base B --experts E1 E2 … --merged M OUT``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from magic_fast.cli import options, output
from magic_fast.cli.progress import progress

if TYPE_CHECKING:
    from magic_fast.calibration import WeightCalibration


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="restore the magnitudes of a model that any tool merged",
        description="Scales each row of the merged model's change so that its magnitude fits its "
        "experts' (weight space calibration, WSC), and writes the result to the new folder OUT.",
        allow_abbrev=False,
    )
    options.models(parser)
    parser.add_argument("--merged", required=True, metavar="MODEL", help="what was merged of them")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    options.weight_calibration(parser)
    options.execution(parser)
    options.common(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import magic_fast as mf

    quiet, style = arguments.quiet, arguments.progress
    with progress(quiet=quiet, title="calibrate", style=style) as report:
        calibrated = mf.calibrate_checkpoints(
            arguments.base,
            arguments.experts,
            arguments.merged,
            arguments.out,
            calibration=weight_calibration(arguments),
            device=arguments.device,
            backend=arguments.backend,
            max_shard_size=arguments.max_shard_size,
            memory=arguments.memory,
            resume=arguments.resume,
            progress=report,
        )
    output.show_report(calibrated, quiet=arguments.quiet, json=arguments.json)
    return 0


def weight_calibration(arguments: argparse.Namespace) -> WeightCalibration:
    """The options of :func:`options.weight_calibration` as the object that the api takes."""
    from magic_fast.calibration import WeightCalibration, sensitive_from_file
    from magic_fast.recipe import EpsMode, Granularity, Variant

    sensitive = arguments.sensitive
    return WeightCalibration(
        variant=Variant(arguments.variant),
        granularity=Granularity(arguments.granularity),
        eps_mode=EpsMode(arguments.eps_mode),
        clamp=arguments.clamp,
        strength=arguments.strength,
        sensitive=None if sensitive is None else sensitive_from_file(sensitive),
    )
