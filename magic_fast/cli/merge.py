"""``magic-fast merge CONFIG OUT``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magic_fast.cli import calibration_options, options, output
from magic_fast.cli.progress import progress

if TYPE_CHECKING:
    from magic_fast.config import MergeConfig
    from magic_fast.config.series import Merge
    from magic_fast.engine.plan.plan import MergePlan


def add_parser(commands: Any) -> None:
    parser = options.command(
        commands,
        "merge",
        help="merge checkpoints as a YAML configuration says",
        description="Merges checkpoints as CONFIG says, the YAML that mergekit reads plus "
        "`calibrate:`, into the new folder OUT, which appears once, whole.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML file; of several documents (mergekit-multi) the results with a name are models "
        "of the others, and the one without is OUT",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make; it must be missing or empty")
    options.execution(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    parser.add_argument(
        "--intermediate",
        metavar="FOLDER",
        help="keep the results with a name of several documents there (default: beside OUT until "
        "it is whole)",
    )
    options.chosen_tensors(parser)
    parser.add_argument(
        "--config-from",
        metavar="MODEL",
        help="model or folder whose config.json and other small files the result takes, but for "
        "the tokenizer's (default: base_model, or the first model)",
    )
    parser.add_argument(
        "--tokenizer-from",
        metavar="MODEL",
        help="model or folder whose tokenizer files the result takes; the rows of the embeddings "
        "stay as they are",
    )
    parser.add_argument("--out-dtype", help="dtype of the result, instead of the configuration's")
    parser.add_argument(
        "--preset", help="whose defaults and rules hold, instead of the configuration's"
    )
    calibration_options.calibrate(parser, "calibrate, though the configuration does not say so")
    parser.add_argument("--seed", type=int, help="of the random trims")
    options.compatibility(parser)
    options.common(parser, run)


def run(arguments: argparse.Namespace) -> int:
    import magic_fast as mf
    from magic_fast.config.document import read_text
    from magic_fast.config.series import is_series
    from magic_fast.errors import InputError

    instead = options.given(
        arguments, "preset", "out_dtype", "include", "exclude", "config_from", "tokenizer_from"
    )
    settings = options.run_options(arguments) | options.given(
        arguments, "seed", "compat", "calibrate", "allow_embedding_truncation"
    )
    if is_series(read_text(Path(arguments.config)), arguments.config):
        return run_series(arguments, instead, settings)
    if arguments.intermediate is not None:
        raise InputError(
            f"--intermediate for {arguments.config}: expected several documents, got one. "
            "Remove the option."
        )
    config = read_config(arguments.config, **instead)
    if arguments.dry_run:
        show = partial(output.show_plan, json=arguments.json)
        dry_run(config, arguments.out, show, settings)
        return 0
    with progress(quiet=arguments.quiet, title="merge", style=arguments.progress) as report:
        merged = mf.merge_checkpoints(config, arguments.out, progress=report, **settings)
    output.show_report(merged, quiet=arguments.quiet, json=arguments.json)
    return 0


def dry_run(
    config: MergeConfig,
    out: str | Path,
    show: Callable[[MergePlan], None],
    settings: Mapping[str, Any],
) -> None:
    """Shows the plan of a merge, then refuses it where its executor cannot run it."""
    import magic_fast as mf
    from magic_fast.engine.execute.registry import executor_for
    from magic_fast.planning.options import RunOptions

    planning = dict(settings)
    executor = planning.pop("executor", RunOptions.executor)
    planning.pop("nonfinite", None)  # of what is computed
    plan = mf.plan_checkpoints(config, out, **planning)
    show(plan)
    executor_for(executor, [plan])


def run_series(
    arguments: argparse.Namespace, instead: dict[str, Any], settings: dict[str, Any]
) -> int:
    """The merges of a file of several documents."""
    import magic_fast as mf
    from magic_fast.api.checkpoints.series import read_file

    merges = read_file(arguments.config, {k: v for k, v in instead.items() if v is not None})
    if arguments.dry_run:
        show_series(merges, arguments, settings)
        return 0
    with progress(quiet=arguments.quiet, title="merge", style=arguments.progress) as report:
        settings |= {"intermediate": arguments.intermediate, "progress": report}
        reports = mf.merge_series(merges, arguments.out, **settings)
    if arguments.json:
        options.print_json({name or "": report.as_dict() for name, report in reports.items()})
        return 0
    for made in reports.values():
        output.show_report(made, quiet=arguments.quiet, json=False)
    return 0


def show_series(
    merges: list[Merge], arguments: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """What each merge would do; of one that uses others' results, only what can be known."""
    told = []
    for merge in merges:
        method = merge.config.merge_method
        known: dict[str, Any] = {"name": merge.name, "method": method, "after": list(merge.uses)}
        if not arguments.json:
            after = f" after {', '.join(merge.uses)}" if merge.uses else ""
            print(f"== {merge.name or arguments.out}: {method}{after}")
        if not merge.uses:
            folder = Path(arguments.intermediate or Path(arguments.out).parent)
            place = folder / merge.name if merge.name is not None else arguments.out

            def show(plan: MergePlan, known: dict[str, Any] = known) -> None:
                known["plan"] = plan.describe()
                if not arguments.json:
                    output.show_plan(plan, json=False)

            dry_run(merge.config, place, show, settings)
        told.append(known)
    if arguments.json:
        options.print_json({"merges": told})


def read_config(path: str, **instead: Any) -> MergeConfig:
    """The configuration in a file, with what the command line says ``instead`` of it."""
    from magic_fast.config import MergeConfig
    from magic_fast.config.document import read_document, read_text

    given = {key: value for key, value in instead.items() if value is not None}
    if not given:
        return MergeConfig.from_file(path)
    folder = Path(path).absolute().parent
    document = read_document(read_text(Path(path)), path)
    return MergeConfig.from_dict(dict(document.data) | given, source=path, folder=folder)
