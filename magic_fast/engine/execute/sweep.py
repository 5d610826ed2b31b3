"""Many merges of the same checkpoints from one read: every unit of work is loaded once, merged in
every combination from memory, and written into one output folder for each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from magic_fast.engine.execute.counts import Meter, outcome_of, traffic
from magic_fast.engine.execute.executor import Outcome, Work
from magic_fast.engine.execute.pipeline import Pipeline
from magic_fast.engine.execute.scales import (
    LEAST,
    merge_scales,
    shares,
    splits,
    unscaled,
    worth_sharing,
)
from magic_fast.engine.execute.search import StreamedSearch
from magic_fast.engine.execute.streamed import Loaded, Loader
from magic_fast.engine.execute.variants import Selecting, Variant, copy_of
from magic_fast.engine.execute.writer import Writer
from magic_fast.engine.output.recheck import refuse_changed
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
from magic_fast.ops.job import Job, Stats, View
from magic_fast.recipe import Recipe, Selection


class Sweep:
    """One execution of several plans over the same inputs.

    Args:
        works: plans of the same tensors from the same sources, in the same order.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        self._plans = plans = [work.plan for work in works]
        self._nonfinite = works[0].nonfinite
        self._meter = Meter(traffic(plans), works[0].progress)
        self._writers = [Writer(w.output, w.journal, w.nonfinite) for w in works]
        self._loader = Loader(plans[0].models, works[0].output, works[0].journal)
        self._slot_bytes = slot_for(plans)
        self._variants = self._distinct()
        self._selections: dict[str, dict[Recipe, Selection]] = {}
        self._free: list[Slot] = []
        self._lock = threading.Lock()

    def _distinct(self) -> dict[str, list[Variant]]:
        """Tensor → the ways to merge it that differ."""
        ways = [
            modes(p.steps, self._slot_bytes, p.device, p.backend, searches=False)
            for p in self._plans
        ]
        # several plans may merge one tensor by different backends
        self._backends = {
            id(step): own[step.name].backend
            for plan, own in zip(self._plans, ways, strict=True)
            for step in plan.steps
        }
        found: dict[str, list[Variant]] = {}
        for n, step in enumerate(self._plans[0].steps):
            same: dict[str, list[int]] = {}
            for c, plan in enumerate(self._plans):
                same.setdefault(repr(plan.steps[n]), []).append(c)
            found[step.name] = [
                Variant(self._plans[c[0]].steps[n], ways[c[0]][step.name], c[0], tuple(c))
                for c in same.values()
            ]
        return found

    def execute(self) -> list[Outcome]:
        """All tensors of all plans merged and written.

        Raises:
            CheckpointError: an input changed meanwhile.
        """
        every = [v for variants in self._variants.values() for v in variants]
        self._streamed = Selecting(self._nonfinite, self._backend_of, self._selections)
        self._streamed.share(self._variants)
        self._workers = {}
        if any(v.way.mode is Mode.TORCH for v in every):
            from magic_fast.engine.execute.whole import Worker

            torch_plans = {v.plan for v in every if v.way.mode is Mode.TORCH}
            self._workers = {c: Worker(self._plans[c], self._nonfinite) for c in torch_plans}
        used = SLOTS if any(v.way.mode is Mode.STREAM for v in every) else 0
        slots = [Slot(self._slot_bytes) for _ in range(used)]
        with self._loader as loader:
            self._pipeline = Pipeline(loader, self._compute, self._store, slots)
            for worker in self._workers.values():
                worker.prepare()
            self._pipeline.run(self._units())
        refuse_changed(self._plans[0].models.values())
        return [outcome_of(writer, self._meter, self._pipeline) for writer in self._writers]

    def _backend_of(self, step: Step) -> str:
        return self._backends[id(step)]

    # ---- what to read ----
    def _units(self) -> Iterator[Unit]:
        yield from self._model_scope()
        pending: list[Piece] = []
        for variants in self._variants.values():
            if any(v.way.mode is not Mode.STREAM for v in variants):
                yield from self._flush(pending)
                streamed = [v.step for v in variants if v.way.mode is not Mode.TORCH]
                step, torch = next(iter(streamed), variants[0].step), not streamed
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
                (s for s in steps if ways[s.name].mode is not Mode.TORCH), key=lambda s: s.name
            )
            if steps:
                groups.setdefault(tuple(s.name for s in steps), []).append(steps)
        for found in groups.values():
            yield from self._search(found)

    def _search(self, ways: Sequence[Sequence[Step]]) -> Iterator[Unit]:
        """The selections of the same tensors in several ways, in one pass as a rule."""
        backends: dict[str, dict[tuple[Recipe, ...], Sequence[Step]]] = {}
        for steps in ways:
            backends.setdefault(self._backend_of(steps[0]), {})[_recipes(steps)] = steps
        for backend, distinct in backends.items():
            some = list(distinct.values())
            search = StreamedSearch(some, self._slot_bytes, self._pipeline.wait, backend)
            yield from search.units()
            for steps, found in zip(some, search.results(), strict=True):
                for step, recipe in zip(steps, _recipes(steps), strict=True):
                    self._selections.setdefault(step.name, {})[recipe] = found[step.name]

    # ---- what to do with it ----
    def _compute(self, unit: Unit) -> None:
        pieces: list[Loaded] = unit.buffers["pieces"]
        if unit.search is not None:
            self._meter.bytes_read += unit.buffers["bytes_read"]
            self._streamed(unit)
            return
        slot = unit.buffers["out"] = self._room(pieces)
        done: dict[tuple[int, int], tuple[Loaded, Stats | None]] = {}
        direct: list[tuple[tuple[int, int], Loaded]] = []
        for n, one in enumerate(pieces):
            variants = self._variants[one.piece.step.name]
            arrays = (
                self._arrays(one) if any(v.way.mode is not Mode.TORCH for v in variants) else []
            )
            jobs = []
            for m, variant in enumerate(variants):
                if variant.way.mode is Mode.TORCH:
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
        nbytes = unit.input_bytes + unit.output_bytes * len(self._plans)
        self._meter.count(nbytes, unit.pieces[-1].step.name, read=unit.buffers["bytes_read"])

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
        backend = next((b for _, one in jobs if splits(b := self._backend_of(one.piece.step))), "")
        for key, one in jobs:
            step = one.piece.step
            if step.copy or step.merged is not None or one.piece.count < LEAST:
                continue
            if self._backend_of(step) != backend:
                continue
            job = self._streamed.job(one)
            if shares(job):
                sharing.append((key, one, job))
        if not worth_sharing([job for *_, job in sharing]):
            return list(jobs)
        known = self._selections.setdefault(sharing[0][1].piece.step.name, {})
        found = merge_scales([job for *_, job in sharing], known, backend)
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
