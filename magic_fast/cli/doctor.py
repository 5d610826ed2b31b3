"""``magic-fast doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from magic_fast._version import __version__
from magic_fast.cli import options

PACKAGES = ("torch", "numpy", "safetensors", "triton", "transformers")
VARIABLES = (
    "MAGIC_FAST_BACKEND",
    "MAGIC_FAST_CPU_ISA",
    "MAGIC_FAST_NUM_THREADS",
    "MAGIC_FAST_AUTOTUNE",
)


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "doctor",
        help="what can run here, and why the rest cannot",
        description="Shows the backends, what each was built for, why the others cannot run here, "
        "and the versions to put into a bug report.",
    )
    options.machine_readable(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    import dataclasses
    import platform

    import magic_fast as mf
    from magic_fast.report.summary import backend_table
    from magic_fast.report.table import show

    backends = mf.backends()
    versions = {"magic_fast": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if arguments.json:
        options.print_json(
            {
                "backends": [dataclasses.asdict(backend) for backend in backends],
                "versions": versions,
                "platform": platform.platform(),
                "cpus": _cpus(),
                "environment": variables,
            }
        )
        return 0
    show(backend_table(backends))
    print()
    print(f"machine      {platform.platform()}, {_cpus()} CPUs")
    print("versions     " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print("environment  " + (", ".join(f"{k}={v}" for k, v in variables.items()) or "nothing set"))
    return 0


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
