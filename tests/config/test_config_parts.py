"""The parts under the configuration: parameter table, block detection, calibrate block."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.config_views import llama_names
from magic_fast.config import CalibrateConfig, MergeConfig
from magic_fast.config.blocks import comes_before, find_blocks, split_name
from magic_fast.errors import CheckpointError, ConfigError
from magic_fast.methods.presets import PRESETS
from magic_fast.methods.registry import built_in, find_method, known_parameters

# The table.


def test_every_default_is_in_its_own_range() -> None:
    for row in built_in().values():
        for spec in row.parameters:
            for preset in PRESETS:
                default = spec.default_for(preset)
                assert default is None or spec.accepts(default), (row.name, spec.name, preset)
            assert spec.required <= (spec.default is None), (row.name, spec.name)


def test_names_in_a_row_are_unique() -> None:
    for row in built_in().values():
        names = [name for spec in row.parameters for name in spec.names]
        assert len(names) == len(set(names)), row.name


def test_known_parameters() -> None:
    assert {"t", "density", "int8_mask", "filter_wise"} <= known_parameters()


@pytest.mark.parametrize(
    ("method", "name", "good", "bad"),
    [
        ("ties", "density", [1e-9, 1, 1.0], [0, -0.5, 1.0000001, math.nan, True, "0.5", None]),
        ("breadcrumbs", "gamma", [0, 0.99], [1, -0.1]),
        ("della", "epsilon", [0, 0.15], [-1e-9, math.inf]),
        ("slerp", "t", [0, 1, 0.5], [-0.1, 1.1]),
        ("ties", "lambda", [0, -3, 1e9], [math.inf, math.nan]),
        ("ties", "normalize", [True, False, 0, 1, 1.0], [2, "yes", None]),
        ("ties", "rescale", [True, "l1", "none"], ["l3", 1.5]),
        ("karcher", "max_iter", [1, 10.0], [0, 1.5]),
    ],
)
def test_ranges(method: str, name: str, good: list[Any], bad: list[Any]) -> None:
    spec = find_method(method).find(name)
    assert spec is not None
    assert [value for value in good if not spec.accepts(value)] == []
    assert [value for value in bad if spec.accepts(value)] == []


# Blocks.


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.7.mlp.experts.3.w1.weight", ("model.layers.", 7, "mlp.experts.3.w1.weight")),
        ("transformer.h.0.ln_1.weight", ("transformer.h.", 0, "ln_1.weight")),
        ("encoder.block.5.layer.1.x.weight", ("encoder.block.", 5, "layer.1.x.weight")),
        ("0.weight", ("", 0, "weight")),
        ("layer1.0.conv1.weight", ("layer1.", 0, "conv1.weight")),
        ("model.norm.weight", None),
        ("w.01.x", None),
        ("conv.1", None),
    ],
)
def test_split_name(name: str, parts: tuple[str, int, str] | None) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize("prefix", ["model.layers.", "transformer.h.", "encoder.layer.", "h."])
def test_any_prefix_of_blocks_is_found(prefix: str) -> None:
    names = ["wte.weight", *(f"{prefix}{i}.attn.q.weight" for i in range(12)), "ln_f.weight"]
    main = find_blocks(names, {}, "m").main
    assert main is not None and (main.prefix, main.count) == (prefix, 12)


def test_encoder_and_decoder_each_have_their_own_gradient() -> None:
    names = [f"encoder.block.{i}.layer.0.x.weight" for i in range(3)]
    names += [f"decoder.block.{i}.layer.0.x.weight" for i in range(5)]
    structure = find_blocks(names, {"num_layers": 3}, "t5")
    assert structure.main is not None and structure.main.prefix == "encoder.block."
    assert structure.position("encoder.block.1.layer.0.x.weight") == 0.5
    assert structure.position("decoder.block.1.layer.0.x.weight") == 0.25
    assert structure.position("shared.weight") == 0.0
    assert find_blocks(names, {}, "t5").main is None


def test_text_and_vision_towers() -> None:
    names = [f"visual.blocks.{i}.attn.qkv.weight" for i in range(32)]
    names += [f"model.layers.{i}.mlp.up.weight" for i in range(28)]
    names += ["visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"]
    structure = find_blocks(names, {"text_config": {"num_hidden_layers": 28}}, "vl")
    assert structure.main is not None and structure.main.prefix == "model.layers."
    assert set(structure.stacks) == {"visual.blocks.", "model.layers."}  # the merger is no stack


def test_blocks_beyond_the_declared_ones_stay_at_the_end() -> None:
    names = [f"model.layers.{i}.mlp.w" for i in range(4)]
    structure = find_blocks(names, {"num_hidden_layers": 3}, "m")
    positions = [structure.position(name) for name in names]
    assert positions == [0.0, 0.5, 1.0, 1.0]


def test_plain_layers_count_where_the_config_says_so() -> None:
    names = ["layers.0.weight", "layers.1.weight"]
    assert find_blocks(names, {}, "m").main is None
    assert find_blocks(names, {"num_hidden_layers": 2}, "m").main is not None


def test_a_hole_between_blocks_is_a_damaged_checkpoint() -> None:
    names = [name for name in llama_names(4) if "layers.2." not in name]
    with pytest.raises(CheckpointError, match=r"got none of the tensors of model\.layers\.2"):
        find_blocks(names, {"num_hidden_layers": 4}, "m")


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("wpe.weight", True),
        ("bert.embeddings.LayerNorm.weight", True),
        ("visual.patch_embed.proj.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False),
        ("lm_head.weight", False),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("score.weight", False),
    ],
)
def test_before_or_after_the_blocks(name: str, before: bool) -> None:
    assert comes_before(name) is before


# calibrate:


def calibrate(value: Any) -> CalibrateConfig | None:
    models = [{"model": "a"}, {"model": "b"}]
    data = {"merge_method": "ties", "base_model": "base", "models": models, "calibrate": value}
    return MergeConfig.from_dict(data).calibrate


def test_the_shorthand_is_all_defaults() -> None:
    config = calibrate("wsc")
    assert config is not None and config == CalibrateConfig() == calibrate({})
    assert config.as_dict() == {
        "variant": "manifold", "granularity": None, "p": 2, "eps_mode": "relative", "guards": True,
        "clamp": (0.1, 10.0), "strength": 1.0, "scale": 1.0, "tensors": "general",
        "direction": "auto", "sensitive": None, "row_axis": None,
    }  # fmt: skip
    assert calibrate(None) is None


def test_all_fields_are_read() -> None:
    config = calibrate(
        {"variant": "sphere", "granularity": "tensor", "p": math.inf, "eps_mode": "none",
         "guards": False, "clamp": None, "strength": 0.5, "scale": 2, "direction": "grow",
         "tensors": {"include": ["mlp"], "exclude": [r"\.0\."]}, "sensitive": ["x.weight"],
         "row_axis": [0, 1]}
    )  # fmt: skip
    assert config is not None
    values = config.as_dict()
    assert values["p"] == "inf" and values["clamp"] is None and values["scale"] == 2.0
    assert values["tensors"] == {"include": ("mlp",), "exclude": (r"\.0\.",)}
    assert values["sensitive"] == ("x.weight",) and values["row_axis"] == (0, 1)


def test_axes_by_patterns() -> None:
    config = calibrate({"row_axis": {r"proj\.": 1, "experts": [0, 2]}})
    assert config is not None
    assert config.as_dict()["row_axis"] == {r"proj\.": 1, "experts": (0, 2)}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wcs", ["calibrate", "'wcs'"]),
        (True, ["calibrate"]),
        ({"varient": "sphere"}, ["Did you mean 'variant'"]),
        ({"variant": "manyfold"}, ["Did you mean 'manifold'"]),
        ({"p": 0}, ["calibrate.p", "got 0"]),
        ({"p": 1.5}, ["got 1.5"]),
        ({"p": True}, ["got True"]),
        ({"guards": "no"}, ["calibrate.guards"]),
        ({"clamp": [2, 1]}, ["0 <= low <= high", "[2.0, 1.0]"]),
        ({"clamp": [1]}, ["calibrate.clamp"]),
        ({"clamp": 3}, ["calibrate.clamp"]),
        ({"strength": -1}, ["calibrate.strength"]),
        ({"scale": math.nan}, ["calibrate.scale"]),
        ({"tensors": "all"}, ["calibrate.tensors", "'general' or 'magic'"]),
        ({"tensors": {"include": ["("]}}, ["calibrate.tensors.include[0]", "regular expression"]),
        ({"tensors": {"inclde": ["x"]}}, ["Did you mean 'include'"]),
        ({"sensitive": "x.json", "top": 0}, ["calibrate.sensitive.top"]),
        ({"sensitive": [3]}, ["calibrate.sensitive[0]"]),
        ({"top": 3}, ["calibrate.top"]),
        ({"direction": "up"}, ["calibrate.direction"]),
        ({"row_axis": 0.5}, ["calibrate.row_axis"]),
        ({"row_axis": {"experts": 0.5}}, ["calibrate.row_axis"]),
        ({"row_axis": {"experts(": 0}}, ["calibrate.row_axis"]),
    ],
)
def test_calibrate_faults(value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        calibrate(value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_scores_are_found_beside_the_yaml(tmp_path: Path) -> None:
    text = ("merge_method: ties\nbase_model: base\nmodels: [{model: a}]\n"
            "calibrate: {sensitive: scores.json, top: 3}\n")  # fmt: skip
    (tmp_path / "m.yml").write_text(text)
    config = MergeConfig.from_file(tmp_path / "m.yml")
    assert config.calibrate is not None
    assert config.calibrate.as_dict()["sensitive"] == {"path": "scores.json", "top": 3}
    with pytest.raises(ConfigError, match=r"'scores\.json', which does not exist"):
        config.calibration_arguments()
    (tmp_path / "scores.json").write_text("{}")
    arguments = config.calibration_arguments()
    assert arguments is not None
    assert arguments["sensitive"] == {"path": str(tmp_path / "scores.json"), "top": 3}


def test_the_configuration_never_imports_torch() -> None:
    code = (
        "import sys, magic_fast.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
