"""An executor in one file outside the package: what docs/contributing/add-an-executor.md shows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import magic_fast as mf
from engine.engine_models import MIB, Models, environment
from engine.hashing import hashes
from extending import subprocess_executor
from extending.subprocess_executor import Subprocesses
from magic_fast.cli import main
from magic_fast.engine.execute import registry
from magic_fast.engine.execute.executor import Executor, Outcome, Work
from magic_fast.engine.execute.shard import Shards

SHARDS: dict[str, Any] = {"max_shard_size": 300_000, "memory": 4 * MIB}
TIES = {"parameters": {"density": 0.3, "weight": 0.7}, "calibrate": "wsc"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("m") / "m")


class Watched(subprocess.Popen):  # type: ignore[type-arg]
    """The processes that the executor starts, and how many ran at the same time."""

    started: list[Watched]
    most = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.started.append(self)
        Watched.most = max(Watched.most, sum(p.poll() is None for p in self.started))


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watched]]:
    Watched.started, Watched.most = [], 0
    monkeypatch.setattr(subprocess_executor.subprocess, "Popen", Watched)
    yield Watched.started
    assert all(p.poll() is not None for p in Watched.started), "none is left behind"


def merge(config: str, out: Path, **options: Any) -> mf.MergeReport:
    return mf.merge_checkpoints(config, out, **{**SHARDS, **options})


def interrupt(after: int) -> Callable[[mf.Progress], None]:
    """A progress call that interrupts the run."""
    seen: list[mf.Progress] = []

    def stop(progress: mf.Progress) -> None:
        seen.append(progress)
        if len(seen) == after:
            raise KeyboardInterrupt

    return stop


def test_the_page_shows_this_file(root: Path) -> None:
    page = (root / "docs" / "contributing" / "add-an-executor.md").read_text()
    source = Path(subprocess_executor.__file__).read_text()
    assert f"```python\n{source}```" in page


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ties", TIES),
        ("ties", {"parameters": {"density": 0.3}, "preset": "ties_merging"}),
        ("model_stock", {}),
    ],
    ids=["ties", "thresholds of the whole model", "no recipe"],
)
def test_the_files_are_those_of_the_local_run(
    models: Models, processes: list[Watched], method: str, fields: Any, tmp_path: Path
) -> None:
    config = models.config(method, **fields)
    local = merge(config, tmp_path / "local" / "out")
    seen: list[mf.Progress] = []
    report = merge(
        config, tmp_path / "there" / "out", executor="subprocesses", progress=seen.append
    )
    assert hashes(tmp_path / "there" / "out") == hashes(tmp_path / "local" / "out")
    shards = list((tmp_path / "there" / "out").glob("*.safetensors"))
    assert len(processes) == len(shards) > 2 and Watched.most == 2
    assert report.tensors == local.tensors and report.bytes_written == local.bytes_written
    assert seen[-1].done_bytes == seen[-1].total_bytes


def test_a_single_file(models: Models, processes: list[Watched], tmp_path: Path) -> None:
    config = models.config("ties", **TIES)
    for name in ("local", "subprocesses"):
        merge(config, tmp_path / name / "out.safetensors", executor=name)
    names = ("local", "subprocesses")
    one, other = ((tmp_path / name / "out.safetensors").read_bytes() for name in names)
    assert one == other and len(processes) == 1


def test_a_killed_process_and_what_is_taken_over(
    models: Models, processes: list[Watched], tmp_path: Path
) -> None:
    config, out = models.config("ties", **TIES), tmp_path / "there" / "out"

    def kill(progress: mf.Progress) -> None:
        for process in processes if progress.done_bytes else ():
            process.kill()

    with pytest.raises(mf.OutputError, match=r"shard 'model-0.*merge again with resume"):
        merge(config, out, executor=Subprocesses(2), progress=kill)
    assert not out.exists()
    written = merge(config, out, executor=Subprocesses(2), resume=True).bytes_written
    whole = merge(config, tmp_path / "local" / "out")
    assert hashes(out) == hashes(tmp_path / "local" / "out")
    assert written < whole.bytes_written, "a piece is taken over"


@pytest.mark.parametrize(("first", "then"), [("local", "subprocesses"), ("subprocesses", "local")])
def test_one_executor_resumes_what_another_left(
    models: Models, first: str, then: str, tmp_path: Path
) -> None:
    config, out = models.config("ties", **TIES), tmp_path / "there" / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(config, out, executor=first, progress=interrupt(4))
    written = merge(config, out, executor=then, resume=True).bytes_written
    whole = merge(config, tmp_path / "local" / "out")
    assert hashes(out) == hashes(tmp_path / "local" / "out")
    assert written < whole.bytes_written


def test_a_journal_is_not_believed(models: Models, tmp_path: Path) -> None:
    config, out = models.config("ties", **TIES), tmp_path / "there" / "out"
    with pytest.raises(KeyboardInterrupt):
        merge(config, out, progress=interrupt(4))
    for shard in (tmp_path / "there" / ".out.partial").glob("*.safetensors"):
        size = shard.stat().st_size
        with shard.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\xff" * (size - size // 2))
    merge(config, out, executor="subprocesses", resume=True)
    merge(config, tmp_path / "local" / "out")
    assert hashes(out) == hashes(tmp_path / "local" / "out")


def test_a_head_that_is_killed_takes_its_processes_with_it(models: Models, tmp_path: Path) -> None:
    config, out = tmp_path / "ties.yml", tmp_path / "there" / "out"
    config.write_text(models.config("ties", **TIES))
    code = (
        "import os, signal, sys, magic_fast as mf, extending.subprocess_executor\n"
        "def kill(progress): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"mf.merge_checkpoints(sys.argv[1], sys.argv[2], executor='subprocesses', "
        f"progress=kill, **{SHARDS})"
    )
    head = subprocess.run(  # ends when nobody has its standard error any more
        [sys.executable, "-c", code, str(config), str(out)],
        env=environment(), stderr=subprocess.PIPE, timeout=120, check=False,
    )  # fmt: skip
    assert head.returncode == -9, head.stderr
    merge(str(config), out, executor="subprocesses", resume=True)
    merge(str(config), tmp_path / "local" / "out")
    assert hashes(out) == hashes(tmp_path / "local" / "out")


def test_an_error_of_a_task_is_that_of_the_merge(tmp_path: Path) -> None:
    models = Models(tmp_path / "m", {"a.weight": (64, 300), "b.weight": (9, 70)})
    path = models.folder / "expert-1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xc0\x7f"  # the last element of the last tensor
    path.write_bytes(data)
    config, out = models.config("average"), tmp_path / "there" / "out"
    small: dict[str, Any] = {"max_shard_size": 1, "executor": "subprocesses"}
    with pytest.raises(mf.NonFiniteError, match=r"b\.weight.*629"):
        mf.merge_checkpoints(config, out, **small)
    assert list((tmp_path / "there").iterdir()) == [], "nothing is left"
    mf.merge_checkpoints(config, out, nonfinite="propagate", **small)
    small["executor"] = "local"
    mf.merge_checkpoints(config, tmp_path / "local" / "out", nonfinite="propagate", **small)
    assert hashes(out) == hashes(tmp_path / "local" / "out")


def test_sweep_calibration_and_series(
    models: Models, processes: list[Watched], tmp_path: Path
) -> None:
    config = models.config("ties", parameters={"density": 0.3, "weight": 0.7})
    experts = [models.folder / f"expert-{k}" for k in range(3)]
    named = f"name: first\n{config}---\n{config.replace(str(experts[0]), 'first')}"
    for name in ("local", "subprocesses"):
        options = {**SHARDS, "executor": name}
        folder = tmp_path / name
        mf.sweep_checkpoints(config, folder / "sweep", {"density": [0.2, 0.4]}, **options)
        merged = folder / "sweep" / "density=0.2"
        mf.calibrate_checkpoints(
            models.folder / "base", experts, merged, folder / "calibrated", **options
        )
        mf.merge_series(named, folder / "series", **options)
    for made in ("sweep/density=0.2", "sweep/density=0.4", "calibrated", "series"):
        one, other = (hashes(tmp_path / n / made) for n in ("local", "subprocesses"))
        for record in ("README.md", "magic_fast.json"):  # they name the folders of the models
            one.pop(record), other.pop(record)
        assert one == other, made
    assert len(processes) > 8


def test_an_installed_package_offers_one_to_the_command(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = tmp_path / "site" / "toy_executors-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_executors\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[magic_fast.executors]\ntoy = toy_executors:TOY\nbroken = toy_executors:NOTHING\n"
    )
    (tmp_path / "site" / "toy_executors.py").write_text(
        "import magic_fast as mf\n"
        "from extending.subprocess_executor import Subprocesses\n"
        "TOY = mf.register_executor('toy', Subprocesses, summary='for a test')\n"
    )
    config, site = tmp_path / "ties.yml", str(tmp_path / "site")
    config.write_text(models.config("ties", **TIES))
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join((site, env["PYTHONPATH"]))

    def command(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "magic_fast", "merge", str(config), str(tmp_path / name / "out"),
             "--executor", name, "--max-shard-size", "300KB", "-q"],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    for name in ("toy", "local"):
        assert command(name).returncode == 0, command(name).stderr
    assert hashes(tmp_path / "toy" / "out") == hashes(tmp_path / "local" / "out")
    done = command("broken")
    assert done.returncode == 2
    assert "executor 'broken': expected 'auto' or one of 'local': this process" in done.stderr
    assert "'toy': for a test; got one that is left out: toy_executors:NOTHING" in done.stderr


@pytest.mark.parametrize("way", ["merge", "sweep", "calibrate", "series", "command", "dry run"])
def test_an_unknown_name(
    models: Models, way: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", models.config("average")
    (file := tmp_path / "average.yml").write_text(config)
    experts = [models.folder / f"expert-{k}" for k in range(3)]
    wrong: Any = {"executor": "cluster"}
    calls: dict[str, Callable[[], Any]] = {
        "merge": lambda: mf.merge_checkpoints(config, out, **wrong),
        "sweep": lambda: mf.sweep_checkpoints(config, out, {"scale": [1.0, 2.0]}, **wrong),
        "calibrate": lambda: mf.calibrate_checkpoints(
            models.folder / "base", experts, experts[0], out, **wrong
        ),
        "series": lambda: mf.merge_series(config, out, **wrong),
    }
    message = "executor 'cluster': expected 'auto' or one of 'local': this process, on the CPU;"
    if way in calls:
        with pytest.raises(mf.InputError, match=message):
            calls[way]()
    else:
        more = ["--dry-run"] if way == "dry run" else []
        assert main(["merge", str(file), str(out), "--executor", "cluster", *more]) == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["average.yml"]


def test_what_cannot_run_a_plan_says_why(models: Models, tmp_path: Path) -> None:
    config, out = models.config("average"), tmp_path / "out"
    with pytest.raises(mf.InputError, match="executor 'gpu': expected one that runs plans on cpu"):
        merge(config, out, executor="gpu", device="cpu")
    with pytest.raises(mf.InputError, match="executor: expected a name, or an object with"):
        merge(config, out, executor=3)

    class Picky(Subprocesses):
        def refuse(self, plans: Any) -> None:
            raise mf.InputError("executor 'picky': expected full moon, got none.")

        def run(self, work: Any) -> Outcome:
            raise AssertionError("it refused")

    with pytest.raises(mf.InputError, match="full moon"):
        merge(config, out, executor=Picky())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_is_named(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    mf.register_executor("absent", "no_such_module_at_all:Cluster")
    mf.register_executor("empty", object)
    messages = {
        "absent": "executor 'absent': expected one that can be imported, got: No module named",
        "empty": "with the methods refuse, run, sweep, got <object",
    }
    for name, message in messages.items():
        with pytest.raises(mf.InputError, match=message):
            merge(models.config("average"), tmp_path / "out", executor=name)
    assert list(tmp_path.iterdir()) == []


class OneTensorATime(Executor):
    """Tasks cut further than a shard, in this process."""

    def run(self, work: Work) -> Outcome:
        shards = Shards(work)
        for task in shards.tasks:
            for step in task.steps:
                shards.done(replace(task, steps=(step,)).fill(shards.folder, shards.add))
        return shards.outcome


def test_a_task_may_be_cut_further(models: Models, tmp_path: Path) -> None:
    config = models.config("ties", **TIES)
    for name, executor in (("cut", OneTensorATime()), ("local", "local")):
        merge(config, tmp_path / name / "out", executor=executor, max_shard_size=10**9)
    assert hashes(tmp_path / "cut" / "out") == hashes(tmp_path / "local" / "out")


def test_a_worker_that_does_not_see_the_output(models: Models, tmp_path: Path) -> None:
    class Elsewhere(OneTensorATime):
        def run(self, work: Work) -> Outcome:
            shards = Shards(work)
            return shards.tasks[0].fill(str(tmp_path), shards.add)

    with pytest.raises(mf.OutputError, match=r"Shard not begun for .*Run where the folder"):
        merge(models.config("average"), tmp_path / "out", executor=Elsewhere())


@pytest.mark.parametrize("other", [("0.0.1", "native"), (mf.__version__, "abacus")])
def test_a_worker_of_another_kind_is_refused(
    models: Models, other: tuple[str, str], tmp_path: Path
) -> None:
    class Otherwise(OneTensorATime):
        def run(self, work: Work) -> Outcome:
            shards = Shards(work)
            return replace(shards.tasks[0], made_by=other).fill(shards.folder, shards.add)

    message = f"shard 'model.*': expected magic_fast {other[0]} with backend {other[1]}"
    with pytest.raises(mf.InputError, match=message):
        merge(models.config("average"), tmp_path / "out", executor=Otherwise())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("local", Subprocesses), "name of an executor: expected one that is not taken"),
        (("auto", Subprocesses), "expected a word other than 'auto'"),
        (("new", "no colon"), "factory of executor 'new': expected a callable or 'module:attr"),
        (("new", Subprocesses, ()), r"devices of executor 'new': expected names such as"),
    ],
)
def test_registrations_that_are_refused(arguments: Any, message: str) -> None:
    name, factory, *devices = arguments
    with pytest.raises(mf.InputError, match=message):
        mf.register_executor(name, factory, **({"devices": devices[0]} if devices else {}))
    assert "new" not in registry._SPECS


def test_registering_the_same_again_changes_nothing() -> None:
    again = mf.register_executor(
        "subprocesses", Subprocesses, summary="each shard in a process of its own"
    )
    assert registry._SPECS["subprocesses"] is not None
    assert registry._SPECS["subprocesses"] == again


def test_auto_looks_at_no_entry_point(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def looked(group: str) -> None:
        raise AssertionError(group)

    monkeypatch.setattr(registry, "entry_points_of", looked)
    merge(models.config("average"), tmp_path / "out")
