"""For pytest over another library's own tests (MAGIC_FAST_SUITE): our functions in place where
MAGIC_FAST_REPLACE=1, outcomes to the file MAGIC_FAST_OUTCOMES, and what its tests import but
neither its sources nor this environment have."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import magic_fast as mf

SUITE = os.environ["MAGIC_FAST_SUITE"]
_outcomes: dict[str, str] = {}

torch.manual_seed(0)  # the same models and masks in both runs, as far as the order is

for package, name in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
    if find_spec(package) is None:
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, None)
        setattr(module, name, type(name, (), {}))
        sys.modules[package] = module

if SUITE == "mergekit" and find_spec("tests.common") is None:
    import mergekit_suite_common

    sys.modules["tests.common"] = mergekit_suite_common

if os.environ.get("MAGIC_FAST_REPLACE") == "1":
    getattr(mf.integrations, SUITE).install()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid.rpartition("/")[2]] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ["MAGIC_FAST_OUTCOMES"]).write_text(json.dumps(_outcomes))
