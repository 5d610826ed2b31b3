"""JSON objects from files that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from .messages import problem, shown


class _DuplicateKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for json that refuses a key that comes twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(shown(key))
            seen.add(key)
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def load_json_object(raw: bytes, what: str, path: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse a JSON object; strictly, a key twice and the NaN and Infinity that Python writes are
    errors.

    Raises:
        CheckpointError: says what is wrong with which file.
    """
    try:
        text = raw.decode("utf-8")
        if strict:
            value = json.loads(
                text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
            )
        else:
            value = json.loads(text)
    except UnicodeDecodeError as error:
        raise problem(
            f"{what} with invalid UTF-8",
            path,
            "UTF-8 text",
            f"byte 0x{raw[error.start]:02x} at position {error.start}",
        ) from None
    except _DuplicateKey as error:
        raise problem(
            f"{what} with a duplicate key", path, "each name once", f"{error} twice"
        ) from None
    except RecursionError:
        raise problem(
            f"{what} that is not valid JSON", path, "a JSON object", "too many nested brackets"
        ) from None
    except ValueError as error:
        raise problem(
            f"{what} that is not valid JSON", path, "a JSON object", shown(str(error))
        ) from None
    if not isinstance(value, dict):
        raise problem(
            f"{what} that is not a JSON object", path, "{…}", f"a JSON {type(value).__name__}"
        )
    return value
