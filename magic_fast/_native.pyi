"""The native core, bound by csrc/bindings/module.cpp. Use it through magic_fast.ops.native."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from typing_extensions import Required

from magic_fast.recipe import Selection

_SelectionTuple = tuple[
    tuple[float, ...], tuple[int, ...], tuple[float, ...], tuple[int, ...], tuple[float, ...], int
]
_StatsTuple = tuple[_SelectionTuple, tuple[int, ...], tuple[int, ...], int, int, int]

class JobFields(TypedDict, total=False):
    """One job; arrays by their addresses. csrc/bindings/jobs.h has the same names."""

    plan: Required[Plan]
    numel: Required[int]
    offset: Required[int]
    total: Required[int]
    experts: Required[tuple[int, ...]]
    expert_dtypes: Required[tuple[int | None, ...]]
    rank_cols: int
    stream: int
    base: int
    base_dtype: int | None
    merged: int
    merged_dtype: int | None
    out: int
    out_dtype: int | None
    masks: tuple[int, ...]
    task_masks: tuple[int, ...]
    calibration: Calibration
    coefficient: int
    repaired: int
    norms2: int
    selection: Selection
    weights: int
    weight_cols: int

class Plan:
    def __init__(
        self, recipe: Mapping[str, Any], per_expert: Sequence[Mapping[str, Any]]
    ) -> None: ...

class Calibration:
    def __init__(
        self,
        *,
        rows: int,
        cols: int,
        variant: int,
        per_tensor: bool,
        p: float,
        eps_mode: int,
        guards: bool,
        clamp: tuple[float, float] | None,
        strength: float,
        scale: float,
        direction: int,
        included: Sequence[bool],
    ) -> None: ...

class Search:
    def __init__(self, prototype: JobFields) -> None: ...
    def sample(self, piece: JobFields) -> None: ...
    def feed(self, piece: JobFields, threads: int = 0, isa: int = -1) -> None: ...
    def wants(self) -> list[tuple[int, int]]: ...
    def result(self) -> _SelectionTuple: ...

def select(jobs: list[JobFields], threads: int = 0, isa: int = -1) -> list[_SelectionTuple]: ...
def merge(jobs: list[JobFields], threads: int = 0, isa: int = -1) -> list[_StatsTuple]: ...
def row_stats(
    job: JobFields, gram: int, dots: int, norm2: int, threads: int = 0, isa: int = -1
) -> None: ...
def gram(
    job: JobFields, cols: int, wide: bool, gram: int, threads: int = 0, isa: int = -1
) -> None: ...
def scale(job: JobFields, coefficient: int, threads: int = 0, isa: int = -1) -> None: ...
def row_norms(
    job: JobFields, l1: int, l2: int, linf: int, threads: int = 0, isa: int = -1
) -> None: ...
def norm_sums(
    job: JobFields, before: int, after: int, squares: int, threads: int = 0, isa: int = -1
) -> None: ...
def energies(job: JobFields, squares: int, threads: int = 0, isa: int = -1) -> None: ...
def holders(job: JobFields, alone: int, shared: int, threads: int = 0, isa: int = -1) -> None: ...
def score_counts(
    job: JobFields,
    prefix: Sequence[int],
    counts: int,
    top: int,
    threads: int = 0,
    isa: int = -1,
) -> None: ...
def select_variance(
    job: JobFields, fraction: float, threads: int = 0, isa: int = -1
) -> tuple[float, int]: ...
def vote_sum(job: JobFields, threads: int = 0, isa: int = -1) -> int: ...
def random_words(flat: int, n: int, stream: int, seed: int, words: int, isa: int = -1) -> None: ...
def isa() -> str: ...
def isa_number(name: str) -> int: ...
def num_threads() -> int: ...
def build_config() -> dict[str, Any]: ...
