"""One vocabulary for the models of a merge: the ``tokenizer:`` and ``chat_template:`` of a
configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from magic_fast.checkpoint import Checkpoint, ModelFolder
from magic_fast.checkpoint.tokenizer import (
    OutputTokenizer,
    Tokenizer,
    output_tokenizer,
    read_tokenizer,
    template_of,
    with_tokens,
)
from magic_fast.config import MergeConfig
from magic_fast.config.chat_templates import TEMPLATES
from magic_fast.config.tokens import TokenEntry, TokenSource
from magic_fast.engine.output.identity import digest
from magic_fast.engine.sources.vocabulary import AlignedCheckpoint, Row, vocabulary_axes
from magic_fast.errors import CheckpointError, ConfigError, InputError
from magic_fast.planning.configurations import compare_configurations
from magic_fast.planning.names import settle_names
from magic_fast.planning.sources import small_files
from magic_fast.planning.ties import settle_ties


@dataclass(frozen=True)
class Aligned:
    """The models as the merge sees them, and the tokenizer of the result.

    Attributes:
        models: reference → checkpoint, with embeddings in the rows of the result.
        rows: of the result's embeddings, None where they are as they are stored.
        files: whose other small files the result takes; None for the donor's.
        tokenizer: None for that of ``files``.
        settings: what tells one such merge from another.
        untied: whether weights that a configuration ties are apart in the result.
        warnings: what the user should know.
    """

    models: dict[str, Checkpoint]
    rows: int | None = None
    files: Checkpoint | ModelFolder | None = None
    tokenizer: OutputTokenizer | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    untied: bool = False
    warnings: Sequence[str] = ()


def align(config: MergeConfig, models: dict[str, Checkpoint]) -> Aligned:
    """The models with the same weights tied, and their embeddings in the rows of the vocabulary
    that ``config`` asks for.

    A model's own tokens keep their rows. One that it lacks gets the base model's; where that lacks
    it too, the average of the models that have it (mergekit's documented rule).

    Raises:
        ConfigError: a token that no model has.
        CheckpointError: a model without ``tokenizer.json``.
        InputError: a model without embeddings.
    """
    files = None
    if config.config_from is not None:
        files = small_files(config, config.config_from, models)
    warnings = compare_configurations(models, config.config_from, files)
    warnings += [note for model in models.values() for note in model.notes]
    ties = settle_ties(settle_names(models, config.donor), config.donor)
    aligned = _aligned(config, ties.models)
    warnings += [*ties.warnings, *aligned.warnings]
    return replace(aligned, files=files, untied=ties.untied, warnings=warnings)


def _aligned(config: MergeConfig, models: dict[str, Checkpoint]) -> Aligned:
    donor = _with_folder(config, models)
    template = _template(config, models)
    if config.vocabulary is None:
        resized = models[donor].resized
        count = None if resized is None else resized.rows
        folder = None if resized is None else resized.folder
        settings = {} if template is None else {"chat_template": digest(template)}
        if config.tokenizer_from is not None:
            theirs = small_files(config, config.tokenizer_from, models)
            warnings = _check_rows(models[donor], config.tokenizer_from, theirs)
            made = output_tokenizer(theirs, template=template)
            return Aligned(models, count, tokenizer=made, settings=settings, warnings=warnings)
        if config.config_from is not None and folder is None:
            folder = models[donor].folder
        if template is not None:
            made = output_tokenizer(models[donor], template=template, folder=folder)
            made = replace(made, config={} if config.config_from else made.config)
            return Aligned(models, count, tokenizer=made, settings=settings)
        return Aligned(models, count, tokenizer=OutputTokenizer(folder) if folder else None)
    tokenizers = {name: read_tokenizer(model) for name, model in models.items()}
    source = donor if config.vocabulary in ("union", "base") else config.vocabulary
    tokens = config.tokenizer.tokens or {} if config.tokenizer is not None else {}
    more = [(text, None) for text in tokens]
    others = list(tokenizers.values())
    if config.vocabulary == "union":
        more = [(t, None) for one in others for t in _by_row(one.vocabulary)] + more
    records: dict[str, Mapping[str, Any]] = {}
    for one in others:
        records = {**one.added, **records}
    final = with_tokens(tokenizers[source], [(text, records.get(text)) for text, _ in more])
    table = _Table(config, models, tokenizers, final)
    made = output_tokenizer(
        models[source], None if final.rows == tokenizers[source].rows else final, template
    )
    rows = {name: table.rows(name) for name in models}
    in_rows: dict[str, Checkpoint] = {
        name: AlignedCheckpoint(model, rows[name], models) for name, model in models.items()
    }
    known = digest(repr([rows[name] for name in models]) + repr(sorted(made.texts.items())))
    return Aligned(in_rows, table.count, tokenizer=made, settings={"tokenizer": known})


def _check_rows(donor: Checkpoint, name: str, theirs: Checkpoint | ModelFolder) -> list[str]:
    """What to know of a tokenizer whose files come along while the embeddings stay as they are.

    Raises:
        ConfigError: it has tokens beyond the embeddings.
    """
    try:
        wanted = read_tokenizer(theirs)
    except CheckpointError as error:
        return [f"the rows of the tokenizer of {name} are not checked: {error}"]
    stored = min(_lengths(donor), default=wanted.rows)
    if wanted.rows > stored:
        raise ConfigError(
            f"tokenizer_from {name}: expected at most {stored} tokens, the rows of the "
            f"embeddings, got {wanted.rows}. Use tokenizer_source, which adds rows."
        )
    try:
        rows = read_tokenizer(donor).vocabulary
    except CheckpointError:
        return []
    moved = [t for t, row in wanted.vocabulary.items() if rows.get(t, row) != row]
    if not moved:
        return []
    return [
        f"{len(moved)} tokens of {name}, {moved[0]!r} among them, have other rows than in "
        f"{donor.path}, and the embeddings stay as they are. tokenizer_source moves the rows."
    ]


def _by_row(vocabulary: Mapping[str, int]) -> list[str]:
    return sorted(vocabulary, key=lambda token: vocabulary[token])


def _with_folder(config: MergeConfig, models: Mapping[str, Checkpoint]) -> str:
    """The first model that is a folder, whose small files come along."""
    return next((name for name in models if models[name].folder is not None), config.donor)


def _template(config: MergeConfig, models: Mapping[str, Checkpoint]) -> str | None:
    wanted = config.chat_template
    if wanted != "auto":
        return None if wanted is None else TEMPLATES.get(wanted, wanted)
    found = Counter(filter(None, (template_of(model) for model in models.values())))
    if not found:
        raise CheckpointError(
            "chat template for auto: expected one beside some model, got none. Name one of "
            f"{', '.join(TEMPLATES)}, or write the template out."
        )
    return found.most_common(1)[0][0]  # the first model's where several are as common


class _Table:
    """Where each row of each model's new embeddings comes from."""

    def __init__(
        self,
        config: MergeConfig,
        models: Mapping[str, Checkpoint],
        tokenizers: Mapping[str, Tokenizer],
        final: Tokenizer,
    ) -> None:
        self._base = config.base_model
        self._own = {
            name: _stored_tokens(name, models[name], tokenizer.vocabulary)
            for name, tokenizer in tokenizers.items()
        }
        self._final = final
        block = config.tokenizer
        multiple = (block.pad_to_multiple_of if block is not None else None) or 1
        self.count = -(-final.rows // multiple) * multiple
        overrides: dict[str, TokenEntry] = (block.tokens or {}) if block is not None else {}
        self._limits = {name: _rows_stored(name, model) for name, model in models.items()}
        self._given = {
            text: self._override(text, entry.source)
            for text, entry in overrides.items()
            if entry.source is not None
        }
        self._forced = {text for text, entry in overrides.items() if entry.force}
        self._fallback: dict[str, Row] = {}

    def rows(self, model: str) -> list[Row | None]:
        """A row per token; zeros where a number has none, None (the mean) for padding."""
        rows: list[Row | None] = [()] * self._final.rows
        own = self._own[model]
        for text, place in self._final.vocabulary.items():
            if text in own and not (text in self._forced and text in self._given):
                rows[place] = ((model, own[text]),)
            else:
                rows[place] = self._given[text] if text in self._given else self._missing(text)
        return rows + [None] * (self.count - len(rows))

    def _missing(self, text: str) -> Row:
        if text not in self._fallback:
            if self._base in self._own and text in self._own[self._base]:
                self._fallback[text] = ((self._base, self._own[self._base][text]),)
            else:
                self._fallback[text] = tuple(
                    (m, t[text]) for m, t in self._own.items() if text in t
                )
            if not self._fallback[text]:
                raise ConfigError(
                    f"no embedding for token {text!r}: expected it in a model, got it in none. "
                    "Give it a 'source:' under tokenizer.tokens."
                )
        return self._fallback[text]

    def _override(self, text: str, source: str | TokenSource) -> Row:
        """The rows that an entry of ``tokens:`` names."""
        if isinstance(source, str):
            source = TokenSource(kind="model_token", model=source, token=text)
        if source.kind == "zero":
            return ()
        model = str(source.model)
        token = source.token
        row = source.token_id if token is None else self._own[model].get(token)
        if row is None or row >= self._limits[model]:
            wanted = f"token {token!r}" if token is not None else f"row {source.token_id}"
            raise ConfigError(
                f"no embedding for tokenizer.tokens.{text}: expected {wanted} in {model}, got none "
                f"({self._limits[model]} rows). Correct the source."
            )
        return ((model, row),)


def _lengths(model: Checkpoint) -> list[int]:
    """Of the axes whose places are words."""
    return [model.tensors[tensor].shape[axis] for tensor, axis in vocabulary_axes(model).items()]


def _rows_stored(name: str, model: Checkpoint) -> int:
    found = _lengths(model)
    if not found:
        raise InputError(
            f"embeddings of {name}: expected a tensor such as model.embed_tokens.weight, got none. "
            "Remove 'tokenizer' and 'tokenizer_source', or change the tokenizer after the merge."
        )
    return min(found)


def _stored_tokens(name: str, model: Checkpoint, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The tokens that have a row."""
    limit = _rows_stored(name, model)
    return {text: row for text, row in vocabulary.items() if row < limit}
