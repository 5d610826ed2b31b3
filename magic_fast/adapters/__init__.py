"""LoRA and IA3 adapters: their files, their factors, their merges (docs/adapters.md).

Opening one imports no torch: a merge of checkpoints reads adapters without it.
"""

from __future__ import annotations

from magic_fast.adapters.opening import Adapter, AdapterModule, open_adapter

__all__ = ["Adapter", "AdapterModule", "open_adapter"]
