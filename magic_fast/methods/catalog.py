"""The methods as readers see them: what each does, when to use it, its parameters, its paper and
its cost.

``python -m magic_fast.methods.catalog`` prints docs/catalog.md, and with ``readme`` the table of
README.md: the methods of the package.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from magic_fast.errors import InputError, MagicFastError
from magic_fast.methods.arguments import python_name, resolve_arguments
from magic_fast.methods.presets import PRESETS, build_recipe, check_preset
from magic_fast.methods.registry import built_in, find_method, names
from magic_fast.methods.spec import MethodSpec, ParameterSpec, Value
from magic_fast.ops.registry import SPECS
from magic_fast.recipe import Recipe


@dataclass(frozen=True)
class Parameter:
    """One parameter as a reader needs it.

    Attributes:
        name: in the YAML; ``python``: as a keyword argument.
        scope: ``per_model`` (a value for each expert) or ``per_tensor``.
        accepts: its values, in words.
        default: of Python calls; None: absent.
        presets: where a preset's default is another.
    """

    name: str
    python: str
    scope: str
    accepts: str
    required: bool
    default: Value | None
    presets: Mapping[str, Value | None]


@dataclass(frozen=True)
class Entry:
    """One method in full.

    Attributes:
        models: how many experts; ``base``: ``required``, ``optional``, ``member`` or ``none``.
        form: ``recipe`` or ``inner products`` (in pieces), or ``whole tensor``.
        backends: what runs it.
        reads: passes over base and experts under our defaults, and under presets where they
            differ; of a recipe, tensors that fit into a block of memory come from disk once.
        held: what is in memory at once.
        data: what it needs beside weights.
    """

    name: str
    summary: str
    use_when: str
    paper: str
    arxiv: str
    models: str
    base: str
    form: str
    backends: str
    reads: str
    reads_presets: Mapping[str, str]
    held: str
    data: str
    parameters: tuple[Parameter, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def reads_in_words(self) -> str:
        more = [f"{r} under {', '.join(who)}" for r, who in _turned(self.reads_presets).items()]
        return "; ".join([self.reads, *more])

    def paper_in_words(self) -> str:
        return f"{self.paper}, arXiv {self.arxiv}" if self.arxiv else self.paper


_BLOCKS = "blocks of memory (128 MiB, --memory)"
_WHOLE = "one tensor at a time, float32"


def passes(recipe: Recipe) -> int:
    """Passes over the data: the merge, and what must be known before it."""
    by_magnitude = recipe.trim.by_magnitude and recipe.trims
    return 1 + sum((by_magnitude, *recipe.phases.values()))


def entry(name: str, *, beside: Collection[str] = ()) -> Entry:
    """Everything about one method; ``beside``: names that the caller would have taken too.

    Raises:
        InputError: no such method; close names are suggested.

    >>> entry("ties").reads
    '2'
    """
    spec = find_method(name, beside=beside)
    presets = _presets_of(name)
    if spec.recipe is not None:
        recipes = {preset: _recipe(spec, preset) for preset in presets}
        reads = {
            preset: "by its parameters" if recipe is None else str(passes(recipe))
            for preset, recipe in recipes.items()
        }
        form, held, backends = "recipe", _BLOCKS, ", ".join(spec.name for spec in SPECS)
        if any(recipe is not None and recipe.reference_only for recipe in recipes.values()):
            form, held, backends = "recipe in the reference alone", _WHOLE, "torch"
    else:
        reads = dict.fromkeys(presets, spec.reads)
        form, held, backends = "whole tensor", f"{_WHOLE}: {spec.holds}", "torch"
        if spec.directions is not None:
            streaming = [spec.name for spec in SPECS if spec.streams]
            form, backends = "inner products", ", ".join((*streaming, "torch"))
            held = f"{_BLOCKS}; in torch {held}"
    own = reads["default"]
    most = spec.max_experts
    models = f"{spec.min_experts}" if most == spec.min_experts else f"at least {spec.min_experts}"
    return Entry(
        name,
        spec.summary,
        spec.use_when,
        spec.paper.title,
        spec.paper.arxiv,
        models,
        spec.base,
        form,
        backends,
        own,
        {p: r for p, r in reads.items() if r != own},
        held,
        "none",
        tuple(_parameter(p, presets) for p in spec.parameters),
    )


def entries() -> list[Entry]:
    """Every method, by name."""
    return [entry(name) for name in names()]


def _presets_of(name: str) -> list[str]:
    found = []
    for preset in PRESETS:
        try:
            check_preset(preset, name)
        except InputError:
            continue
        found.append(preset)
    return found


def _recipe(spec: MethodSpec, preset: str) -> Recipe | None:
    """Under the preset's defaults; one that trims by ours trims (mergekit's density is 1). None
    where a parameter that has no default decides whether there is a recipe."""
    density = spec.find("density")
    own = None if density is None else density.default_for("default")
    given: dict[str, Any] = {"density": own} if own not in (None, 1) else {}
    given |= {python_name(p): p.choices[0] if p.choices else 1.0
              for p in spec.parameters if p.required}  # fmt: skip
    try:
        arguments = resolve_arguments(spec.name, given, spec.min_experts, preset)
        return build_recipe(spec.name, spec.min_experts, arguments, preset=preset)
    except MagicFastError:
        return None


def _parameter(spec: ParameterSpec, presets: list[str]) -> Parameter:
    own = spec.default_for("default")
    others = {p: spec.default_for(p) for p in presets}
    return Parameter(
        "/".join(spec.names),
        python_name(spec),
        spec.scope,
        spec.expected(),
        spec.required and own is None,
        own,
        {p: value for p, value in others.items() if value != own},
    )


def _turned(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """``{"a": x, "b": x}`` → ``{x: ["a", "b"]}``, in words."""
    found: dict[str, list[str]] = {}
    for key, value in values.items():
        found.setdefault(_word(value), []).append(key)
    return found


def _word(value: Any) -> str:
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def default_in_words(parameter: Parameter) -> str:
    """``0.2; 1.0 under mergekit``."""
    own = "required" if parameter.required else _word(parameter.default)
    more = [f"{v} under {', '.join(who)}" for v, who in _turned(parameter.presets).items()]
    return "; ".join([own, *more])


def text(found: Entry) -> Iterator[str]:
    """One method for a terminal, line by line."""
    yield f"{found.name}: {found.summary}"
    yield f"  use it when  {found.use_when}"
    yield f"  from         {found.paper_in_words()}"
    yield f"  models       {found.models}; base {found.base}"
    yield f"  reads        {found.reads_in_words()}"
    yield f"  runs on      {found.backends}"
    yield f"  in memory    {found.held}"
    yield f"  data         {found.data}"
    for p in found.parameters:
        python = "" if p.python in p.name.split("/") else f" (Python: {p.python})"
        each = ", one or one a model" if p.scope == "per_model" else ""
        yield f"  {p.name}{python} = {default_in_words(p)}"
        yield f"      {p.accepts}{each}"


def markdown() -> Iterator[str]:
    """docs/catalog.md, line by line."""
    found = [entry(name) for name in sorted(built_in())]
    yield "# The methods, one by one"
    yield ""
    yield "Generated by `python -m magic_fast.methods.catalog`; `magic-fast methods NAME` shows the"
    yield "same. The mathematics: [methods.md](methods.md), [methods_more.md](methods_more.md),"
    yield "[methods_spectral.md](methods_spectral.md); what may follow any of them:"
    yield "[catalog_calibrations.md](catalog_calibrations.md). A *read* is a pass over base and"
    yield "experts. A recipe runs in pieces, and so does what follows from *inner products*;"
    yield "tensors that fit into a block of memory are read from disk once whatever it says. A"
    yield "*whole tensor* method holds what it says. torch is PyTorch, on the CPU and on a GPU."
    yield "Defaults are those of Python calls; a YAML runs under preset `mergekit`."
    yield ""
    yield "| method | what it does | use it when | models | base | form | backends | reads | data |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for e in found:
        yield (
            f"| [`{e.name}`](#{e.name}) | {e.summary} | {e.use_when} | {e.models} | {e.base} | "
            f"{e.form} | {e.backends} | {e.reads_in_words()} | {e.data} |"
        )
    for e in found:
        yield from _section(e)


def _section(e: Entry) -> Iterator[str]:
    link = f" [arXiv {e.arxiv}](https://arxiv.org/abs/{e.arxiv})" if e.arxiv else ""
    yield ""
    yield f"## {e.name}"
    yield ""
    yield f"{e.paper}{',' if link else ''}{link}. In memory: {e.held}."
    if not e.parameters:
        return
    yield ""
    yield "| parameter | Python | values | default |"
    yield "|---|---|---|---|"
    for p in e.parameters:
        each = ", or one a model" if p.scope == "per_model" else ""
        yield (
            f"| `{p.name.replace('/', '`, `')}` | `{p.python}` | {p.accepts}{each} | "
            f"{default_in_words(p)} |"
        )


def readme_table() -> Iterator[str]:
    """The table of README.md, line by line: families as the registry has them."""
    yield "| method | what it does | use it when |"
    yield "|---|---|---|"
    for spec in built_in().values():
        yield f"| `{spec.name}` | {spec.summary} | {spec.use_when} |"


if __name__ == "__main__":
    print("\n".join(readme_table() if sys.argv[1:] == ["readme"] else markdown()))
