"""Bytes, rates and times as people write them. A kilobyte is 1000 bytes, as on a disk's label."""

from __future__ import annotations

import re

from magic_fast.errors import InputError

_DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_FACTORS = {
    "": 1,
    "B": 1,
    **{unit: 1000**i for i, unit in enumerate(("KB", "MB", "GB", "TB"), start=1)},
    **{unit: 1024**i for i, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), start=1)},
}


def format_bytes(count: float) -> str:
    """
    >>> format_bytes(296529408)
    '297 MB'
    >>> format_bytes(2_200_000_000)
    '2.20 GB'
    """
    value, unit = float(count), _DECIMAL[0]
    for larger in _DECIMAL[1:]:
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{value:.0f} B"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def format_rate(count: float, seconds: float) -> str:
    """Bytes per second; a dash where no time has passed."""
    return f"{format_bytes(count / seconds)}/s" if seconds > 0 else "–"


def format_seconds(seconds: float) -> str:
    """
    >>> [format_seconds(t) for t in (0.0123, 4.2, 75, 7384)]
    ['12 ms', '4.2 s', '1 min 15 s', '2 h 3 min']
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def parse_bytes(text: str) -> int:
    """A size such as ``5GB``, ``512MiB`` or ``1000``, in bytes.

    Raises:
        InputError: not a positive number with a known unit.

    >>> parse_bytes("5GB"), parse_bytes("1.5 GiB")
    (5000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size < 1:
        raise InputError(
            f"bad size: expected a positive number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, "
            f"got {text!r}. Write for example 5GB."
        )
    return size
