"""Options that several commands share, each written once."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from magic_fast.errors import InputError
from magic_fast.report.units import parse_bytes


def common(parser: argparse.ArgumentParser) -> None:
    """How much is said."""
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="errors only, no progress, no summary"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say which backend was taken and why"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def models(parser: argparse.ArgumentParser, *, experts: bool = True) -> None:
    """The checkpoints that a merge came from, or will; ``experts``: whether they must be given."""
    parser.add_argument(
        "--base",
        required=True,
        metavar="MODEL",
        help="folder or .safetensors file that the experts started from",
    )
    parser.add_argument(
        "--experts",
        required=experts,
        nargs="+",
        action="extend",
        metavar="MODEL",
        help="fine-tuned models",
    )


def machine_readable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def device(parser: argparse.ArgumentParser) -> None:
    """Where it runs, with how much memory, and into how large files."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda (all GPUs), cuda:N or auto (default)"
    )
    parser.add_argument(
        "--backend",
        help="refused where it cannot run (default: the fastest that can; see doctor)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="of an output file (5GB)",
    )
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="for buffers, whatever the size of the models (128MiB). A tensor that must be held "
        "whole and needs more is refused; without this option, one that needs more than is free",
    )


def executor(parser: argparse.ArgumentParser) -> None:
    """What runs the plan."""
    parser.add_argument(
        "--executor",
        default="auto",
        metavar="NAME",
        help="what runs the plan: local (this process, on the CPU), gpu (this process, on its "
        "GPUs), or an executor that an installed package adds (default: local or gpu, by the "
        "device); the result is the same",
    )


def execution(parser: argparse.ArgumentParser) -> None:
    """Where and how a merge or calibration runs."""
    device(parser)
    executor(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the interrupted run of this configuration; a finished OUT is verified",
    )
    progress(parser)
    machine_readable(parser)


def progress(parser: argparse.ArgumentParser) -> None:
    """How progress is shown."""
    parser.add_argument(
        "--progress",
        choices=("auto", "json", "none"),
        default="auto",
        help="a bar on a terminal and plain lines elsewhere (auto), one JSON object a line (json)",
    )


def calibrate(parser: argparse.ArgumentParser, what: str) -> None:
    """WSC by one word; ``what`` it does there."""
    parser.add_argument(
        "--calibrate",
        choices=("wsc", "manifold", "manifold_exact", "sphere", "spectral"),
        help=f"{what}: WSC, or a variant of it by name",
    )


def weight_calibration(parser: argparse.ArgumentParser) -> None:
    """How WSC runs."""
    group = parser.add_argument_group("calibration (WSC)")
    group.add_argument(
        "--variant",
        choices=("manifold", "manifold_exact", "sphere", "spectral"),
        default="manifold",
        help="how the coefficient of a row is computed (default: manifold)",
    )
    group.add_argument(
        "--granularity",
        choices=("row", "tensor"),
        help="what shares a coefficient (default: row; of spectral: tensor)",
    )
    group.add_argument(
        "--eps-mode",
        choices=("relative", "absolute", "none"),
        default="relative",
        help="relative is scale-free (default); absolute is what the authors' code has",
    )
    group.add_argument(
        "--clamp",
        type=clamp,
        default="0.1,10",
        metavar="LOW,HIGH",
        help="bounds of a coefficient, or none (default: 0.1,10)",
    )
    group.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="exponent of a coefficient; 0 does nothing (default: 1)",
    )
    group.add_argument(
        "--sensitive",
        metavar="FILE",
        help="JSON list of tensor names, or object of name: score (the ten lowest count), that may "
        "only shrink; all others may only grow",
    )


def feature_calibration(parser: argparse.ArgumentParser) -> None:
    """How FSC runs, and on what."""
    group = parser.add_argument_group("calibration in feature space (FSC, DSC)")
    group.add_argument(
        "--space",
        choices=("weight", "feature", "dual", "svc", "lines"),
        default="weight",
        help="weight: WSC, without data (default); feature: FSC; dual: WSC, then FSC; svc: "
        "singular values; lines: scale by depth",
    )
    samples(group, "one for each expert, by the name of its folder, else in order")
    group.add_argument(
        "--reduction",
        choices=("ratio_of_sums", "mean", "median"),
        default="ratio_of_sums",
        help="how positions become one coefficient (default: ratio_of_sums)",
    )
    group.add_argument(
        "--norm",
        metavar="P",
        help="1, 2, …, inf: of a feature (1); in weight space of variant sphere (2)",
    )
    group.add_argument(
        "--per-channel", action="store_true", help="a coefficient for each output channel"
    )
    group.add_argument(
        "--sequential",
        action="store_true",
        help="each layer on what the calibrated ones before it give",
    )


def spectrum_and_depth(parser: argparse.ArgumentParser) -> None:
    """The numbers of ``--space svc`` and ``--space lines``."""
    group = parser.add_argument_group("singular values and depth (svc, lines)")
    group.add_argument(
        "--alpha",
        type=float,
        help="svc: least share of an expert that counts (0.1); lines: factor of the first block "
        "(default: from the norms of the models)",
    )
    group.add_argument("--beta", type=float, help="lines: what the last block gets beyond alpha")
    group.add_argument(
        "--num-blocks", type=positive, metavar="N", help="lines: default: as many as the model has"
    )


def samples(group: Any, tasks: str) -> None:
    """What a model runs on."""
    group.add_argument(
        "--data",
        action="append",
        type=assignment,
        default=[],
        metavar="TASK=PATH",
        help="samples of a task: a .jsonl of texts, token ids or images, a .txt, or a folder of "
        f"images; {tasks}",
    )
    group.add_argument(
        "--samples", type=positive, default=64, metavar="N", help="of a task, the first (64)"
    )
    group.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="samples at a time (8)"
    )
    group.add_argument(
        "--max-length", type=positive, default=512, metavar="N", help="tokens of a sample (512)"
    )


def assignment(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"expected TASK=PATH, got {text!r}")
    return name, value


def settings(texts: list[str]) -> dict[str, list[Any]]:
    """``density=0.1,0.2`` → ``{"density": [0.1, 0.2]}``; a value is what YAML reads, so a list in
    brackets is one value.

    Raises:
        ConfigError: not of this form, or a name twice.
    """
    import yaml

    from magic_fast.errors import ConfigError

    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise ConfigError(f"--set {text!r}: expected NAME=VALUE, got no '='.")
        if name in found:
            raise ConfigError(f"--set {name}: expected once, got it twice. List all its values.")
        try:
            found[name] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise ConfigError(
                f"--set {text!r}: expected values separated by commas, got {values!r}."
            ) from None
    return found


def size(text: str) -> int:
    try:
        return parse_bytes(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def clamp(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH or none, got {text!r}") from None
    return low, high


def print_json(value: Any) -> None:
    """One JSON object on standard output; NaN and infinities become null, which JSON has."""
    import json

    json.dump(_plain(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int):
        return value
    return str(value)
