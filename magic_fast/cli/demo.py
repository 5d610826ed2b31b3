"""``magic-fast demo``: from nothing to a merged, calibrated, verified model: its users' libraries
read it back, and one tensor of it is merged again in memory."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magic_fast.cli import options, output
from magic_fast.cli.progress import progress
from magic_fast.errors import InternalError

if TYPE_CHECKING:
    import torch

    from magic_fast.config import MergeConfig

PROBE = "model.layers.1.self_attn.q_proj.weight"


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


def verify(merged: Path, config: MergeConfig, *, backend: str) -> Iterator[str]:
    """One line for each thing that holds; raises InternalError at the first that does not."""
    import torch

    assert config.base_model is not None and config.models is not None
    base = config.resolve_path(config.base_model)
    experts = [config.resolve_path(entry.model) for entry in config.models]
    names = _shapes(base)
    _demand(_shapes(merged) == names, "names, shapes and dtypes", "those of the base", "others")
    yield f"safetensors: {len(names)} tensors, with the base's names, shapes and dtypes"

    for name in names:
        _demand(bool(torch.isfinite(_load(merged, name)).all()), name, "finite values", "others")
    yield "every value is finite"

    import magic_fast as mf

    density = float(config.parameters["density"])
    again = mf.merge(
        {PROBE: _load(base, PROBE)},
        [{PROBE: _load(expert, PROBE)} for expert in experts],
        config.merge_method,
        density=density,
        preset=config.preset,
        calibrate="wsc",
        backend=backend,
    )[PROBE]
    differing = int((again != _load(merged, PROBE)).sum())
    _demand(differing == 0, PROBE, "the bits of mf.merge in memory", f"{differing} others")
    yield f"{PROBE} is what mf.merge gives in memory, bit for bit"
    yield _open_with_transformers(merged)


def _open_with_transformers(folder: Path) -> str:
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return "transformers is not installed: not tried with it"
    import torch

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 9, 13]])).logits
    _demand(bool(torch.isfinite(logits).all()), "logits", "finite values", "others")
    return f"transformers: {type(model).__name__} opens it and runs"


def _shapes(folder: Path) -> dict[str, tuple[list[int], str]]:
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                part = shard.get_slice(name)
                found[name] = (part.get_shape(), part.get_dtype())
    return found


def _load(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            if name in shard.keys():
                tensor: torch.Tensor = shard.get_tensor(name)
                return tensor
    raise InternalError(f"missing tensor for {name}: expected it in {folder}, got none. Report it.")


def _demand(holds: bool, what: str, expected: str, got: str) -> None:
    if not holds:
        raise InternalError(
            f"wrong result for {what}: expected {expected}, got {got}. Please report it."
        )
