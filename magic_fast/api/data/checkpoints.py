"""``merge_checkpoints_by_data``: RegMean and Fisher merging of checkpoints, layer by layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from magic_fast.api.checkpoints.feature_model import experts_of
from magic_fast.api.checkpoints.merge import plan_checkpoints
from magic_fast.api.checkpoints.streamed_model import run_streamed
from magic_fast.api.data.merge import label_of, merge_by_data, shares_of
from magic_fast.api.data.settings import DataMethod, left_text
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.features.run import FeatureRun
from magic_fast.calibration.features.streamed import StreamedWeights, Take
from magic_fast.calibration.samples import Sampling
from magic_fast.calibration.statistics.grams import Grams, MatrixKey, Regression
from magic_fast.checkpoint import Checkpoint, open_checkpoint
from magic_fast.engine import MergePlan, MergeReport, Step
from magic_fast.engine.execute.whole import DTYPES, as_bytes, tensor_of
from magic_fast.engine.plan.devices import device_of
from magic_fast.engine.plan.plan import free_bytes
from magic_fast.errors import InputError, OutputError
from magic_fast.huggingface import models as hf_models
from magic_fast.huggingface.data import batches_by_task
from magic_fast.planning.options import ProgressCall, RunOptions
from magic_fast.planning.outputs import run_and_close
from magic_fast.planning.steps import input_of, read_tensor


def merge_checkpoints_by_data(
    experts: Sequence[str | Path],
    out: str | Path,
    data: Mapping[str, Any],
    method: str = "regmean",
    *,
    weights: Sequence[float] | None = None,
    off_diagonal: float | None = None,
    preset: str | None = None,
    samples: int = Sampling.samples,
    batch_size: int = Sampling.batch_size,
    max_length: int = Sampling.max_length,
    device: str = RunOptions.device,
    max_shard_size: int = RunOptions.max_shard_size,
    memory: int | None = None,
    nonfinite: str = RunOptions.nonfinite,
    progress: ProgressCall | None = None,
) -> MergeReport:
    """Checkpoints merged by what samples tell of each weight (docs/methods_data.md).

    Each expert's model (an architecture of transformers, extra ``hf``) runs on its own samples with
    one layer's weights in memory at a time. The sums that the merge needs, about twice the models'
    matrices in float32, lie on disk beside ``out`` meanwhile.

    Args:
        experts: folders of one architecture.
        out: folder to make.
        data: task → path of samples or batches, as :func:`calibrate_checkpoints` takes them; a task
            is the name of an expert's folder, or they go together in order.
        method: ``regmean``, or ``fisher`` by the mean squares of a matrix's inputs. Gradients need
            a model whole: :func:`merge_by_data`.
        weights, off_diagonal, preset: as of :func:`merge_by_data`.
        samples, batch_size, max_length: how many samples of a file, together in a batch, and
            tokens of each.
        device: where the models run.
        max_shard_size, memory, nonfinite, progress: as of :func:`merge_checkpoints`.

    Returns:
        What was done; its ``warnings`` say which share of the parameters is the experts' mean
        because no sample tells of it, and magic_fast.json by how many inputs each matrix was
        merged.

    >>> merge_checkpoints_by_data(["math", "code"], "merged",
    ...     {"math": "math.jsonl", "code": "code.jsonl"})  # doctest: +SKIP
    """
    if preset == "fusion_bench" and method == "fisher":
        raise InputError(
            "preset 'fusion_bench' for method 'fisher': expected None for checkpoints, "
            "because it takes gradients. Merge modules: mf.merge_by_data."
        )
    settings = DataMethod.of(method, preset, off_diagonal=off_diagonal)
    names = [str(e) for e in experts]
    if not names:
        raise InputError("experts: expected at least one checkpoint, got none.")
    config = {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in zip(names, shares_of(weights, len(names)), strict=True)
        ],
        "parameters": {"normalize": False},
    }
    target = device_of(device)
    plan = plan_checkpoints(config, out, max_shard_size=max_shard_size, memory=memory)
    options = RunOptions(
        device=target, max_shard_size=max_shard_size, memory=memory, nonfinite=nonfinite,
        progress=progress,
    )  # fmt: skip
    scratch = Path(plan.out).parent / f".{Path(plan.out).name}.sums"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        sampling = Sampling(samples, batch_size, max_length)
        job = _Job(plan, names, data, sampling, settings, target, scratch, weights)
        job.run()
        return run_and_close(plan, options)
    finally:
        for model in plan.models.values():
            model.close()
        shutil.rmtree(scratch, ignore_errors=True)


class _Job:
    """From the plan of the experts' mean to the plan of the merge by data."""

    def __init__(
        self,
        plan: MergePlan,
        names: Sequence[str],
        data: Mapping[str, Any],
        sampling: Sampling,
        settings: DataMethod,
        device: str,
        scratch: Path,
        weights: Sequence[float] | None,
    ) -> None:
        self._plan, self._names, self._settings = plan, list(names), settings
        self._device, self._scratch, self._weights = device, scratch, weights
        first = self._checkpoint(0)
        self._model = hf_models.build_structure(first)
        self._experts = experts_of(names, list(data))
        self._stored, self._missing = hf_models.stored_names(self._model, first)
        self._data = batches_by_task(data, self._model, first.folder or first.path, sampling)
        self._factors = shares_of(weights, len(names))

    def _checkpoint(self, number: int) -> Checkpoint:
        return self._plan.models[self._names[number]]

    def run(self) -> None:
        """Puts what was found into the plan."""
        self._scratch.mkdir(parents=True)
        if self._missing:
            self._whole()
            return
        sums = _Sums(self._scratch)
        regression = Regression(self._settings.scale_off_diagonal, sums.room)
        for task, k in self._experts.items():
            grams = Grams(sums.room)
            self._run(task, k, grams)

            def change(name: str, number: int = k) -> Tensor:
                return self._read(number, name).float() - self._mean(name, sums)

            regression.add(grams.found, self._factors[k], change)
        self._write(regression, sums)

    def _run(self, task: str, number: int, grams: Grams) -> None:
        def read(which: int, name: str, take: Take, rows: slice | None) -> Tensor:
            source = input_of(self._plan.models, self._names[number], self._stored[name])
            data = as_bytes(take(source.nbytes))
            self._checkpoint(number).read_into(source.info.name, data)
            return tensor_of(source, data)

        def make(model: nn.Module, weights: StreamedWeights) -> FeatureRun:
            return FeatureRun(
                model, weights, {task: 0}, FeatureCalibration(), device=self._device,
                gatherer=grams,
            )  # fmt: skip

        model = hf_models.build_structure(self._checkpoint(number))
        run_streamed(
            model, self._checkpoint(number), self._stored, read, self._device, make,
            {task: self._data[task]}, self._plan.warnings,
        )  # fmt: skip

    def _read(self, number: int, name: str) -> Tensor:
        return read_tensor(self._plan.models, self._names[number], self._stored[name])

    def _mean(self, name: str, sums: _Sums) -> Tensor:
        found, fresh = sums.place(("mean", name), self._shape(name), torch.float32)
        if fresh:
            for number, factor in enumerate(self._factors):
                found.add_(self._read(number, name).float(), alpha=factor)
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint(0).resolve(self._stored[name]).shape

    def _write(self, regression: Regression, sums: _Sums) -> None:
        """Writes the matrices beside OUT, a file for each parameter, and lets the plan copy
        them."""
        by_name: dict[str, list[MatrixKey]] = {}
        for key in regression.matrices():
            by_name.setdefault(key[0], []).append(key)
        dtypes = {step.name: step.dtype for step in self._plan.steps}
        folder, files = self._scratch / "merged", dict[str, str]()
        folder.mkdir()
        told: dict[str, int] = {}
        for name, keys in by_name.items():
            merged = self._mean(name, sums)
            for key in keys:
                regression.solve(key, merged)
                told[label_of(key)] = regression.positions[key]
            stored = self._stored[name]
            files[stored] = f"model-{len(files) + 1:05d}.safetensors"
            save_file({stored: merged.to(DTYPES[dtypes[stored]])}, str(folder / files[stored]))
            sums.drop(name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        total = sum(s.numel for s in self._plan.steps if s.recipe is not None)
        seen = sum(s.numel for s in self._plan.steps if s.name in files)
        self._replace(folder, told, 1 - seen / total if total else 0.0)

    def _replace(self, folder: Path, told: Mapping[str, int], left: float) -> None:
        """Copies of the tensors in a folder instead of the steps that would make them."""
        key = str(folder)
        merged = open_checkpoint(key)
        plan = self._plan
        plan.models = {**plan.models, key: merged}
        plan.steps = [
            Step(s.name, s.shape, s.dtype, None, (input_of(plan.models, key, s.name),), copy=True)
            if s.name in merged
            else s
            for s in plan.steps
        ]
        off = {"off_diagonal": self._settings.off_diagonal}
        plan.method = self._settings.name
        plan.warnings.append(left_text(left))
        plan.settings = {
            **plan.settings, "method": plan.method, **(off if plan.method == "regmean" else {}),
            "positions": dict(told), "left": left,
        }  # fmt: skip

    def _whole(self) -> None:
        """By modules that transformers loads, where it has other names than the checkpoints."""
        self._plan.warnings.append(
            f"transformers has other names for {len(self._missing)} parameters "
            f"({self._missing[0]}, …) than the checkpoint: all models are held in memory whole"
        )
        models = [hf_models.load_whole(self._checkpoint(k)) for k in range(len(self._names))]
        by_task = {task: models[k] for task, k in self._experts.items()}
        factors = [self._factors[k] for k in self._experts.values()]
        off = self._settings.off_diagonal if self._settings.name == "regmean" else None
        merged, report = merge_by_data(
            by_task, self._data, self._settings.name, weights=factors, off_diagonal=off
        )
        merged.save_pretrained(str(self._scratch / "merged"))
        self._replace(self._scratch / "merged", report.positions, report.left)


class _Sums:
    """Tensors on disk, in memory as far as the system keeps them there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[object, tuple[Path, Tensor]] = {}

    def room(self, key: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.place(key, shape, dtype)[0].zero_()

    def place(self, key: object, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
        """The tensor of a key, and whether it is new (all 0)."""
        if key in self._files:
            return self._files[key][1], False
        path = self._folder / f"{len(self._files)}.sum"
        size = torch.Size(shape).numel()
        free = free_bytes(str(self._folder))
        if free < size * dtype.itemsize:
            raise OutputError(
                f"disk for the sums of a merge beside {str(self._folder)!r}: expected "
                f"{size * dtype.itemsize} more free bytes, got {free}. Free some space, or write "
                "elsewhere."
            )
        with open(path, "wb") as file:
            file.truncate(size * dtype.itemsize)
        made = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        self._files[key] = path, made
        return made, True

    def drop(self, name: str) -> None:
        """The files of a parameter, which is written."""
        for key in [k for k in self._files if _is_of(k, name)]:
            self._files.pop(key)[0].unlink()


def _is_of(key: object, name: str) -> bool:
    assert isinstance(key, tuple)
    own = key[1]
    return own == name or (isinstance(own, tuple) and own[0] == name)
