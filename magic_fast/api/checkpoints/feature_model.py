"""FSC and DSC of checkpoints on disk: the merged model runs with one layer's weights at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.api.checkpoints.streamed_model import new_buffer, run_streamed
from magic_fast.api.results import FeatureReport
from magic_fast.api.tensors.calibrate_features import calibrate_features, take_features
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.features.batches import experts_by_task
from magic_fast.calibration.features.inputs import Inputs, as_made
from magic_fast.calibration.features.run import FeatureRun
from magic_fast.calibration.features.streamed import StreamedWeights, Take
from magic_fast.calibration.samples import Sampling
from magic_fast.calibration.sensitivity.lists import is_sensitive, unknown_names
from magic_fast.checkpoint import Checkpoint, open_checkpoint
from magic_fast.engine import Progress, Step, common_shape
from magic_fast.engine.execute.whole import as_bytes, tensor_of
from magic_fast.engine.plan.step import FLOATS
from magic_fast.huggingface import models as hf_models
from magic_fast.huggingface.data import batches_by_task
from magic_fast.planning.steps import input_of
from magic_fast.recipe import Recipe


class FeatureSpace:
    """What FSC of checkpoints needs, checked before anything runs.

    Args:
        models: reference → checkpoint.
        names: references of the merged model, the base, and the experts.
        data: task → path of samples, or batches as :func:`calibrate_features` takes them.
        settings: of FSC.
        sampling: how much of files is used.
        device: where the model runs.
        progress: called after each layer.
        inputs: from a batch that is given to what the model is called with.
        tasks: names of the experts; None: those of their folders, where tasks have them.

    Attributes:
        models: the checkpoints that the steps read, by reference.
    """

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        names: Sequence[str],
        data: Mapping[str, Any],
        settings: FeatureCalibration,
        sampling: Sampling,
        device: str,
        progress: Callable[[Progress], None] | None = None,
        inputs: Inputs | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        self.models, self._names = dict(models), list(names)
        self._settings, self._device, self._progress = settings, device, progress
        merged = self._merged
        self._model = hf_models.build_structure(merged)
        self._stored, self._missing = hf_models.stored_names(self._model, merged)
        self._experts = experts_of(names[2:], list(data), tasks)
        for stored in sorted(set(self._stored.values())):
            common_shape(stored, [input_of(self.models, m, stored) for m in self._names])
        known = [
            *(n for n, _ in self._model.named_modules()),
            *(n for n, _ in self._model.named_parameters(remove_duplicate=False)),
        ]
        if settings.sensitive is not None:
            chosen = self._in_model(settings.sensitive, known)
            settings = self._settings = replace(settings, sensitive=chosen)
        settings.check_names(known)
        folder = merged.folder or merged.path
        self.warnings: list[str] = []
        self.data = batches_by_task(data, self._model, folder, sampling, inputs, self.warnings)
        self.bytes_read = 0

    @property
    def _merged(self) -> Checkpoint:
        return self.models[self._names[0]]

    def _in_model(self, chosen: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
        """Names of the checkpoint as the model has them."""
        unknown = set(unknown_names(chosen, known))
        found: list[str] = []
        for name in chosen:
            inside = [own for own, stored in self._stored.items() if is_sensitive(stored, {name})]
            found += inside if name in unknown and inside else [name]
        return tuple(found)

    def digest(self) -> str:
        """SHA-256 of the samples."""
        found = hashlib.sha256()
        for task, batches in self.data.items():
            found.update(repr((task, len(batches))).encode())
            for batch in batches:
                values = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
                for name, value in values:
                    found.update(repr((name, getattr(value, "shape", None))).encode())
                    if isinstance(value, Tensor):
                        found.update(
                            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                        )
        return found.hexdigest()

    def take_merged(self, checkpoint: Checkpoint) -> None:
        """Another checkpoint of the same names in place of the merged one (DSC's middle)."""
        self.models[self._names[0]] = checkpoint

    def steps(
        self, like: Mapping[str, Checkpoint], scratch: str
    ) -> tuple[list[Step], FeatureReport]:
        """What makes the calibrated checkpoint, in the names and dtypes of the merged one in
        ``like``; and what was found of each layer."""
        steps, report = self._found(like, scratch)
        self.warnings[:0] = report.warnings
        return steps, report

    def _found(
        self, like: Mapping[str, Checkpoint], scratch: str
    ) -> tuple[list[Step], FeatureReport]:
        if self._missing:
            self.warnings.append(
                f"transformers has other names for {len(self._missing)} parameters "
                f"({self._missing[0]}, …) than the checkpoint: all models are held in memory whole"
            )
            return self._whole(like, scratch)
        run = self._run()
        factors: dict[str, tuple[Tensor, int | None]] = {}
        for name, found in run.factors().items():
            factors[self._stored[name]] = found
        dtypes = {n: like[self._names[0]].resolve(n).dtype for n in like[self._names[0]]}
        steps = [self._step(name, dtype, factors.get(name)) for name, dtype in dtypes.items()]
        report = FeatureReport()
        take_features(run, report)
        return steps, report

    def _step(self, name: str, dtype: str, found: tuple[Tensor, int | None] | None) -> Step:
        merged, base = self._names[:2]
        own = input_of(self.models, merged, name)
        copied = Step(name, own.info.shape, dtype, None, (own,), copy=True)
        if found is None or dtype not in FLOATS or bool((found[0] == 1).all()):
            return copied
        step = replace(copied, base=input_of(self.models, base, name), copy=False)
        factor, axis = found
        if not factor.dim():
            return replace(step, recipe=Recipe(weights=(1.0,), scale=float(factor.float())))
        arguments = {"factor": tuple(factor.float().tolist()), "axis": axis}
        return replace(step, method="scale_channels", arguments=arguments)

    def _run(self) -> FeatureRun:
        def make(model: nn.Module, weights: StreamedWeights) -> FeatureRun:
            return FeatureRun(
                model, weights, self._experts, self._settings, self._told(), self._device
            )

        return run_streamed(
            self._model, self._merged, self._stored, self._read, self._device, make, self.data,
            self.warnings,
        )  # fmt: skip

    def _told(self) -> Callable[[int, int, str], None] | None:
        """Progress in bytes of the models, which is what takes the time to read."""
        report = self._progress
        if report is None:
            return None
        total = sum(self.models[m].nbytes for m in self._names)

        def told(done: int, stations: int, name: str) -> None:
            report(Progress(total * done // max(1, stations), total, name))

        return told

    def _read(
        self, which: int, name: str, take: Take = new_buffer, rows: slice | None = None
    ) -> Tensor:
        reference = self._names[which]
        source = input_of(self.models, reference, self._stored[name])
        start, count = 0, source.nbytes
        if rows is not None:
            row = source.nbytes // source.shape[0]
            start, count = rows.start * row, (rows.stop - rows.start) * row
            source = replace(source, shape=(rows.stop - rows.start, *source.shape[1:]))
        self.bytes_read += count
        data = as_bytes(take(count))
        self.models[reference].read_into(source.info.name, data, start, count)
        return tensor_of(source, data)

    def _whole(
        self, like: Mapping[str, Checkpoint], scratch: str
    ) -> tuple[list[Step], FeatureReport]:
        """By modules that transformers loads; what it saves is what is copied."""
        models = [hf_models.load_whole(self.models[name]) for name in self._names]
        merged, base, *experts = models
        own = {f: getattr(self._settings, f) for f in self._settings.__dataclass_fields__}
        by_task = {task: experts[k] for task, k in self._experts.items()}
        calibrated, report = calibrate_features(
            base, by_task, merged, self.data, inputs=as_made, out=merged, **own
        )
        calibrated.save_pretrained(scratch)
        saved = self.models[scratch] = open_checkpoint(scratch)
        wanted = like[self._names[0]]
        steps = []
        for name in wanted:
            source = input_of(self.models, scratch if name in saved else self._names[0], name)
            steps.append(
                Step(name, source.shape, wanted.resolve(name).dtype, None, (source,), copy=True)
            )
        return steps, report


def experts_of(
    references: Sequence[str], tasks: Sequence[str], given: Sequence[str] | None = None
) -> dict[str, int]:
    """Task → expert: by the expert's name in ``given``, or that of its folder, or in order where
    no task is one."""
    names = [Path(r).name for r in references]
    if given is not None:
        return dict(zip(tasks, experts_by_task(len(given), given, tasks), strict=True))
    if len(set(names)) == len(names) and set(tasks) & set(names):
        return dict(zip(tasks, experts_by_task(len(names), names, tasks), strict=True))
    return dict(zip(tasks, experts_by_task(len(names), None, tasks), strict=True))
