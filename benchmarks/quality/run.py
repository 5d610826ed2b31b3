"""Trains, merges, calibrates and scores; then writes the tables (PROTOCOL.md).

    python benchmarks/quality/run.py --reduced                 # one seed
    python benchmarks/quality/run.py                           # all; resumes where it was stopped
    python benchmarks/quality/run.py --only-table              # of what the cache holds

Each scenario of a seed is one file in the cache; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from quality import settings  # noqa: E402 - found beside this folder

Job = tuple[int, str]


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Seed and scenario, in an order in which whatever was done first is of use."""
    if options.reduced:
        return [(0, name) for name in settings.REDUCED]
    development = [[(s, name) for name in settings.DEVELOPMENT] for s in settings.DEVELOPMENT_SEEDS]
    seeds = range(options.seeds)
    first = [[(s, name) for name in settings.FIRST] for s in seeds]
    rest = [[(s, n) for n in settings.SCENARIOS if n not in settings.FIRST] for s in seeds]
    ordered = [*development[:1], *first[:2], *development[1:], *first[2:], *rest]
    return [job for group in ordered for job in group]


def file_of(folder: Path, job: Job) -> Path:
    return folder / f"{job[1].replace('/', '-')}-{job[0]}.json"


def work(folder: Path, job: Job, grid: tuple[float, ...]) -> str:
    """Runs one job in a process of its own and writes its file whole."""
    file = file_of(folder, job)
    if file.is_file():  # another run on the same cache was quicker
        return f"seed {job[0]} {job[1]}: there already"
    import torch
    from transformers.utils import logging

    from quality.measure import measure

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    seed, name = job
    scenario = settings.SCENARIOS[name]
    # The images' base is the same in all regimes; the text's is pre-trained on the regime's tasks.
    which = scenario.family if scenario.family == "images" else scenario.name.replace("/", "-")
    known = folder / f"{which}-base-{seed}.pt"
    base = torch.load(known, weights_only=True) if known.is_file() else None
    record, trained = measure(
        seed, scenario, grid,
        development=seed in settings.DEVELOPMENT_SEEDS, base=base,
        say=lambda text: print(f"  seed {seed} {name}: {text}", flush=True),
    )  # fmt: skip
    if base is None:
        torch.save(trained, known.with_suffix(".partial"))
        known.with_suffix(".partial").replace(known)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(file)
    return f"seed {seed} {name}: {record['seconds']:.0f} s, {record['cpu_seconds']:.0f} s of CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".quality"))
    parser.add_argument("--reduced", action="store_true", help="one seed, fewer scenarios and λ")
    parser.add_argument("--seeds", type=int, default=len(settings.SEEDS))
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MAGIC_FAST_NUM_THREADS"] = "1"
    grid = settings.REDUCED_GRID if options.reduced else settings.GRID
    folder = options.cache / ("reduced" if options.reduced else "full")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(options)
    start = time.perf_counter()
    if not options.only_table:
        todo = [job for job in jobs if not file_of(folder, job).is_file()]
        print(f"{len(todo)} of {len(jobs)} jobs to do, {options.workers} at a time", flush=True)
        with ProcessPoolExecutor(
            options.workers, mp_context=get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            for line in (
                pool.map(work, *zip(*[(folder, job, grid) for job in todo], strict=True))
                if todo
                else ()
            ):
                print(f"{line} ({(time.perf_counter() - start) / 60:.1f} min)", flush=True)
    from quality.table import write  # torch is imported only now: workers set their threads first

    records = [
        json.loads(file_of(folder, j).read_text()) for j in jobs if file_of(folder, j).is_file()
    ]
    write(records, markdown=options.markdown, summary=options.json)
    print(f"done after {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
