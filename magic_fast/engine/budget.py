"""What a plan holds in memory, against what it may: blocks that go round, and tensors that must be
whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from magic_fast.engine.machine import available_memory
from magic_fast.engine.memory import DEFAULT_MEMORY, LEAST_SLOT, SLOTS, slot_bytes
from magic_fast.engine.native import Mode, held_bytes, modes
from magic_fast.errors import InputError

if TYPE_CHECKING:
    from magic_fast.engine.plan import MergePlan

LEAST = 32 << 20  # less is not asked of anyone: Python itself takes as much
_MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """How a plan runs within its memory.

    Attributes:
        slot_bytes: size of a block.
        modes: tensor → how it is merged, and why not in pieces ('' where it is).
        blocks: bytes of all blocks; 0 where nothing is streamed.
        held: bytes beside them, at most: of the largest tensor that must be whole.
        tensor: its name, or ''.
        beside: bytes that reading takes beside both: factors of adapters.
        allowed: bytes for both; None: no limit is known.
        given: whether the user named the limit; else it is what the machine has free.
    """

    slot_bytes: int
    modes: Mapping[str, tuple[Mode, str]]
    blocks: int
    held: int
    tensor: str
    allowed: int | None
    given: bool
    beside: int = 0

    @property
    def total(self) -> int:
        return self.blocks + self.held + self.beside

    @property
    def fits(self) -> bool:
        return self.allowed is None or self.total <= self.allowed

    @property
    def why(self) -> str:
        """Why the largest tensor must be whole, or ''."""
        return self.modes[self.tensor][1] if self.tensor else ""

    def refuse_excess(self) -> None:
        """Raises:
        InputError: a tensor that must be whole needs more memory than is allowed.
        """
        if self.fits or not self.held:
            return
        where = "allowed by --memory" if self.given else "that are free on this machine"
        most = -(-self.total // _MIB)
        advice = f"Pass --memory {most}MiB" + (
            " or more" if self.given else " to run all the same, or close other programs"
        )
        raise InputError(
            f"not enough memory for tensor '{self.tensor}': expected at most "
            f"{(self.allowed or 0) / _MIB:.0f} MiB, {where}, got {most} MiB, as it must be held "
            f"whole ({self.why}). {advice}, or choose a method that works in pieces "
            "(`magic-fast methods` tells)."
        )


def budget_of(plan: MergePlan, *, staged: bool = True) -> Budget:
    """Blocks of the memory allowed; smaller ones where tensors that are whole need some of it.

    Args:
        staged: no sweep, which holds what it merges on a GPU, and what a search would be for.
    """
    given = plan.memory is not None
    memory = DEFAULT_MEMORY if plan.memory is None else plan.memory
    allowed = max(memory, LEAST) if given else available_memory()
    beside = sum(model.overhead for model in plan.models.values())
    found = _with_blocks(plan, slot_bytes(memory - beside), allowed, given, staged, beside)
    if found.fits or allowed is None:
        return found
    for size in (slot_bytes(allowed - found.held - beside), LEAST_SLOT):
        smaller = _with_blocks(plan, min(size, found.slot_bytes), allowed, given, staged, beside)
        if smaller.fits:
            return smaller
    return smaller


def _with_blocks(
    plan: MergePlan, size: int, allowed: int | None, given: bool, staged: bool, beside: int
) -> Budget:
    ways = modes(plan, size, plan.device, searches=staged)
    if staged and plan.device != "cpu":
        return Budget(size, ways, SLOTS * size, 0, "", allowed, given, beside)
    blocks = SLOTS * size if _any_streamed(ways.values()) else 0
    held, tensor = 0, ""
    for step in plan.steps:
        mode = ways[step.name][0]
        needs = 0 if mode is Mode.STREAM else held_bytes(step, mode)
        if needs > held:
            held, tensor = needs, step.name
    return Budget(size, ways, blocks, held, tensor, allowed, given, beside)


def _any_streamed(ways: Iterable[tuple[Mode, str]]) -> bool:
    return any(mode is Mode.STREAM for mode, _ in ways)
