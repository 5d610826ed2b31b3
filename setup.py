"""Builds the native core. Everything else about the package is in pyproject.toml.

Environment:
    MAGIC_FAST_CUDA            auto (default): the CUDA part where nvcc is found; 0: never;
                               1: without nvcc is an error.
    MAGIC_FAST_REQUIRE_NATIVE  1: a failed build of the extension is an error instead of a
                               pure-Python install.
    MAGIC_FAST_SANITIZE        address,undefined (or another -fsanitize= list): an instrumented
                               build for the tests.

The CUDA kernels are a module of their own, ``magic_fast._cuda``, compiled and linked by nvcc with
its runtime inside; no GPU has to be visible, and where it cannot be built everything else is.

One static library per instruction set, each compiled with its own flags, so that no code of one set
can end up in another's functions; they are linked into ``magic_fast._native``, which chooses at run
time.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, SetupError

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # gcc 12's own AVX-512 header trips these two warnings
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
    "neon": [],
}
X86 = ("x86_64", "amd64", "AMD64")
ARM = ("aarch64", "arm64")


def isas() -> list[str]:
    """Instruction sets to compile for this machine's architecture, or those of MAGIC_FAST_ISAS."""
    machine = platform.machine()
    found = ["neon"] if machine in ARM else ["baseline"]
    if machine in X86:
        found = ["baseline", "avx2", "avx512"]
    wanted = os.environ.get("MAGIC_FAST_ISAS")
    if wanted is None:
        return found
    names = wanted.split(",")
    if not set(names) <= set(found):
        raise SetupError(
            f"MAGIC_FAST_ISAS: expected some of {', '.join(found)}, got {wanted!r}. "
            "Unset it to build all of them."
        )
    return names


def want_cuda() -> bool:
    """MAGIC_FAST_CUDA resolved: whether CUDA sources are compiled in."""
    word = os.environ.get("MAGIC_FAST_CUDA", "auto")
    if word not in ("auto", "0", "1"):
        raise SetupError(f"MAGIC_FAST_CUDA: expected auto, 0 or 1, got {word!r}.")
    nvcc = shutil.which("nvcc")
    if word == "1" and nvcc is None:
        raise SetupError(
            "MAGIC_FAST_CUDA=1: expected nvcc on the PATH, got none. "
            "Install the CUDA toolkit, or set MAGIC_FAST_CUDA=0."
        )
    return word != "0" and nvcc is not None and bool(glob("csrc/cuda/*.cu"))


CUDA = want_cuda()
SANITIZE = os.environ.get("MAGIC_FAST_SANITIZE", "")
REQUIRED = os.environ.get("MAGIC_FAST_REQUIRE_NATIVE", "0") == "1" or bool(SANITIZE)

# Votes and thresholds are exact in float32: nothing may be reassociated or contracted.
CFLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
CFLAGS += ["-fvisibility-inlines-hidden", "-fPIC", "-Wall", "-Wextra"]
LINK = ["-pthread"] if sys.platform != "win32" else []
MACROS: list[tuple[str, str | None]] = [(f"MF_HAVE_{isa.upper()}", None) for isa in isas()]
if SANITIZE:
    CFLAGS[CFLAGS.index("-O3")] = "-O1"  # instrumented, -O3 takes many times as long to compile
    CFLAGS += [
        f"-fsanitize={SANITIZE}",
        "-fno-omit-frame-pointer",
        "-fno-sanitize-recover=all",
        "-g",
    ]
    LINK += [f"-fsanitize={SANITIZE}"]
    MACROS.append(("MF_SANITIZED", None))

INCLUDES = ["csrc/include", pybind11.get_include()]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
SOURCES = [*sorted(glob("csrc/cpu/*.cpp")), "csrc/bindings/module.cpp"]
LIBRARIES = [
    (
        f"mf_{isa}",
        {
            "sources": [f"csrc/cpu/isa/{isa}.cpp"],
            "include_dirs": ["csrc/include"],
            "cflags": CFLAGS + ISA_FLAGS[isa],
            "obj_deps": {"": HEADERS},  # without it a changed header rebuilds nothing
        },
    )
    for isa in isas()
]
# Machine code for two generations, and PTX for what comes after. Nothing is contracted, as above.
CUDA_TARGETS = ("sm_80", "sm_90", "PTX of sm_90")
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Icsrc/include", "-Icsrc/cuda"]
NVCC_FLAGS += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
NVCC_FLAGS += ["-gencode=arch=compute_90,code=compute_90", "-Xfatbin=-compress-all"]
NVCC_FLAGS += [f"--threads={len(CUDA_TARGETS)}"]  # a target each
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
NVCC_FLAGS += [f'-DMF_CUDA_ARCHITECTURES="{" ".join(CUDA_TARGETS)}"']
CUDA_SOURCES = [*sorted(glob("csrc/cuda/*.cu")), "csrc/bindings/cuda_module.cpp"]
CUDA_HEADERS = [*HEADERS, *sorted(glob("csrc/cuda/*.cuh"))]
# What an existing build directory was built with; another setting must not reuse its objects.
SETTINGS = repr((SANITIZE, isas(), CFLAGS, os.environ.get("CXX"), os.environ.get("CC")))


BUILD_ERRORS = (BaseError, CCompilerError, OSError)


def say(message: str) -> None:
    print(f"magic_fast: {message}", file=sys.stderr)


def _settings_changed(folder: str) -> bool:
    """Whether ``folder`` was built with other settings; remembers these."""
    stamp = Path(folder) / "magic_fast.settings"
    changed = stamp.exists() and stamp.read_text() != SETTINGS
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(SETTINGS)
    return changed


def _without_native(error: BaseException) -> None:
    if REQUIRED:
        raise error
    say(f"the native extension was not built: {error}")
    say("the package works without it, on the torch backend; `magic-fast doctor` says so.")
    say("Install a C++17 compiler and reinstall to get it;")
    say("MAGIC_FAST_REQUIRE_NATIVE=1 makes this an error.")


class BuildLibraries(build_clib):
    """The per-ISA libraries; a failure leaves the extension out."""

    failed: BaseException | None = None

    def run(self) -> None:
        if _settings_changed(self.build_temp):
            self.force = True
        try:
            super().run()
        except BUILD_ERRORS as error:
            BuildLibraries.failed = error
            _without_native(error)


class BuildExtension(build_ext):
    """The extension; optional, and never an old one under new settings."""

    def run(self) -> None:
        self.run_command("build_clib")  # `build_ext --inplace` alone would not
        if BuildLibraries.failed is not None:  # the CUDA kernels do without them
            self.extensions = [e for e in self.extensions if e.name == "magic_fast._cuda"]
        if not self.extensions:
            return
        if _settings_changed(self.build_temp):
            self.force = True
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "magic_fast._cuda":
            self._build_cuda(ext)
            return
        try:
            super().build_extension(ext)
        except BUILD_ERRORS as error:
            _without_native(error)
            self.extensions = []

    def _build_cuda(self, ext: Extension) -> None:
        """Every source by nvcc, two at a time, and linked by it: it knows where its runtime is."""
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / "cuda"
        settings = repr((NVCC_FLAGS, sys.version_info[:2]))
        stamp = objects / "magic_fast.settings"
        fresh = stamp.exists() and stamp.read_text() == settings
        includes = [f"-I{pybind11.get_include()}", *(f"-I{d}" for d in self.include_dirs)]
        newest = max(Path(h).stat().st_mtime for h in CUDA_HEADERS)

        def compiled(source: str) -> Path:
            found = objects / (Path(source).name + ".o")
            wanted = max(newest, Path(source).stat().st_mtime)
            if not fresh or not found.exists() or found.stat().st_mtime < wanted:
                _run(["nvcc", *NVCC_FLAGS, *includes, "-c", source, "-o", str(found)])
            return found

        try:
            objects.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(2) as pool:
                parts = list(pool.map(compiled, CUDA_SOURCES))
            _run(["nvcc", "-shared", "-cudart=static", *map(str, parts), "-o", str(target)])
            stamp.write_text(settings)
        except BUILD_ERRORS as error:
            if CUDA_WANTED:
                raise
            say(f"the CUDA kernels were not built: {error}")
            say("GPUs are served by Triton or PyTorch; MAGIC_FAST_CUDA=1 makes this an error.")


def _run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CCompilerError(f"{shlex.join(command[:1])} failed:\n{done.stdout[-4000:]}")


CUDA_WANTED = os.environ.get("MAGIC_FAST_CUDA") == "1"
CUDA_MODULES = [
    Extension(
        "magic_fast._cuda",
        sources=[],
        depends=[*CUDA_SOURCES, *CUDA_HEADERS],
        optional=not CUDA_WANTED,  # setuptools passes over what fails and is optional
    )
]

setup(
    packages=[
        *find_packages(include=["magic_fast", "magic_fast.*"]),
        "magic_fast.kernels",
        "magic_fast.examples",
    ],
    libraries=LIBRARIES,
    ext_modules=[
        Extension(
            "magic_fast._native",
            sources=SOURCES,
            include_dirs=INCLUDES,
            define_macros=MACROS,
            extra_compile_args=CFLAGS,
            extra_link_args=LINK,
            depends=[*HEADERS, *sorted(glob("csrc/cpu/isa/*.cpp"))],
            language="c++",
            optional=not REQUIRED,
        ),
        *(CUDA_MODULES if CUDA else []),
    ],
    cmdclass={"build_clib": BuildLibraries, "build_ext": BuildExtension},
)
