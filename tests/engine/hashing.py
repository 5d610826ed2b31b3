"""What two folders have in common, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path


def hashes(folder: Path) -> dict[str, str]:
    """File → SHA-256, of everything in a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """File → size, time of change and inode: what must stay as it is of an input."""
    return {
        str(p.relative_to(folder)): (s.st_size, s.st_mtime_ns, s.st_ino)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and (s := p.stat())
    }
