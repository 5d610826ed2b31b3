"""The public surface as text: signatures of what `mf.__all__` names, the keys of the YAML, and the
help of every command.

    python tests/support/public_surface.py      writes them to tests/packaging/surface

It refuses to write where a name or a keyword that was promised is gone.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from pathlib import Path

import magic_fast as mf
from magic_fast.cli.program import build_parser

FOLDER = Path(__file__).parents[1] / "packaging" / "surface"
_KEYWORD = re.compile(r"^    (\*{0,2}\w+)", re.MULTILINE)


def signatures() -> str:
    """Every public name in alphabetical order, a parameter a line."""
    return "\n".join(_described(name) for name in sorted(mf.__all__))


def _described(name: str) -> str:
    value = getattr(mf, name)
    if isinstance(value, type):
        if issubclass(value, BaseException):
            bases = ", ".join(b.__name__ for b in value.__mro__[1:-2])
            return f"error {name}({bases})\n"
        public = [n for n in vars(value) if not n.startswith("_")]
        members = "".join(f"    .{n}\n" for n in sorted(public))
        return f"class {name}(\n{_parameters(value)})\n{members}"
    return f"def {name}(\n{_parameters(value)})\n" if callable(value) else f"{name}\n"


def _parameters(value: object) -> str:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a class without one
        return ""
    if hasattr(value, "model_fields"):  # a configuration: `yaml_keys` has them
        return ""
    lines, keyword_only = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    # by keyword only\n")
        lines.append(f"    {p}\n")
    return "".join(lines) + f"    -> {signature.return_annotation}\n"


def yaml_keys() -> str:
    """Every key of a configuration, below the part that has it, with its default."""
    schema = mf.MergeConfig.model_json_schema()
    lines = []
    for part, properties in sorted({"": schema, **schema["$defs"]}.items()):
        for key, value in properties.get("properties", {}).items():
            lines.append(f"{part or 'configuration'}: {key} = {value.get('default')!r}\n")
    return "".join(lines)


def helps() -> dict[str, str]:
    """Command ('' for the program) → its help, 100 columns wide."""
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "100"
    try:
        parser = build_parser()
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        texts = {name: sub.format_help() for name, sub in commands.choices.items()}
        return {"": parser.format_help()} | texts
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def path_of(command: str) -> Path:
    """The file that holds the help of a command."""
    return FOLDER / f"help-{command or 'magic-fast'}.txt"


def promises(text: str) -> set[str]:
    """Each public name with its parameters, of a text of :func:`signatures`; each key, of one of
    :func:`yaml_keys`."""
    kept = set(re.findall(r"^\w+: \w+(?= =)", text, re.MULTILINE))
    for block in text.split("\n\n"):
        name = re.split(r"\W", block.strip().split(" ", 1)[-1], maxsplit=1)[0]
        kept |= {name} | {f"{name}({keyword})" for keyword in _KEYWORD.findall(block)}
        kept |= {f"{name}{member}" for member in re.findall(r"^    (\.\w+)", block, re.MULTILINE)}
    return kept


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    now = {"signatures.txt": signatures(), "yaml.txt": yaml_keys()}
    for file, text in now.items():
        recorded = FOLDER / file
        if recorded.exists() and (gone := promises(recorded.read_text()) - promises(text)):
            print(f"Not written: promised and gone are {', '.join(sorted(gone))}.", file=sys.stderr)
            return 1
    for file, text in now.items():
        (FOLDER / file).write_text(text)
    for command, text in helps().items():
        path_of(command).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
