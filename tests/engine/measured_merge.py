"""A merge in a process of its own that watches its anonymous memory.

    python measured_merge.py CONFIG OUT MEMORY

Prints JSON: peak of RssAnon in bytes, whether torch was imported, bytes written.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path


class Peak:
    """Largest anonymous memory of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.003):
            self._look()

    def _look(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                self.bytes = max(self.bytes, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        self._look()
        self._stopped.set()
        self._thread.join()
        return self.bytes


def main(config: str, out: str, memory: int) -> None:
    import magic_fast as mf

    peak = Peak()
    try:
        report = mf.merge_checkpoints(config, out, memory=memory)
    finally:
        found = peak.stop()
    print(
        json.dumps(
            {"peak": found, "torch": "torch" in sys.modules, "written": report.bytes_written}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
