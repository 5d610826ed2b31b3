"""JSON objects from files that nobody vouches for."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

from magic_fast.errors import CheckpointError

from .io_errors import reading
from .messages import FETCH_AGAIN, problem, shown


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


def load_json_object(
    raw: bytes, what: str, path: str, *, strict: bool = True, advice: str = FETCH_AGAIN
) -> dict[str, Any]:
    """Parse a JSON object; strictly, a key twice and the NaN and Infinity that Python writes are
    errors.

    Raises:
        CheckpointError: says what is wrong with which file.
    """

    def wrong(how: str, expected: str, got: str) -> CheckpointError:
        return problem(f"{what} {how}", path, expected, got, advice)

    rules: Any = {"object_pairs_hook": _unique_keys, "parse_constant": _refuse_constant}
    try:
        value = json.loads(raw.decode("utf-8"), **rules if strict else {})
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at position {error.start}"
        raise wrong("with invalid UTF-8", "UTF-8 text", got) from None
    except _DuplicateKey as error:
        raise wrong("with a duplicate key", "each name once", f"{error} twice") from None
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        got = "too many nested brackets" if deep else shown(str(error))
        raise wrong("that is not valid JSON", "a JSON object", got) from None
    if not isinstance(value, dict):
        raise wrong("that is not a JSON object", "{…}", f"a JSON {type(value).__name__}")
    return value


def json_file(path: str, what: str, advice: str = FETCH_AGAIN) -> dict[str, Any]:
    """The object in a file, which need not be strict; empty where there is no file.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    if not os.path.isfile(path):
        return {}
    with reading(path), open(path, "rb") as file:
        raw = file.read()
    return load_json_object(raw, what, path, strict=False, advice=advice)
