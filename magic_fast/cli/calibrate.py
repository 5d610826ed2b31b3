"""``magic-fast calibrate --base B --experts E1 E2 … --merged M OUT``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from magic_fast.cli import options, output
from magic_fast.cli.progress import progress
from magic_fast.errors import InputError

if TYPE_CHECKING:
    from magic_fast.calibration import WeightCalibration
    from magic_fast.calibration.feature import FeatureCalibration


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "calibrate",
        help="restore the magnitudes of a model that any tool merged",
        description="Scales each row of the merged model's change so that its magnitude fits its "
        "experts' (weight space calibration, WSC), or each layer's by what it makes of samples "
        "(feature space, FSC), or both (dual, DSC), and writes the result to the new folder OUT.",
        allow_abbrev=False,
    )
    options.models(parser)
    parser.add_argument("--merged", required=True, metavar="MODEL", help="what was merged of them")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    options.weight_calibration(parser)
    options.feature_calibration(parser)
    options.execution(parser)
    options.common(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import magic_fast as mf

    refuse_idle(arguments)
    quiet, style = arguments.quiet, arguments.progress
    with progress(quiet=quiet, title="calibrate", style=style) as report:
        calibrated = mf.calibrate_checkpoints(
            arguments.base,
            arguments.experts,
            arguments.merged,
            arguments.out,
            space=arguments.space,
            calibration=weight_calibration(arguments),
            data=data(arguments),
            features=feature_calibration(arguments) if arguments.space != "weight" else None,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
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


def feature_calibration(arguments: argparse.Namespace) -> FeatureCalibration:
    """The options of :func:`options.feature_calibration`, and those it shares with WSC."""
    from magic_fast.calibration import sensitive_from_file
    from magic_fast.calibration.feature import FeatureCalibration, FeatureGranularity, Reduction

    norm = arguments.norm
    per_channel = arguments.per_channel
    return FeatureCalibration(
        reduction=Reduction(arguments.reduction),
        p=int(norm) if norm.isdecimal() else norm,
        granularity=FeatureGranularity.CHANNEL if per_channel else FeatureGranularity.LAYER,
        sequential=arguments.sequential,
        clamp=arguments.clamp,
        strength=arguments.strength,
        sensitive=None if arguments.sensitive is None else sensitive_from_file(arguments.sensitive),
    )


def data(arguments: argparse.Namespace) -> dict[str, str]:
    """Task → path."""
    found: dict[str, str] = {}
    for task, path in arguments.data:
        if task in found:
            raise InputError(f"--data {task}: expected each task once, got it twice.")
        found[task] = path
    return found


#: Options that mean something in one kind of space only, and their defaults.
_OF_WEIGHTS: dict[str, object] = {
    "variant": "manifold",
    "granularity": "row",
    "eps_mode": "relative",
}
_OF_FEATURES: dict[str, object] = {
    "samples": 64, "batch_size": 8, "max_length": 512, "reduction": "ratio_of_sums", "norm": "1",
    "per_channel": False, "sequential": False,
}  # fmt: skip


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuses options that would do nothing in the chosen space."""
    spaces: dict[str, dict[str, object]] = {"weight": _OF_FEATURES, "feature": _OF_WEIGHTS}
    idle = spaces.get(arguments.space, {})
    for name, default in idle.items():
        if getattr(arguments, name) != default:
            other = "'feature' or 'dual'" if arguments.space == "weight" else "'weight' or 'dual'"
            raise InputError(
                f"--{name.replace('_', '-')}: expected it with --space {other}, got "
                f"--space {arguments.space}. Leave it out, or choose another space."
            )
