"""What config.json says of each layer follows the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from magic_fast.config.per_layer import Layer, follow
from magic_fast.errors import ConfigError

ORDER = [0, 1, 2, 1, 2, 3]


def followed(
    config: dict[str, Any], order: Sequence[int] = ORDER, *, count: int = 4, **settings: Any
) -> dict[str, Any]:
    before = repr(config)
    kind = str(config.get("model_type", ""))
    layers = [Layer(config, kind, number, count) for number in order]
    result, stated = follow(config, "", count, layers, **settings)
    assert repr(config) == before
    assert stated == sum(number < count for number in order)
    return result


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": list("abcbcd")}),
        ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 1, 1, 1, 0]}),
        ({"any_new_field": [7, 8, 9, 0]}, {"any_new_field": [7, 8, 9, 8, 9, 0]}),
        ({"three": [1, 2, 3]}, {"three": [1, 2, 3]}),
        ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
        ({"moe_layers": [0, 1, 2, 3]}, {"moe_layers": [0, 1, 2, 3, 4, 5]}),
        ({"per_layer_config": {"1": {"x": 7}}}, {"per_layer_config": {"1": {"x": 7},
                                                                      "3": {"x": 7}}}),
        ({"per_layer_config": {"02": {"x": 7}}}, {"per_layer_config": {"2": {"x": 7},
                                                                       "4": {"x": 7}}}),
        ({"attention_layers": list("glgl"), "attention_types": [[["g", "l"], 2]]},
         {"attention_layers": list("glglgl"), "attention_types": [[list("glglgl"), 1]]}),
        ({"full_attn_idxs": [1]}, {"full_attn_idxs": [1, 3]}),
        ({"hybrid_override_pattern": "M*-E"}, {"hybrid_override_pattern": "M*-*-E"}),
        (
            {"decoder_sparse_step": 1, "mlp_only_layers": [3]},
            {"decoder_sparse_step": 1, "mlp_only_layers": [5]},
        ),
        (
            {"decoder_sparse_step": 2, "mlp_only_layers": []},
            {"decoder_sparse_step": 2, "mlp_only_layers": []},
        ),
        ({"interleave_moe_layer_step": 2}, {"interleave_moe_layer_step": 2}),
        ({"first_k_dense_replace": 1}, {"first_k_dense_replace": 1}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1},
         {"attn_layer_period": 2, "attn_layer_offset": 1}),
    ],
)  # fmt: skip
def test_layers_0_to_2_and_1_to_3(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert followed(config) == expected


def test_periods_become_lists_where_they_no_longer_hold() -> None:
    order = [0, 2, 1, 3]
    sparse = followed({"decoder_sparse_step": 2, "mlp_only_layers": []}, order)
    assert sparse == {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}
    assert followed({"interleave_moe_layer_step": 2}, order)["moe_layers"] == [2, 3]
    gemma = followed({"model_type": "gemma2"}, order)
    assert gemma["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert "layer_types" not in followed({"model_type": "gemma2"}, [0, 1, 0, 1, 2, 3])
    qwen = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
            "max_window_layers": 3}  # fmt: skip
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert followed(qwen, [2, 3, 0])["layer_types"] == kinds
    assert "layer_types" not in followed({"model_type": "qwen2"}, [2, 3, 0])


def test_counts_follow() -> None:
    assert followed({"first_k_dense_replace": 2}, [0, 1, 0, 1, 2, 3])["first_k_dense_replace"] == 4
    listed = followed({"first_k_dense_replace": 1}, [1, 0, 2], reads=["mlp_layer_types"])
    assert listed["mlp_layer_types"] == ["sparse", "dense", "sparse"]
    assert followed({"num_kv_shared_layers": 2}, [0, 1, 2, 3, 3])["num_kv_shared_layers"] == 3
    period = {"attn_layer_period": 4, "attn_layer_offset": 2}
    assert followed(period, [2, 0, 1])["attn_layer_offset"] == 0


@pytest.mark.parametrize(
    ("config", "order"),
    [
        ({"first_k_dense_replace": 2}, ORDER),
        ({"num_kv_shared_layers": 2}, ORDER),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [2, 1, 2, 2, 0]),
    ],
)
def test_what_config_json_cannot_say_is_refused(config: dict[str, Any], order: list[int]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(config))} for the new order of layers"):
        followed(config, order)


def test_layers_for_multi_token_prediction() -> None:
    config = {"num_nextn_predict_layers": 1}
    assert followed(config, [0, 1, 4], stores_mtp=True) == {"num_nextn_predict_layers": 1}
    assert followed(config, [0, 1], stores_mtp=True) == {"num_nextn_predict_layers": 0}
    assert followed(config, [0, 1]) == {"num_nextn_predict_layers": 1}  # the file has none
    with pytest.raises(ConfigError, match="multi-token prediction last"):
        followed(config, [0, 4, 1], stores_mtp=True)


def test_layers_in_their_places_change_nothing() -> None:
    config = {"layer_types": list("abcd"), "first_k_dense_replace": 2}
    assert followed(config, range(4)) == config
    assert followed(config, range(3))["layer_types"] == list("abc")


def test_another_models_layers_bring_their_own() -> None:
    ours, theirs = {"layer_types": list("abcd")}, {"layer_types": list("wxyz")}
    layers = [Layer(ours, "", 0, 4), Layer(theirs, "", 3, 4), Layer(theirs, "", 0, 4)]
    assert follow(ours, "", 4, layers)[0]["layer_types"] == ["a", "z", "w"]


def test_the_part_of_a_model_with_several() -> None:
    text = {"layer_types": list("abcd")}
    config = {"text_config": text, "vision_config": {"depths": [1, 2, 3, 4]}}
    layers = [Layer(text, "", number, 4) for number in ORDER]
    result, _ = follow(config, "text_config", 4, layers)
    assert result["text_config"] == {"layer_types": list("abcbcd")}
    assert result["vision_config"] == config["vision_config"]
