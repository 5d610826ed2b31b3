"""Options that several commands share, each written once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from magic_fast.errors import InputError
from magic_fast.report.units import parse_bytes


def command(commands: Any, name: str, **words: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    parser: argparse.ArgumentParser = commands.add_parser(name, allow_abbrev=False, **words)
    return parser


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options by the names that the library has for them too."""
    return {name: getattr(arguments, name) for name in names}


def common(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """How much is said, and what runs the command."""
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="errors only, no progress, no summary"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say which backend was taken and why"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)


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


def chosen_tensors(parser: argparse.ArgumentParser) -> None:
    """Which tensors are merged."""
    what = (
        "a regular expression on names, a kind (head, embedding, router, norm, …) or a part "
        "of the model (vision, text, …)"
    )
    add = partial(parser.add_argument, nargs="+", action="extend", metavar="WHAT")
    add("--include", help=f"merge these tensors alone, the others stay the base's; {what}")
    add("--exclude", help="leave these tensors as they are in the base; as for --include")


def machine_readable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


#: Options of a run on checkpoints. What the user leaves out is not in the namespace: the library
#: has the defaults.
_RUN = ("device", "backend", "executor", "max_shard_size", "memory", "nonfinite", "resume")


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of a run on checkpoints that the user gave, by the names that the library has."""
    return {name: getattr(arguments, name) for name in _RUN if hasattr(arguments, name)}


def device(parser: argparse.ArgumentParser) -> None:
    """Where it runs, with how much memory, and into how large files."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--device", help="cpu, cuda (all GPUs), cuda:N or auto (default)")
    add("--backend", help="refused where it cannot run (default: the fastest that can; see doctor)")
    add("--max-shard-size", type=size, metavar="SIZE", help="of an output file (5GB)")
    add(
        "--memory",
        type=size,
        metavar="SIZE",
        help="for buffers, whatever the size of the models (128MiB). A tensor that must be held "
        "whole and needs more is refused; without this option, one that needs more than is free",
    )
    add(
        "--nonfinite",
        choices=("error", "propagate"),
        help="NaN and infinity in a tensor that is merged: stop (error, the default), or pass them "
        "on and count them",
    )


def executor(parser: argparse.ArgumentParser) -> None:
    """What runs the plan."""
    parser.add_argument(
        "--executor",
        default=argparse.SUPPRESS,
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
        default=argparse.SUPPRESS,
        help="continue the interrupted run of this configuration; a finished OUT is verified",
    )
    reports(parser)


def compatibility(parser: argparse.ArgumentParser) -> None:
    """Where results follow another system, or inputs do not fit."""
    parser.add_argument(
        "--compat", metavar="SYSTEM", help="repeat a known fault of a system: mergekit-0.1.4"
    )
    parser.add_argument(
        "--allow-embedding-truncation",
        action="store_true",
        help="cut embeddings of unequal vocabularies to the smallest",
    )


def reports(parser: argparse.ArgumentParser) -> None:
    """How progress and the result are shown."""
    parser.add_argument(
        "--progress",
        choices=("auto", "json", "none"),
        default="auto",
        help="a bar on a terminal and plain lines elsewhere (auto), one JSON object a line (json)",
    )
    machine_readable(parser)


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
