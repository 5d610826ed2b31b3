"""Lists of sensitive layers: written, read, and what a name in them stands for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import magic_fast as mf
from features.families import average
from features.planted import planted, samples
from magic_fast.calibration.sensitivity.lists import is_sensitive, unknown_names


def test_file_and_back(tmp_path: Path) -> None:
    base, experts = planted()
    report = mf.sensitive_layers(base, experts, data={"a": samples()}, top=3)
    path = tmp_path / "new" / "sensitive.json"
    report.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["sensitive.json"]
    found = json.loads(path.read_text())
    assert found["scores"] == report.scores
    assert list(found["scores"]) == sorted(report.scores, key=lambda n: report.scores[n])
    for key in ("metric", "perturbation", "samples", "noise", "intervals", "top", "sensitive"):
        assert key in found
    assert mf.sensitive_from_file(path) == report.sensitive
    assert mf.sensitive_from_file(path, top=1) == report.sensitive[:1]
    with pytest.raises(mf.OutputError, match="expected a file that can be written"):
        report.save(path / "below")


def test_list_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "scores.json"
    scores = {"b": 0.5, "c": 0.5, "a": 0.5, "d": 0.1}
    for order in (scores, dict(reversed(scores.items()))):
        path.write_text(json.dumps(order))
        assert mf.sensitive_from_file(path, top=2) == ("d", "a")  # equal ones by name
    path.write_text(json.dumps({str(k): k for k in range(30)}))
    assert len(mf.sensitive_from_file(path)) == 10
    path.write_text(json.dumps({"scores": scores, "top": 3, "noise": True}))
    assert mf.sensitive_from_file(path) == ("d", "a", "b")
    assert "it was found to be noise when it was measured" in caplog.text
    for text, message in (
        ('{"a": true}', "expected a list of names or an object of name: score, got dict"),
        ('{"a": NaN}', "expected a finite score of 'a', got nan"),
        ('{"scores": {"a": 1}, "top": "x"}', "expected a whole number of at least 1 as top"),
        ("[1]", "expected a list of names or an object of name: score, got list"),
        ("{", "expected a JSON file"),
    ):
        path.write_text(text)
        with pytest.raises(mf.InputError, match=re.escape(message)):
            mf.sensitive_from_file(path)


def test_a_module_stands_for_what_is_in_it() -> None:
    assert is_sensitive("a.b.weight", {"a.b"}) and is_sensitive("a.b.weight", {"a"})
    assert not is_sensitive("a.bc.weight", {"a.b"})
    assert unknown_names(["a", "a.b", "b"], ["a.b.weight"]) == ["b"]
    base, experts = planted()
    merged = average(experts)
    by_tensor, by_module = (
        mf.calibrate_weights(
            base, experts, merged, calibration=mf.WeightCalibration(sensitive=names)
        )[0].state_dict()
        for names in (["layers.3.weight", "layers.3.bias"], ["layers.3"])
    )
    free = mf.calibrate_weights(base, experts, merged)[0].state_dict()
    assert all(torch.equal(by_tensor[n], by_module[n]) for n in by_tensor)
    assert not torch.equal(free["layers.3.weight"], by_module["layers.3.weight"])
    with pytest.raises(mf.InputError, match=r"^sensitive tensor 'layers.9': expected a tensor of"):
        mf.calibrate_weights(
            base, experts, merged, calibration=mf.WeightCalibration(sensitive=["layers.9"])
        )


@pytest.mark.parametrize("space", ["feature", "dual"])
def test_a_container_holds_its_layers_back(space: str) -> None:
    base, experts = planted()
    data = {"a": samples(), "b": samples(seed=6)}
    found = [
        mf.calibrate_features(
            base, experts, average(experts), data, space=space, sensitive=names, clamp=None
        )
        for names in (["layers"], [f"layers.{k}" for k in (4, 2, 0, 1, 3)])
    ]
    for (one, report), (two, _) in (found, found[::-1]):
        for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q), name
        held = [x for x in report.layers if x.name.startswith("layers")]
        assert all(float(x.applied) <= 1 for x in held)
        assert any(float(x.coefficient) > 1 for x in held)
