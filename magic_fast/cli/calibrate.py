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
        "(feature space, FSC), or both (dual, DSC); or its singular values by how far the experts "
        "agree (svc), or its blocks by their depth (lines). Writes the result to the new folder "
        "OUT. magic-fast methods tells when to use which.",
        allow_abbrev=False,
    )
    options.models(parser)
    parser.add_argument("--merged", required=True, metavar="MODEL", help="what was merged of them")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    options.weight_calibration(parser)
    options.feature_calibration(parser)
    options.spectrum_and_depth(parser)
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
            features=feature_calibration(arguments) if arguments.space in _FEATURES else None,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            alpha=arguments.alpha,
            beta=arguments.beta,
            num_blocks=arguments.num_blocks,
            device=arguments.device,
            backend=arguments.backend,
            executor=arguments.executor,
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
        granularity=arguments.granularity and Granularity(arguments.granularity),
        p=norm(arguments, 2) if arguments.space == "weight" else 2,
        eps_mode=EpsMode(arguments.eps_mode),
        clamp=arguments.clamp,
        strength=arguments.strength,
        sensitive=None if sensitive is None else sensitive_from_file(sensitive),
    )


def feature_calibration(arguments: argparse.Namespace) -> FeatureCalibration:
    """The options of :func:`options.feature_calibration`, and those it shares with WSC."""
    from magic_fast.calibration import sensitive_from_file
    from magic_fast.calibration.feature import FeatureCalibration, FeatureGranularity, Reduction

    per_channel = arguments.per_channel
    return FeatureCalibration(
        reduction=Reduction(arguments.reduction),
        p=norm(arguments, 1),
        granularity=FeatureGranularity.CHANNEL if per_channel else FeatureGranularity.LAYER,
        sequential=arguments.sequential,
        clamp=arguments.clamp,
        strength=arguments.strength,
        sensitive=None if arguments.sensitive is None else sensitive_from_file(arguments.sensitive),
    )


def norm(arguments: argparse.Namespace, default: int) -> Any:
    """The p of ``--norm``; the settings refuse what is none."""
    given = default if arguments.norm is None else arguments.norm
    return int(given) if str(given).isdecimal() else given


def data(arguments: argparse.Namespace) -> dict[str, str]:
    """Task → path."""
    found: dict[str, str] = {}
    for task, path in arguments.data:
        if task in found:
            raise InputError(f"--data {task}: expected each task once, got it twice.")
        found[task] = path
    return found


_WEIGHTS, _FEATURES, _SPECTRUM = ("weight", "dual"), ("feature", "dual"), ("svc", "lines")
_MAGNITUDES = ("weight", "feature", "dual")
#: Options that mean something in some spaces only: those, and the option's default.
_OF_SPACES: dict[str, tuple[tuple[str, ...], object]] = {
    "variant": (_WEIGHTS, "manifold"),
    "granularity": (_WEIGHTS, None),
    "eps_mode": (_WEIGHTS, "relative"),
    "clamp": (_MAGNITUDES, (0.1, 10.0)),
    "strength": (_MAGNITUDES, 1.0),
    "sensitive": (_MAGNITUDES, None),
    "norm": (_MAGNITUDES, None),
    "samples": (_FEATURES, 64),
    "batch_size": (_FEATURES, 8),
    "max_length": (_FEATURES, 512),
    "reduction": (_FEATURES, "ratio_of_sums"),
    "per_channel": (_FEATURES, False),
    "sequential": (_FEATURES, False),
    "alpha": (_SPECTRUM, None),
    "beta": (("lines",), None),
    "num_blocks": (("lines",), None),
}


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuses options that would do nothing in the chosen space."""
    for name, (spaces, default) in _OF_SPACES.items():
        if arguments.space not in spaces and getattr(arguments, name) != default:
            words = [f"'{space}'" for space in spaces]
            where = " or ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else words[0]
            raise InputError(
                f"--{name.replace('_', '-')}: expected it with --space {where}, got --space "
                f"{arguments.space}. Leave it out, or choose another space."
            )
    if arguments.norm and arguments.space == "weight" and arguments.variant != "sphere":
        raise InputError(
            f"--norm: expected it with --variant 'sphere', got --variant {arguments.variant}. "
            "Leave it out, or choose that variant."
        )
