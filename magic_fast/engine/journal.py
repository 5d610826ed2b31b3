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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from magic_fast.checkpoint import InputFile, OutputFolder, changed_inputs
from magic_fast.errors import InputError

NAME = "journal.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to be continued.

    Attributes:
        config: the configuration, its seed and everything else that decides values, as text.
        output: hash of the output's headers.
        inputs: every input file as it was when its header was read.
        backend, device: what computes; their float32 sums differ in the last bits.
    """

    config: str
    output: str
    inputs: tuple[InputFile, ...]
    backend: str
    device: str

    def differences(self, other: Identity) -> list[str]:
        """In words, what ``other`` (now) has that this one (before) had not."""
        found = changed_inputs(self.inputs, other.inputs)
        if self.config != other.config:
            found.append("the configuration")
        elif self.output != other.output:
            found.append("the layout of the output (shard size or version)")
        for what in ("backend", "device"):
            was, now = getattr(self, what), getattr(other, what)
            if was != now:
                found.append(f"the {what}: was {was}, is {now}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Identity:
        return cls(
            str(value["config"]),
            str(value["output"]),
            tuple(InputFile.from_dict(f) for f in value["inputs"]),
            str(value["backend"]),
            str(value["device"]),
        )


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

    def to_line(self) -> str:
        value = {
            "name": self.name,
            "start": self.start,
            "stop": self.stop,
            "checksum": self.checksum,
            "coefficient": base64.b64encode(self.coefficient.tobytes()).decode(),
            "repaired": self.repaired,
            "norms2": list(self.norms2),
            "backend": self.backend,
        }
        return json.dumps(value, separators=(",", ":"), allow_nan=True)

    @classmethod
    def from_line(cls, line: str) -> Record:
        value = json.loads(line)
        coefficient = array("f")
        coefficient.frombytes(base64.b64decode(value["coefficient"]))
        return cls(
            value["name"],
            value["start"],
            value["stop"],
            value["checksum"],
            coefficient,
            value["repaired"],
            tuple(value["norms2"]),
            value["backend"],
        )


class Journal:
    """The journal of one run, open for appending."""

    def __init__(self, output: OutputFolder, identity: Identity) -> None:
        self._path = os.path.join(output.partial, NAME)
        self.records: dict[tuple[str, int, int], Record] = {}
        if output.resumed:
            self._take_over(identity)
        if not self.records:
            head = {"format": _FORMAT, "identity": identity.as_dict()}
            with open(self._path, "w", encoding="utf-8") as file:
                file.write(json.dumps(head) + "\n")
        self._file = open(self._path, "a", encoding="utf-8", buffering=1)

    def _take_over(self, identity: Identity) -> None:
        """Reads what an earlier run left; a torn last line is no record.

        Raises:
            InputError: it was another run: configuration, inputs, backend or device differ.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                lines = file.read().split("\n")
            head = json.loads(lines[0])
            before = Identity.from_dict(head["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # killed before the first line was whole: nothing to take over
        differences = before.differences(identity)
        if head.get("format") != _FORMAT:
            differences.append("the version of the journal")
        if differences:
            raise InputError(
                f"resume for {self._path!r}: expected the run that was interrupted, got another: "
                f"{'; '.join(differences)}. Run without --resume to start afresh."
            )
        whole, size = [lines[0]], len(lines[0].encode()) + 1
        for line in lines[1:-1]:  # what follows the last newline is torn or empty
            try:
                record = Record.from_line(line)
            except (ValueError, KeyError, TypeError):
                break
            self.records[record.name, record.start, record.stop] = record
            size += len(line.encode()) + 1
            whole.append(line)
        with open(self._path, "r+b") as raw:
            raw.truncate(size)

    def add(self, record: Record) -> None:
        """Appends one finished piece."""
        self.records[record.name, record.start, record.stop] = record
        self._file.write(record.to_line() + "\n")

    def close(self) -> None:
        self._file.close()
