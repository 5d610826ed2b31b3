"""What every test may lean on: the demand for the extension in CI, and tiny checkpoints."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import emulator, interpreter

emulator.switch_on()
if interpreter.switch_on():  # before anything imports Triton
    interpreter.quicken()

ROOT = Path(__file__).resolve().parents[1]

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU: only the tests of properties need it
    pass
else:  # the same examples on every run: a failure in CI is a failure here
    settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    """With MAGIC_FAST_REQUIRE_NATIVE=1 a build without the extension is a failure, not a skip."""
    if os.environ.get("MAGIC_FAST_REQUIRE_NATIVE") != "1":
        return
    try:
        importlib.import_module("magic_fast._native")
    except ImportError as error:
        raise pytest.UsageError(
            f"MAGIC_FAST_REQUIRE_NATIVE=1, but magic_fast._native does not import: {error}"
        ) from error


@pytest.fixture(autouse=True)
def _warnings_heard() -> None:
    """What a command made quiet is heard again: by the next test, and after what it shares."""
    logging.root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and expert-0/ … expert-2/: tiny sharded bf16 Llama checkpoints. Read only."""
    from magic_fast.cli.demo_data import TINY, write_checkpoints

    folder = tmp_path_factory.mktemp("models")
    write_checkpoints(folder, TINY, num_experts=3, seed=0)
    return folder


@pytest.fixture
def own_registry() -> Iterator[None]:
    """What a test registers as a backend, or offers by entry points, is gone after it."""
    from magic_fast.ops import registry
    from magic_fast.plugins import entry_points_of

    def forget() -> None:
        for cached in (entry_points_of, registry.left_out, registry.specs, registry.loaded):
            cached.cache_clear()
        registry.measured_order.cache_clear()

    before = list(registry._REGISTERED)
    forget()
    yield
    registry._REGISTERED[:] = before
    forget()
