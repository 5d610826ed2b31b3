"""PEFT with the merges that are faster here: after :func:`install`, ``add_weighted_adapter`` and
the functions of ``peft.utils.merge_utils`` run on them.

docs/drop-in.md says what is replaced and how results may differ.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.errors import InputError, missing_package
from magic_fast.integrations import Revertible

__all__ = ["Installation", "install", "uninstall"]

log = logging.getLogger("magic_fast")


@dataclass
class Installation(Revertible):
    """What :func:`install` did; leaving its ``with`` takes it back, unless it was there before.

    Attributes:
        version: of PEFT.
        replaced: names that run here now.
        left: name → why it is still PEFT's own.
    """

    version: str
    replaced: tuple[str, ...]
    left: Mapping[str, str]
    _undo: Callable[[], None] | None = None

    def in_words(self) -> str:
        """The one line that is logged."""
        left = ", ".join(f"{name} ({why})" for name, why in self.left.items())
        return (
            f"peft {self.version}: replaced {', '.join(self.replaced) or 'nothing'}; "
            f"left as they are: {left or 'none'}"
        )


_active: Installation | None = None


def install() -> Installation:
    """Replaces the functions of ``peft.utils.merge_utils``, wherever PEFT's modules hold them, and
    the ``svd`` combination of ``add_weighted_adapter``.

    Each replacement is first tried against this release's own on something small; one that does
    not agree is left out. One line of the log (``magic_fast``, INFO) says what was replaced. Done
    twice, it stays done once. What your own modules imported from PEFT before stays PEFT's.

    Returns:
        an :class:`Installation`, also a context manager.

    Raises:
        InputError: PEFT is not installed, or has no merge functions (before 0.9).

    >>> with install() as installation:  # doctest: +SKIP
    ...     model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "merged", "ties", density=0.2)
    """
    global _active
    if _active is not None:
        return Installation(_active.version, _active.replaced, _active.left)
    version = _version()
    from magic_fast.integrations.peft import functions, svd, trial

    left = {name: "a view" for name in functions.LEFT if name in functions.OWN} | trial.differing()
    chosen = {name: ours for name, ours in functions.OURS.items() if name not in left}
    _swap({id(functions.OWN[name]): ours for name, ours in chosen.items()})
    power = trial.scaling_power()
    if isinstance(power, int):
        svd.put(svd.replacement(power))
    else:
        left["svd"] = power
    replaced = (*chosen, "svd") if isinstance(power, int) else tuple(chosen)
    _active = Installation(version, replaced, left, uninstall)
    log.info(_active.in_words())
    return _active


def uninstall() -> None:
    """PEFT's own functions again. Without an installation it does nothing."""
    global _active
    if _active is None:
        return
    from magic_fast.integrations.peft import functions, svd

    _swap({id(ours): functions.OWN[name] for name, ours in functions.OURS.items()
           if name in functions.OWN})  # fmt: skip
    if svd.OWN is not None:
        svd.put(svd.OWN)
    _active = None


def _version() -> str:
    try:
        import peft
    except ImportError:
        raise missing_package("peft", f"for {__name__}", "peft") from None
    try:
        import peft.utils.merge_utils
    except ImportError:
        raise InputError(
            f"version of peft: expected 0.9 or later, which merges adapters by functions, got "
            f"{peft.__version__}. Upgrade it."
        ) from None
    return str(peft.__version__)


def _swap(successors: Mapping[int, Any]) -> None:
    """In every module of PEFT that is loaded; those loaded later take what the others hold."""
    for name, module in list(sys.modules.items()):
        if name == "peft" or name.startswith("peft."):
            for attribute, value in list(vars(module).items()):
                if id(value) in successors:
                    setattr(module, attribute, successors[id(value)])
