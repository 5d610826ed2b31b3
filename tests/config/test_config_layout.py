"""Which tensors the output has, from which sources, with which values: worked by hand."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from config.config_views import BLOCK, GOLDEN, View, llama, llama_names, view_of
from magic_fast.config import MergeConfig, OutputTensor, resolve_layout
from magic_fast.errors import CheckpointError, ConfigError

Q0 = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layout(
    data: Mapping[str, Any], views: Mapping[str, View] | None = None, layers: int = 3
) -> dict[str, OutputTensor]:
    config = MergeConfig.from_dict(data)
    views = views or {}
    tensors = resolve_layout(
        config, {m: views.get(m, llama(layers)) for m in config.model_references}
    )
    named = {tensor.name: tensor for tensor in tensors}
    assert len(named) == len(tensors)
    return named


def task_arithmetic(**entries: Any) -> dict[str, Any]:
    """models a (with ``a=``) and b (with ``b=``) over the base; other keys go to the top."""
    models = [{"model": m, "parameters": entries.pop(m, {})} for m in ("a", "b")]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": models, **entries}


def source_models(tensor: OutputTensor) -> list[str]:
    return [source.model for source in tensor.sources]


def test_one_output_for_each_tensor_of_the_donor_in_its_order() -> None:
    tensors = layout(task_arithmetic())
    assert list(tensors) == llama_names(3)
    tensor = tensors[UP.format(1)]
    assert source_models(tensor) == ["a", "b", "base"]  # the unlisted base is appended
    assert [source.model for source in tensor.experts] == ["a", "b"]
    assert tensor.base is not None and tensor.base.model == "base" and tensor.base.is_base
    assert {source.tensor_name for source in tensor.sources} == {tensor.name}


def test_a_listed_base_keeps_its_place_and_has_no_parameters() -> None:
    data = task_arithmetic()
    data["models"].insert(1, {"model": "base"})
    tensor = layout(data)[NORM]
    assert source_models(tensor) == ["a", "base", "b"]
    assert tensor.expert_parameters["weight"] == (1.0, 1.0)


def test_linear_takes_all_as_equals() -> None:
    models = [{"model": "base", "parameters": {"weight": 3}}, {"model": "a"}]
    tensor = layout({"merge_method": "linear", "base_model": "base", "models": models})[NORM]
    assert tensor.base is None and not any(source.is_base for source in tensor.sources)
    assert tensor.expert_parameters["weight"] == (3.0, 1.0)
    assert tensor.parameters == {"normalize": True}


def test_a_base_only_for_the_calibration_is_no_source() -> None:
    data = {"merge_method": "linear", "base_model": "base", "calibrate": "wsc",
            "models": [{"model": "a"}, {"model": "b"}]}  # fmt: skip
    tensor = layout(data)[NORM]
    assert source_models(tensor) == ["a", "b"]
    assert tensor.base is not None and tensor.base.model == "base"
    with pytest.raises(ConfigError, match="calibrate measures"):
        MergeConfig.from_dict({**data, "base_model": None})


def test_slerp_goes_from_the_base_wherever_it_stands() -> None:
    for order in (["base", "a"], ["a", "base"], ["a"]):
        models = [{"model": name} for name in order]
        data = {"merge_method": "slerp", "base_model": "base", "models": models}
        tensor = layout({**data, "parameters": {"t": 0.25}})[NORM]
        assert tensor.base is not None and tensor.base.model == "base"
        assert [source.model for source in tensor.experts] == ["a"]
        assert tensor.parameters == {"t": 0.25, "per_row": False}


def weights(data: dict[str, Any], *names: str, layers: int = 3) -> list[float]:
    tensors = layout(data, layers=layers)
    return [tensors[name].expert_parameters["weight"][0] for name in names]


def test_gradients_run_over_the_layers() -> None:
    data = task_arithmetic(a={"weight": [0, 0.5, 0.3, 0.7, 1]})
    # 3 layers: t = 0, 1/2, 1 hit points 0, 2, 4. Outside the blocks t = 0.
    names = (EMBED, UP.format(0), UP.format(1), UP.format(2), NORM, HEAD)
    assert weights(data, *names) == [0, 0, 0.3, 1, 0, 0]
    # 4 layers of a gradient of 3 points: positions 0, 2/3, 4/3, 2.
    data = task_arithmetic(a={"weight": [1.0, 0.4, 0.1]})
    found = weights(data, *(UP.format(i) for i in range(4)), layers=4)
    assert found == pytest.approx([1, 1 / 3 * 1 + 2 / 3 * 0.4, 2 / 3 * 0.4 + 1 / 3 * 0.1, 0.1])


def test_a_single_layer_takes_the_end_of_a_gradient() -> None:
    assert weights(task_arithmetic(a={"weight": [2, 5]}), UP.format(0), EMBED, layers=1) == [5, 2]
    assert weights(task_arithmetic(a={"weight": [7]}), UP.format(0), layers=2) == [7]


def test_first_matching_filter_wins_and_may_hold_a_gradient() -> None:
    setting = [
        {"filter": "self_attn", "value": 0.5},
        {"filter": "layers.0", "value": 9},
        {"filter": "mlp", "value": [0.3, 0.2]},
        {"filter": "*", "value": 0.25},
        {"filter": "norm", "value": 8},
    ]
    names = (Q0.format(0), UP.format(0), UP.format(1), UP.format(2), NORM)
    found = weights(task_arithmetic(a={"weight": setting}), *names)
    assert found == pytest.approx([0.5, 9, 0.25, 0.2, 0.25])


def test_precedence_source_slice_top_default() -> None:
    def value(source: Any, part: Any, top: Any) -> float:
        blocks = [{} if v is None else {"parameters": {"weight": v}} for v in (source, part, top)]
        entry = {"model": "a", "layer_range": [0, 2], **blocks[0]}
        base = {"model": "base", "layer_range": [0, 2]}
        data = {"merge_method": "task_arithmetic", "base_model": "base",
                "slices": [{"sources": [base, entry], **blocks[1]}], **blocks[2]}  # fmt: skip
        return float(layout(data)[UP.format(0)].expert_parameters["weight"][0])

    assert value(2, 3, 4) == 2
    assert value(None, 3, 4) == 3
    assert value(None, None, 4) == 4
    assert value(None, None, None) == 1
    assert value([{"filter": "self_attn", "value": 2}], 3, 4) == 3  # no match: the next level


def test_defaults_are_the_presets() -> None:
    def read(method: str, preset: str, **top: Any) -> dict[str, Any]:
        data = task_arithmetic(merge_method=method, preset=preset, parameters=top)
        return layout(data)[NORM].arguments(method)

    assert read("ties", "mergekit") == {
        "weights": (1, 1), "density": (1, 1), "scale": 1, "normalize": True, "rescale": "none",
    }  # fmt: skip
    assert read("ties", "default")["density"] == (0.2, 0.2)
    assert read("ties", "fusion_bench")["scale"] == 0.3
    assert read("dare_linear", "mergekit")["rescale"] == "l1"
    assert read("dare_linear", "default")["rescale"] == "keep_probability"
    assert read("dare_linear", "default")["density"] == (0.5, 0.5)
    assert read("della", "default")["epsilon"] == (0.15, 0.15)
    assert read("breadcrumbs", "default")["gamma"] == (0.01, 0.01)
    assert read("ties", "mergekit", scale=0.5)["scale"] == 0.5
    assert read("ties", "mergekit", rescale=True, normalize=0)["rescale"] == "l1"
    assert read("ties", "mergekit", normalize=0)["normalize"] is False


def test_a_required_parameter_without_a_match_names_the_tensor() -> None:
    data = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}],
            "parameters": {"t": [{"filter": "mlp", "value": 0.5}]}}  # fmt: skip
    with pytest.raises(ConfigError, match=r"no value of t for model\.embed_tokens\.weight"):
        layout(data)


def test_a_filter_that_matches_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    setting = [{"filter": "self_atn", "value": 1}, {"filter": "mlp", "value": 1}, {"value": 2}]
    with caplog.at_level(logging.WARNING, logger="magic_fast"):
        layout(task_arithmetic(a={"weight": setting}))
    assert "self_atn" in caplog.text and "'mlp'" not in caplog.text


# Slices.


def source(model: str, start: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [start, end], "parameters": parameters}


def test_slices_renumber_layers_and_split_what_is_outside() -> None:
    first = [source("base", 0, 1), source("a", 0, 1, weight=[0.5, 0.7]), source("c", 2, 3)]
    second = [source("base", 1, 3), source("b", 0, 2, weight=[0.1, 1])]
    data = {"merge_method": "task_arithmetic", "base_model": "base",
            "slices": [{"sources": first}, {"sources": second}]}  # fmt: skip
    tensors = layout(data)
    assert sorted(tensors) == sorted(llama_names(3))
    names = {key: [s.tensor_name for s in tensors[UP.format(key)].sources] for key in range(3)}
    assert names[0] == [UP.format(0), UP.format(0), UP.format(2)]
    assert names[1] == [UP.format(1), UP.format(0)]
    assert names[2] == [UP.format(2), UP.format(1)]
    found = [tensors[UP.format(i)].expert_parameters["weight"] for i in range(3)]
    assert found == [(0.7, 1.0), (0.1,), (1.0,)]  # each slice starts anew; one layer takes t = 1
    assert source_models(tensors[EMBED]) == ["base", "a", "c"]
    assert tensors[EMBED].expert_parameters["weight"] == (0.5, 1.0)  # t = 0
    assert source_models(tensors[HEAD]) == source_models(tensors[NORM]) == ["base", "b"]


def test_the_last_slice_gives_all_its_sources_to_norm_and_head() -> None:
    parts = [[source("base", 0, 1), source("a", 0, 1)],
             [source("base", 1, 2), source("b", 1, 2), source("c", 1, 2)]]  # fmt: skip
    data = {"merge_method": "task_arithmetic", "base_model": "base",
            "slices": [{"sources": part} for part in parts]}  # fmt: skip
    tensors = layout(data)
    for name in (NORM, HEAD):
        assert source_models(tensors[name]) == ["base", "b", "c"]


def test_stacking_may_repeat_layers() -> None:
    parts = [[source("a", 0, 2)], [source("b", 1, 3)], [source("a", 1, 2, scale=0.5)]]
    data = {"merge_method": "passthrough", "slices": [{"sources": part} for part in parts]}
    tensors = layout(data)
    assert MergeConfig.from_dict(data).num_layers == 5
    blocks = [(t.sources[0].model, t.sources[0].tensor_name, t.expert_parameters["scale"])
              for t in (tensors[UP.format(i)] for i in range(5))]  # fmt: skip
    assert blocks == [
        ("a", UP.format(0), (1.0,)), ("a", UP.format(1), (1.0,)), ("b", UP.format(1), (1.0,)),
        ("b", UP.format(2), (1.0,)), ("a", UP.format(1), (0.5,)),
    ]  # fmt: skip


def test_an_unlisted_base_takes_the_slices_range() -> None:
    data = {"merge_method": "task_arithmetic", "base_model": "base",
            "slices": [{"sources": [source("a", 1, 3), source("b", 1, 3)]}]}  # fmt: skip
    tensor = layout(data)[UP.format(0)]
    assert [(s.model, s.tensor_name) for s in tensor.sources] == [
        ("a", UP.format(1)), ("b", UP.format(1)), ("base", UP.format(1)),
    ]  # fmt: skip


def test_a_slice_may_have_a_base_of_its_own() -> None:
    pieces = [
        {"sources": [source("a", 0, 1), source("b", 0, 1)], "base_model": "other"},
        {"sources": [source("a", 1, 2), source("b", 1, 2)]},
    ]
    data = {"merge_method": "task_arithmetic", "base_model": "base", "slices": pieces}
    tensors = layout(data)
    assert source_models(tensors[UP.format(0)]) == ["a", "b", "other"]
    assert source_models(tensors[UP.format(1)]) == ["a", "b", "base"]
    assert MergeConfig.from_dict(data).model_references == ("base", "other", "a", "b")
    del data["base_model"]
    with pytest.raises(ConfigError, match="missing key for base_model"):
        MergeConfig.from_dict(data)


def test_residual_weight_does_what_it_does_in_mergekit() -> None:
    pieces = [{"sources": [source("a", 0, 1), source("b", 0, 1)], "residual_weight": 0.5}]
    data = {"merge_method": "linear", "slices": pieces}
    config = MergeConfig.from_dict(data)
    assert config.warnings == ("slices[0].residual_weight: no effect, as in mergekit.",)


VISION = "vision_tower.encoder.layers.{}.fc.weight"


def vision_language(layers: int = 3) -> View:
    """Three layers of text beside ``layers`` of vision, and what is between them."""
    names = [f"language_model.{name}" for name in llama_names(3)]
    names += ["multi_modal_projector.linear.weight", "vision_tower.norm.weight"]
    config = {"text_config": {"num_hidden_layers": 3}}
    return View(names + [VISION.format(i) for i in range(layers)], config)


def modular(modules: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"merge_method": "task_arithmetic", "base_model": "base", "modules": modules, **more}


def test_each_module_is_merged_in_its_own_way() -> None:
    pieces = [{"sources": [source("a", 0, 1)]}, {"sources": [source("b", 0, 3)]}]
    modules = {
        "text_decoder": {"slices": pieces},
        "multi_modal_projector": {"models": [{"model": "b"}], "parameters": {"weight": 0.2}},
        "vision_tower": {"models": [{"model": "a"}, {"model": "c"}]},
    }
    data = modular(modules, parameters={"weight": [0.0, 1.0]})
    views = {name: vision_language() for name in ("base", "a", "b", "c")}
    tensors = layout(data, views)
    names = {name for name in tensors if name.startswith("language_model")}
    assert names == {f"language_model.{name}" for name in llama_names(4)}
    assert MergeConfig.from_dict(data).num_layers == 4
    head = tensors[f"language_model.{UP.format(0)}"]
    assert source_models(head) == ["a", "base"]
    projector = tensors["multi_modal_projector.linear.weight"]
    assert source_models(projector) == ["b", "base"]
    assert projector.expert_parameters["weight"] == (0.2,)  # the module's before all's
    vision = [tensors[VISION.format(i)] for i in range(3)]
    assert [source_models(t) for t in vision] == [["a", "c", "base"]] * 3
    assert [t.expert_parameters["weight"] for t in vision] == [(0, 0), (0.5, 0.5), (1, 1)]
    config = MergeConfig.from_dict(data)
    assert MergeConfig.from_yaml(config.to_yaml()) == config


def test_default_is_the_whole_model() -> None:
    modules = {"default": {"models": [{"model": "a"}, {"model": "b"}]}}
    tensors = layout(modular(modules))
    same = layout({"merge_method": "task_arithmetic", "base_model": "base", **modules["default"]})
    assert tensors == same


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (
            {"vision_tower": {"models": [{"model": "a"}]}},
            "tensor in no module for language_model.model.embed_tokens.weight of base: expected it "
            "in one of vision_tower, got a name with none of them. Add a module 'default:' for all "
            "that no other module has.",
        ),
        (
            {"audio": {"models": [{"model": "a"}]}, "default": {"models": [{"model": "a"}]}},
            "module without tensors for 'audio': expected it as a component of the names of base, "
            "such as language_model, multi_modal_projector, vision_tower, got none with it. "
            "Correct the name.",
        ),
        (
            {"default": {"models": [{"model": "a"}]}, "text_decoder": {"models": [{"model": "a"}]}},
            "two modules for the rest of base: expected one of default and text_decoder, got both. "
            "Remove one.",
        ),
        (
            {
                "default": {"models": [{"model": "a"}]},
                "vision_tower": {"slices": [{"sources": [source("a", 0, 2)]}]},
            },
            "other number of layers for module vision_tower: expected 3 as in base, whose "
            "config.json stays, got 2. Only the layers of default or text_decoder may become more "
            "or fewer.",
        ),
    ],
)
def test_modules_that_do_not_fit_the_model(modules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layout(modular(modules), {"base": vision_language(), "a": vision_language()})
    assert str(caught.value) == words


def test_layer_range_past_the_end_names_slice_and_source() -> None:
    parts = [[source("a", 0, 2)], [source("b", 2, 4)]]
    data = {"merge_method": "passthrough", "slices": [{"sources": part} for part in parts]}
    with pytest.raises(ConfigError) as caught:
        layout(data)
    assert str(caught.value) == (
        "layer_range past the end for slices[1], source b: expected at most 3, the number of its "
        "layers, got [2, 4]. Correct the layer_range."
    )


def test_slices_need_one_clear_stack_of_layers() -> None:
    data = {"merge_method": "passthrough", "slices": [{"sources": [source("a", 0, 1)]}]}
    two = View([f"{side}.block.{i}.mlp.w" for side in ("encoder", "decoder") for i in range(2)])
    with pytest.raises(ConfigError, match=r"encoder\.block\.\* \(2\), decoder\.block\.\* \(2\)"):
        layout(data, {"a": two})
    with pytest.raises(ConfigError, match="got none"):
        layout(data, {"a": View(["w"])})
    short = View(llama_names(2), {"num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match="expected 3 blocks"):
        layout(data, {"a": short})
    data["slices"].append({"sources": [source("b", 0, 1)]})  # type: ignore[attr-defined]
    other = View(["h.0.mlp.w", "h.1.mlp.w"])
    with pytest.raises(CheckpointError, match="different layer names for b"):
        layout(data, {"b": other})


# What is missing, what only seems to be.


@pytest.mark.parametrize("holder", ["base", "a"])
def test_a_missing_tensor_names_tensor_and_model(holder: str) -> None:
    lacking = {"base": "a", "a": "base"}[holder]
    views = {lacking: View([n for n in llama_names(3) if n != UP.format(1)], llama(3).config)}
    with pytest.raises(CheckpointError) as caught:
        layout(task_arithmetic(), views)
    message = str(caught.value)
    assert f"missing tensor for {lacking}: expected {UP.format(1)} as in" in message


def test_what_no_expert_has_stays_as_in_the_base(caplog: pytest.LogCaptureFixture) -> None:
    """Layers for multi-token prediction: nothing changes them, and that is said once."""
    more = ["mtp.fc.weight", "mtp.norm.weight"]
    with caplog.at_level(logging.WARNING, logger="magic_fast"):
        found = layout(task_arithmetic(), {"base": View([*llama_names(3), *more], {})})
    assert list(found) == [*llama_names(3), *more]
    for name in more:
        assert found[name].experts == () and found[name].base is not None
    assert "2 tensors stay as in base, as no other model has them: mtp.fc.weight" in caplog.text


def test_what_one_expert_has_is_not_the_bases_alone() -> None:
    views = {m: View([*llama_names(3), "mtp.fc.weight"], {}) for m in ("base", "a")}
    with pytest.raises(CheckpointError, match=r"missing tensor for b: expected mtp.fc.weight"):
        layout(task_arithmetic(), views)


@pytest.mark.parametrize("lacking", ["base", "a"])
def test_a_missing_tensor_of_a_slice(lacking: str) -> None:
    views = {lacking: View([n for n in llama_names(3) if n != UP.format(2)], llama(3).config)}
    parts = [source("base", 0, 1), source("a", 2, 3)] if lacking == "a" else [
        source("base", 2, 3), source("a", 0, 1)]  # fmt: skip
    data = {"merge_method": "task_arithmetic", "base_model": "base",
            "slices": [{"sources": parts}]}  # fmt: skip
    with pytest.raises(
        CheckpointError, match=rf"missing tensor for {lacking}: expected .*layers\.2"
    ):
        layout(data, views)


def test_tied_heads_are_not_missing() -> None:
    tied = View(llama_names(3, head=False), llama(3).config, tied=(HEAD,))
    assert HEAD in layout(task_arithmetic(), {"a": tied})  # the base has a head of its own
    assert HEAD not in layout(task_arithmetic(), {"base": tied})  # the output ties as the base does
    both = layout(task_arithmetic(), {"base": tied, "a": tied, "b": tied})
    assert list(both) == llama_names(3, head=False)


def test_an_untied_head_over_a_tied_base_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tied = View(llama_names(3, head=False), {"num_hidden_layers": 3}, tied=(HEAD,))
    own = View(llama_names(3), {"num_hidden_layers": 3, "tie_word_embeddings": False})
    with caplog.at_level(logging.WARNING, logger="magic_fast"):
        layout(task_arithmetic(), {"base": tied, "a": own})
    assert "lm_head.weight is tied in base and a tensor of its own in a" in caplog.text


def test_buffers_that_follow_from_the_config_may_be_missing() -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_buffer = View([*llama_names(3), extra], llama(3).config)
    assert extra not in layout(task_arithmetic(), {"a": with_buffer})
    assert extra not in layout(task_arithmetic(), {"base": with_buffer})
    everywhere = {name: with_buffer for name in ("base", "a", "b")}
    assert extra in layout(task_arithmetic(), everywhere)


def test_every_model_needs_a_view() -> None:
    config = MergeConfig.from_dict(task_arithmetic())
    with pytest.raises(ConfigError, match="missing checkpoint for a"):
        resolve_layout(config, {"base": llama(1)})


def test_36000_tensors_of_5_models(capsys: pytest.CaptureFixture[str]) -> None:
    experts = [f"mlp.experts.{j}.{p}.weight" for j in range(128) for p in ("gate", "up", "down")]
    view = View(llama_names(94, block=[*BLOCK, *experts]), {"num_hidden_layers": 94})
    density = [{"filter": ".up.", "value": [0.1, 0.5, 1]}, {"value": 0.3}]
    models = [{"model": f"m{i}", "parameters": {"weight": [0.1, 1], "density": density}}
              for i in range(4)]  # fmt: skip
    data = {"merge_method": "ties", "base_model": "base", "models": models}
    config = MergeConfig.from_dict(data)
    start = time.perf_counter()
    tensors = resolve_layout(config, {name: view for name in config.model_references})
    seconds = time.perf_counter() - start
    assert len(tensors) == 94 * (len(BLOCK) + 384) + 3
    last = tensors[-1]
    assert (
        last.name.startswith("model.layers.93.") and last.expert_parameters["weight"] == (1.0,) * 4
    )
    with capsys.disabled():
        print(f"\n  layout of {len(tensors)} tensors x 5 models: {seconds:.2f} s")


# The recorded configurations of mergekit.

CASES = sorted((GOLDEN / "mergekit_e2e").glob("*/config.yml"))


def test_golden_configurations_are_there() -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden folder at {GOLDEN}")
    assert CASES


@pytest.mark.parametrize("path", CASES, ids=[path.parent.name for path in CASES])
def test_golden_mergekit_e2e_configuration(path: Path) -> None:
    """Parses unchanged, or is refused in words; the layout has exactly the recorded tensors."""
    config = MergeConfig.from_file(path)
    assert MergeConfig.from_yaml(config.to_yaml()) == config
    root = path.parent.parent
    views = {name: view_of(root / name) for name in config.model_references}
    tensors = resolve_layout(config, views)
    expected = view_of(path.parent / "expected")
    assert sorted(tensor.name for tensor in tensors) == sorted(expected.names())
    recorded = json.loads((path.parent / "expected" / "config.json").read_text())
    layers = config.num_layers or views[config.donor].config["num_hidden_layers"]
    assert layers == recorded["num_hidden_layers"]
    for tensor in tensors:
        assert all(views[one.model].has(one.tensor_name) for one in tensor.sources)
