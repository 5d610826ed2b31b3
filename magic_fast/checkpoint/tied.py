"""Tied weights: names that a model has and its checkpoint does not store, because another tensor
holds the same values.

The pairs are those of the model families in ``transformers``; a family is recognised by the names
it stores.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

#: (head, embedding): one is stored where ``tie_word_embeddings`` holds.
WORD_EMBEDDINGS: tuple[tuple[str, str], ...] = (
    ("lm_head.weight", "model.embed_tokens.weight"),  # Llama, Mistral, Qwen, Gemma, Phi, OLMo, …
    ("lm_head.weight", "model.language_model.embed_tokens.weight"),  # multimodal, current layout
    ("lm_head.weight", "language_model.model.embed_tokens.weight"),
    (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
    ),  # multimodal, older layout
    ("lm_head.weight", "model.decoder.embed_tokens.weight"),  # OPT
    ("lm_head.weight", "transformer.wte.weight"),  # GPT-2, GPT-J, MPT
    ("lm_head.weight", "wte.weight"),  # GPT-2 as first published
    ("lm_head.weight", "transformer.word_embeddings.weight"),  # BLOOM, Falcon
    ("lm_head.weight", "word_embeddings.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),  # GPT-NeoX
    ("output.weight", "model.tok_embeddings.weight"),  # InternLM 2
    ("lm_head.weight", "shared.weight"),  # T5
    ("lm_head.weight", "model.shared.weight"),  # BART
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
)
#: (input embedding, shared embedding): encoder-decoders share these whatever the configuration
# says.
SHARED_EMBEDDINGS: tuple[tuple[str, str], ...] = (
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
    ("model.encoder.embed_tokens.weight", "model.shared.weight"),
    ("model.decoder.embed_tokens.weight", "model.shared.weight"),
)


def ties_word_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` ties head and embedding, at its top or in a nested text
    configuration.

    True where any part says so, False where one says no. ``transformers`` leaves the key out where
    it has its default of true, so a silent configuration ties, unless its architectures have no
    head (``LlamaModel``). An empty one does not.

    >>> ties_word_embeddings({"model_type": "gemma"})
    True
    >>> ties_word_embeddings({"tie_word_embeddings": False})
    False
    """
    if not config:
        return False
    nested = (config.get(key) for key in ("text_config", "llm_config", "language_config"))
    said = [
        part.get("tie_word_embeddings") for part in (config, *nested) if isinstance(part, Mapping)
    ]
    if any(value is True for value in said):
        return True
    return not any(value is False for value in said) and not _is_headless(config)


def find_aliases(stored: Container[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Tied names that are not stored, each with the stored name that holds its values.

    >>> find_aliases({"model.embed_tokens.weight"}, {"tie_word_embeddings": True})
    {'lm_head.weight': 'model.embed_tokens.weight'}
    """
    pairs = SHARED_EMBEDDINGS + (WORD_EMBEDDINGS if ties_word_embeddings(config) else ())
    aliases: dict[str, str] = {}
    for tied, source in pairs:
        if tied not in stored and source in stored:
            aliases.setdefault(tied, source)
    return aliases


def _is_headless(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return False
    return all(
        str(name).endswith("Model") and not str(name).endswith("LMHeadModel")
        for name in architectures
    )
