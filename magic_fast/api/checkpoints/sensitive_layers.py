"""``sensitive_layers_of_checkpoints``: the label-free measure on checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from magic_fast.api.tensors.feature_weights import wide_like
from magic_fast.api.tensors.merge import merge
from magic_fast.api.tensors.sensitive_layers import probe_module, sensitive_layers
from magic_fast.calibration import SensitivityReport, TensorFilter
from magic_fast.calibration.features.inputs import as_made
from magic_fast.calibration.samples import Sampling
from magic_fast.calibration.sensitivity.lists import TOP
from magic_fast.calibration.sensitivity.measure import Probe, Progress
from magic_fast.checkpoint import Checkpoint
from magic_fast.engine import common_shape
from magic_fast.engine.plan.devices import device_of
from magic_fast.errors import InputError
from magic_fast.huggingface import models as hf_models
from magic_fast.huggingface.data import batches_by_task
from magic_fast.planning.options import RunOptions
from magic_fast.planning.outputs import closing
from magic_fast.planning.sources import open_named
from magic_fast.planning.steps import input_of, read_tensor
from magic_fast.reference.sensitivity import enlarged


def sensitive_layers_of_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path] | None,
    data: Mapping[str, Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    merged: str | Path | None = None,
    by: str = "tensor",
    perturbation: float = 1.1,
    top: int = TOP,
    tensors: str | TensorFilter | Sequence[str] | None = None,
    together: int | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    samples: int = Sampling.samples,
    batch_size: int = Sampling.batch_size,
    max_length: int = Sampling.max_length,
    device: str = RunOptions.device,
    progress: Progress | None = None,
) -> SensitivityReport:
    """:func:`sensitive_layers` by the divergence of the outputs, on checkpoints of an architecture
    of transformers (extra ``hf``); the names in the report are the checkpoint's.

    One model is held, in float32; the base's tensors are read again each time they are needed.

    Args:
        base: folder that the experts started from.
        experts: folders, or a mapping of names to them, whose average is looked at; None where
            ``merged`` is given.
        data: task → path of samples (a ``.jsonl``, a ``.txt``, a folder of images), or batches.
        inputs: from a batch that is given to what the model is called with, as of
            :func:`calibrate_features`; files need none.
        merged: folder of a model that was merged already, to look at instead.
        samples, batch_size, max_length: of files, as in :func:`calibrate_checkpoints`.
        device: where the model runs.

    Everything else as in :func:`sensitive_layers`.

    >>> report = sensitive_layers_of_checkpoints(
    ...     "base", ["math", "code"], {"math": "math.jsonl", "code": "code.jsonl"}
    ... )  # doctest: +SKIP
    >>> report.save("sensitive.json")  # doctest: +SKIP
    """
    probe = Probe(by, perturbation, top, tensors, together, resamples, confidence, seed)
    if not data:
        raise InputError("data: expected samples of at least one task, got none.")
    if (merged is None) != bool(experts):
        raise InputError(
            "experts, merged: expected one of them, got "
            f"{'neither' if merged is None else 'both'}. Experts are averaged; a merged model is "
            "taken as it is."
        )
    device = device_of(device)
    paths = experts.values() if isinstance(experts, Mapping) else experts or ()
    others = [merged] if merged is not None else list(paths)
    names = [str(m) for m in (base, *others)]
    models = open_named(names)
    with closing(models):
        work = _Checkpoints(models, names, average=merged is None)
        sampling = Sampling(samples, batch_size, max_length)
        said: list[str] = []
        batches = batches_by_task(data, work.model, work.folder, sampling, inputs, said)
        report = work.run(probe, batches, device, progress)
        report.warnings += said
        return report


class _Checkpoints:
    """The averaged or merged model of checkpoints."""

    def __init__(
        self, models: Mapping[str, Checkpoint], names: Sequence[str], *, average: bool
    ) -> None:
        self._models, self._names, self._average = models, list(names), average
        like = models[names[0] if average else names[1]]
        self.folder = like.folder or like.path
        self.model = hf_models.build_structure(like)
        self._stored, self._missing = hf_models.stored_names(self.model, like)
        for stored in sorted(set(self._stored.values())):
            common_shape(stored, [input_of(models, m, stored) for m in names])

    def run(
        self, probe: Probe, data: Mapping[str, Any], device: str, progress: Progress | None
    ) -> SensitivityReport:
        if self._missing:
            return self._whole(probe, data, device, progress)
        values: dict[str, Tensor] = {}
        for stored in dict.fromkeys(self._stored.values()):
            values[stored] = self._merged(stored).to(device)
        hf_models.materialise(self.model, {n: values[s] for n, s in self._stored.items()})
        hf_models.move_buffers(self.model, device)
        del values
        factor = probe.perturbation

        def change(name: str) -> Tensor:
            own = self.model.get_parameter(name).detach()
            start = read_tensor(self._models, self._names[0], self._stored[name])
            return enlarged(start.to(own.device), own, factor)

        return probe_module(
            self.model, change, probe, data=data, progress=progress, stored=self._stored
        )

    def _merged(self, stored: str) -> Tensor:
        """In float32 (float64 where it is), on the CPU."""
        start, *rows = (read_tensor(self._models, m, stored) for m in self._names)
        if not self._average:
            return rows[0]
        out = wide_like({"": start})[""]
        if not start.is_floating_point():
            return out.copy_(start)
        averaged: Tensor = merge(start, rows, "average", out=out, name=stored)
        return averaged

    def _whole(
        self, probe: Probe, data: Mapping[str, Any], device: str, progress: Progress | None
    ) -> SensitivityReport:
        """By modules that transformers loads, where its names are not the checkpoint's."""
        base, *others = (hf_models.load_whole(self._models[n]).to(device) for n in self._names)
        own = {f: getattr(probe, f) for f in probe.__dataclass_fields__}
        report = sensitive_layers(
            base, others if self._average else None, data=data, inputs=as_made,
            merged=None if self._average else others[0], progress=progress, **own,
        )  # fmt: skip
        report.warnings.insert(
            0,
            f"transformers has other names for {len(self._missing)} parameters "
            f"({self._missing[0]}, …) than the checkpoint: all models were held in memory whole, "
            "and the names are those of transformers",
        )
        return report
