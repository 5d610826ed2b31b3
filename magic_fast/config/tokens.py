"""The ``tokenizer:`` block: whose vocabulary, and where the rows of single tokens come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from magic_fast.config.calibrate import Strict
from magic_fast.config.problems import Path, Problem, listed
from magic_fast.config.references import parse_reference, reference_or_none

#: Sources that are no model.
WORDS = ("union", "base")
Reference = Annotated[str, BeforeValidator(parse_reference)]


class TokenSource(Strict):
    """``source:`` of one token written out: a row of a model, or zeros."""

    kind: Literal["model_token", "zero"]
    model: Reference | None = None
    token: str | None = None
    token_id: Annotated[int, Field(strict=True, ge=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> TokenSource:
        one = (self.token is None) != (self.token_id is None)
        if self.kind == "model_token" and not (self.model is not None and one):
            raise ValueError("expected model and one of token and token_id for kind model_token")
        if self.kind == "zero" and (self.model, self.token, self.token_id) != (None, None, None):
            raise ValueError("expected no model and no token for kind zero")
        return self


def _token_source(value: Any) -> Any:
    return value if value is None or is_written_out(value) else parse_reference(value)


def is_written_out(value: Any) -> bool:
    """Whether a token's source is a mapping with a ``kind``, or one already read."""
    return isinstance(value, TokenSource) or (isinstance(value, Mapping) and "kind" in value)


class TokenEntry(Strict):
    """One item of ``tokens:``; ``force`` gives its row to models that have the token, too."""

    source: Annotated[TokenSource | str | None, BeforeValidator(_token_source)] = None
    force: Annotated[bool, Field(strict=True)] = False


class TokenizerEntry(Strict):
    """mergekit's ``tokenizer:`` block."""

    source: Reference = "union"
    tokens: dict[str, TokenEntry] | None = None
    pad_to_multiple_of: Annotated[int, Field(strict=True, ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("source", "") is None:
            return {key: item for key, item in value.items() if key != "source"}
        return value


def check_tokenizer(data: Mapping[str, Any], models: set[str | None]) -> Iterator[Problem]:
    """Both ways of asking at once, and sources that are none of ``models``."""
    block = data.get("tokenizer")
    if block is not None and data.get("tokenizer_source") is not None:
        yield Problem(
            ("tokenizer_source",),
            "two tokenizers",
            "expected one of tokenizer and tokenizer_source, got both. Remove one.",
        )
    if data.get("tokenizer_from") and (block is not None or data.get("tokenizer_source")):
        yield Problem(
            ("tokenizer_from",),
            "two tokenizers",
            "expected one of tokenizer_from, tokenizer_source and tokenizer, got two. Remove one: "
            "tokenizer_from takes the files and leaves the embeddings as they are.",
        )
    yield from _check(("tokenizer_source",), data.get("tokenizer_source"), {*models, *WORDS})
    if not isinstance(block, Mapping):
        return
    yield from _check(("tokenizer", "source"), block.get("source"), {*models, *WORDS})
    tokens = block.get("tokens")
    for text, entry in tokens.items() if isinstance(tokens, Mapping) else ():
        source = entry.get("source") if isinstance(entry, Mapping) else None
        path: Path = ("tokenizer", "tokens", text, "source")
        if isinstance(source, Mapping) and is_written_out(source):
            yield from _check((*path, "model"), source.get("model"), models)
        else:
            yield from _check(path, source, models)


def _check(path: Path, source: Any, known: set[str | None]) -> Iterator[Problem]:
    reference = reference_or_none(source)
    if reference is not None and reference not in known:
        choices = listed(sorted(filter(None, known)))
        yield Problem(
            path,
            "tokenizer of a model that is not merged",
            f"expected one of {choices}, got {source!r}. Correct it.",
        )
