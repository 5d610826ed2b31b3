"""The small files that make weights a model: configuration, tokenizer, templates, code."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from magic_fast.models.lookup import LAYER_COUNTS, TEXT_PARTS, text_parts

from .io_errors import reading
from .locate import PICKLE_SUFFIXES
from .reader import Checkpoint, ModelFolder
from .strict_json import json_file
from .tokenizer import OutputTokenizer
from .writer import OutputFolder

_LOG = logging.getLogger("magic_fast")

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
#: The tokenizer's files.
TOKENIZER: tuple[str, ...] = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "normalizer.json",
    "*.model",  # sentencepiece, and tokenizer.model
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "tekken.json",
)
#: What never comes along: weights in any format and their indices, ...
_WEIGHTS = (
    *PICKLE_SUFFIXES,
    ".safetensors",
    ".index.json",
    ".gguf",
    ".ggml",
    ".h5",
    ".keras",
    ".pb",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".tflite",
    ".mlmodel",
    ".nemo",
    ".npz",
    ".npy",
)
#: ... the state and the logs of a training, what is written anew, and what belongs to a repository.
_LEFT = (
    "trainer_state.json",
    "trainer_log*",
    "training_*",
    "*_results.json",
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "zero_to_fp32.py",
    "latest",
    "events.out.tfevents*",
    "adapter_config.json",
    "README*",
    "magic_fast.json",
    ".*",
    "*.lock",
    "*.log",
)
_LEFT_FOLDERS = (".*", "__pycache__", "checkpoint-*", "global_step*", "runs", "logs", "wandb")
_LARGEST = 200_000_000  # bytes of a file that is small
_AUTO_MAP_FILES = (
    CONFIG_NAME,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_TOKEN_ID = re.compile(r"_token_(id|ids|index)$")
_DTYPE_KEYS = ("torch_dtype", "dtype")
_VOCABULARY_KEYS = ("vocab_size", "vocab_size_per_layer_input")
#: safetensors' dtype names as configurations spell them.
CONFIG_DTYPES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


def sidecar_source(base: Checkpoint | None, models: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint whose small files the result gets: the base, or else the first model.

    A bare file has none and is passed over; None where all are bare files.
    """
    candidates = [*([base] if base is not None else []), *models]
    return next((checkpoint for checkpoint in candidates if checkpoint.folder is not None), None)


def sidecar_files(folder: str) -> list[str]:
    """Names of the small files in a model's folder that go along with its weights, sorted.

    All beside the weights and one folder below do, but weights, their indices, training states,
    READMEs and what lies in folders of these;
    Python files only where a configuration's ``auto_map`` asks for them. What is larger than
    200 MB stays behind, with a warning.

    Raises:
        CheckpointError: the folder or one of its configurations cannot be read.
    """
    configs = (os.path.join(folder, name) for name in _AUTO_MAP_FILES)
    code = any("auto_map" in json_file(path, "Corrupt configuration") for path in configs)
    names = []
    with reading(folder):
        for place, folders, files in os.walk(folder):
            if place != folder:  # no deeper: it may be any folder that weights were put into
                folders.clear()
                if any(name.endswith(_WEIGHTS) for name in files):
                    continue
            folders[:] = sorted(name for name in folders if not _matches(name, _LEFT_FOLDERS))
            names += [
                os.path.relpath(os.path.join(place, name), folder)
                for name in files
                if _comes_along(os.path.join(place, name), code)
            ]
    return sorted(names)


def _comes_along(path: str, code: bool) -> bool:
    name = os.path.basename(path)
    left = name.endswith(_WEIGHTS) or _matches(name, _LEFT) or (name.endswith(".py") and not code)
    if left or not os.path.isfile(path):
        return False
    size = os.path.getsize(path)
    if size > _LARGEST:
        _LOG.warning("%s stays behind: it has %.0f MB, more than a small file.", path, size / 1e6)
    return size <= _LARGEST


def updated_config(
    config: Mapping[str, Any],
    dtype: str | None = None,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    untied: bool = False,
) -> dict[str, Any]:
    """A copy of ``config.json`` with dtype, depth, vocabulary and ties of the result, and nothing
    else changed.

    Args:
        config: not modified.
        dtype: safetensors' name (``BF16``); replaces the value of ``torch_dtype`` or ``dtype``,
            whichever is there, at the top and in the parts of a multimodal model. Never added. None
            leaves it.
        num_layers: replaces ``num_hidden_layers`` or its kin, at the top and in the text part. None
            leaves it.
        vocab_size: replaces ``vocab_size`` and its kin where they are there, at the top and in the
            text part. None leaves it.
        untied: head and embedding are no longer tied, at the top and wherever it was said.

    >>> updated_config({"torch_dtype": "float32", "n_layer": 4}, "BF16", 6)
    {'torch_dtype': 'bfloat16', 'n_layer': 6}
    """
    result = copy.deepcopy(dict(config))
    parts = [
        value
        for key, value in result.items()
        if key.endswith("_config") and key != "quantization_config"
    ]
    if dtype is not None:
        for part in (result, *parts):
            _replace(part, _DTYPE_KEYS, CONFIG_DTYPES.get(dtype, dtype.lower()), str)
    if num_layers is not None:
        for part in text_parts(result):
            _replace(part, LAYER_COUNTS, num_layers, int)
    if vocab_size is not None:
        for part in text_parts(result):
            _replace(part, _VOCABULARY_KEYS, vocab_size, int)
    if untied:
        for part in parts:
            _replace(part, ("tie_word_embeddings",), False, bool)
        result["tie_word_embeddings"] = False
    return result


def copy_sidecars(
    source: Checkpoint | ModelFolder,
    output: OutputFolder,
    *,
    dtype: str | None = None,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    tokenizer: OutputTokenizer | None = None,
    untied: bool = False,
    config: Mapping[str, Any] | None = None,
) -> list[str]:
    """Copy small files, the configuration (``config``, or the source's) by way of
    `updated_config`, the tokenizer's as ``tokenizer`` says; returns their names.

    A configuration that does not change is copied byte for byte. There are none where source or
    output is a single file.
    """
    if source.folder is None or output.is_file:
        return []
    places = {name: source.folder for name in sidecar_files(source.folder)}
    if tokenizer is not None:
        others = tokenizer.folder != source.folder
        with_ids = others and tokenizer.config
        patterns = (*TOKENIZER, GENERATION_NAME) if with_ids else TOKENIZER
        places = {name: place for name, place in places.items() if not _matches(name, patterns)}
        for name in sidecar_files(tokenizer.folder):
            if _matches(name, patterns) and not _matches(name, tokenizer.left_out):
                places[name] = tokenizer.folder
    texts = {} if tokenizer is None else tokenizer.texts
    for name, place in places.items():
        if name not in texts:
            output.copy_file(os.path.join(place, name), name)
    for name, text in texts.items():
        output.write_text(name, text)
    names = sorted({*places, *texts})
    given = source.config if config is None else config
    written = updated_config(given, dtype, num_layers, vocab_size, untied)
    if tokenizer is not None:
        written = _with_token_ids(written, tokenizer.config)
    if written != source.config:
        output.write_text(CONFIG_NAME, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return names


def _with_token_ids(config: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the numbers of tokens that another one has, at the top and in the text
    part: they are rows of the tokenizer that comes along."""
    ids = {key: value for key, value in other.items() if _TOKEN_ID.search(key)}
    result = {**config, **ids}
    for name in TEXT_PARTS:
        part = result.get(name)
        if isinstance(part, dict):
            theirs = other.get(name)
            known = theirs if isinstance(theirs, Mapping) else other
            more = {key: value for key, value in known.items() if _TOKEN_ID.search(key)}
            result[name] = {**part, **{k: v for k, v in more.items() if k in part}}
    return result


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _replace(part: object, keys: Sequence[str], value: object, kind: type) -> None:
    """Set those of ``keys`` that are there with a value of this kind."""
    if isinstance(part, dict):
        for key in keys:
            if isinstance(part.get(key), kind):
                part[key] = value
