"""Entry points of installed packages: loaded once, a broken one named and left out."""

from __future__ import annotations

import logging
from functools import cache

log = logging.getLogger("magic_fast")


@cache
def entry_points_of(group: str) -> tuple[dict[str, object], dict[str, str]]:
    """What installed packages offer under ``group``, for example ``magic_fast.backends``.

    The first call imports what the entry points name, so call it on first use of a registry, not
    on import. Both dictionaries are shared by all callers; leave them as they are.

    Returns:
        (Name → the loaded object, name → the reason it is left out), each in alphabetical order.
    """
    from importlib.metadata import entry_points

    offered = sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.value))
    values: dict[str, set[str]] = {}
    for entry in offered:
        values.setdefault(entry.name, set()).add(entry.value)
    loaded: dict[str, object] = {}
    left_out: dict[str, str] = {}
    for entry in offered:
        if entry.name in loaded or entry.name in left_out:
            continue
        reason = None
        if len(values[entry.name]) > 1:
            reason = f"several packages offer it: {', '.join(sorted(values[entry.name]))}"
        else:
            try:
                loaded[entry.name] = entry.load()
            except Exception as error:  # of any kind: it is code of others
                reason = f"{entry.value} cannot be loaded: {type(error).__name__}: {error}"
        if reason is not None:
            left_out[entry.name] = reason
            log.warning("entry point %s of %s is left out: %s", entry.name, group, reason)
    return loaded, left_out
