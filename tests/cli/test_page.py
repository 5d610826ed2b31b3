"""``magic-fast inspect --html``: the page, its numbers, and what a browser makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import magic_fast as mf
from magic_fast.cli import main
from magic_fast.report.page import page
from support.models import load

Capture = pytest.CaptureFixture[str]
SECTIONS = ["magnitude", "coefficients", "norms", "conflict", "cosines", "alike", "numbers"]


@pytest.fixture(scope="module")
def merged(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By TIES with WSC."""
    from support.models import write_config

    folder = tmp_path_factory.mktemp("page")
    mf.merge_checkpoints(write_config(folder, tiny_models), folder / "merged")
    return folder / "merged"


def inspect(models: Path, *more: object) -> list[str]:
    experts = [str(models / f"expert-{k}") for k in range(3)]
    return ["inspect", "--base", str(models / "base"), "--experts", *experts, *map(str, more)]


def statistics(**changes: Any) -> Any:
    from magic_fast.api.tensors.stats import TensorStatistics

    plain = {"shape": (2, 3), "norms": (1.0, 2.0), "cosines": [[1.0, 0.5], [0.5, 1.0]]}
    return TensorStatistics(**({"name": "a.0.weight", "sign_conflict": 0.25} | plain | changes))


def test_statistics_of_a_calibrated_model_tell_what_its_record_says(
    tiny_models: Path, merged: Path
) -> None:
    record = json.loads((merged / "magic_fast.json").read_text())
    recorded = {t["name"]: t for t in record["tensors"]}
    experts = [tiny_models / f"expert-{k}" for k in range(3)]
    found = {t.name: t for t in mf.inspect_checkpoints(tiny_models / "base", experts, merged)}
    again = mf.task_vector_stats(
        load(tiny_models / "base"), [load(e) for e in experts], load(merged)
    )
    assert recorded
    assert {name for name, t in found.items() if t.calibrated} == set(recorded)
    for name, tensor in recorded.items():
        assert found[name].coefficients == tuple(tensor["coefficient_quantiles"])
        assert found[name].magnitude_before == tensor["magnitude_before"]
        assert found[name].magnitude == again[name].magnitude


def test_before_is_a_model(tiny_models: Path, tmp_path: Path) -> None:
    """A model that others merged and calibrated: before and after are two folders."""
    names = ("base", "expert-0", "expert-1", "expert-2")
    models = [{n: t.float() for n, t in load(tiny_models / name).items()} for name in names]
    base, experts = models[0], models[1:]
    before = mf.merge(base, experts, "average")
    after, report = mf.calibrate_weights(base, experts, before)
    for name, model in zip((*names, "before", "after"), (*models, before, after), strict=True):
        (tmp_path / name).mkdir()
        save_file(model, tmp_path / name / "model.safetensors")
    places = [tmp_path / name for name in names[1:]]
    found = mf.inspect_checkpoints(
        tmp_path / "base", places, tmp_path / "after", before=tmp_path / "before"
    )
    for tensor in found:
        expected = report[tensor.name]
        assert not tensor.calibrated
        if not expected.calibrated:
            continue
        assert tensor.magnitude_before == pytest.approx(expected.magnitude_before, rel=1e-5)
        assert tensor.magnitude == pytest.approx(expected.magnitude_after, rel=1e-5)
        assert expected.coefficient is not None
        assert tensor.coefficients is not None
        ordered = expected.coefficient.double().sort().values
        assert tensor.coefficients[2] == pytest.approx(
            float(ordered[round(0.5 * (len(ordered) - 1))]), rel=1e-5
        )


def test_rows_follow_the_layout_of_the_model() -> None:
    """GPT-2 stores projections [in, out]: a column that vanished is one unit of four, not a third
    of every row."""
    from magic_fast.api.tensors.stats import statistics_of
    from magic_fast.models import roles_of

    name = "h.0.mlp.c_fc.weight"
    role = roles_of({"model_type": "gpt2"}, {name: ((3, 4), "F32")})[name]
    expert = torch.ones(3, 4)
    merged = expert.clone()
    merged[:, 0] = 0
    found = statistics_of(torch.zeros(3, 4), [expert], merged, name, role=role)
    assert found.row_deviation == pytest.approx(0.25)


def test_page_has_a_section_for_each_plot_and_a_row_for_each_tensor(
    tiny_models: Path, merged: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "report.html"
    command = inspect(tiny_models, "--merged", merged, "--html", path)
    assert main([*command, "-q"]) == 0
    assert capsys.readouterr().out == ""
    text = path.read_text("utf-8")
    assert [s for s in SECTIONS if f'<section id="{s}">' in text] == SECTIONS
    assert text.count("<tr>") == 1 + len(load(merged))
    assert main([*command, "--json"]) == 0
    assert "tensors" in json.loads(capsys.readouterr().out)
    assert path.read_text("utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_names_are_text() -> None:
    name = "</script><script>alert(1)</script>.weight"
    text = page([statistics(name=name)], base="<b>", experts=["x</title>", "y"])
    assert "<script>alert" not in text
    assert "<b>" not in text.partition("<body>")[2].partition("<section")[0]
    assert text.count("</script>") == page([statistics()], base="b", experts=["x", "y"]).count(
        "</script>"
    )


def test_layers_of_feature_space_have_their_plot() -> None:
    layers = [
        {"name": "h.0.fc", "by_task": {"maths": 1.5, "code": None}, "applied": 1.4, "note": ""},
        {"name": "h.1.fc", "by_task": {}, "applied": 1.0, "note": "never called"},
    ]
    text = page([statistics()], base="b", experts=["x", "y"], record={"layers": layers})
    assert '<section id="features">' in text
    assert "maths" in text
    assert '"h.1.fc"' not in text


def test_one_expert_that_did_not_move() -> None:
    still = statistics(norms=(0.0,), cosines=[[0.0]], sign_conflict=0.0)
    text = page([still], base="b", experts=["x"])
    shown = [s for s in SECTIONS if f'<section id="{s}">' in text]
    assert shown == ["norms", "conflict", "numbers"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "report.pdf",
            "report 'report.pdf': expected a name that ends in .html, got '.pdf'. Name another.",
        ),
        (
            "missing/report.html",
            "report 'missing/report.html': expected a folder that exists, got 'missing'. "
            "Make it first.",
        ),
    ],
)
def test_bad_places_are_refused_before_any_work(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--base", "none", "--experts", "none", "--html", path]) == 2
    assert message in capsys.readouterr().err


def test_before_without_merged_is_refused(tiny_models: Path, capsys: Capture) -> None:
    assert main(inspect(tiny_models, "--before", tiny_models / "base")) == 2
    assert "before: expected a merged model beside it, got none." in capsys.readouterr().err


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium that logs its console and its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "window-size=1200,900", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def test_browser_draws_every_plot_without_a_network(
    tiny_models: Path, merged: Path, tmp_path: Path, browser: Any
) -> None:
    path = tmp_path / "report.html"
    assert main(inspect(tiny_models, "--merged", merged, "--html", path, "-q")) == 0
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    drawn = {
        section.get_attribute("id")
        for section in browser.find_elements("tag name", "section")
        if section.find_elements("css selector", ".main-svg :is(.point, .box, image)")
        or section.find_elements("css selector", ".main-svg .trace path")
    }
    assert drawn == {*SECTIONS[:-1]}
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]

    rows = browser.find_elements("css selector", "#numbers tbody tr")
    assert len(rows) == 21
    browser.find_element("id", "filter").send_keys("LAYERS.1.mlp")
    assert [row.is_displayed() for row in rows].count(True) == 3
