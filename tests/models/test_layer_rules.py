"""What configurations make of their layers by themselves: our rules against transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from magic_fast.models.layer_rules import implied, listed_by_rule

pytest.importorskip("transformers")
RULES = json.loads(
    (Path(__file__).parents[2] / "magic_fast" / "models" / "layer_rules.json").read_text()
)
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"sliding_window_pattern": 3},
    {"full_attention_interval": 3},
    {"global_attn_every_n_layers": 5},
    {"no_rope_layer_interval": 3},
    {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4},
    {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 4},
    {"full_attn_idxs": [1, 3]},
    {"first_k_dense_replace": 4},
    {"num_hash_layers": 5},
)


def test_known_types_have_rules() -> None:
    wanted = {"gemma2", "gemma3_text", "cohere2", "gpt_oss", "qwen2", "qwen3", "modernbert",
              "llama4_text", "smollm3", "qwen3_next", "qwen3_5_text", "olmo3"}  # fmt: skip
    assert wanted <= RULES.keys()
    assert listed_by_rule("llama") == ()


@pytest.mark.parametrize("model_type", sorted(RULES))
def test_a_rule_gives_what_transformers_makes(model_type: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    compared = 0
    for depth in (22, 27):
        for fields in VARIANTS:
            try:
                config = CONFIG_MAPPING[model_type](num_hidden_layers=depth, **fields)
            except Exception:  # a field that this type refuses
                continue
            stated = fields | {
                key: value
                for key, value in vars(config).items()
                if key == "sliding_window" and key not in fields
            }
            for key in listed_by_rule(model_type):
                ours = implied(model_type, stated, key, depth)
                theirs = getattr(config, key, None)
                if ours is not None and isinstance(theirs, list | tuple):
                    compared += 1
                    assert ours == list(theirs), (key, fields)
    assert compared
