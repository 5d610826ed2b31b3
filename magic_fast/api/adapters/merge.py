"""``merge_adapters``: LoRA or IA3 adapters of one base merged into one of their kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magic_fast.adapters import Adapter, open_adapter
from magic_fast.adapters.joined import in_one_convention
from magic_fast.adapters.opening import CONFIG_NAME, WEIGHTS_NAME
from magic_fast.api.adapters.formed import (
    flat_modules,
    is_formed,
    merge_formed,
    refuse_other_sizes,
)
from magic_fast.api.adapters.inputs import Asked, base_copies, coefficients_of, refuse_unlike
from magic_fast.api.adapters.modules import merge_module, refuse_calibration_of_vectors
from magic_fast.api.adapters.written import write
from magic_fast.api.options import Calibrate, MergeOptions, Weights
from magic_fast.api.results import AdapterReport
from magic_fast.api.tensors.resolve import Call, numbers_of, resolve
from magic_fast.checkpoint import (
    open_checkpoint,
)
from magic_fast.engine import Progress
from magic_fast.engine.sources.adapted import AdaptedCheckpoint
from magic_fast.errors import InputError
from magic_fast.ops import refuse_backend
from magic_fast.planning.outputs import check_out

ON = ("weights", "factors")
OUT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PLAIN = (str, int, float, bool, list)  # what a recipe says in YAML


def merge_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    method: str = "average",
    *,
    weights: Weights = None,
    scale: float | None = None,
    calibrate: Calibrate = None,
    rank: int | None = None,
    on: str = "weights",
    dtype: str | None = None,
    base: str | Path | None = None,
    base_model: str | None = None,
    preset: str | None = None,
    backend: str | None = None,
    masks: Sequence[Mapping[str, Tensor]] | None = None,
    seed: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    **method_params: Any,
) -> AdapterReport:
    """Adapters of one base merged into one adapter of the same kind.

    A LoRA changes a weight by τ = s·B·A. Methods that add the τ_k up (``average``, ``linear``,
    ``task_arithmetic``) are exact: the factors are stacked to rank Σ r_k, or brought to the nearest
    of ``rank`` by QR and the SVD of a small core; ξ of WSC comes from products of the factors and
    scales rows of B. No τ_k is formed. Every other method sees the τ_k of one module at a time, and
    its result is brought to ``rank``, and so are changes of other forms: DoRA, LoHa, LoKr and
    differences of matrices (vectors stay differences). IA3 multiplies activations by vectors l:
    methods see l − 1.

    Args:
        adapters: K folders of PEFT or files of kohya or diffusers, all of one kind and naming, or
            of one diffusion model that is known: those meet in the names of the first. Their ranks
            may differ, and the modules too: where one has no module, its τ is 0.
        out: new folder, or, of kohya and diffusers, a ``.safetensors`` file.
        method: of :func:`merge`, with its parameters; the result has the scaling in its factors.
        weights, scale: as of :func:`merge`.
        calibrate: None, ``"wsc"``, a variant or settings; a weight is called ``MODULE.weight``, and
            its rows are the module's outputs. Entries of an IA3 vector scale rows: the row's length
            cancels; vectors of inputs (``feedforward_modules``) are left as merged.
        rank: of the result, at most; None: the exact one of methods that add up, else the largest
            of the adapters. The report says what is lost.
        on: ``"weights"``: methods see the τ_k. ``"factors"``: A and B are merged by themselves as
            PEFT does it (under preset ``peft``; ranks must agree): products of unlike adapters then
            come in.
        dtype: of the result, ``float32``, ``float16`` or ``bfloat16``; None: what those of the
            factors promote to.
        base: the model that all were trained on, a checkpoint: DoRA's change is of its weights, and
            it says what is a convolution in the files of LoHa and LoKr.
        base_model: what all were trained on, where PEFT's configurations or kohya's headers differ
            in its spelling.
        preset, backend, seed: as of :func:`merge`. IA3 under preset ``peft``: Σ w·l.
        masks: of each adapter, name → keep mask: ``MODULE.weight``; on factors, and of IA3, the
            keys of the first adapter's file.
        progress: called with each module that is done.

    Returns:
        What became of each module.

    Raises:
        CheckpointError: no adapter, of another kind than the first, or of a form that is not s·B·A
            or another that adds up (OFT, VeRA, …); tensors that were trained whole.
        InputError: other base models or shapes; parameters that do not fit.
        NonFiniteError: NaN or infinity in an adapter, or an overflow of ``dtype``.
        OutputError: ``out`` is in the way, or cannot be written.

    >>> report = merge_adapters(["adapters/french", "adapters/code"], "adapters/both", "ties",
    ...                         density=0.3, rank=16, calibrate="wsc")  # doctest: +SKIP
    >>> max(module.lost for module in report.modules)  # doctest: +SKIP
    0.21
    """
    paths = [] if isinstance(adapters, str | os.PathLike) else list(adapters or ())
    if not paths or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise InputError(f"adapters: expected a list of paths, got {adapters!r}.")
    _refuse_values(rank, on, dtype, masks, len(paths))
    given = {"weights": numbers_of(weights), "scale": scale, **method_params}
    call = resolve(
        method,
        given,
        len(paths),
        MergeOptions(calibrate=calibrate, preset=preset, backend=backend, masks=masks, seed=seed),
    )
    if call.over_model:
        way = "Pass scope='tensor'" if "scope" in call.arguments else "Choose another preset"
        raise InputError(
            f"method {method!r} under preset {call.preset!r} for adapters: expected thresholds "
            f"tensor by tensor, got one over the model. {way}."
        )
    if backend is not None:
        refuse_backend(backend, "cpu")
    opened: list[Adapter] = []
    model = None
    try:
        for path in paths:
            opened.append(open_adapter(path))
        joined, notes = in_one_convention(opened)
        named = refuse_unlike(joined, base_model)
        target = _check_out(out, joined[0])
        _refuse_misuse(joined, call, rank, on)
        copies = base_copies(joined)
        model = None if base is None else open_checkpoint(base)
        options = {
            "method": method, "scale": scale, "preset": preset, "backend": backend, "seed": seed,
            **method_params,
        }  # fmt: skip
        own = call.arguments.get("weights")
        given = options | ({} if own is None else {"weights": list(own)})
        asked = Asked(
            joined,
            None if own is None else tuple(own),
            options,
            masks,
            call.calibration,
            coefficients_of(call.recipe, len(joined), given | {"backend": "torch"}),
            rank,
            on,
            None if dtype is None else OUT_DTYPES[dtype],
            None if model is None else [AdaptedCheckpoint(model, a) for a in opened],
        )
        report = AdapterReport(target, opened[0].kind, opened[0].style, method, warnings=notes)
        tensors = _run(asked, report, progress) | copies
        settings = {
            **given, "calibrate": None if calibrate is None else str(calibrate), "rank": rank,
            "on": on, "dtype": dtype, "base": base and os.fspath(base),
        }  # fmt: skip
        said = {n: x for n, x in settings.items() if x is not None and isinstance(x, _PLAIN)}
        recipe = {"merge_adapters": {"adapters": [a.path for a in opened], **said}}
        write(target, joined, report, tensors, named, recipe)
        return report
    finally:
        if model is not None:
            model.close()
        for adapter in opened:
            adapter.close()


def _refuse_values(
    rank: object, on: str, dtype: str | None, masks: Sequence[object] | None, num_adapters: int
) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise InputError(f"rank: expected a whole number of at least 1, got {rank!r}.")
    for name, value, allowed in (("on", on, ON), ("dtype", dtype, (*OUT_DTYPES, None))):
        if value not in allowed:
            words = ", ".join(repr(word) for word in allowed if word)
            raise InputError(f"{name}: expected one of {words}, got {value!r}.")
    if masks is not None and not (
        len(masks) == num_adapters and all(isinstance(m, Mapping) for m in masks)
    ):
        raise InputError(f"masks: expected {num_adapters} mappings from names, got {masks!r:.60}.")


def _check_out(out: str | Path, first: Adapter) -> str:
    if first.style == "peft" and Path(out).suffix == ".safetensors":
        raise InputError(
            f"output {str(out)!r}: expected a folder, which PEFT's adapters are, got the name of a "
            f"file. Name the folder; it gets {WEIGHTS_NAME} and {CONFIG_NAME}."
        )
    return check_out(out, False)


def _refuse_misuse(opened: Sequence[Adapter], call: Call, rank: int | None, on: str) -> None:
    """Refuses settings that would do nothing, or mean nothing, for these adapters."""
    is_ia3 = opened[0].kind == "ia3"
    if is_ia3 and (on == "factors" or rank is not None):
        raise InputError(
            "rank and on='factors' for IA3: expected neither, got one. Its vectors have no rank "
            "and no factors: leave it out."
        )
    if on == "factors" and call.preset != "peft":
        raise InputError(
            "on='factors': expected preset 'peft', whose rule it is, got "
            f"{call.preset!r}. Pass preset='peft', or leave out on."
        )
    formed = [m for a in opened for m in a.modules.values() if m.form is not None]
    if on == "factors" and formed and formed[0].form is not None:
        raise InputError(
            f"on='factors' for '{formed[0].name}': expected A and B only, got "
            f"{formed[0].form.words}. Leave out on, and pass a rank."
        )
    if on == "factors" and (rank is not None or call.calibration is not None):
        raise InputError(
            "rank and calibrate with on='factors': expected neither, got one. They are about the "
            "changes of weights: leave out on, or them."
        )
    if call.calibration is None:
        return
    if is_ia3:
        refuse_calibration_of_vectors(call.calibration)
        if call.preset == "peft":
            raise InputError(
                "calibrate for IA3 under preset 'peft': expected none, got one. That preset adds "
                "vectors up whole, not what they change: leave one of the two out."
            )
    call.calibration.check_names(f"{name}.weight" for a in opened for name in a.modules)


def _run(
    asked: Asked, report: AdapterReport, progress: Callable[[Progress], None] | None
) -> dict[str, Tensor]:
    """All tensors of the result by their keys; fills in the report."""
    names = list(dict.fromkeys(name for a in asked.adapters for name in a.modules))
    sizes = {n: sum(a.modules[n].nbytes for a in asked.adapters if n in a.modules) for n in names}
    found: dict[str, Tensor] = {}
    done = 0
    for name in names:
        own = {k: a.modules[name] for k, a in enumerate(asked.adapters) if name in a.modules}
        if is_formed(own):
            refuse_other_sizes(asked, name, own)
            tensors, module = merge_formed(asked, name, own)
        else:
            tensors, module = merge_module(asked, name)
        found |= tensors
        report.modules.append(module)
        done += sizes[name]
        if progress is not None:
            progress(Progress(done, sum(sizes.values()), name))
    flat = flat_modules(asked)
    if flat:
        report.warnings.append(
            f"{len(flat)} modules are written as matrices, first {flat[0]}: their files do not say "
            "whether they are convolutions; pass base where they are"
        )
    some = [m.name for m in report.modules if len(m.adapters) < len(asked.adapters)]
    if some:
        report.warnings.append(
            f"{len(some)} of {len(names)} modules are not in every adapter, first {some[0]}; "
            "those without one change nothing there"
        )
    return found
