"""``magic-fast demo``: from nothing to a merged, calibrated, verified model."""

from __future__ import annotations

import argparse
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magic_fast.cli import options, output
from magic_fast.cli.progress import progress

if TYPE_CHECKING:
    from magic_fast.config import MergeConfig


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "demo",
        help="make small checkpoints, merge and calibrate them, verify the result",
        description="Makes a base and three experts (once; about 1.2 GB), merges them as "
        "examples/ties_wsc.yml says, shows the magnitudes before and after calibration, reads "
        "the result back, and draws a page of plots (where plotly is installed). Then trains five "
        "tiny specialists (once; seconds), merges them in four ways, calibrates in three, and "
        "shows the accuracy.",
    )
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where (default: .demo)")
    parser.add_argument(
        "--size", choices=("small", "tiny"), default="small", help="148 M or 0.2 M parameters"
    )
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import magic_fast as mf
    from magic_fast.cli.demo_accuracy import accuracy_lines
    from magic_fast.cli.demo_check import verify
    from magic_fast.cli.demo_data import SIZES, write_checkpoints
    from magic_fast.report.units import format_seconds

    def say(text: str) -> None:
        if not arguments.quiet:
            print(text, flush=True)

    folder = arguments.folder.absolute() / arguments.size
    shape = SIZES[arguments.size]
    start = time.perf_counter()
    say(f"Checkpoints: base and 3 experts, {shape.parameters / 1e6:.1f} M parameters, in {folder}")
    # In a process of its own: the report of the merge shows the peak memory of this one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(write_checkpoints, folder / "checkpoints", shape).result()
    say(f"  there after {format_seconds(time.perf_counter() - start)}")

    config = demo_config(folder)
    merged = folder / "merged"
    shutil.rmtree(merged, ignore_errors=True)  # what an earlier demo made
    say(f"Merge: {config.merge_method} + WSC into {merged}")
    with progress(quiet=arguments.quiet, title="merge") as report:
        result = mf.merge_checkpoints(config, merged, progress=report)
    output.show_report(result, quiet=arguments.quiet, json=False)

    say("\nReading it back:")
    for line in verify(merged, config, backend=result.backend):
        say(f"  {line}")
    say(f"\n{_draw_page(config, merged)}")

    say(
        "\nDoes calibration help? Five tiny specialists, one merged model; accuracy on test images:"
    )
    start = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        lines = pool.submit(accuracy_lines, folder.parent / "specialists").result()
    for line in lines:
        say(f"  {line}")
    say(f"  after {format_seconds(time.perf_counter() - start)}")
    return 0


def _draw_page(config: MergeConfig, merged: Path) -> str:
    """Writes the plots beside the merged folder; what came of it, in a line."""
    import magic_fast as mf
    from magic_fast.api.checkpoints.inspect import record_of
    from magic_fast.report.page import write_page

    assert config.base_model is not None and config.models is not None
    base = config.resolve_path(config.base_model)
    experts = [str(config.resolve_path(entry.model)) for entry in config.models]
    page = merged.parent / "report.html"
    if find_spec("plotly") is None:
        return (
            "Page of plots: not drawn, plotly is not installed (pip install 'magic_fast[report]')"
        )
    write_page(
        page,
        mf.inspect_checkpoints(base, experts, merged),
        base=str(base),
        experts=experts,
        merged=str(merged),
        record=record_of(str(merged)),
    )
    return f"Page of plots: {page}"


def demo_config(folder: Path) -> MergeConfig:
    """``ties_wsc.yml`` with ``folder`` before its paths, whatever else the current folder holds."""
    from importlib import resources

    from magic_fast.config import MergeConfig

    text = resources.files("magic_fast.examples").joinpath("ties_wsc.yml").read_text("utf-8")
    return MergeConfig.from_yaml(text.replace("checkpoints/", f"{folder}/checkpoints/"))
