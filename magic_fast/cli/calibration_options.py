"""The options of calibrations, made from their settings: words, defaults and help stand there."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from magic_fast.calibration.builtin import SPACES
from magic_fast.calibration.registry import is_variant, variants
from magic_fast.calibration.values import default_of, setting_of, settings_of, words_of
from magic_fast.calibration.weight import WeightCalibration
from magic_fast.cli.options import positive


class Variants:
    """The words for a variant of WSC, those of installed packages too; these are loaded when a
    word is not known otherwise.

    >>> "sphere" in Variants(), "fsc" in Variants(), "wsc" in Variants("wsc")
    (True, False, True)
    """

    def __init__(self, *more: str) -> None:
        self._more = more

    def __iter__(self) -> Iterator[str]:
        return iter((*self._more, *variants()))

    def __contains__(self, word: object) -> bool:
        return word in self._more or is_variant(word)


def calibrate(parser: argparse.ArgumentParser, what: str) -> None:
    """WSC by one word; ``what`` it does there."""
    parser.add_argument(
        "--calibrate", choices=Variants("wsc"), help=f"{what}: WSC, or a variant of it by name"
    )


def weight_calibration(parser: argparse.ArgumentParser) -> None:
    """How WSC runs."""
    group = parser.add_argument_group("calibration (WSC)")
    for f in settings_of(WeightCalibration):
        if f.metadata["option"]:
            _setting(group, WeightCalibration, f.name)


def feature_calibration(parser: argparse.ArgumentParser) -> None:
    """How FSC runs, and on what."""
    from magic_fast.calibration.feature import FeatureCalibration

    group = parser.add_argument_group("calibration in feature space (FSC, DSC)")
    group.add_argument(
        "--space",
        choices=SPACES,
        default=SPACES[0],
        help="weight: WSC, without data (default); feature: FSC; dual: WSC, then FSC; svc: "
        "singular values; lines: scale by depth",
    )
    samples(group, "one for each expert, by the name of its folder, else in order")
    _setting(group, FeatureCalibration, "reduction")
    group.add_argument(
        "--norm",
        metavar="P",
        help=f"1, 2, …, inf: of a feature ({FeatureCalibration.p:g}); in weight space of variant "
        f"sphere ({WeightCalibration.p:g})",
    )
    group.add_argument(
        "--per-channel", action="store_true", help="a coefficient for each output channel"
    )
    _setting(group, FeatureCalibration, "sequential")


def _setting(group: Any, kind: type, name: str) -> None:
    """The option of one setting."""
    f = setting_of(kind, name)
    what, default = f.metadata["kind"], default_of(kind, name)
    told: dict[str, Any] = {"default": default}
    if what == "variant":
        told["choices"] = Variants()
    elif isinstance(what, type):
        told["choices"] = words_of(kind, name)
    elif what == "flag":
        told["action"] = "store_true"
    elif what == "bounds":
        told |= {"type": bounds, "metavar": "LOW,HIGH"}
    elif what == "tensor names":
        told["metavar"] = "FILE"
    else:
        told["type"] = float
    help_text = f.metadata["option"].format(default=_written(default))
    group.add_argument(f"--{name.replace('_', '-')}", help=help_text, **told)


def _written(default: Any) -> str:
    """A default as one would type it."""
    if isinstance(default, tuple):
        return ",".join(f"{x:g}" for x in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def spectrum_and_depth(parser: argparse.ArgumentParser) -> None:
    """The numbers of ``--space svc`` and ``--space lines``."""
    from magic_fast.calibration.spectrum import SVC_ALPHA

    group = parser.add_argument_group("singular values and depth (svc, lines)")
    group.add_argument(
        "--alpha",
        type=float,
        help=f"svc: least share of an expert that counts ({SVC_ALPHA:g}); lines: factor of the "
        "first block (default: from the norms of the models)",
    )
    group.add_argument("--beta", type=float, help="lines: what the last block gets beyond alpha")
    group.add_argument(
        "--num-blocks", type=positive, metavar="N", help="lines: default: as many as the model has"
    )


def samples(group: Any, tasks: str) -> None:
    """What a model runs on."""
    from magic_fast.calibration.samples import Sampling

    group.add_argument(
        "--data",
        action="append",
        type=assignment,
        default=[],
        metavar="TASK=PATH",
        help="samples of a task: a .jsonl of texts, token ids or images, a .txt, or a folder of "
        f"images; {tasks}",
    )
    for name, what in (
        ("samples", "of a task, the first"),
        ("batch_size", "samples at a time"),
        ("max_length", "tokens of a sample"),
    ):
        default = getattr(Sampling, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive,
            default=default,
            metavar="N",
            help=f"{what} ({default})",
        )


def assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"expected TASK=PATH, got {text!r}")
    return name, value


def bounds(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH or none, got {text!r}") from None
    return low, high
