"""Reading checkpoints: names and places from the headers, bytes only when asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from magic_fast.models import ModelRoles, Quantisation, quantisation_of, roles_of
from magic_fast.models.quantised import NUMBERS

from .file_reader import PREFIX_BYTES, FileReader
from .hashing import InputFile
from .header import Header
from .io_errors import reading
from .locate import Located, locate, refuse_foreign
from .messages import problem, shown
from .strict_json import load_json_object
from .tensors import TensorInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self


class Resized(NamedTuple):
    """A vocabulary that is not the one of the configuration.

    Attributes:
        rows: how many words it has.
        folder: where its tokenizer lies, or None.
    """

    rows: int
    folder: str | None


class Checkpoint:
    """A model's tensors by name, each with its place; `open_checkpoint` makes one.

    Attributes:
        path: the folder or file as it was named, made absolute.
        folder: the folder that holds the small files too, or None for a bare file.
        config: the parsed ``config.json``, or {}.
        tensors: stored name → `TensorInfo`, in the order of files and offsets.
        aliases: tied name → stored name; disjoint from ``tensors``.
        files: identity of every weights file.
        overhead: bytes that reading takes beside the caller's buffers.
        metadata: the headers' ``__metadata__``, merged.
        resized: the vocabulary of an adapter that was trained with another one, or None.
        notes: what the user should know of how it is read.
    """

    resized: Resized | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        path: str,
        folder: str | None,
        headers: list[tuple[Header, InputFile]],
        config: dict[str, Any],
        reader: FileReader,
        owns_reader: bool,
    ) -> None:
        self.path = path
        self.folder = folder
        self.config = config
        tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._headers = [header for header, _ in headers]  # others may have the same
        for header in self._headers:
            _add_disjoint(tensors, header.tensors)
            self.metadata.update(header.metadata)
        self._stored = tensors
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.files: tuple[InputFile, ...] = tuple(file for _, file in headers)
        self.overhead = 0
        self._dtypes: Mapping[str, str] = {}
        self._reader = reader
        self._owns_reader = owns_reader

    def __contains__(self, name: object) -> bool:
        return name in self.tensors or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {len(self.tensors)} tensors, {len(self.files)} files)"

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        return MappingProxyType(self.roles.aliases)

    @cached_property
    def roles(self) -> ModelRoles:
        """What each stored tensor is to the model (docs/models.md)."""
        return roles_of(self.config, self._headers_of_tensors())

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """Its quantised tensors, or None where all are numbers."""
        if all(info.dtype in NUMBERS for info in self._stored.values()):
            return None
        return quantisation_of(self.config, self._headers_of_tensors())

    def _headers_of_tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (info.shape, info.dtype) for name, info in self._stored.items()}

    @property
    def is_file(self) -> bool:
        """Whether all of it is one file that was named as such."""
        return self.folder is None and len(self.files) == 1

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def is_alias(self, name: str) -> bool:
        """Whether ``name`` is a tied weight that another stored tensor stands for."""
        return name in self.aliases

    def resolve(self, name: str) -> TensorInfo:
        """The stored tensor behind a name, tied or not.

        Raises:
            CheckpointError: there is none; the message names the nearest ones.
        """
        info = self._stored.get(name)
        if info is None and name in self.aliases:
            info = self._stored[self.aliases[name]]
        if info is None:
            near = difflib.get_close_matches(name, self.tensors, n=2)
            got = f"only names like {' and '.join(map(shown, near))}" if near else "no such name"
            raise problem(
                "Missing tensor",
                f"{shown(name)} in {self.path}",
                "it to be stored",
                got,
                "Use checkpoints of the same architecture",
            )
        return info

    def stored_dtype(self, name: str) -> str:
        """The dtype a tensor has on disk, where it is read as another."""
        info = self.resolve(name)
        return self._dtypes.get(info.name, info.dtype)

    def read_into(
        self, name: str, buffer: Buffer, start: int = 0, nbytes: int | None = None
    ) -> int:
        """`FileReader.read_into` by name. Thread-safe."""
        return self._reader.read_into(self.resolve(name), buffer, start, nbytes)

    def read(self, name: str) -> bytearray:
        """All bytes of a tensor, little-endian, row-major."""
        data = bytearray(self.resolve(name).nbytes)
        self.read_into(name, data)
        return data

    def opener(self) -> Callable[[], Checkpoint]:
        """What opens it again, in another process too."""
        return partial(open_checkpoint, self.path)

    def close(self) -> None:
        """Close the files, unless a reader was shared. Reading again opens them again."""
        if self._owns_reader:
            self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str], *, reader: FileReader | None = None
) -> Checkpoint:
    """Open a model: a folder, with or without an index of its shards, or one file.

    Only headers are read. A folder without an index may hold ``model.safetensors``, one file of
    another name, or one complete set of numbered shards; anything else is ambiguous and an error.

    Args:
        path: ``~`` is expanded. Links are followed, as caches of model hubs are made of them.
        reader: share open files with other checkpoints; the caller closes it.

    Raises:
        CheckpointError: what `locate` refuses; damaged headers; a tensor in two files; a tensor
            that the index names and its file lacks.

    Example:
        >>> with open_checkpoint("models/base") as base:  # doctest: +SKIP
        ...     base.tensors["model.norm.weight"].shape
        (4096,)
    """
    given = os.path.expanduser(os.fspath(path))
    located = locate(given)
    own = reader is None
    reader = FileReader() if reader is None else reader
    try:
        headers = [reader.read_header(file) for file in located.files]
        checkpoint = Checkpoint(
            os.path.abspath(given),
            located.folder,
            headers,
            read_config(located.folder),
            reader,
            own,
        )
        _check_index(located, checkpoint.tensors)
    except BaseException:
        if own:
            reader.close()
        raise
    return checkpoint


def _add_disjoint(tensors: dict[str, TensorInfo], more: Mapping[str, TensorInfo]) -> None:
    for name in tensors.keys() & more.keys():
        raise problem(
            "Tensor in two shards",
            shown(name),
            "one file",
            f"{tensors[name].path} and {more[name].path}",
            "Remove the file that does not belong to the model",
        )
    tensors.update(more)


def _check_index(located: Located, tensors: Mapping[str, TensorInfo]) -> None:
    for name, path in (located.weight_map or {}).items():
        info = tensors.get(name)
        if info is None or info.path != path:
            got = "no such tensor in it" if info is None else f"it in {info.path}"
            raise problem(
                "Index naming a tensor that its shard lacks",
                f"tensor {shown(name)} in {located.index}",
                f"it in {path}",
                got,
                "Download the index and the shards again, of one revision",
            )


def read_config(folder: str | None) -> dict[str, Any]:
    """The parsed ``config.json`` of a folder, {} where it has none. Raises CheckpointError."""
    if folder is None:
        return {}
    path = os.path.join(folder, "config.json")
    if not os.path.lexists(path):
        return {}
    with reading(path), open(path, "rb") as file:
        raw = file.read()
    refuse_foreign(raw[:PREFIX_BYTES], path)
    return load_json_object(raw, "Corrupt config", path, strict=False)


class ModelFolder(NamedTuple):
    """A folder with the small files of a model, whose weights are not read.

    Attributes:
        path, folder: where it is.
        config: the parsed ``config.json``, or {}.
    """

    path: str
    folder: str
    config: Mapping[str, Any]


def open_folder(path: str) -> ModelFolder:
    """The small files in a folder.

    Raises:
        CheckpointError: it is none, or its configuration is damaged.
    """
    if not os.path.isdir(path):
        advice = "Name the folder of a model"
        raise problem("Missing small files", path, "a folder", "something else", advice)
    return ModelFolder(path, path, read_config(path))
