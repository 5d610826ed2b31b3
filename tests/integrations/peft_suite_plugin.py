"""For pytest over PEFT's own tests: our functions in place where MAGIC_FAST_REPLACE=1, outcomes
to the file MAGIC_FAST_OUTCOMES, and names for packages that they import but do not need here."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_outcomes: dict[str, str] = {}

for package, name in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
    if find_spec(package) is None:
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, None)
        setattr(module, name, type(name, (), {}))
        sys.modules[package] = module

if os.environ.get("MAGIC_FAST_REPLACE") == "1":
    import magic_fast as mf

    mf.integrations.peft.install()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid.rpartition("/")[2]] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["MAGIC_FAST_OUTCOMES"]).write_text(json.dumps(_outcomes))
