"""What identifies an input file without its weights: size, time of change, hash of its header."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class InputFile:
    """One weights file as it was when its header was read.

    Attributes:
        path: as opened.
        size: bytes.
        mtime_ns: time of last change, nanoseconds.
        header_hash: SHA-256 of the header's JSON bytes, hexadecimal.
    """

    path: str
    size: int
    mtime_ns: int
    header_hash: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> InputFile:
        """From what `to_dict` gave."""
        return cls(
            str(value["path"]),
            int(value["size"]),
            int(value["mtime_ns"]),
            str(value["header_hash"]),
        )


def changed_inputs(before: Iterable[InputFile], now: Iterable[InputFile]) -> list[str]:
    """Every way in which the inputs differ from before, in words, sorted by path; empty where they
    are the same.

    >>> changed_inputs([InputFile("a", 8, 0, "00")], [InputFile("a", 9, 0, "00")])
    ['a: size was 8 bytes, is 9 bytes']
    """
    old, new = ({file.path: file for file in files} for files in (before, now))
    found: list[str] = []
    for path in sorted(old.keys() | new.keys()):
        was, is_now = old.get(path), new.get(path)
        if was is None:
            found.append(f"{path}: was not an input")
        elif is_now is None:
            found.append(f"{path}: is no longer an input")
        elif was.size != is_now.size:
            found.append(f"{path}: size was {was.size} bytes, is {is_now.size} bytes")
        elif was.header_hash != is_now.header_hash:
            found.append(f"{path}: its header changed")
        elif was.mtime_ns != is_now.mtime_ns:
            found.append(f"{path}: it was written to since (modification time changed)")
    return found
