"""Several merges in one file, as of mergekit-multi: later ones use the results of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magic_fast.config.document import Document, read_documents
from magic_fast.config.schema import MergeConfig
from magic_fast.errors import ConfigError

_FORBIDDEN = frozenset('/\\:*?"<>|')


@dataclass(frozen=True)
class Merge:
    """One merge of a series.

    ``name`` is what others call its result, None for the last result; ``uses`` are the names of
    those whose results it reads.
    """

    name: str | None
    config: MergeConfig
    uses: tuple[str, ...]


def is_series(text: str, source: str | None = None) -> bool:
    """Whether a YAML text holds several documents, or one with a ``name``. Raises ConfigError."""
    documents = read_documents(text, source)
    return len(documents) > 1 or documents[0].data.get("name") is not None


def read_series(
    text: str,
    source: str | None = None,
    *,
    folder: Path | None = None,
    instead: Mapping[str, Any] | None = None,
) -> list[Merge]:
    """The merges of a YAML text, each after those that it uses; the one without a name is last.

    Args:
        text: YAML documents separated by ``---``; all but one have a ``name``.
        source: name for messages.
        folder: where relative paths are tried after the current directory.
        instead: top-level keys that go before those of every document.

    Raises:
        ConfigError: a faulty document, two results of one name, none or two without a name, a name
            that is no file name, merges that wait for one another.
    """
    where = source or "the configuration"
    documents = read_documents(text, source)
    names = [_name(document, where) for document in documents]
    for name in names:
        if names.count(name) > 1:
            which = f"name {name!r}" if name is not None else "document without a name"
            raise ConfigError(
                f"several results for {where}: expected each {which} once, got "
                f"{names.count(name)}. Give each merge but the last result a 'name:' of its own."
            )
    if None not in names:
        raise ConfigError(
            f"no last result for {where}: expected one document without a name, got a name in "
            "each. Remove the 'name:' of the one that OUT is to hold."
        )
    merges = []
    for name, document in zip(names, documents, strict=True):
        data = {key: value for key, value in document.data.items() if key != "name"}
        config = MergeConfig.from_document(
            Document(data | dict(instead or {}), document.origin), folder
        )
        wanted = (*config.model_references, *config.file_references)
        uses = tuple(r for r in wanted if r in names)
        merges.append(Merge(name, config, uses))
    return _ordered(merges, where)


def _name(document: Document, where: str) -> str | None:
    name = document.data.get("name")
    if name is None:
        return None
    if not isinstance(name, str) or not name.strip(". ") or _FORBIDDEN & set(name):
        line = document.origin.line_of(("name",))
        raise ConfigError(
            f"bad name for {where}, line {line}: expected the name of a folder, got {name!r}. "
            "Use letters, digits, '-' and '_'."
        )
    return name


def _ordered(merges: list[Merge], where: str) -> list[Merge]:
    """What is used comes first; else the order of the file, the result without a name last."""
    waiting = sorted(merges, key=lambda merge: merge.name is None)
    done: list[Merge] = []
    while waiting:
        made = {merge.name for merge in done}
        ready = [merge for merge in waiting if made.issuperset(merge.uses)]
        if not ready:
            stuck = ", ".join(
                f"{m.name or 'the last'} uses {' and '.join(m.uses)}" for m in waiting
            )
            raise ConfigError(
                f"merges that wait for one another for {where}: expected an order in which each "
                f"uses earlier ones, got {stuck}. Correct the names."
            )
        done.append(ready[0])
        waiting.remove(ready[0])
    return done
