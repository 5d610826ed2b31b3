"""The command line: arguments → api → report. No mathematics, no heavy import at the top."""

from magic_fast.cli.program import main

__all__ = ["main"]
