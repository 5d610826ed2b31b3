"""Which layers are sensitive: what was measured, its file, and what a list of names stands for
(docs/calibration.md)."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from magic_fast.errors import InputError, OutputError

log = logging.getLogger("magic_fast")
TOP = 10  # the authors' number of sensitive layers


def lowest(scores: Mapping[str, float], top: int) -> tuple[str, ...]:
    """The ``top`` names of the lowest scores; of equal ones the first by name.

    >>> lowest({"b": 0.1, "a": 0.1, "c": 0.9}, 2)
    ('a', 'b')
    """
    return tuple(sorted(scores, key=lambda name: (scores[name], name))[:top])


def names_of(value: object, what: str) -> tuple[str, ...] | None:
    """A list of sensitive names as settings hold it.

    Raises:
        InputError: one string, which would be taken for its letters.
    """
    if value is None:
        return None
    if isinstance(value, str):
        raise InputError(
            f"calibration sensitive: expected a list of {what}, got the string "
            f"{value!r}. Read a file of scores with sensitive_from_file()."
        )
    return tuple(value)  # type: ignore[arg-type]


def is_sensitive(name: str, chosen: Collection[str]) -> bool:
    """Whether a list names the tensor or module, or one that it lies in.

    >>> [is_sensitive(name, {"layers.1"}) for name in ("layers.1.mlp.weight", "layers.10.bias")]
    [True, False]
    """
    return any(prefix in chosen for prefix in _prefixes(name))


def unknown_names(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those that are neither one of ``known`` nor have one of them inside."""
    every = {prefix for name in known for prefix in _prefixes(name)}
    return [name for name in chosen if name not in every]


def refuse_unknown(
    chosen: Iterable[str] | None, known: Iterable[str], kind: str, wanted: str, of: str
) -> None:
    """Refuses sensitive names that are not ``wanted`` of the model, whose names are ``of``."""
    unknown = unknown_names(chosen or (), known)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(
            f"sensitive {kind} {unknown[0]!r}: expected {wanted} of the model, got an unknown "
            f"name{more}. Check the list against the model's {of}."
        )


def _prefixes(name: str) -> Iterator[str]:
    """The name and the modules it lies in, from the inside."""
    while name:
        yield name
        name = name.rpartition(".")[0]


@dataclass
class SensitivityReport:
    """How much the model loses when one layer's part of the merged task vector grows.

    Attributes:
        scores: tensor or module → score with that one enlarged; lower is worse.
        metric: ``kl``: minus the divergence from the outputs of the model as it is, a token or
            sample; ``evaluate``: what the caller's function gave.
        perturbation: the factor on its part of the task vector.
        by: ``tensor`` or ``module``.
        top: how many count as sensitive.
        samples: how many samples the scores are means of; None: not known.
        unperturbed: the score of the model as it is.
        intervals: name → bounds of its score minus the median score; all of them hold together with
            probability ``confidence``. Empty where ``evaluate`` gave one number.
        confidence, resamples, seed: of the intervals.
        noise: whether the list could be chance: no interval in it lies below 0. None: unknown.
        significant: the names of the list whose interval lies below 0.
        warnings: what to know before it is used, in words.
    """

    scores: dict[str, float]
    metric: str
    perturbation: float
    by: str
    top: int
    samples: int | None
    unperturbed: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0
    noise: bool | None = None
    significant: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def sensitive(self) -> tuple[str, ...]:
        """The ``top`` names that lose most: what ``sensitive=`` of a calibration takes."""
        return lowest(self.scores, self.top)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the most sensitive first."""
        order = lowest(self.scores, len(self.scores))
        own = asdict(self) | {
            "sensitive": list(self.sensitive),
            "scores": {name: self.scores[name] for name in order},
            "intervals": {n: list(self.intervals[n]) for n in order if n in self.intervals},
        }
        return own

    def save(self, path: str | Path) -> None:
        """Writes the JSON file that ``sensitive:`` and ``--sensitive`` read; it appears whole.

        Raises:
            OutputError: it cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise OutputError(
                f"scores for {str(path)!r}: expected a file that can be written, got "
                f"{error.strerror}. Check the folder."
            ) from None


def sensitive_from_file(path: str | Path, top: int | None = None) -> tuple[str, ...]:
    """The sensitive names of a JSON file: a list of names, or {name: score} where a lower score is
    worse, by itself or as ``scores`` in what :meth:`SensitivityReport.save` wrote.

    Args:
        path: of the file.
        top: how many of the lowest scores; None: what the file says as ``top``, else 10. A list is
            taken whole. Of equal scores the first by name counts, whatever their order in the file.

    Raises:
        InputError: not such a file. A list that was noise when it was measured is a warning in the
            log.
    """
    where = f"sensitive list {str(path)!r}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"{where}: expected a JSON file, got {e}.") from None
    if isinstance(data, list) and all(isinstance(n, str) for n in data):
        return tuple(data)
    whole = isinstance(data, dict) and isinstance(data.get("scores"), dict)
    scores = data["scores"] if whole else data
    if not isinstance(scores, dict) or not all(type(v) in (int, float) for v in scores.values()):
        raise InputError(
            f"{where}: expected a list of names or an object of name: score, "
            f"got {type(data).__name__}."
        )
    for name, score in scores.items():
        if not math.isfinite(score):
            raise InputError(f"{where}: expected a finite score of {name!r}, got {score}.")
    if top is None:
        top = data.get("top", TOP) if whole else TOP
        if type(top) is not int or top < 1:
            raise InputError(f"{where}: expected a whole number of at least 1 as top, got {top!r}.")
    if whole and data.get("noise") is True:
        log.warning("%s: it was found to be noise when it was measured", where)
    return lowest(scores, top)
