"""Every method and calibration has its row, and the pages in docs are what the tables say."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import magic_fast as mf
from magic_fast.calibration import as_calibration
from magic_fast.calibration import catalog as calibrations
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.weight import CALIBRATE_WORDS
from magic_fast.cli import main
from magic_fast.cli.calibrate import refuse_idle
from magic_fast.cli.program import build_parser
from magic_fast.config.calibrate import CalibrateConfig
from magic_fast.methods import catalog, registry
from magic_fast.methods.registry import built_in, names
from magic_fast.recipe import Variant

KEYWORD = inspect.Parameter.KEYWORD_ONLY


def test_every_method_has_its_row() -> None:
    inside = [name for module in registry._MODULES for name in registry._methods_of(module)]
    assert list(registry._HOMES) == inside
    for name, spec in built_in().items():
        assert name == spec.name and spec.summary and spec.use_when and spec.paper.title, name
        ways = [spec.recipe, spec.directions, spec.function]
        assert sum(way is not None for way in ways) == 1, name
        assert (spec.recipe is not None) == (not spec.reads) == (not spec.holds), name


def test_document_is_generated() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "catalog.md"
    assert document.read_text() == "\n".join(catalog.markdown()) + "\n"


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("average", "1"),
        ("ties", "2"),
        ("dare_ties", "1"),
        ("breadcrumbs", "2"),
        ("sce", "2"),
        ("ramplus_tl", "2"),
    ],
)
def test_reads(name: str, reads: str) -> None:
    assert catalog.entry(name).reads == reads


def test_majority_takes_one_more() -> None:
    assert catalog.entry("ties").reads_presets["magic"] == "3"


def test_every_calibration_has_its_row() -> None:
    variants = {variant.value for variant in Variant}
    assert set(calibrations.CALIBRATORS) == variants | {"fsc", "dsc", "svc", "lines"}
    assert not set(calibrations.CALIBRATORS) & set(built_in())
    settings = {n: [s.name for s in c.settings] for n, c in calibrations.CALIBRATORS.items()}
    own = {f.name for f in fields(mf.WeightCalibration) if f.init} - {"variant"}
    for name in variants:
        assert set(settings[name]) == (own if name == "sphere" else own - {"p"})
    features = {f.name for f in fields(FeatureCalibration) if f.init}
    assert set(settings["fsc"]) == set(settings["dsc"]) == features
    for name, function in (("svc", mf.svc), ("lines", mf.lines)):
        named = [n for n, p in inspect.signature(function).parameters.items() if p.kind is KEYWORD]
        assert sorted(settings[name]) == sorted(set(named) - {"out", "nonfinite", "name"})


def test_calibration_document_is_generated() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "catalog_calibrations.md"
    assert document.read_text() == "\n".join(calibrations.markdown()) + "\n"


@pytest.mark.parametrize("name", [*calibrations.CALIBRATORS, "wsc"])
def test_ways_to_ask(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a row says to type is understood: YAML, Python and the options of the command."""
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    found = calibrations.find_calibrator(name)
    assert found is not None and all(way in out for way in found.use)
    for way in found.use:
        if way.startswith("YAML: "):
            long, short = way.removeprefix("YAML: ").removesuffix(")").split(" (or ")
            asked = [CalibrateConfig.model_validate(yaml.safe_load(w)["calibrate"])
                     for w in (long, short)]  # fmt: skip
            assert {a.variant for a in asked} == {found.name}
            assert as_calibration(found.name) == mf.WeightCalibration(variant=found.name)
        elif way.startswith("magic-fast "):
            line = way.replace("TASK=PATH …", "a=b").replace(" B", " 1").split()[1:]
            line += ["--base", "b", "--experts", "e", "--merged", "m", "out"]
            refuse_idle(build_parser().parse_args(line))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names())
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in listed["methods"]] == list(names())
    assert [c["name"] for c in listed["calibrations"]] == list(calibrations.CALIBRATORS)
    assert main(["methods"]) == 0 and "norm restoration" in capsys.readouterr().out
    assert main(["methods", "sphere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == "none"
    assert main(["methods", "ties"]) == 0
    out = capsys.readouterr().out
    assert "lambda/scale (Python: scale)" not in out and "density = 0.2; 1.0 under mergekit" in out
    assert main(["methods", "tyes"]) == 2
    assert "Did you mean 'ties'" in capsys.readouterr().err
    assert main(["methods", "spher"]) == 2
    assert "Did you mean 'sphere'" in capsys.readouterr().err


@pytest.mark.parametrize("word", CALIBRATE_WORDS)
def test_merge_takes_every_word(word: str) -> None:
    """The command spells them out, as its help imports nothing of torch."""
    given = build_parser().parse_args(["merge", "config.yml", "out", "--calibrate", word])
    assert given.calibrate == word
