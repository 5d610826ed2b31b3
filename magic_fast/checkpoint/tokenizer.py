"""Tokenizers as files: which token has which row, and the tokenizer of a merged model."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .io_errors import reading
from .messages import problem, shown
from .reader import Checkpoint, ModelFolder
from .strict_json import json_file

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
#: What an edited ``tokenizer.json`` holds too, so that a copy of the donor's would contradict it.
_STALE = ("added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_TEMPLATES = ("chat_template.*", "additional_chat_templates/*.jinja")
_ADVICE = (
    "Write one with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        data: the parsed ``tokenizer.json``.
        vocabulary: token → row of the embedding, added tokens too.
    """

    data: Mapping[str, Any]
    vocabulary: Mapping[str, int]

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """The records of added tokens (special ones among them), by their text."""
        return {record["content"]: record for record in self.data.get("added_tokens") or ()}

    @property
    def rows(self) -> int:
        """Rows of an embedding that has one for every token."""
        return max(self.vocabulary.values(), default=-1) + 1


@dataclass(frozen=True)
class OutputTokenizer:
    """The tokenizer files of a result.

    Attributes:
        folder: the model whose tokenizer files come along.
        texts: files that are written instead of copied.
        left_out: patterns of files that do not come along.
        config: of that model, whose ``*_token_id`` are rows of this tokenizer.
    """

    folder: str
    texts: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def read_tokenizer(model: Checkpoint | ModelFolder) -> Tokenizer:
    """The tokenizer that lies beside a model's weights.

    Raises:
        CheckpointError: there is no ``tokenizer.json``, or it is damaged.
    """
    path = os.path.join(model.folder or model.path, TOKENIZER_NAME)
    if model.folder is None or not os.path.isfile(path):
        raise problem("Missing tokenizer", model.path, TOKENIZER_NAME, "no such file", _ADVICE)
    data = json_file(path, "Corrupt tokenizer")
    found: dict[str, int] = {}
    part = data.get("model")
    vocab = part.get("vocab") if isinstance(part, dict) else None
    if isinstance(vocab, dict):
        found.update(vocab)
    elif isinstance(vocab, list):  # unigram: pieces with scores, in the order of their rows
        found.update((piece[0], row) for row, piece in enumerate(vocab))
    else:
        raise problem("Corrupt tokenizer", path, '"vocab" in its "model"', shown(vocab), _ADVICE)
    for record in data.get("added_tokens") or ():
        found[record["content"]] = record["id"]
    if not all(type(row) is int and row >= 0 for row in found.values()):
        raise problem("Corrupt tokenizer", path, "numbers of rows", "something else", _ADVICE)
    return Tokenizer(data, found)


def with_tokens(
    tokenizer: Tokenizer, more: Iterable[tuple[str, Mapping[str, Any] | None]]
) -> Tokenizer:
    """``tokenizer`` with further tokens in the rows after its last.

    Args:
        more: text of each token, and its record in another tokenizer (None: an ordinary token).
            Those that are there already are passed over.
    """
    data = copy.deepcopy(dict(tokenizer.data))
    found, row = dict(tokenizer.vocabulary), tokenizer.rows
    records = list(data.get("added_tokens") or ())
    for text, record in more:
        if text in found:
            continue
        plain = {"single_word": False, "lstrip": False, "rstrip": False}
        plain |= {"normalized": True, "special": False}
        records.append({"id": row, "content": text, **plain, **_flags(record or {})})
        found[text] = row
        row += 1
    data["added_tokens"] = records
    return Tokenizer(data, found)


def template_of(model: Checkpoint) -> str | None:
    """The chat template of a model, None where it has none (or several by name)."""
    if model.folder is None:
        return None
    path = os.path.join(model.folder, TEMPLATE_NAME)
    if os.path.isfile(path):
        with reading(path), open(path, encoding="utf-8") as file:
            return file.read()
    template = _config(model.folder).get("chat_template")
    return template if isinstance(template, str) else None


def output_tokenizer(
    source: Checkpoint | ModelFolder,
    edited: Tokenizer | None = None,
    template: str | None = None,
    folder: str | None = None,
) -> OutputTokenizer:
    """The tokenizer files of a result that takes them from ``source``.

    Args:
        edited: its tokenizer with further tokens, or None where it has those of ``source``.
        template: the chat template, or None for that of ``source``.
        folder: where the tokenizer lies; None: beside ``source``.
    """
    folder = folder or source.folder
    if folder is None:
        got = "a bare file"
        raise problem("Missing tokenizer", source.path, "the folder of a model", got, _ADVICE)
    texts: dict[str, str] = {}
    config = _config(folder)
    if edited is not None:
        texts[TOKENIZER_NAME] = _text(edited.data)
        if isinstance(config.get("added_tokens_decoder"), dict):
            config["added_tokens_decoder"] = {
                str(record["id"]): {"content": text, **_flags(record)}
                for text, record in edited.added.items()
            }
    if template is not None:
        texts[TEMPLATE_NAME] = template
        config["chat_template"] = template  # read by transformers that know no separate file
    if config != _config(folder):
        texts[CONFIG_NAME] = _text(config)
    left_out = (*(_STALE if edited is not None else ()), *(_TEMPLATES if template else ()))
    return OutputTokenizer(folder, texts, left_out, source.config)


def _flags(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("id", "content")}


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _config(folder: str) -> dict[str, Any]:
    return json_file(os.path.join(folder, CONFIG_NAME), "Corrupt tokenizer")
