"""Bytes and seconds in words."""

from __future__ import annotations

import pytest

from magic_fast.errors import InputError
from magic_fast.report.units import format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_400, "999 kB"),
        (999_600, "1.00 MB"),
        (296_529_408, "297 MB"),
        (5 * 10**12, "5.00 TB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (75, "1 min 15 s"),
        (7384, "2 h 3 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_format_rate() -> None:
    assert format_rate(3e9, 2) == "1.50 GB/s"
    assert format_rate(3e9, 0) == "–"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gib", 3 * 2**29), ("1000", 1000)],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", "1e9", "0.5"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(InputError, match="expected a positive number with B, KB"):
        parse_bytes(text)
