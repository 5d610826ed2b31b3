"""The form of all messages of this package, and how damaged names are shown in them."""

from __future__ import annotations

from magic_fast.errors import CheckpointError

FETCH_AGAIN = "Download or copy the file again"


def shown(name: object) -> str:
    """A name as messages show it: quoted, and cut where a damaged file made it absurdly long."""
    text = repr(name[:120]) if isinstance(name, str) else repr(name)[:120]
    return text + "…" if isinstance(name, str) and len(name) > 120 else text


def problem(
    what: str,
    where: object,
    expected: object,
    got: object,
    advice: str = FETCH_AGAIN,
) -> CheckpointError:
    """A `CheckpointError` in the one form that all messages have."""
    text = f"{what} for {where}: expected {expected}, got {got}. {advice}."
    return CheckpointError(
        text.encode("utf-8", "backslashreplace").decode()
    )  # damaged names can be printed


def is_unicode(name: str) -> bool:
    """Whether a string can be written as UTF-8 (JSON escapes can make half characters)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
