"""``magic-fast mergekit-yaml CONFIG OUT``: mergekit's own command with our methods inside it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from magic_fast.errors import MagicFastError

NAME = "mergekit-yaml"


def add_parser(commands: Any) -> None:
    """For the list of commands; its words are read by mergekit, not here."""
    commands.add_parser(
        NAME, help="mergekit's command with the methods that are faster here (extra: mergekit)"
    )


def run(words: Sequence[str]) -> int:
    """All of mergekit's flags and output. Its exit code; 2 where the fault is the input's."""
    from magic_fast.integrations import mergekit

    try:
        mergekit.installed_version()  # before its commands are imported
        from mergekit.scripts.run_yaml import main

        command = _with_replacement(main)
        command.main(args=list(words), prog_name=f"magic-fast {NAME}")  # ends by SystemExit
    except MagicFastError as error:
        print(f"magic-fast: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _with_replacement(command: Any) -> Any:
    """The click command with a callback that installs first. The log is set up as mergekit does
    it, but before, so that ``-v`` shows what was replaced."""
    import copy

    from magic_fast.integrations import mergekit

    theirs, ours = command.callback, copy.copy(command)

    def callback(**options: Any) -> Any:
        loud = options.get("verbosity") or int(bool(options.get("verbose")))
        logging.basicConfig(level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(loud, 2)])
        if options.get("num_threads"):  # theirs is for torch's threads; ours are others
            os.environ.setdefault("MAGIC_FAST_NUM_THREADS", str(options["num_threads"]))
        with mergekit.install():
            return theirs(**options)

    ours.callback = callback
    return ours
