"""What there is to know of each calibration: what it does, when to use it, whose it is, what it
needs and costs, and its settings. ``magic-fast methods`` shows them beside the merge methods;
``python -m magic_fast.calibration.catalog`` prints docs/catalog_calibrations.md."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from magic_fast.calibration.builtin import CALIBRATIONS, Calibration
from magic_fast.calibration.feature import FeatureCalibration
from magic_fast.calibration.registry import calibrations, find
from magic_fast.calibration.spectrum import SVC_ALPHA
from magic_fast.calibration.values import accepts, default_of, settings_of
from magic_fast.calibration.weight import WeightCalibration, idle_settings


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


_OF_MODEL = {"row_axis": "of the model's layout", "granularity": "row"}  # None in the settings
_OF_SPECTRUM = {
    "svc": (
        Setting(
            "alpha", "a finite number > 0; the authors' is 1/K, after tsv_m 1", f"{SVC_ALPHA:g}"
        ),
    ),
    "lines": (
        Setting("beta", "a finite number", "required"),
        Setting("alpha", "a finite number", "from the norms of all models"),
        Setting("num_blocks", "a whole number >= 1", "of checkpoints, as many as they have"),
    ),
}


def _settings(kind: type, without: Collection[str] = (), **other: str) -> tuple[Setting, ...]:
    return tuple(
        Setting(f.name, accepts(kind, f.name), other.get(f.name) or _word(f.name, f.default))
        for f in settings_of(kind)
        if f.name not in {"variant", *without}
    )


def _word(name: str, value: Any) -> str:
    if value is None:
        return _OF_MODEL.get(name, "none")
    if isinstance(value, tuple):
        return f"[{', '.join(f'{x:g}' for x in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


_STREAMED = "blocks of memory (128 MiB, --memory); with granularity tensor one tensor"


def _weights(c: Calibration) -> Calibrator:
    """A variant of WSC."""
    whole = c.needs == "tensors"
    without = idle_settings(c) if c.function else {"p"} - {"p" if c.name == "sphere" else ""}
    return Calibrator(
        c.name, c.summary, c.use_when, c.paper, c.arxiv,
        (f"YAML: calibrate: {{variant: {c.name}}} (or calibrate: {c.name})",
         f"magic-fast calibrate --variant {c.name}",
         f'mf.merge(…, calibrate="{c.name}"), mf.calibrate_weights'),
        "0 in a merge, 1 on a model merged elsewhere",
        "one tensor at a time, float32: K task vectors and Δ" if whole else _STREAMED,
        "none",
        _settings(WeightCalibration, without, granularity=str(c.granularity)),
    )  # fmt: skip


def _features(c: Calibration) -> Calibrator:
    dual = c.space == "dual"
    return Calibrator(
        c.name, c.summary, c.use_when, c.paper, c.arxiv,
        (f"magic-fast calibrate --space {c.space} --data TASK=PATH …",
         "mf.calibrate_features(…, data)" + (', space="dual"' if dual else ""),
         f'mf.calibrate_checkpoints(…, space="{c.space}", data=…)'),
        "1 more, layer by layer" + (", after that of WSC" if dual else ""),
        "one layer of base, merged and one expert, float32, and the samples' hidden states",
        "a few unlabelled samples of each task",
        _settings(FeatureCalibration),
    )  # fmt: skip


def _spectrum(c: Calibration) -> Calibrator:
    """Of singular values, or of depth."""
    depth = c.needs == "depth"
    return Calibrator(
        c.name, c.summary, c.use_when, c.paper, c.arxiv,
        (f"magic-fast calibrate --space {c.space}" + (" --beta B" if depth else ""), f"mf.{c.name}",
         f'mf.calibrate_checkpoints(…, space="{c.space}"' + (", beta=…)" if depth else ")")),
        "0; 1 without alpha" if depth else "1",
        "blocks of memory (128 MiB, --memory)" if depth else
        "one tensor at a time: K task vectors in float32, about eight float64 copies of one",
        "none",
        _OF_SPECTRUM[c.name],
    )  # fmt: skip


_BY_NEEDS = {
    "rows": _weights,
    "tensors": _weights,
    "data": _features,
    "spectrum": _spectrum,
    "depth": _spectrum,
}


def calibrators() -> dict[str, Calibrator]:
    """All calibrations by name, those that are registered after ours."""
    return {name: _BY_NEEDS[c.needs](c) for name, c in calibrations().items()}


#: Ours, by name; ``wsc`` stands for the default variant.
CALIBRATORS: Mapping[str, Calibrator] = {n: _BY_NEEDS[c.needs](c) for n, c in CALIBRATIONS.items()}
ALIASES: Mapping[str, str] = {"wsc": default_of(WeightCalibration, "variant")}


def find_calibrator(name: str) -> Calibrator | None:
    """The calibration of that name, or None.

    >>> find_calibrator("sphere").summary.split(":")[0]
    'norm restoration'
    """
    found = find(ALIASES.get(name, name))
    return None if found is None else _BY_NEEDS[found.needs](found)


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
        yield " · ".join(f"`{way.removeprefix('YAML: ')}`" for way in c.use)
        yield ""
        yield "| setting | values | default |"
        yield "|---|---|---|"
        for s in c.settings:
            yield f"| `{s.name}` | {s.accepts} | {s.default} |"


if __name__ == "__main__":
    print("\n".join(markdown()))
