"""Tiny models of every type on disk: two fine-tunes are merged, and transformers loads what the
merge by hand gives; rows of calibrations by the classes of the modules; all own layers in slices.

What does not pass is in ``tools/architectures/shrink.json``, with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from architectures import shrink  # noqa: E402
from magic_fast.models import table  # noqa: E402
from models import whole_models as whole  # noqa: E402

if transformers.__version__ != table.heading()["transformers"]:
    pytest.skip(
        f"the table is of transformers {table.heading()['transformers']}, here is "
        f"{transformers.__version__}",
        allow_module_level=True,
    )

MERGED = table.model_types()
SLICED = [model_type for model_type in MERGED if shrink.sliced_class(model_type)]
SAMPLE = ("gpt2", "gpt_oss", "llava", "qwen3_vl_moe", "t5", "t5gemma", "whisper", "xlnet")
SLICED_SAMPLE = ("bart", "bert", "clip", "llama")
#: So many at least.
LEAST, LEAST_SLICED = 300, 60


def cases(model_types: list[str], what: str) -> list[object]:
    """Those that do not pass must fail, unless for want of a package."""
    left_out = shrink.LEFT_OUT[what]

    def marks(model_type: str) -> list[pytest.MarkDecorator]:
        reason = left_out.get(model_type)
        strict = reason is not None and not reason.startswith("needs")
        return [pytest.mark.xfail(reason=reason, strict=strict)] if reason else []

    return [pytest.param(t, marks=marks(t)) for t in model_types]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@torch.no_grad()
def check(model_type: str, folder: Path) -> None:
    family = whole.Family(model_type, folder)
    whole.check_merge(family)
    whole.check_words(family)
    whole.check_rows(family)


@torch.no_grad()
def check_sliced(model_type: str, folder: Path) -> None:
    architecture = shrink.sliced_class(model_type)
    assert architecture is not None
    whole.check_passthrough(whole.Family(model_type, folder, architecture))


@pytest.mark.parametrize("model_type", SAMPLE)
def test_some_merged(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


@pytest.mark.parametrize("model_type", SLICED_SAMPLE)
def test_some_sliced(model_type: str, tmp_path: Path) -> None:
    check_sliced(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", cases(MERGED, "merged"))
def test_merged(model_type: str, tmp_path: Path) -> None:
    check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", cases(SLICED, "sliced"))
def test_sliced(model_type: str, tmp_path: Path) -> None:
    check_sliced(model_type, tmp_path)


def test_how_many() -> None:
    for types, what, least in ((MERGED, "merged", LEAST), (SLICED, "sliced", LEAST_SLICED)):
        left_out = shrink.LEFT_OUT[what]
        assert left_out.keys() <= set(types)
        assert len(types) - len(left_out) >= least
