"""PEFT's test of all combinations of adapters, on tiny models made here: its own take theirs from
a hub. Collected by test_suites.py only, beside PEFT's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, LoraConfig
from tests.testing_common import PeftCommonTester  # PEFT's
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    ),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=32,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}  # fmt: skip


class TestLocalModels(PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self) -> dict[str, Any]:
        import torch

        ids = torch.tensor([[1, 1, 1], [1, 2, 1]]).to(self.torch_device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_weighted_combination_of_adapters(
        self, kind: str, config_cls: Any, tmp_path: Path
    ) -> None:
        AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(tmp_path / kind)
        options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        if config_cls is LoraConfig:
            options |= {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
        self._test_weighted_combination_of_adapters(str(tmp_path / kind), config_cls, options)
