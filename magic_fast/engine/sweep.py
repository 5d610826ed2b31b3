"""Many merges of the same checkpoints from one read: every unit of work is loaded once, merged in
every combination from memory, and written into one output folder for each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from magic_fast.checkpoint import OutputFolder
from magic_fast.checkpoint.fs import REAL
from magic_fast.checkpoint.io_errors import writing
from magic_fast.checkpoint.staging import Staging
from magic_fast.engine.execute.pipeline import Pipeline
from magic_fast.engine.execute.scales import (
    LEAST,
    merge_scales,
    shares,
    unscaled,
    worth_sharing,
)
from magic_fast.engine.execute.search import SharedSearch
from magic_fast.engine.execute.streamed import Loaded, Loader, Writer
from magic_fast.engine.execute.variants import Selecting, Variant, copy_of
from magic_fast.engine.output.identity import identity_of
from magic_fast.engine.output.journal import NoJournal
from magic_fast.engine.output.recheck import refuse_changed
from magic_fast.engine.output.report import MergeReport, Progress
from magic_fast.engine.plan.memory import DEFAULT_MEMORY, SLOTS, Slot, aligned, slot_bytes
from magic_fast.engine.plan.modes import Mode, modes
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.engine.plan.step import Step, over_model
from magic_fast.engine.plan.units import (
    Piece,
    Unit,
    cut,
    element_size,
    fits,
    grain,
    group,
    piece_bytes,
)
from magic_fast.engine.run import Finish, evidence, fill_report, peak_rss
from magic_fast.ops.job import Job, Stats, View
from magic_fast.recipe import Recipe, Selection


class Sweep:
    """One execution of several plans over the same inputs.

    Args:
        plans: the same tensors from the same sources, in the same order.
        nonfinite: ``error`` or ``propagate``.
        progress: called after each unit.
    """

    def __init__(
        self,
        plans: Sequence[MergePlan],
        nonfinite: str,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plans, self._nonfinite, self._progress = plans, nonfinite, progress
        self._slot_bytes = slot_for(plans)
        self._variants = self._distinct()
        self._selections: dict[str, dict[Recipe, Selection]] = {}
        self._free: list[Slot] = []
        self._lock = threading.Lock()
        self._done = 0
        self.bytes_read = 0

    def _distinct(self) -> dict[str, list[Variant]]:
        """Tensor → the ways to merge it that differ."""
        ways = [
            modes(p.steps, self._slot_bytes, p.device, p.backend, searches=False)
            for p in self._plans
        ]
        found: dict[str, list[Variant]] = {}
        for n, step in enumerate(self._plans[0].steps):
            same: dict[str, list[int]] = {}
            for c, plan in enumerate(self._plans):
                same.setdefault(repr(plan.steps[n]), []).append(c)
            found[step.name] = [
                Variant(self._plans[c[0]].steps[n], ways[c[0]][step.name][0], c[0], tuple(c))
                for c in same.values()
            ]
        return found

    def execute(self, outputs: Sequence[OutputFolder]) -> tuple[list[Writer], Pipeline]:
        """All tensors of all combinations merged and written; no output is final yet."""
        every = [v for variants in self._variants.values() for v in variants]
        self._streamed = Selecting(self._nonfinite, self._selections)
        self._streamed.share(self._variants)
        self._workers = {}
        if any(v.mode is Mode.TORCH for v in every):
            from magic_fast.engine.execute.whole import Worker

            torch_plans = {v.plan for v in every if v.mode is Mode.TORCH}
            self._workers = {c: Worker(self._plans[c], self._nonfinite) for c in torch_plans}
        journal = NoJournal()
        self._writers = [Writer(output, journal, self._nonfinite) for output in outputs]
        used = SLOTS if any(v.mode is Mode.STREAM for v in every) else 0
        self._total = self._expected_bytes()
        slots = [Slot(self._slot_bytes) for _ in range(used)]
        with Loader(self._plans[0].models, outputs[0], journal) as loader:
            self._pipeline = Pipeline(loader, self._compute, self._store, slots)
            for worker in self._workers.values():
                worker.prepare()
            self._pipeline.run(self._units())
        return self._writers, self._pipeline

    def _expected_bytes(self) -> int:
        reads = sum(i.nbytes for s in self._plans[0].steps for i in s.inputs)
        return reads + sum(plan.output_bytes for plan in self._plans)

    # ---- what to read ----
    def _units(self) -> Iterator[Unit]:
        yield from self._model_scope()
        pending: list[Piece] = []
        for variants in self._variants.values():
            if any(v.mode is not Mode.STREAM for v in variants):
                yield from self._flush(pending)
                step = variants[0].step
                torch = all(v.mode is Mode.TORCH for v in variants)
                yield Unit((Piece(step, 0, step.numel),), streamed=False, torch=torch)
                continue
            steps = [v.step for v in variants]
            searched = [s for s in steps if selects(s) and not over_model(s)]
            if searched and not fits(steps[0], self._slot_bytes):
                yield from self._flush(pending)
                yield from self._search([[s] for s in searched])
            widest = max(steps, key=grain) if steps[0].numel else steps[0]
            pieces = cut(widest, self._slot_bytes)
            pending += pieces
            if len(pieces) > 1:
                yield from self._flush(pending)
        yield from self._flush(pending)

    def _flush(self, pending: list[Piece]) -> Iterator[Unit]:
        for pieces in group(pending, self._slot_bytes):
            yield Unit(pieces)
        pending.clear()

    def _model_scope(self) -> Iterator[Unit]:
        """Thresholds over the whole model, of all combinations that trim the same tensors at
        once."""
        groups: dict[tuple[str, ...], list[list[Step]]] = {}
        for plan in self._plans:
            ways = modes(plan.steps, self._slot_bytes, plan.device, plan.backend)
            steps = [s for s in plan.steps if selects(s) and over_model(s)]
            steps = sorted(
                (s for s in steps if ways[s.name][0] is not Mode.TORCH), key=lambda s: s.name
            )
            if steps:
                groups.setdefault(tuple(s.name for s in steps), []).append(steps)
        for found in groups.values():
            yield from self._search(found)

    def _search(self, ways: Sequence[Sequence[Step]]) -> Iterator[Unit]:
        """The selections of the same tensors in several ways, in one pass as a rule."""
        distinct = list({_recipes(steps): steps for steps in ways}.values())
        search = SharedSearch(distinct, self._slot_bytes, self._pipeline.wait)
        yield from search.units()
        for steps, found in zip(distinct, search.all_selections(), strict=True):
            for step, recipe in zip(steps, _recipes(steps), strict=True):
                self._selections.setdefault(step.name, {})[recipe] = found[step.name]

    # ---- what to do with it ----
    def _compute(self, unit: Unit) -> None:
        pieces: list[Loaded] = unit.buffers["pieces"]
        self.bytes_read += sum(n.nbytes for p in pieces for *_, n in p.inputs)
        if unit.search is not None:
            self._streamed(unit)
            return
        slot = unit.buffers["out"] = self._room(pieces)
        done: dict[tuple[int, int], tuple[Loaded, Stats | None]] = {}
        direct: list[tuple[tuple[int, int], Loaded]] = []
        for n, one in enumerate(pieces):
            variants = self._variants[one.piece.step.name]
            arrays = self._arrays(one) if any(v.mode is not Mode.TORCH for v in variants) else []
            jobs = []
            for m, variant in enumerate(variants):
                if variant.mode is Mode.TORCH:
                    done[n, m] = self._torch(one, variant)
                else:
                    jobs.append(((n, m), copy_of(one, variant.step, arrays, slot)))
            direct += self._shared(jobs, done)
        batch = Unit(tuple(one.piece for _, one in direct))
        batch.buffers["pieces"] = [one for _, one in direct]
        self._streamed(batch)
        for (key, one), stats in zip(direct, batch.buffers["stats"], strict=True):
            done[key] = one, stats
        unit.buffers["done"] = done
        self._tell(unit)

    def _tell(self, unit: Unit) -> None:
        self._done += unit.input_bytes + unit.output_bytes * len(self._plans)
        if self._progress is not None:
            name = unit.pieces[-1].step.name
            self._progress(Progress(min(self._done, self._total), self._total, name))

    def _arrays(self, one: Loaded) -> list[View]:
        """The inputs, rounded to the configuration's dtype where they are of another; once."""
        if one.piece.step.copy:
            return [view for _, view, _ in one.inputs]
        return self._streamed.arrays(one)

    def _shared(
        self,
        jobs: Sequence[tuple[tuple[int, int], Loaded]],
        done: dict[tuple[int, int], tuple[Loaded, Stats | None]],
    ) -> list[tuple[tuple[int, int], Loaded]]:
        """Merges those of one piece that may share their work; returns the others."""
        sharing: list[tuple[tuple[int, int], Loaded, Job]] = []
        for key, one in jobs:
            step = one.piece.step
            if step.copy or step.merged is not None or one.piece.count < LEAST:
                continue
            job = self._streamed.job(one)
            if shares(job):
                sharing.append((key, one, job))
        if not worth_sharing([job for *_, job in sharing]):
            return list(jobs)
        known = self._selections.setdefault(sharing[0][1].piece.step.name, {})
        found = merge_scales([job for *_, job in sharing], known)
        if found is None:
            return list(jobs)
        for (key, one, _), stats in zip(sharing, found, strict=True):
            done[key] = one, stats
        return [entry for entry in jobs if entry[0] not in done]

    def _torch(self, one: Loaded, variant: Variant) -> tuple[Loaded, Stats | None]:
        own = Loaded(Piece(variant.step, one.piece.start, one.piece.stop))
        own.inputs = one.inputs
        unit = Unit((own.piece,), streamed=False, torch=True, buffers={"pieces": [own]})
        self._workers[variant.plan](unit)
        return own, unit.buffers["stats"][0]

    def _room(self, pieces: Sequence[Loaded]) -> Slot:
        """Memory for every output of a unit; used again once they are written."""
        needed = 0
        for one in pieces:
            for variant in self._variants[one.piece.step.name]:
                needed += aligned(one.piece.byte_range(variant.step.dtype)[1])
        with self._lock:
            slot = self._free.pop() if self._free else None
        if slot is None or slot.size < needed:
            return Slot(needed)
        slot.reset()
        return slot

    def _store(self, unit: Unit) -> None:
        done: dict[tuple[int, int], tuple[Loaded, Stats | None]] = unit.buffers["done"]
        shares_of: list[list[tuple[Loaded, Stats | None]]] = [[] for _ in self._plans]
        for n, m in sorted(done):
            variant = self._variants[unit.pieces[n].step.name][m]
            for c in variant.combinations:
                shares_of[c].append(done[n, m])
        for writer, share in zip(self._writers, shares_of, strict=True):
            part = Unit(tuple(one.piece for one, _ in share))
            part.buffers["pieces"] = [one for one, _ in share]
            part.buffers["stats"] = [stats for _, stats in share]
            writer(part)
        with self._lock:
            self._free.append(unit.buffers["out"])


def selects(step: Step) -> bool:
    """Whether something over the whole tensor, or model, decides what stays of it."""
    return not step.copy and step.recipe is not None and step.recipe.needs_select


def _recipes(steps: Sequence[Step]) -> tuple[Recipe, ...]:
    return tuple(unscaled(s.recipe) for s in steps if s.recipe is not None)


def slot_for(plans: Sequence[MergePlan]) -> int:
    """Bytes of the inputs of a unit, so that these and all outputs keep within the memory."""
    most, sample = 0.0, 1 << 16
    for steps in zip(*(plan.steps for plan in plans), strict=True):
        outputs = sum(element_size(step.dtype) for step in steps)
        most = max(most, outputs * sample / max(piece_bytes(steps[0], sample), 1))
    return slot_bytes(int((plans[0].memory or DEFAULT_MEMORY) / (1 + most)))


def run_sweep(
    plans: Sequence[MergePlan],
    names: Sequence[str],
    out: str,
    *,
    nonfinite: str = "error",
    progress: Callable[[Progress], None] | None = None,
    finish: Finish | None = None,
    index: Callable[[Sequence[MergeReport]], str],
) -> list[MergeReport]:
    """Executes plans over the same inputs, from one read of them.

    Args:
        plans: the same tensors from the same sources; each ``out`` is ``out``/name.
        names: the sub-folder of each.
        out: the folder; it appears once, whole, with all sub-folders.
        index: the text of ``sweep.json``, from the reports.

    Raises:
        NonFiniteError, CheckpointError, OutputError: nothing is left.
    """
    started = time.monotonic()
    for plan in plans:
        plan.budget_with(staged=False).refuse_excess()
    staging = Staging(out, resume=False, fs=REAL)
    try:
        with ExitStack() as stack:
            outputs = [
                stack.enter_context(OutputFolder(os.path.join(staging.partial, name)))
                for name in names
            ]
            for output, plan in zip(outputs, plans, strict=True):
                output.create_shards(plan.shards)
            job = Sweep(plans, nonfinite, progress)
            writers, pipeline = job.execute(outputs)
            refuse_changed(plans[0].models.values())
            reports = []
            for plan, output, writer in zip(plans, outputs, writers, strict=True):
                report = MergeReport(plan.out, plan.method, "", warnings=list(plan.warnings))
                fill_report(report, plan, writer)
                report.bytes_read, report.bytes_written = job.bytes_read, writer.written
                report.stages = vars(pipeline.times)
                if finish is not None:
                    finish(plan, report, output, evidence(writer, identity_of(plan, nonfinite)))
                output.finalise()
                reports.append(report)
        for report in reports:
            report.seconds = time.monotonic() - started
            report.peak_memory_bytes = peak_rss()
        _write_index(os.path.join(staging.partial, "sweep.json"), staging, index(reports))
        staging.commit()
    finally:
        staging.abandon(keep=False)
    return reports


def _write_index(path: str, staging: Staging, text: str) -> None:
    data = text.encode()
    with writing(path, staging.partial, REAL, len(data)):
        with REAL.new_file(path) as fd:
            REAL.write_exactly(fd, memoryview(data), 0)
            REAL.fsync(fd)
        REAL.fsync_path(staging.partial)
