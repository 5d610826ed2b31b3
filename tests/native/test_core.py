"""The extension as software: instruction sets, symbols, threads, forks, flush modes, sizes."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from ctypes import string_at
from pathlib import Path

import pytest
import torch

from magic_fast import _native
from magic_fast.ops.job import Job
from magic_fast.ops.native.backend import NativeBackend
from magic_fast.ops.native.jobs import Call
from magic_fast.recipe import Recipe, Trim, TrimRule
from native.native_cases import bits, random_case

ROOT = Path(__file__).resolve().parents[2]
CONFIG = _native.build_config()


def words(flat: int, n: int, stream: int, seed: int, isa: str) -> list[str]:
    """Random words of elements [flat, flat + n)."""
    out = array("I", bytes(4 * n))
    number = _native.isa_number(isa)
    _native.random_words(flat, n, stream, seed, out.buffer_info()[0], number)
    return [f"{w:08x}" for w in out]


@pytest.mark.parametrize("isa", CONFIG["supported_isas"])
def test_known_random_words(isa: str) -> None:
    zero = ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(0, 4, 0, 0, isa) == zero
    stream = 0x345B65BAF420F1E5
    assert words(0, 4, stream, 42, isa) == ["8e155c47", "d9a4c13a", "bacd7ee3", "c8d4643f"]
    second = (stream + 0x9E3779B97F4A7C15) % 2**64
    assert words(0, 4, second, 42, isa) == ["9479d246", "642d5e8f", "9699000c", "e8a8a1a6"]
    run = words(2**34 - 7, 1000, stream, 42, isa)  # across a carry of the counter's low word
    for start, n in ((0, 1), (3, 5), (13, 600), (999, 1)):
        assert words(2**34 - 7 + start, n, stream, 42, isa) == run[start : start + n]


def fields_of_the_stub() -> dict[str, bool]:
    """The fields of a job as type checkers know them, and whether each must be there."""
    tree = ast.parse((ROOT / "magic_fast" / "_native.pyi").read_text())
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "JobFields"]
    lines = [n for n in found.body if isinstance(n, ast.AnnAssign)]
    return {ast.unparse(n.target): "Required" in ast.unparse(n.annotation) for n in lines}


def test_the_extension_knows_the_fields_of_a_job_by_name() -> None:
    x = torch.ones(16)
    fields = Call().job(Job(x, [x], Recipe(weights=(1.0,))))
    objects = ("masks", "task_masks", "calibration", "selection")
    absent = {name: None if name in objects else 0 for name in fields_of_the_stub()}
    assert _native.select([{**absent, **fields}]) == _native.select([fields])
    for name, required in fields_of_the_stub().items():
        if required:
            rest = {n: v for n, v in fields.items() if n != name}
            with pytest.raises(ValueError, match=rf"^job: field '{name}' is missing\.$"):
                _native.select([rest])
    with pytest.raises(ValueError, match=r"^job: field 'numbers' is not known\.$"):
        _native.select([{**fields, "numbers": 1}])


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_environment_chooses_the_instruction_set() -> None:
    show = "from magic_fast import _native; print(_native.isa())"
    for isa in CONFIG["supported_isas"]:
        assert _run(show, MAGIC_FAST_CPU_ISA=isa).stdout.strip() == isa
    for isa in {"baseline", "avx2", "avx512", "neon"} - set(CONFIG["supported_isas"]):
        found = _run(show, MAGIC_FAST_CPU_ISA=isa)
        assert found.returncode != 0
        assert f"instruction set '{isa}': expected one of" in found.stderr
    assert "got 'sse9'" in _run(show, MAGIC_FAST_CPU_ISA="sse9").stderr


def test_a_refused_instruction_set_is_the_reason_why_not() -> None:
    code = (
        "from magic_fast.ops.native.backend import NativeBackend; print(NativeBackend().why_not())"
    )
    assert "expected one of" in _run(code, MAGIC_FAST_CPU_ISA="nonsense").stdout


def test_number_of_threads_follows_the_environment() -> None:
    show = "from magic_fast import _native; print(_native.num_threads())"
    assert _run(show, MAGIC_FAST_NUM_THREADS="3").stdout.strip() == "3"
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= int(_run(show, MAGIC_FAST_NUM_THREADS="").stdout) <= allowed


FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "neon": [],
}


@pytest.mark.parametrize("isa", CONFIG["isas"])
def test_no_function_is_shared_between_instruction_sets(isa: str, tmp_path: Path) -> None:
    """A weak symbol would be merged by the linker, and an old CPU might run another set's copy."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    nm = shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs a compiler and nm")
    target = tmp_path / f"{isa}.o"
    command = [compiler, "-std=c++17", "-O1", "-fno-inline", "-ffp-contract=off", "-w", *FLAGS[isa]]
    source = ROOT / "csrc" / "cpu" / "isa" / f"{isa}.cpp"
    subprocess.run(
        [*command, f"-I{ROOT}/csrc/include", "-c", str(source), "-o", str(target)], check=True
    )
    symbols = subprocess.run(
        [nm, "-C", str(target)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    defined = [line.split(maxsplit=2)[1:] for line in symbols if not line.startswith(" ")]
    assert [s for s in defined if s[0] in "WVuw"] == []
    assert [s[1] for s in defined if s[0] == "T"] == [f"mf::{isa}::kernels()"]


def test_several_python_threads_at_once() -> None:
    cases = [random_case(seed, shape=(130, 1000)) for seed in range(500, 506)]
    expected = []
    for case in cases:
        job = case.job()
        NativeBackend(threads=1).merge(job)
        expected.append(job.out)

    def work(i: int) -> bool:
        job = cases[i % len(cases)].job()
        NativeBackend(threads=1 + i % 4).merge(job)
        return torch.equal(bits(job.out), bits(expected[i % len(cases)]))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(48)))


def test_a_forked_child_has_threads_of_its_own() -> None:
    case = random_case(510, shape=(130, 1000))
    job = case.job()
    NativeBackend(threads=3).merge(job)  # the parent's pool is running
    again = case.job()  # torch's own threads do not survive a fork: nothing of it runs in the child
    size = job.out.numel() * job.out.element_size()
    child = os.fork()
    if child == 0:
        NativeBackend(threads=3).merge(again)
        found, wanted = (string_at(x.out.data_ptr(), size) for x in (again, job))
        os._exit(0 if found == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_denormals_survive_a_flushing_caller() -> None:
    x = torch.tensor([1e-40, -3e-42, 1e-38], dtype=torch.float32)
    out = torch.zeros(3)
    flushing = torch.set_flush_denormal(True)
    try:
        NativeBackend().merge(Job(None, [x], Recipe((0.5,)), out))
    finally:
        torch.set_flush_denormal(False)
    if not flushing:
        pytest.skip("this machine cannot flush denormals")
    assert torch.equal(bits(out), bits(x * 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", CONFIG["supported_isas"])
def test_rounding_of_every_pattern(dtype: torch.dtype, isa: str) -> None:
    """All 16-bit values, their halfway points and neighbours round as torch rounds them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    pattern = every.view(torch.int32)
    around = torch.cat(
        [pattern + d for d in (-1, 0, 1, 0x7FF, 0x800, 0x1000, 0x7FFF, 0x8000, 0x8001)]
    )
    x = around.view(torch.float32)
    x = x[~x.isnan()]
    out = torch.zeros(x.shape, dtype=dtype)
    NativeBackend(isa=isa).merge(Job(None, [x], Recipe((1.0,)), out))
    want = (x + 0.0).to(dtype)  # the sum starts at +0
    assert torch.equal(bits(out), bits(want))
    back = torch.zeros(every.shape)
    finite = every[every.isfinite()]
    back = torch.zeros(finite.shape)
    NativeBackend(isa=isa).merge(Job(None, [finite.to(dtype)], Recipe((1.0,)), back))
    assert torch.equal(back, finite)


def test_nonfinite_places_and_overflow() -> None:
    base = torch.zeros(3, 700)
    experts = [torch.zeros(3, 700) for _ in range(3)]
    base[2, 5] = float("nan")
    experts[1][1, 699] = float("inf")
    experts[1][2, 0] = float("nan")
    stats = NativeBackend().merge(Job(base, experts, Recipe((1.0,) * 3), torch.zeros(3, 700)))
    assert stats.base_nonfinite == 1405
    assert stats.first_nonfinite == (-1, 1399, -1)
    big = torch.full((300,), 3.0e4)
    big[:41] = 1.0
    out = torch.zeros(300, dtype=torch.float16)
    stats = NativeBackend().merge(Job(None, [big, big, big], Recipe((1.0,) * 3), out))
    assert stats.overflow == 41 and stats.first_nonfinite == (-1, -1, -1)


def test_many_experts() -> None:
    experts = [torch.randn(70, generator=torch.Generator().manual_seed(s)) for s in range(100)]
    out = torch.zeros(70)
    NativeBackend().merge(Job(None, experts, Recipe((1.0,) * 100), out))
    total = torch.zeros(70)
    for e in experts:
        total += e
    assert torch.equal(out, total)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 16 << 30:
        pytest.skip(f"needs 16 GiB of free memory, has {free >> 30}")
    n = 2**31 + 77
    x = torch.zeros(n, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    x[5] = 0.5
    out = torch.empty_like(x)
    recipe = Recipe((2.0,), Trim(TrimRule.MAGNITUDE, density=(2.5 / n,)))
    stats = NativeBackend().merge(Job(None, [x], recipe, out))
    assert stats.selection.threshold == (2.0,) and stats.kept == (2,)
    assert out[-3:].tolist() == [0.0, -4.0, 6.0] and float(out[5]) == 0.0
