"""What a plan holds in memory, against what it may: blocks that go round, and tensors that must be
whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from magic_fast.engine.plan.machine import available_memory
from magic_fast.engine.plan.memory import DEFAULT_MEMORY, LEAST_SLOT, SLOTS, slot_bytes
from magic_fast.engine.plan.modes import Mode, Way, held_bytes, modes
from magic_fast.engine.plan.step import Step
from magic_fast.errors import InputError

LEAST = 32 << 20  # less is not asked of anyone: Python itself takes as much
_MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """How a plan runs within its memory.

    Attributes:
        slot_bytes: size of a block.
        modes: tensor → how it is merged.
        blocks: bytes of all blocks; 0 where nothing is streamed.
        held: bytes beside them, at most: of the largest tensor that must be whole.
        tensor: its name, or ''.
        beside: bytes that reading takes beside both: factors of adapters.
        allowed: bytes for both; None: no limit is known.
        given: whether the user named the limit; else it is what the machine has free.
    """

    slot_bytes: int
    modes: Mapping[str, Way]
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
        return self.modes[self.tensor].why if self.tensor else ""

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


def budget_of(
    steps: Sequence[Step],
    *,
    beside: int,
    memory: int | None,
    device: str,
    backend: str | None,
    staged: bool = True,
) -> Budget:
    """Blocks of the memory allowed; smaller ones where tensors that are whole need some of it.

    Args:
        steps: of a plan.
        beside: bytes that reading takes beside blocks and tensors.
        memory: bytes that the user allows, or None.
        device, backend: as of the plan.
        staged: no sweep, which holds what it merges on a GPU, and what a search would be for.
    """
    given = memory is not None
    allowed = available_memory() if memory is None else max(memory, LEAST)

    def of_blocks(size: int) -> Budget:
        ways = modes(steps, size, device, backend, searches=staged)
        if staged and device != "cpu":
            return Budget(size, ways, SLOTS * size, 0, "", allowed, given, beside)
        streamed = any(way.mode is Mode.STREAM for way in ways.values())
        blocks = SLOTS * size if streamed else 0
        return Budget(size, ways, blocks, *_largest(steps, ways), allowed, given, beside)

    budget = of_blocks(slot_bytes((DEFAULT_MEMORY if memory is None else memory) - beside))
    if budget.fits or allowed is None:
        return budget
    for size in (slot_bytes(allowed - budget.held - beside), LEAST_SLOT):
        smaller = of_blocks(min(size, budget.slot_bytes))
        if smaller.fits:
            return smaller
    return smaller


def _largest(steps: Sequence[Step], ways: Mapping[str, Way]) -> tuple[int, str]:
    """Bytes and name of the tensor that needs most of those that are held whole; 0 and '' where
    all of them are streamed."""
    held, tensor = 0, ""
    for step in steps:
        mode = ways[step.name].mode
        needs = 0 if mode is Mode.STREAM else held_bytes(step, mode)
        if needs > held:
            held, tensor = needs, step.name
    return held, tensor
