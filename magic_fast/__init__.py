"""Merges fine-tuned checkpoints of one base model and restores each layer's magnitude.

>>> import magic_fast as mf
>>> import torch
>>> base = torch.zeros(2, 4)
>>> experts = [torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)]
>>> mf.merge(base, experts, "average").unique().tolist()
[2.0]

What stands in ``__all__`` is the public surface; everything else may change. ``__init__.pyi`` lists
these names and where each comes from. Importing this package imports nothing else: a name is
imported when it is first used.
"""

from __future__ import annotations

import logging
import re
from importlib import import_module

from magic_fast._version import __version__ as __version__

# A library is silent until its user asks for its log.
logging.getLogger("magic_fast").addHandler(logging.NullHandler())

_LINE = re.compile(r"^from (\S+) import \(?\s*(\w+) as \2\b", re.MULTILINE)


def _homes() -> dict[str, str]:
    """Public name → the module it comes from."""
    stub = __spec__.loader.get_data(__file__.replace(".pyc", ".py") + "i").decode()
    return {name: home for home, name in _LINE.findall(stub)}


_HOMES = _homes()

__all__ = [name for name, home in _HOMES.items() if home != __name__]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'magic_fast' has no attribute {name!r}")
    if home == __name__:  # mf.integrations and what is in it, each imported on use
        return import_module(f"{home}.{name}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
