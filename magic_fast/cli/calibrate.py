"""``magic-fast calibrate --base B --experts E1 E2 … --merged M OUT``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from magic_fast.cli import calibration_options, options, output
from magic_fast.cli.progress import progress
from magic_fast.errors import InputError

if TYPE_CHECKING:
    from magic_fast.calibration import WeightCalibration
    from magic_fast.calibration.feature import FeatureCalibration


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "calibrate",
        help="restore the magnitudes of a model that any tool merged",
        description="Scales each row of the merged model's change so that its magnitude fits its "
        "experts' (weight space calibration, WSC), or each layer's by what it makes of samples "
        "(feature space, FSC), or both (dual, DSC); or its singular values by how far the experts "
        "agree (svc), or its blocks by their depth (lines). Writes the result to the new folder "
        "OUT. magic-fast methods tells when to use which.",
    )
    options.models(parser)
    parser.add_argument("--merged", required=True, metavar="MODEL", help="what was merged of them")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    calibration_options.weight_calibration(parser)
    calibration_options.feature_calibration(parser)
    calibration_options.spectrum_and_depth(parser)
    options.execution(parser)
    options.common(parser, run)
    parser.set_defaults(idle={name: parser.get_default(name) for name in _SPACES_OF})


def run(arguments: argparse.Namespace) -> int:
    import magic_fast as mf

    refuse_idle(arguments)
    with progress(quiet=arguments.quiet, title="calibrate", style=arguments.progress) as report:
        calibrated = mf.calibrate_checkpoints(
            arguments.base,
            arguments.experts,
            arguments.merged,
            arguments.out,
            space=arguments.space,
            calibration=weight_calibration(arguments),
            data=data(arguments),
            features=feature_calibration(arguments) if arguments.space in _FEATURES else None,
            progress=report,
            **options.given(arguments, "samples", "batch_size", "max_length"),
            **options.given(arguments, "alpha", "beta", "num_blocks"),
            **options.run_options(arguments),
        )
    output.show_report(calibrated, quiet=arguments.quiet, json=arguments.json)
    return 0


def weight_calibration(arguments: argparse.Namespace) -> WeightCalibration:
    """The options of WSC as the object that the api takes."""
    from magic_fast.calibration import WeightCalibration
    from magic_fast.recipe import EpsMode, Granularity

    return WeightCalibration(
        variant=arguments.variant,
        granularity=arguments.granularity and Granularity(arguments.granularity),
        p=norm(arguments, WeightCalibration)
        if arguments.space == "weight"
        else WeightCalibration.p,
        eps_mode=EpsMode(arguments.eps_mode),
        **_shared(arguments),
    )


def feature_calibration(arguments: argparse.Namespace) -> FeatureCalibration:
    """The options of FSC, and those it shares with WSC, as the object that the api takes."""
    from magic_fast.calibration.feature import FeatureCalibration, FeatureGranularity, Reduction

    per_channel = arguments.per_channel
    return FeatureCalibration(
        reduction=Reduction(arguments.reduction),
        p=norm(arguments, FeatureCalibration),
        granularity=FeatureGranularity.CHANNEL if per_channel else FeatureGranularity.LAYER,
        sequential=arguments.sequential,
        **_shared(arguments),
    )


def _shared(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that WSC and FSC share."""
    from magic_fast.calibration import sensitive_from_file

    file = arguments.sensitive
    names = None if file is None else sensitive_from_file(file)
    return options.given(arguments, "clamp", "strength") | {"sensitive": names}


def norm(arguments: argparse.Namespace, settings: Any) -> Any:
    """The p of ``--norm``, else of the settings; these refuse what is none."""
    given = settings.p if arguments.norm is None else arguments.norm
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
#: Options that mean something in some spaces only.
_SPACES_OF: dict[str, tuple[str, ...]] = {
    "variant": _WEIGHTS,
    "granularity": _WEIGHTS,
    "eps_mode": _WEIGHTS,
    "clamp": _MAGNITUDES,
    "strength": _MAGNITUDES,
    "sensitive": _MAGNITUDES,
    "norm": _MAGNITUDES,
    "samples": _FEATURES,
    "batch_size": _FEATURES,
    "max_length": _FEATURES,
    "reduction": _FEATURES,
    "per_channel": _FEATURES,
    "sequential": _FEATURES,
    "alpha": _SPECTRUM,
    "beta": ("lines",),
    "num_blocks": ("lines",),
}


def refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuses options that would do nothing in the chosen space. ``arguments.idle`` has their
    defaults."""
    for name, spaces in _SPACES_OF.items():
        if arguments.space not in spaces and getattr(arguments, name) != arguments.idle[name]:
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
