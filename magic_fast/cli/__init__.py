"""The command line: arguments → api → report. No mathematics; nothing heavy is imported at the top."""

from magic_fast.cli.program import main

__all__ = ["main"]
