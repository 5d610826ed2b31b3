"""The safetensors header: a strict parser and a deterministic serialiser.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data. The JSON maps a tensor's
name to its ``dtype``, ``shape`` and ``data_offsets`` [begin, end), counted from the end of the
header. The library of the same name neither tells where a tensor lies nor writes in place, so both
are done here and cross-checked with it in the tests. Stricter than the library in one point, as the
format's text demands: a duplicate key is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from magic_fast.errors import InputError

from .messages import is_unicode, problem, shown
from .strict_json import load_json_object
from .tensors import (
    DTYPE_BITS,
    LARGEST,
    MAX_DIMENSIONS,
    METADATA_KEY,
    TensorInfo,
    TensorSpec,
    tensor_nbytes,
)

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ALIGNMENT = 8  # of the data's start, in bytes


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        path: the file.
        tensors: name → place, in the order of the data.
        metadata: ``__metadata__``, or {}.
        data_start: position of the first byte after the header.
        file_size: bytes of the whole file.
        header_hash: SHA-256 of the JSON bytes, hexadecimal.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    header_hash: str


#: (hash, size of the file) → header that is in use somewhere.
_RECENT: WeakValueDictionary[tuple[str, int], Header] = WeakValueDictionary()


def header_length(prefix: bytes | bytearray, file_size: int, path: str) -> int:
    """The length N in the first 8 bytes of a file, checked against the limit and the file's size.

    Raises:
        CheckpointError: the file is shorter than its header or the header exceeds 100 MB.
    """
    if len(prefix) < LENGTH_BYTES:
        raise problem(
            "Truncated file", path, "at least 8 bytes of a safetensors file", f"{len(prefix)} bytes"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise problem(
            "Oversized header",
            path,
            f"at most {MAX_HEADER_BYTES} bytes",
            f"{length} bytes",
            "The file is damaged or is not a safetensors file: download or copy it again",
        )
    if length > file_size - LENGTH_BYTES:
        raise problem(
            "Truncated header",
            path,
            f"{length} bytes of header",
            f"a file of {file_size} bytes",
            "The file is cut short: download or copy it again",
        )
    return length


def parse_header(raw: bytes, file_size: int, path: str) -> Header:
    """Parse the JSON part of a header and check every claim it makes.

    Args:
        raw: the N bytes after the length.
        file_size: size of the whole file in bytes.
        path: for messages and for `TensorInfo.path`; nothing is opened.

    Raises:
        CheckpointError: invalid UTF-8 or JSON, duplicate keys, unknown dtype, size that does not
            fit dtype and shape, offsets that overlap, leave holes or leave the file, or a file
            longer or shorter than its tensors.

    >>> raw = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    >>> parse_header(raw, 8 + len(raw) + 8, "x").tensors["w"].offset
    62
    """
    digest = hashlib.sha256(raw).hexdigest()
    twin = _RECENT.get((digest, file_size))
    if twin is not None:  # models of one architecture often have the same headers
        return replace(twin, path=path, tensors=_moved(twin.tensors, path))
    entries = _load(raw, path)
    metadata = _metadata(entries.pop(METADATA_KEY, None), path)
    data_start = LENGTH_BYTES + len(raw)
    escapes = b"\\u" in raw
    infos: list[TensorInfo] = []
    for name, entry in entries.items():
        if escapes and not is_unicode(name):
            raise problem("Tensor name that is not Unicode", path, "valid Unicode", shown(name))
        infos.append(_tensor(name, entry, data_start, path))
    infos.sort(key=_position)
    _check_cover(infos, data_start, file_size, path)
    header = Header(
        path=path,
        tensors={info.name: info for info in infos},
        metadata=metadata,
        data_start=data_start,
        file_size=file_size,
        header_hash=digest,
    )
    _RECENT[digest, file_size] = header
    return header


def _moved(tensors: Mapping[str, TensorInfo], path: str) -> dict[str, TensorInfo]:
    """The same places in another file."""
    return {
        name: TensorInfo(name, info.dtype, info.shape, path, info.offset, info.nbytes)
        for name, info in tensors.items()
    }


def serialize_header(
    tensors: Sequence[TensorSpec], path: str, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The first bytes of a file (length, JSON, padding), and where each tensor goes.

    Tensors lie one after the other in the order given; the data starts at a multiple of 8. The same
    arguments give the same bytes.

    Raises:
        InputError: a name twice, or a header of more than 100 MB.

    >>> head, (w,) = serialize_header([TensorSpec("w", "F32", (2,))], "x")
    >>> len(head), w.offset
    (64, 64)
    """
    entries: dict[str, Any] = {}
    if metadata:
        _metadata(dict(metadata), path)
        entries[METADATA_KEY] = {key: metadata[key] for key in sorted(metadata)}
    begins: list[int] = []
    end = 0
    for spec in tensors:
        if spec.name in entries:
            raise InputError(
                f"Tensor written twice for {path}: expected distinct names, got {shown(spec.name)} "
                "again. Name each tensor once."
            )
        begins.append(end)
        end += spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begins[-1], end],
        }
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise InputError(
            f"Header too long for {path}: expected at most {MAX_HEADER_BYTES} bytes, got "
            f"{len(raw)}. Write more and smaller shards."
        )
    start = LENGTH_BYTES + len(raw)
    infos = tuple(
        TensorInfo(spec.name, spec.dtype, spec.shape, path, start + begin, spec.nbytes)
        for spec, begin in zip(tensors, begins, strict=True)
    )
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw, infos


def _load(raw: bytes, path: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise problem("Corrupt header", path, "JSON that begins with '{'", f"{raw[:16]!r}")
    return load_json_object(raw, "Corrupt header", path)


def _metadata(value: object, path: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise problem("Corrupt header", path, f"{METADATA_KEY} to hold only strings", shown(value))
    if not all(is_unicode(text) for item in value.items() for text in item):
        raise problem("Corrupt header", path, f"{METADATA_KEY} of valid Unicode", shown(value))
    return value


def _tensor(name: str, entry: object, data_start: int, path: str) -> TensorInfo:
    """One entry of the header, each field checked on its own."""
    if type(entry) is not dict:
        raise problem("Corrupt header entry", _where(name, path), "an object", shown(entry))
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        raise problem(
            "Unknown dtype", _where(name, path), f"one of {', '.join(DTYPE_BITS)}", shown(dtype)
        )
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise problem(
            "Corrupt shape",
            _where(name, path),
            f"a list of at most {MAX_DIMENSIONS} sizes",
            shown(shape),
        )
    for size in shape:
        if type(size) is not int or not 0 <= size <= LARGEST:
            raise problem(
                "Corrupt shape", _where(name, path), "whole numbers from 0 to 2^63-1", shown(shape)
            )
    if type(offsets) is not list or [*map(type, offsets)] != [int, int]:
        raise problem(
            "Corrupt offsets",
            _where(name, path),
            "data_offsets of two whole numbers",
            shown(offsets),
        )
    begin, end = offsets
    if not 0 <= begin <= end <= LARGEST:
        raise problem("Corrupt offsets", _where(name, path), "0 <= begin <= end", shown(offsets))
    nbytes = tensor_nbytes(dtype, shape)
    if nbytes is None or nbytes != end - begin:
        raise problem(
            "Byte size that does not match dtype and shape",
            _where(name, path),
            f"{'whole bytes' if nbytes is None else f'{nbytes} bytes'} for {dtype} {shown(shape)}",
            f"{end - begin} bytes in data_offsets",
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _position(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes


def _check_cover(infos: Sequence[TensorInfo], data_start: int, file_size: int, path: str) -> None:
    """The tensors, in order, must fill the file: no byte twice, none left over."""
    end = data_start
    previous: TensorInfo | None = None
    for info in infos:
        if info.offset + info.nbytes > file_size:
            raise problem(
                "Offsets outside the file",
                _where(info.name, path),
                f"a file of at least {info.offset + info.nbytes} bytes",
                f"{file_size} bytes",
                "The file is truncated or damaged: download or copy it again",
            )
        if info.offset != end:
            after = shown(previous.name) if previous else "the header"
            what = "Overlapping offsets" if info.offset < end else "Hole between tensors"
            raise problem(
                what,
                _where(info.name, path),
                f"data to begin at byte {end}, after {after}",
                f"byte {info.offset}",
            )
        end, previous = info.offset + info.nbytes, info
    if end != file_size:
        raise problem("Trailing bytes", path, f"a file of {end} bytes", f"{file_size} bytes")


def _where(name: str, path: str) -> str:
    return f"tensor {shown(name)} in {path}"
