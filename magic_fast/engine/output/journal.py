"""What a run has finished, so that a killed one can be taken up again.

``journal.jsonl`` lies in the partial folder: first the identity of the run, then one line per
piece that was written, with a checksum of its bytes. Nothing in it is believed: on resuming, a
piece counts as done only when the bytes on disk have that checksum, so the order in which data and
journal reach the disk does not matter.
"""

from __future__ import annotations

import base64
import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from magic_fast.checkpoint import REAL, FileSystem, OutputFolder
from magic_fast.checkpoint.io_errors import writing
from magic_fast.engine.output.identity import Identity
from magic_fast.errors import InputError

NAME = "journal.jsonl"
_FORMAT = 2


@dataclass
class Record:
    """One finished piece: elements [start, stop) of a tensor.

    Attributes:
        checksum: XXH3-64 of the bytes, hexadecimal.
        coefficient: raw ξ of its rows, or empty.
        repaired: rows that the guards left alone.
        norms2: ‖τ_k‖² of each expert and ‖d‖² before and after, over these rows; or empty.
    """

    name: str
    start: int
    stop: int
    checksum: str
    coefficient: array[float] = field(default_factory=lambda: array("f"))
    repaired: int = 0
    norms2: tuple[float, ...] = ()
    backend: str = ""

    def as_dict(self) -> dict[str, Any]:
        coefficient = base64.b64encode(self.coefficient.tobytes()).decode()
        return {**vars(self), "coefficient": coefficient}

    @classmethod
    def from_line(cls, line: str) -> Record:
        record = cls(**json.loads(line))
        data, record.coefficient = base64.b64decode(record.coefficient), array("f")
        record.coefficient.frombytes(data)
        record.norms2 = tuple(record.norms2)
        return record


class Journal:
    """The journal of one run, open for appending.

    Raises:
        InputError: an earlier run is resumed that was another.
        OutputError: the journal cannot be written.
    """

    def __init__(self, output: OutputFolder, identity: Identity, fs: FileSystem = REAL) -> None:
        self._path = os.path.join(output.partial, NAME)
        self._folder = output.partial
        self._fs = fs
        self.records: dict[tuple[str, int, int], Record] = {}
        self._size = self._take_over(identity) if output.resumed else 0
        with self._writing():
            self._fd = fs.open(self._path, os.O_RDWR | os.O_CREAT)
        try:
            with self._writing():
                fs.truncate(self._fd, self._size)
            if not self._size:
                self._append({"format": _FORMAT, "identity": identity.as_dict()})
        except BaseException:
            self.close()
            raise

    def _take_over(self, identity: Identity) -> int:
        """Reads what an earlier run left; a torn last line is no record. Returns the number of
        bytes that are good.

        Raises:
            InputError: it was another run: configuration, inputs, backend or device differ.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                lines = file.read().split("\n")
            head = json.loads(lines[0])
            if head["format"] != _FORMAT:
                differences = ["the version of the journal"]
            else:
                differences = Identity.from_dict(head["identity"]).differences(identity)
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # killed before the first line was whole: nothing to take over
        if differences:
            raise InputError(
                f"resume for {self._path!r}: expected the run that was interrupted, got another: "
                f"{'; '.join(differences)}. Run without --resume to start afresh."
            )
        size = len(lines[0].encode()) + 1
        for line in lines[1:-1]:  # what follows the last newline is torn or empty
            try:
                record = Record.from_line(line)
            except (ValueError, KeyError, TypeError):
                break
            self.records[record.name, record.start, record.stop] = record
            size += len(line.encode()) + 1
        return size if len(lines) > 1 else 0

    def add(self, record: Record) -> None:
        """Appends one finished piece.

        Raises:
            OutputError: disk full or I/O error.
        """
        self._append(record.as_dict())
        self.records[record.name, record.start, record.stop] = record

    def close(self) -> None:
        self._fs.close(self._fd)

    def _append(self, value: Mapping[str, Any]) -> None:
        line = (json.dumps(value, separators=(",", ":")) + "\n").encode()
        with self._writing(len(line)):
            self._fs.write_exactly(self._fd, memoryview(line), self._size)
        self._size += len(line)

    def _writing(self, needed: int = 0) -> AbstractContextManager[None]:
        return writing(self._path, self._folder, self._fs, needed)


class NoJournal(Journal):
    """Keeps nothing on the disk: for what is not resumed, and for a part of a run whose pieces are
    written down elsewhere.

    Args:
        records: pieces that an earlier run finished.
        add: called with each piece that is finished.
    """

    def __init__(
        self, records: Iterable[Record] = (), add: Callable[[Record], None] | None = None
    ) -> None:
        self.records = {(r.name, r.start, r.stop): r for r in records}
        self._tell = add

    def add(self, record: Record) -> None:
        if self._tell is not None:
            self._tell(record)

    def close(self) -> None:
        return None
