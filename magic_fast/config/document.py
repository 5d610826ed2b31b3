"""YAML text to plain Python values, with the line of every key and no duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from magic_fast.config.problems import Origin, Path, show_path
from magic_fast.errors import ConfigError

#: A merge description has some hundreds of values; aliases that expand beyond this are a mistake.
MAX_NODES = 200_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads ``1e-5`` as a number, as YAML 1.2 does (1.1 calls it a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Document:
    """The top-level mapping of a YAML text, and where its parts stand."""

    data: Mapping[str, Any]
    origin: Origin


def read_text(path: FilePath) -> str:
    """The text of a YAML file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(
            f"unreadable file for {path}: expected a YAML file, got: {reason}. Correct the path."
        ) from None


def read_document(text: str, source: str | None = None) -> Document:
    """Parse one YAML document whose top level is a mapping.

    Args:
        text: YAML.
        source: name for messages, usually the file's path.

    Raises:
        ConfigError: bad syntax, a key twice in one mapping, several documents, not a mapping.

    >>> read_document("merge_method: linear").data
    {'merge_method': 'linear'}
    """
    documents = read_documents(text, source)
    if len(documents) > 1:
        raise ConfigError(
            f"several documents for {source or 'the configuration'}: expected one merge, got "
            f"{len(documents)} documents separated by '---' (mergekit-multi). Run them with "
            "magic-fast merge or mf.merge_series."
        )
    return documents[0]


def read_documents(text: str, source: str | None = None) -> list[Document]:
    """Parse all documents of a YAML text, at least one; each top level is a mapping.

    Arguments and errors are those of :func:`read_document`.
    """
    name = source or "the configuration"
    documents: list[Document] = []
    try:
        loader = _Loader(text)
        while not documents or loader.check_node():
            root = loader.get_node() if loader.check_node() else None
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(
                    f"no keys for {name}: expected a mapping such as 'merge_method: ties', "
                    f"got {_kind(root)}. Write key: value lines."
                )
            lines: dict[Path, int] = {}
            _Walk(lines, name).visit(root, (), ())
            documents.append(Document(loader.construct_document(root), Origin(source, lines)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"bad YAML for {name}{line}: expected valid YAML, got: "
            f"{error.problem or error.context}. Check indentation, colons and quotes there."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"bad YAML for {name}: expected valid YAML text, got: {error}. Correct the file."
        ) from None
    return documents


@dataclass
class _Walk:
    """Notes the line of every path; refuses duplicate and non-text keys and endless aliases."""

    lines: dict[Path, int]
    name: str
    count: int = 0

    def visit(self, node: yaml.Node, path: Path, parents: tuple[int, ...]) -> None:
        self.count += 1
        if id(node) in parents or self.count > MAX_NODES:
            raise ConfigError(
                f"endless aliases for {self.name}, line {node.start_mark.line + 1}: expected at "
                f"most {MAX_NODES} values, got more (an anchor inside itself?). "
                "Write the values out."
            )
        parents = (*parents, id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                self.visit(item, (*path, index), parents)
        elif isinstance(node, yaml.MappingNode):
            self.mapping(node, path, parents)

    def mapping(self, node: yaml.MappingNode, path: Path, parents: tuple[int, ...]) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                self.visit(value, path, parents)
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(
                    f"key that is not text for {show_path(path)} ({self.name}, line {line}): "
                    f"expected a name, got {getattr(key, 'value', key)!r}. Put quotes around it."
                )
            if key.value in seen:
                raise ConfigError(
                    f"key given twice for {show_path(path)} ({self.name}, line {line}): expected "
                    f"'{key.value}' once, got it on lines {seen[key.value]} and {line}. "
                    "Remove one of them."
                )
            seen[key.value] = line
            self.lines[(*path, key.value)] = line
            self.visit(value, (*path, key.value), parents)


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "an empty document"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"
