"""The tree as the tests of its structure see it: modules, imports, circles of files, sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

LINES = 300  # of a file
FILES = 22  # of a folder
FILES_OF_A_WING = 15  # of these rooms and of every folder in them
COMPILED = ("magic_fast._native", "magic_fast._cuda")  # no Python file
WINGS = ("api", "calibration", "engine", "methods", "ops")


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    """Every Python file of the package and the name of its module."""
    for folder, prefix in (("magic_fast", "magic_fast"), ("kernels", "magic_fast.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            yield path, ".".join((prefix, *inner))


def package_of(module: str) -> list[str]:
    """The parts of the package that a module's relative imports start from."""
    return module.split(".")[:-1]  # `magic_fast.ops.__init__` too


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import of ours in ``source``: those inside functions and under
    TYPE_CHECKING too. `from a.b import c` gives `a.b.c`, which may be a module or a name in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = package_of(module)
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "magic_fast")


def edges(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module → modules that it imports, by their names in ``sources`` (packages end in
    ``__init__``)."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for _, name in imported(source, module):
            if name in COMPILED:
                continue
            for target in (name, f"{name}.__init__", _parent(name), f"{_parent(name)}.__init__"):
                if target in sources:
                    graph[module].add(target)
                    break
    return graph


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which leads to every other (Tarjan's strong components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    groups: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        path.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in path:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            at = path.index(node)
            group = set(path[at:])
            del path[at:]
            if len(group) > 1 or node in graph[node]:
                groups.append(group)

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return groups


def sources_of(root: Path) -> dict[str, str]:
    """Module → its text."""
    return {module: path.read_text() for path, module in modules(root)}


def long_files(root: Path) -> dict[str, int]:
    """Source files of more than LINES lines."""
    found = {}
    for folder in ("magic_fast", "kernels", "csrc"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"):
                lines = len(path.read_text().splitlines())
                if lines > LINES:
                    found[path.relative_to(root).as_posix()] = lines
    return found


def full_folders(root: Path) -> dict[str, int]:
    """Folders with more source files than they may have."""
    counts: dict[str, int] = {}
    for folder in ("magic_fast", "kernels", "csrc"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                name = path.parent.relative_to(root).as_posix()
                counts[name] = counts.get(name, 0) + 1
    return {name: n for name, n in sorted(counts.items()) if n > most_files(name)}


def most_files(folder: str) -> int:
    """How many source files a folder may have."""
    parts = folder.split("/")
    in_a_wing = parts[0] == "magic_fast" and len(parts) > 1 and parts[1] in WINGS
    return FILES_OF_A_WING if in_a_wing else FILES


def names_native(source: str) -> bool:
    """Whether code compares, passes or imports the backend ``native`` or its compiled core: as an
    import, a name, a keyword, a place in the registry, or a string that is its name, the path of
    its module, or an end of the name that is compared with. Strings are seen as they come out:
    joined, formatted, in lower case. Docstrings do not count."""
    tree = ast.parse(source)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(id(node.value))
    return any(_names_native(node) for node in ast.walk(tree) if id(node) not in prose)


_ENDS = {"nat", "nati", "nativ", "ative", "tive"}


def _names_native(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(_is_wing(alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
        if node.level and any("native" in name.split(".") for name in names):
            return True
        return any(map(_is_wing, names)) or any(n.name.startswith("Native") for n in node.names)
    if isinstance(node, ast.Name):
        return node.id.startswith("NativeBackend") or node.id == "native"
    if isinstance(node, ast.Attribute):
        return node.attr.startswith("NativeBackend") or node.attr == "native"
    if isinstance(node, ast.keyword | ast.arg):
        return node.arg == "native"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name | ast.Attribute):
        registry = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
        return registry == "SPECS"
    if isinstance(node, ast.Constant | ast.BinOp | ast.Call | ast.JoinedStr | ast.Subscript):
        return _is_its_name(_value_of(node))
    return False


def _value_of(node: ast.expr) -> object:
    """What an expression without names comes to; None for any other."""
    if isinstance(node, ast.Constant):
        return node.value
    if any(isinstance(part, ast.Name | ast.Await | ast.Lambda) for part in ast.walk(node)):
        return None
    try:
        return eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": {}})
    except Exception:  # whatever is wrong with it, it names nothing
        return None


def _is_its_name(value: object) -> bool:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        word = value.strip().casefold()
        return (
            word == "native" or word in _ENDS or word.startswith("nativebackend") or _is_wing(word)
        )
    return isinstance(value, list | tuple | set | dict) and any(map(_is_its_name, value))


def _is_wing(name: str) -> bool:
    parts = name.split(":")[0].split(".")
    return parts[:3] == ["magic_fast", "ops", "native"] or parts[:2] == ["magic_fast", "_native"]
