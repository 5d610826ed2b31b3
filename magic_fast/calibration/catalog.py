"""What there is to know of each calibration: what it does, when to use it, whose it is, what it
needs and costs, and its settings. ``magic-fast methods`` shows them beside the merge methods;
``python -m magic_fast.calibration.catalog`` prints docs/catalog_calibrations.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.weight import WeightCalibration
from magic_fast.recipe import Variant


@dataclass(frozen=True)
class Setting:
    """One setting: its name in YAML and Python, its values in words, its default in words."""

    name: str
    accepts: str
    default: str


@dataclass(frozen=True)
class Calibrator:
    """One calibration in full.

    Attributes:
        use: how to ask for it in a YAML (where it can be), on the command line, in Python.
        reads: passes over base and experts beyond the merge, and on a model merged elsewhere.
        held: what is in memory at once.
        data: what it needs beside weights.
    """

    name: str
    summary: str
    use_when: str
    paper: str
    arxiv: str
    use: tuple[str, ...]
    reads: str
    held: str
    data: str
    settings: tuple[Setting, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def paper_in_words(self) -> str:
        return f"{self.paper}, arXiv {self.arxiv}" if self.arxiv else self.paper


_NORM = "a whole number >= 1, or inf"
_BOUNDS = "[low, high] of a coefficient, or none"
#: Setting of WSC → its values.
_WEIGHTS = {
    "granularity": "row or tensor",
    "p": _NORM,
    "eps_mode": "relative, absolute or none",
    "guards": "true or false",
    "clamp": _BOUNDS,
    "strength": "an exponent >= 0; 0 does nothing",
    "scale": "a factor after the coefficient",
    "tensors": "general, magic, or include and exclude patterns",
    "direction": "auto, free, grow or shrink",
    "sensitive": "names of tensors or modules that may only shrink, or their file",
    "row_axis": "axis or axes of output units",
}
_FEATURES = {
    "reduction": "ratio_of_sums, mean or median",
    "p": _NORM,
    "granularity": "layer or channel",
    "sequential": "true or false",
    "clamp": _BOUNDS,
    "strength": "an exponent >= 0; 0 does nothing",
    "scale": "a factor after the coefficient",
    "min_denominator": "a share in [0, 1)",
    "sensitive": "names of tensors or modules that may only shrink, or their file",
}
_OF_MODEL = {"row_axis": "of the model's layout", "granularity": "row"}  # None in the settings
_ALPHA = Setting("alpha", "a finite number > 0; the authors' is 1/K, after tsv_m 1", "0.1")
_BETA = Setting("beta", "a finite number", "required")
_FIRST = Setting("alpha", "a finite number", "from the norms of all models")
_COUNT = Setting("num_blocks", "a whole number >= 1", "of checkpoints, as many as they have")


def _settings(kind: type, words: Mapping[str, str], **other: str) -> tuple[Setting, ...]:
    defaults = {f.name: f.default for f in fields(kind)}
    return tuple(
        Setting(name, accepts, other.get(name) or _word(name, defaults[name]))
        for name, accepts in words.items()
    )


def _word(name: str, value: Any) -> str:
    if value is None:
        return _OF_MODEL.get(name, "none")
    if isinstance(value, tuple):
        return f"[{', '.join(f'{x:g}' for x in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


_MAGIC = ("MAGIC", "2512.19320")
_STREAMED = "blocks of memory (128 MiB, --memory); with granularity tensor one tensor"


def _variant(variant: Variant, summary: str, use_when: str, paper: tuple[str, str]) -> Calibrator:
    """A variant of WSC."""
    whole = variant is Variant.SPECTRAL
    words = {n: a for n, a in _WEIGHTS.items() if n != "p" or variant is Variant.SPHERE}
    return Calibrator(
        variant.value, summary, use_when, *paper,
        (f"YAML: calibrate: {{variant: {variant.value}}} (or calibrate: {variant.value})",
         f"magic-fast calibrate --variant {variant.value}",
         f'mf.merge(…, calibrate="{variant.value}"), mf.calibrate_weights'),
        "0 in a merge, 1 on a model merged elsewhere",
        "one tensor at a time, float32: K task vectors and Δ" if whole else _STREAMED,
        "none",
        _settings(WeightCalibration, words, **({"granularity": "tensor"} if whole else {})),
    )  # fmt: skip


def _features(name: str, space: str, summary: str, use_when: str) -> Calibrator:
    return Calibrator(
        name, summary, use_when, *_MAGIC,
        (f"magic-fast calibrate --space {space} --data TASK=PATH …",
         "mf.calibrate_features(…, data)" + (', space="dual"' if space == "dual" else ""),
         f'mf.calibrate_checkpoints(…, space="{space}", data=…)'),
        "1 more, layer by layer" + (", after that of WSC" if space == "dual" else ""),
        "one layer of base, merged and one expert, float32, and the samples' hidden states",
        "a few unlabelled samples of each task",
        _settings(FeatureCalibration, _FEATURES),
    )  # fmt: skip


def _entries() -> Iterator[Calibrator]:
    yield _variant(
        Variant.MANIFOLD,
        "WSC: each row scaled to the surface that the experts' rows span",
        "the paper's calibration is wanted; rows of different experts are nearly orthogonal",
        _MAGIC,
    )
    yield _variant(
        Variant.MANIFOLD_EXACT,
        "WSC manifold without the assumption that the experts' rows are orthogonal",
        "few experts whose changes overlap",
        ("a least-squares form of MAGIC's manifold", ""),
    )
    yield _variant(
        Variant.SPHERE,
        "norm restoration: each row, or each tensor, of the change gets the experts' mean norm",
        "the first to try; after a mean it never shrinks",
        _MAGIC,
    )
    yield _variant(
        Variant.SPECTRAL,
        "spectral norm restoration: the largest singular value gets the experts' mean",
        "few directions carry the change",
        _MAGIC,
    )
    yield _features(
        "fsc", "feature",
        "FSC: each layer's change scaled until its features are as large as the experts'",
        "samples are at hand, and the merge's scale is off or untuned",
    )  # fmt: skip
    yield _features(
        "dsc", "dual", "DSC: WSC, then FSC on its result", "both are wanted in one pass"
    )
    yield Calibrator(
        "svc",
        "singular values divided by how far the experts over-agree along them",
        "experts share directions, which a sum counts several times",
        "singular value calibration", "",
        ("magic-fast calibrate --space svc", "mf.svc",
         'mf.calibrate_checkpoints(…, space="svc")'),
        "1",
        "one tensor at a time: K task vectors in float32, about eight float64 copies of one",
        "none",
        (_ALPHA,),
    )  # fmt: skip
    yield Calibrator(
        "lines",
        "the change scaled by depth: alpha in the first block, alpha + beta in the last",
        "early layers hold what all tasks share",
        "LiNeS", "2410.17146",
        ("magic-fast calibrate --space lines --beta B", "mf.lines",
         'mf.calibrate_checkpoints(…, space="lines", beta=…)'),
        "0; 1 without alpha",
        "blocks of memory (128 MiB, --memory)",
        "none",
        (_BETA, _FIRST, _COUNT),
    )  # fmt: skip


#: All calibrations, by name; ``wsc`` stands for the default variant.
CALIBRATORS: Mapping[str, Calibrator] = {entry.name: entry for entry in _entries()}
ALIASES: Mapping[str, str] = {"wsc": WeightCalibration().variant.value}


def find_calibrator(name: str) -> Calibrator | None:
    """The calibration of that name, or None.

    >>> find_calibrator("sphere").summary.split(":")[0]
    'norm restoration'
    """
    return CALIBRATORS.get(ALIASES.get(name, name))


def text(found: Calibrator) -> Iterator[str]:
    """One calibration for a terminal, line by line."""
    yield f"{found.name}: {found.summary}"
    yield f"  use it when  {found.use_when}"
    yield f"  from         {found.paper_in_words()}"
    for n, way in enumerate(found.use):
        yield f"  {'ask for it' if n == 0 else '          '}   {way}"
    yield f"  reads        {found.reads}"
    yield f"  in memory    {found.held}"
    yield f"  data         {found.data}"
    for s in found.settings:
        yield f"  {s.name} = {s.default}"
        yield f"      {s.accepts}"


def markdown() -> Iterator[str]:
    """docs/catalog_calibrations.md, line by line."""
    yield "# Calibrations, one by one"
    yield ""
    yield "Generated by `python -m magic_fast.calibration.catalog`; `magic-fast methods NAME` shows"
    yield "the same. What scales the change after any merge: in it, or on a model that another tool"
    yield "merged ([calibration.md](calibration.md), [methods_spectral.md](methods_spectral.md))."
    yield "*Reads* are passes over base and experts. `wsc` is WSC with its default variant,"
    yield "`manifold`."
    yield ""
    yield "| calibration | what it does | use it when | reads | data |"
    yield "|---|---|---|---|---|"
    for c in CALIBRATORS.values():
        yield (f"| [`{c.name}`](#{c.name}) | {c.summary} | {c.use_when} | {c.reads} | {c.data} |")
    for c in CALIBRATORS.values():
        link = f" [arXiv {c.arxiv}](https://arxiv.org/abs/{c.arxiv})" if c.arxiv else ""
        yield ""
        yield f"## {c.name}"
        yield ""
        yield f"{c.paper}{',' if link else ''}{link}. In memory: {c.held}."
        yield ""
        yield " · ".join(_code(way) for way in c.use)
        yield ""
        yield "| setting | values | default |"
        yield "|---|---|---|"
        for s in c.settings:
            yield f"| `{s.name}` | {s.accepts} | {s.default} |"


def _code(way: str) -> str:
    return f"`{way.removeprefix('YAML: ')}`"


if __name__ == "__main__":
    print("\n".join(markdown()))
