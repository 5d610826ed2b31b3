"""The CUDA sources compiled for the host, so that the `cuda` backend runs on CPU tensors in tests:
blocks one after the other, the threads of a block as fibers (csrc/cuda/emulate.h)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "emulated"
ENVIRONMENT = "MAGIC_FAST_CUDA_EMULATED"
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"),
    *("-DMF_EMULATE", "-DMF_CUDA_MODULE=_cuda_emulated", "-Icsrc/include", "-Icsrc/cuda"),
]


def switch_on() -> None:
    """Builds it and names it, unless the caller did, a GPU is here, or there is no compiler (then
    the backend says that it was not built, and its tests are skipped)."""
    compiler = os.environ.get("CXX", "c++").split()
    if ENVIRONMENT in os.environ or shutil.which(compiler[0]) is None:
        return
    try:
        import pybind11
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        return
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    os.environ[ENVIRONMENT] = str(build([*compiler, *FLAGS, *includes]))


def build(command: list[str], folder: Path = FOLDER) -> Path:
    """The module, compiled anew where a source is younger; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/bindings/cuda_module.cpp"]
    headers = [h for g in ("include/*.h", "common/*.h", "cuda/*.h", "cuda/*.cuh")
               for h in ROOT.glob(f"csrc/{g}")]  # fmt: skip
    newest = max(p.stat().st_mtime for p in (*sources, *headers))
    module = folder / "_cuda_emulated.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if module.exists() and module.stat().st_mtime > newest:
            return module
        objects = [folder / f"{s.name}.o" for s in sources]

        def compiled(pair: tuple[Path, Path]) -> None:
            source, target = pair
            run([*command, "-x", "c++", "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compiled, zip(sources, objects, strict=True)))
        fresh = folder / "fresh.so"
        run([*command[:1], *command[1:], "-shared", *map(str, objects), "-o", str(fresh)])
        fresh.replace(module)  # whoever has the old one loaded keeps it
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
