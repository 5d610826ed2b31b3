"""What there is to know of each method beside its parameters: what it does, when to use it, whose
it is, and what it costs. ``python -m magic_fast.methods.catalog`` prints docs/catalog.md."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from magic_fast.methods.arguments import find_method, python_name, resolve_arguments
from magic_fast.methods.geometric import GEOMETRIC
from magic_fast.methods.parameters import PRESETS, ParameterSpec, Value, available_methods
from magic_fast.methods.recipes import RECIPES, build_recipe, check_preset
from magic_fast.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """The facts of a method that are in no other table.

    Attributes:
        summary: what it does, in a line.
        use_when: what speaks for it.
        paper: title, or where it comes from.
        arxiv: its number, or ''.
        reads: passes over base and experts, of methods that are no recipe.
        held: whole tensors in float32 beside base and experts, of methods that are no recipe.
    """

    summary: str
    use_when: str
    paper: str
    arxiv: str = ""
    reads: str = ""
    held: str = ""


_DARE = ("Language Models are Super Mario", "2311.03099")
_DELLA = ("DELLA-Merging", "2406.11617")
_BREADCRUMBS = ("Model Breadcrumbs", "2312.06795")
_RAM = ("RAM", "2601.13572")
_ISO = ("No Task Left Behind", "2502.04959")
_ARC = ("Animating Rotation with Quaternion Curves (Shoemake, 1985)", "")
_GIVEN_AND_DELTA = "one tensor of every model, and Δ"
_ONE = "one tensor of both models"

#: One row for every method of METHODS, by name.
ROWS: Mapping[str, Row] = {
    "linear": Row(
        "weighted mean of whole models, without a base", "the models share no base",
        "Model Soups", "2203.05482",
    ),
    "average": Row("mean of the experts", "a baseline is wanted", "Model Soups", "2203.05482"),
    "task_arithmetic": Row(
        "base plus the weighted sum of the changes", "the experts barely interfere",
        "Editing Models with Task Arithmetic", "2212.04089",
    ),
    "ties": Row(
        "largest entries of each change, sign vote, mean of those that agree",
        "experts disagree on signs", "TIES-Merging", "2306.01708",
    ),
    "dare_linear": Row(
        "random entries dropped, the rest rescaled, summed", "changes are small and redundant",
        *_DARE,
    ),
    "dare_ties": Row(
        "random entries dropped, the rest rescaled, sign vote, sum of those that agree",
        "as dare_linear, and signs disagree", *_DARE,
    ),
    "della": Row(
        "entries dropped at random, large ones less often; sign vote, mean of those that agree",
        "as dare_ties, with uneven changes", *_DELLA,
    ),
    "della_linear": Row(
        "entries dropped at random, large ones less often; summed",
        "as dare_linear, with uneven changes", *_DELLA,
    ),
    "breadcrumbs": Row(
        "the smallest entries and the outliers dropped, summed", "a few outliers dominate",
        *_BREADCRUMBS,
    ),
    "breadcrumbs_ties": Row(
        "the smallest entries and the outliers dropped, sign vote, sum of those that agree",
        "a few outliers dominate and signs disagree", *_BREADCRUMBS,
    ),
    "magnitude_prune": Row(
        "the largest entries of each change, summed", "the experts agree",
        "the trim of TIES-Merging alone", "2306.01708",
    ),
    "magmax": Row(
        "the largest change of each entry", "experts learnt one after the other",
        "MagMax", "2407.06322",
    ),
    "emr_unified": Row(
        "sign vote, then the largest change that agrees", "one model for all tasks, untuned",
        "EMR-Merging", "2405.17461",
    ),
    "consensus_ta": Row(
        "task arithmetic on the entries that enough tasks need", "many experts",
        "Localizing Task Information (TALL masks)", "2405.07813",
    ),
    "passthrough": Row(
        "one model's layers as they are, or scaled", "layers are stacked by slices", "mergekit",
    ),
    "sce": Row(
        "experts weighted by the energy of their changes, tensor by tensor, then a vote",
        "experts of unequal strength", "FuseChat", "2408.07990",
    ),
    "ram": Row(
        "entries that one expert changed stay whole, shared ones are averaged",
        "sparse changes, as after reinforcement learning", *_RAM,
    ),
    "ramplus_tl": Row(
        "as ram, what one expert changed alone amplified", "as ram, and experts overlap",
        *_RAM,
    ),
    "pcb": Row(
        "entries weighted by their size and by the experts' agreement", "strong interference",
        "Parameter Competition Balancing", "2410.02396",
    ),
    "nearswap": Row(
        "the expert's entries where they are near the base's", "a light touch of one expert",
        "mergekit",
    ),
    "arcee_fusion": Row(
        "the entries of one expert that matter most", "one expert, little side effect",
        "mergekit", "", "1", _ONE,
    ),
    "slerp": Row("along the arc between two models", "two models", *_ARC, "2", _ONE),
    "nuslerp": Row(
        "along the arc between two models or two changes", "two models with weights",
        *_ARC, "2", _GIVEN_AND_DELTA,
    ),
    "multislerp": Row(
        "weighted mean of directions in the tangent space at their sum",
        "several models of like norm", "mergekit", "", "2", _GIVEN_AND_DELTA,
    ),
    "karcher": Row(
        "the point on the sphere nearest to all models", "several models of like norm",
        "Riemannian centre of mass (Karcher, 1977)", "", "2", _GIVEN_AND_DELTA,
    ),
    "model_stock": Row(
        "mean change, shortened by how little the experts agree", "runs of one task",
        "Model Stock", "2403.19522", "2", _GIVEN_AND_DELTA,
    ),
    "iso_c": Row(
        "all directions of the summed change made equally strong", "many tasks", *_ISO,
        "1", "K task vectors and about eight float64 copies of one",
    ),
    "iso_cts": Row(
        "as iso_c, with directions of each task beside the common ones",
        "many tasks that share little", *_ISO,
        "1", "K task vectors and about twelve float64 copies of one",
    ),
    "tsv_m": Row(
        "the leading singular directions of each task, made orthogonal",
        "many tasks, low-rank changes", "Task Singular Vectors", "2412.00081",
        "1", "K task vectors and about twelve float64 copies of one",
    ),
    "star": Row(
        "small singular values of each change dropped, the rest rescaled, then the mean",
        "noisy changes", "STAR", "2502.10339",
        "1", "K task vectors and about five float64 copies of one",
    ),
}  # fmt: skip


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
    spec, row = find_method(name, beside=beside), ROWS[name]
    presets = _presets_of(name)
    if name in RECIPES:
        reads = {p: str(passes(_recipe(name, p))) for p in presets}
        form, held, backends = "recipe", _BLOCKS, "native, cuda, triton, torch"
    else:
        reads = dict.fromkeys(presets, row.reads)
        held, backends = f"one tensor at a time, float32: {row.held}", "torch"
        form = "whole tensor"
        if name in GEOMETRIC:
            form, backends = "inner products", "native, torch"
            held = f"{_BLOCKS}; in torch {held}"
    own = reads["default"]
    most = spec.max_experts
    models = f"{spec.min_experts}" if most == spec.min_experts else f"at least {spec.min_experts}"
    return Entry(
        name,
        row.summary,
        row.use_when,
        row.paper,
        row.arxiv,
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
    """All available methods, by name."""
    return [entry(name) for name in available_methods()]


def _presets_of(name: str) -> list[str]:
    from magic_fast.errors import InputError

    found = ["default"]
    for preset in PRESETS:
        try:
            check_preset(preset, name)
        except InputError:
            continue
        found += [preset] if preset != "default" else []
    return found


def _recipe(name: str, preset: str) -> Recipe:
    """Under the preset's defaults; one that trims by ours trims (mergekit's density is 1)."""
    spec = find_method(name)
    density = spec.find("density")
    own = None if density is None else density.default_for("default")
    given = {"density": own} if own not in (None, 1) else {}
    given |= {python_name(p): 1.0 for p in spec.parameters if p.required}
    arguments = resolve_arguments(name, given, spec.min_experts, preset)
    return build_recipe(name, spec.min_experts, arguments, preset=preset)


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
    found = entries()
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


if __name__ == "__main__":
    print("\n".join(markdown()))
