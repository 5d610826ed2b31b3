"""One loaded piece, merged in several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from magic_fast.engine.execute.scales import select_once, unscaled
from magic_fast.engine.execute.streamed import Loaded, Streamed, slab_shape
from magic_fast.engine.plan.memory import Slot
from magic_fast.engine.plan.modes import Way
from magic_fast.engine.plan.step import Step
from magic_fast.engine.plan.units import Piece
from magic_fast.ops.job import Job, View
from magic_fast.recipe import Recipe, Selection


@dataclass(frozen=True)
class Variant:
    """One way to merge a tensor, and the combinations that ask for it."""

    step: Step
    way: Way
    plan: int
    combinations: tuple[int, ...]


class Selecting(Streamed):
    """The stage that streams, with one selection for each recipe, whatever its scale."""

    def __init__(
        self,
        nonfinite: str,
        backend_of: Callable[[Step], str],
        known: dict[str, dict[Recipe, Selection]],
    ) -> None:
        super().__init__(nonfinite, backend_of)
        self._known = known
        self.arrays = self._arrays
        self._shared: set[tuple[str, Recipe]] = set()

    def share(self, variants: Mapping[str, Sequence[Variant]]) -> None:
        """Says which selections several merges will need."""
        for name, ways in variants.items():
            recipes = [unscaled(v.step.recipe) for v in ways if v.step.recipe is not None]
            self._shared |= {(name, r) for r in recipes if recipes.count(r) > 1}

    def job(self, one: Loaded) -> Job:
        """What is to be done with a piece, without a model merged elsewhere."""
        return self._job(one)[0]

    def _job(self, one: Loaded) -> tuple[Job, View | None]:
        job, merged = super()._job(one)
        step = one.piece.step
        if step.recipe is not None and merged is None and step.recipe.needs_select:
            known = self._known.setdefault(step.name, {})
            recipe = unscaled(step.recipe)
            if recipe in known:
                job.selection = known[recipe]
            elif (step.name, recipe) in self._shared:
                job.selection = select_once(job, known, self._backend_of(step))
        return job, merged


def copy_of(one: Loaded, step: Step, arrays: Sequence[View], slot: Slot) -> Loaded:
    """A loaded piece to be merged as ``step`` says, into room of its own."""
    own = Loaded(Piece(step, one.piece.start, one.piece.stop))
    shape = slab_shape(own.piece)[0]
    own.inputs = [
        (source, replace(view, shape=shape), data)
        for (source, _, data), view in zip(one.inputs, arrays, strict=True)
    ]
    address, data = slot.take(own.piece.byte_range(step.dtype)[1])
    own.out, own.out_bytes = View(address, step.dtype, shape, data), data
    return own
