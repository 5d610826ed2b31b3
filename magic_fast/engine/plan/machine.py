"""How much memory this machine, or the container that we run in, still has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NO_LIMIT = 1 << 60  # what version 1 of cgroups has for none is a little below 2^63


def available_memory(root: str = "/") -> int | None:
    """Bytes that a process can take without swapping: what the kernel says is available, and what
    every control group above us still allows; None where the system does not tell.

    Args:
        root: where /proc and /sys are looked for.
    """
    found = [*_meminfo(Path(root)), *_cgroups(Path(root))]
    if not found and root == "/":
        with suppress(ValueError, OSError):  # no Linux: all there is
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(found), 0) if found else None


def _meminfo(root: Path) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _cgroups(root: Path) -> Iterator[int]:
    """Limit less use of each group from ours up to the top. Pages of files count as free: they are
    given up when memory is short."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = folder / path.strip("/")
        # in a container the path may be that of the host, and the top is our own group
        for group in (own, *(p for p in own.parents if p == folder or folder in p.parents)):
            with suppress(OSError, ValueError):
                most = int((group / limit).read_text())  # "max" where there is none
                if most < _NO_LIMIT:
                    yield most - int((group / used).read_text()) + _files(group)


def _files(group: Path) -> int:
    with suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(count)
    return 0
