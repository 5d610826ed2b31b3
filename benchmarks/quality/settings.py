"""The sizes of the experiment (PROTOCOL.md), in one place."""

from __future__ import annotations

from dataclasses import dataclass

DEVELOPMENT_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)

#: λ of an arm: its own scale times these.
GRID = tuple(2.0 ** (i / 2) for i in range(-4, 5))
REDUCED_GRID = tuple(2.0**i for i in range(-2, 3))
#: λ that are tried without tuning, beside 1.
FIXED = (2.0**-0.5, 2.0**0.5)

MASKS = 5
DRAWS = 5
DRAW_SIZE = 32  # inputs of each task
DEVIATION_SIZE = 64  # held-out inputs of each task
#: Merges on which draws and clamps are varied.
DRAWN = ("average",)
CLAMPED = ("average", "ties", "tsv_m")
CLAMPS: dict[str, tuple[float, float] | None] = {"clamp 0.5–2": (0.5, 2.0), "no clamp": None}

#: A task counts where average ≥ base + the first and expert ≥ average + the second.
MARGINS = (0.10, 0.02)
RESAMPLES = 2000


@dataclass(frozen=True)
class Training:
    """Steps and peak learning rate of the base's pre-training or of an expert's training."""

    steps: int
    rate: float


@dataclass(frozen=True)
class Scenario:
    """A family in a regime.

    Attributes:
        expert: how each expert is trained.
        share: of text: how often the base sees the right operation.
        full: whether draws, clamps and fixed λ are varied too.
    """

    family: str
    regime: str
    expert: Training
    share: float = 0.0
    full: bool = True

    @property
    def name(self) -> str:
        return f"{self.family}/{self.regime}"


BASE = {"images": Training(1500, 2e-3), "text": Training(500, 3e-3)}
SCENARIOS = {
    s.name: s
    for s in (
        Scenario("images", "easy", Training(200, 5e-4)),
        Scenario("text", "easy", Training(60, 5e-4), share=0.3),
        Scenario("images", "correlated", Training(200, 5e-4)),
        Scenario("text", "hard", Training(60, 5e-4), share=0.2),
        Scenario("images", "hard", Training(200, 1e-3)),
        Scenario("images", "tiny", Training(200, 5e-4), full=False),
    )
}
DEVELOPMENT = ("images/easy", "text/easy", "images/correlated")
REDUCED = DEVELOPMENT
#: Of every seed, before the others of any.
FIRST = ("images/easy", "text/easy", "images/correlated", "text/hard")
