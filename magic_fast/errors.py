"""Errors of magic_fast. The class tells whose fault it was; the command line maps it to an exit
code.

Every message reads: *what is wrong* for *which tensor or file*: expected *x*, got *y*. *What to
do.*
"""

from __future__ import annotations


class MagicFastError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(MagicFastError, ValueError):
    """The caller's arguments or tensors do not fit."""

    exit_code = 2


def missing_package(name: str, what: str, extra: str, got: object = "none installed") -> InputError:
    """The error where a package of an extra is not there; ``what`` it is for."""
    return InputError(
        f"package {name!r}: expected it {what}, got {got}. Install the extra: "
        f"pip install 'magic_fast[{extra}]'."
    )


class ConfigError(InputError):
    """A configuration file or value is wrong."""


class CheckpointError(InputError):
    """A checkpoint on disk is missing, damaged or not what was asked for."""


class NonFiniteError(InputError, ArithmeticError):
    """A NaN or an infinity in an input, or a result that overflows the output dtype."""


class BackendError(InputError, RuntimeError):
    """A backend was asked for by name and cannot run here, or cannot run this recipe."""


class OutputError(MagicFastError, OSError):
    """The output cannot be written: folder in the way, disk full, an I/O error."""

    exit_code = 2


class InternalError(MagicFastError, RuntimeError):
    """Our fault. Please report it."""

    exit_code = 1
