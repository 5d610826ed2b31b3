"""Several merges in one file, each using the results of earlier ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magic_fast.api.checkpoints.merge import merge_checkpoints
from magic_fast.config.document import read_text
from magic_fast.config.series import Merge, read_series
from magic_fast.engine import MergeReport
from magic_fast.engine.execute.registry import refuse_executor
from magic_fast.errors import InputError
from magic_fast.planning.outputs import check_out, is_whole


def merge_series(
    config: str | Path | Sequence[Merge],
    out: str | Path,
    *,
    intermediate: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> dict[str | None, MergeReport]:
    """Runs the merges of one file, as of mergekit-multi, in an order in which each finds what it
    uses.

    Args:
        config: path of a YAML file, or YAML text, of documents separated by ``---``. All but one
            have a ``name``, by which others list their result as a model. Or what
            ``read_series`` made of it.
        out: folder (or ``.safetensors`` file) for the result without a name.
        intermediate: folder for the results with a name, one sub-folder each; they stay. None: a
            folder beside ``out``, removed when ``out`` is whole.
        resume: continue where an interrupted run stopped; finished results are verified.
        settings: as of :func:`merge_checkpoints`, ``executor`` among them; they hold for every
            merge.

    Returns:
        Name → report, in the order of the merges; the last one's name is None.

    Raises:
        ConfigError, CheckpointError, InputError, OutputError, NonFiniteError: as
            :func:`merge_checkpoints`; every document is checked before the first merge, and
            what is finished stays for ``resume``.

    >>> merge_series("series.yml", "merged", intermediate="parts")  # doctest: +SKIP
    """
    refuse_executor(settings.get("executor", "auto"))
    merges = read_file(config) if isinstance(config, str | Path) else list(config)
    target = Path(check_out(out, resume))
    beside = target.absolute().with_name(f".{target.name}.intermediate")
    folder = Path(intermediate) if intermediate is not None else beside
    if resume and is_whole(target) and not folder.is_dir():
        raise InputError(
            f"resume for {str(target)!r}: expected the results that it was merged from in "
            f"{str(folder)!r}, got none there. It is finished; magic-fast verify reads it again."
        )
    places = {merge.name: folder / merge.name for merge in merges if merge.name is not None}
    if not resume:
        for place in places.values():
            check_out(place, False)
    folder.mkdir(parents=True, exist_ok=True)
    reports = {}
    for merge in merges:
        reports[merge.name] = merge_checkpoints(
            merge.config.with_places(places),
            target if merge.name is None else places[merge.name],
            resume=resume,
            **settings,
        )
    if intermediate is None:
        shutil.rmtree(folder)
    return reports


def read_file(config: str | Path, instead: Mapping[str, Any] | None = None) -> list[Merge]:
    """The merges of a YAML file, or of YAML text. Raises ConfigError."""
    if isinstance(config, str) and "\n" in config:
        return read_series(config, instead=instead)
    path = Path(config)
    return read_series(read_text(path), str(path), folder=path.absolute().parent, instead=instead)
