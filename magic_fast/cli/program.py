"""The program ``magic-fast``: its parser, and what ends it.

Exit codes: 0 done; 2 the user's input, files or disk; 1 our fault; 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from magic_fast._version import __version__
from magic_fast.cli import (
    calibrate,
    demo,
    doctor,
    inspect,
    merge,
    methods,
    sweep,
    verify,
)
from magic_fast.errors import MagicFastError

COMMANDS = (merge, sweep, calibrate, inspect, verify, methods, doctor, demo)
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="magic-fast",
        description="Merges fine-tuned checkpoints of one base; restores each layer's magnitude.",
        epilog="Exit codes: 0 done, 2 the input, 1 our fault, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"magic-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code. Without ``--debug`` no traceback reaches the user."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr, format="magic-fast: %(message)s", level=_log_level(arguments), force=True
    )
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(arguments, _interrupted(arguments), INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MagicFastError as error:
        return _fail(arguments, str(error), error.exit_code)
    except OSError as error:
        return _fail(arguments, _system_message(error), 2)
    except MemoryError:
        return _fail(arguments, "out of memory. Close other programs or use a larger machine", 2)
    except Exception as error:
        return _fail(
            arguments,
            f"internal error, {type(error).__name__}: {error}. "
            "This is our fault: please report it with the output of the same command and --debug",
            1,
        )
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(arguments: argparse.Namespace, message: str, code: int) -> int:
    if arguments.debug:
        logging.getLogger("magic_fast").exception("traceback, asked for by --debug")
    print(
        f"magic-fast: error: {message}" if code != INTERRUPTED else f"magic-fast: {message}",
        file=sys.stderr,
    )
    return code


def _interrupted(arguments: argparse.Namespace) -> str:
    out = getattr(arguments, "out", None)
    if out is None or os.path.exists(out):
        return "interrupted"
    return f"interrupted; {out} was not made. The same command with --resume continues"


def _system_message(error: OSError) -> str:
    """What the operating system refused, and for which file."""
    reason = error.strerror or str(error)
    return f"{reason}: {error.filename}" if error.filename else reason


def _log_level(arguments: argparse.Namespace) -> int:
    if arguments.debug:
        return logging.DEBUG
    if arguments.verbose:
        return logging.INFO
    return logging.ERROR if arguments.quiet else logging.WARNING


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run the way Ctrl-C does: cleaning up."""
    raise KeyboardInterrupt
