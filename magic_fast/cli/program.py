"""The program ``magic-fast``: its parser, and what ends it.

Exit codes: 0 done; 2 the user's input, files or disk; 1 our fault; 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

from magic_fast._version import __version__
from magic_fast.errors import MagicFastError

COMMANDS = (
    "merge",
    "merge-by-data",
    "merge-adapters",
    "extract-adapter",
    "sweep",
    "calibrate",
    "sensitivity",
    "inspect",
    "verify",
    "methods",
    "doctor",
    "demo",
)
OTHERS = ("mergekit-yaml",)  # another package's command: its words are not ours to parse
INTERRUPTED = 130
_OBJECTS_BETWEEN_COLLECTIONS = 100_000
SECONDS_TO_STOP = 1.5  # then a command that was interrupted is ended


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or of ``only`` one, which is quicker."""
    parser = argparse.ArgumentParser(
        prog="magic-fast",
        description="Merges fine-tuned checkpoints of one base; restores each layer's magnitude.",
        epilog="Exit codes: 0 done, 2 the input, 1 our fault, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"magic-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in (*COMMANDS, *OTHERS) if only is None else (only,):
        _module(name).add_parser(commands)
    return parser


def _module(command: str) -> Any:
    return import_module(f"magic_fast.cli.{command.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code. Without ``--debug`` no traceback reaches the user."""
    words = sys.argv[1:] if argv is None else list(argv)
    with seldom_collecting():
        return _run(words)


def _run(words: Sequence[str]) -> int:
    if words and words[0] in OTHERS:
        return int(_module(words[0]).run(words[1:]))
    named = words[0] if words and words[0] in COMMANDS else None
    arguments = build_parser(named).parse_args(words)
    logging.basicConfig(
        stream=sys.stderr, format="magic-fast: %(message)s", level=_log_level(arguments), force=True
    )
    stopping = Stopping()
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
        stopping.restore()


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Modules make many objects and no garbage: looking for it is a good part of a quick start."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Stopping:
    """Ctrl-C and SIGTERM end a command, from now until ``restore``.

    The first one raises KeyboardInterrupt, so that everything is put away; further ones change
    nothing. Where that takes too long, as inside a library's long calculation (Python runs no
    handler then, so a thread is told by the system), the process ends as if it had been killed,
    which every run can be resumed from.
    """

    def __init__(self) -> None:
        self._stopped, self._restored = False, threading.Event()
        self._previous: dict[signal.Signals, Any] = {}
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._watchdog = threading.Thread(target=self._watch, name="magic-fast-signals")
        self._watchdog.daemon = True
        self._watchdog.start()
        self._wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._previous = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN  # as nohup and & have it
        }

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._restored.set()
        os.close(self._write_end)
        self._watchdog.join()
        os.close(self._read_end)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._stopped:
            self._stopped = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while number := os.read(self._read_end, 1):  # nothing once the other end is closed
            if number[0] in self._previous and not self._restored.wait(SECONDS_TO_STOP):
                _leave()


def _leave() -> None:
    print("magic-fast: interrupted; the same command with --resume continues", file=sys.stderr)
    os._exit(INTERRUPTED)


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
