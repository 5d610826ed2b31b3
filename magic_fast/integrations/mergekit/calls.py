"""What the replacements of every release share: mergekit's parameters to ours, its tensors to one
merge, and what was replaced and how it is taken back. mergekit itself is not imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from magic_fast.api.tensors.merge import merge
from magic_fast.calibration import WeightCalibration
from magic_fast.calibration.registry import is_variant
from magic_fast.config.calibrate import CalibrateConfig
from magic_fast.errors import InputError
from magic_fast.methods.arguments import python_name
from magic_fast.methods.registry import find_method, methods
from magic_fast.methods.spec import MethodSpec, ParameterSpec
from magic_fast.models import roles_of
from magic_fast.models.memory import plain_config
from magic_fast.planning.steps import calibration_from

#: Methods of mergekit that run here; the others stay its own (TIES is timed by make bench-dropin).
REPLACED = (
    "linear",
    "task_arithmetic",
    "ties",
    "dare_ties",
    "dare_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
    "karcher",
)

PRESET = "mergekit"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_NO_SUM = 1e-8  # a sum of weights below this divides nothing here, and everything in mergekit


def new_methods(existing: Sequence[str]) -> list[MethodSpec]:
    """Our methods on task vectors that mergekit lacks, as its YAML can have them: one tensor at a
    time, so nothing that looks at the whole model first (``pcb`` with scope ``tensor`` only)."""
    found = sorted(methods().items())
    new = [spec for name, spec in found if name not in existing]
    return [spec for spec in new if spec.base in ("required", "optional")]


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the fast merge may have these: plain tensors of its dtypes, no gradient wanted."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not wanted and all(
        type(t) in _PLAIN and t.dtype in _DTYPES and t.device.type in ("cpu", "cuda")
        for t in tensors
    )


def arguments_of(method: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """mergekit's parameters by our names; those without an effect here (``int8_mask``) left out.

    Returns:
        None where a value is out of our range: mergekit knows what it means by it.
    """
    spec, given = find_method(method), {}
    for name, value in parameters.items():
        found = spec.find(name)
        if found is None or value is None:
            continue
        if not all(found.accepts(v) for v in (value if isinstance(value, list) else [value])):
            return None
        given[python_name(found)] = value
    if method == "linear" and given.get("normalize", True) and abs(sum(given["weights"])) < _NO_SUM:
        return None
    if "epsilon" in given and "density" in given:  # DELLA: both ends are probabilities
        for density, epsilon in zip(given["density"], given["epsilon"], strict=True):
            if not epsilon < density < 1 - epsilon:
                return None
    return given


def check_value(ours: ParameterSpec, value: Any) -> None:
    """A value of a parameter that mergekit does not know, while it plans.

    Raises:
        InputError: it is out of range.
    """
    if not ours.accepts(value):
        raise InputError(f"{ours.name}: expected {ours.expected()}, got {value!r}. Correct it.")


def out_of_range(method: str, name: str | None) -> InputError:
    """What mergekit would be left to judge, where it cannot: a calibrated or a new method."""
    ranges = "; ".join(
        f"{p.name} {p.expected()}" for p in find_method(method).parameters if p.kind == "float"
    )
    return InputError(
        f"parameters of method {method!r} for '{name or 'the tensor'}': expected {ranges}, got "
        "one out of range. Correct it."
    )


def run(
    method: str,
    base: Tensor | None,
    experts: Sequence[Tensor],
    arguments: Mapping[str, Any],
    *,
    name: str | None,
    calibrate: WeightCalibration | None = None,
    row_axis: int | tuple[int, ...] | None = None,
    out: Tensor | None = None,
    compat: str | None = None,
) -> Tensor:
    """One tensor merged, in the dtype of the first input. The inputs are read, never written.

    Random masks are drawn from a seed of torch's generator, so that ``--random-seed`` and
    ``torch.manual_seed`` hold, and the next tensor gets another.
    """
    rescale = find_method(method).find("rescale")
    random = rescale is not None and rescale.random_trim
    wanted = [t for t in experts if t.requires_grad] if torch.is_grad_enabled() else []
    if wanted:
        raise InputError(
            f"gradients of {method!r} for '{name or 'the tensor'}': expected none to be wanted, "
            "got a tensor that requires one. Merge inside torch.no_grad()."
        )
    merged: Tensor = merge(
        None if base is None else base.detach().contiguous(),
        [t.detach().contiguous() for t in experts],
        method,
        preset=PRESET,
        nonfinite="propagate",
        name=name or "",
        seed=int(torch.randint(2**63 - 1, ())) if random else None,
        calibrate=calibrate,
        row_axis=row_axis,
        out=out,
        compat=compat,
        **arguments,
    )
    return merged


def calibration_of(value: Any) -> WeightCalibration | None:
    """The parameter ``calibrate`` of a YAML: ``wsc``, a variant, ``none``, or settings as text.

    mergekit's parameters are numbers and words, so settings are a mapping in quotes.

    >>> calibration_of("{variant: sphere, p: 1}").p
    1
    >>> calibration_of("sphere").p
    2
    >>> calibration_of("none") is None
    True
    """
    if isinstance(value, WeightCalibration):
        return value
    if value is None or value == 0:
        return None
    return _calibration("wsc" if value == 1 else value)


@lru_cache(maxsize=64)
def _calibration(text: Any) -> WeightCalibration | None:
    import yaml
    from pydantic import ValidationError

    why: object = "an unknown word"
    try:
        given = yaml.safe_load(text) if isinstance(text, str) else text
        if given in ("none", None):
            return None
        if isinstance(given, dict) or given == "wsc" or is_variant(given):
            return calibration_from(CalibrateConfig.model_validate(given).as_dict())
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (yaml.YAMLError, InputError) as error:
        why = error
    raise InputError(
        "calibrate: expected wsc, none or settings in quotes such as '{variant: sphere}', got "
        f"{text!r} ({why}). Correct it."
    ) from None


def row_axis_of(
    models: Sequence[Any], name: str | None, shape: Sequence[int], calibrate: WeightCalibration
) -> tuple[int, ...] | None:
    """Axes of the output units by the layout of the models, which mergekit's references name."""
    role = None
    if name:
        role = roles_of(_config(models[0]), {name: (tuple(shape), "F32")})[name]
    resolved = calibrate.resolve(name or "", shape, (1.0,) * len(models), role=role)
    return None if resolved is None else resolved.axes


@lru_cache(maxsize=16)
def _config(model: Any) -> Mapping[str, Any]:
    """The configuration of a ModelReference; an empty one for inputs that are no checkpoint."""
    try:
        return plain_config(model)
    except (OSError, ValueError):  # no config.json, or one that needs code of its own
        return {}


@dataclass(frozen=True)
class Replaced:
    """Names of mergekit's methods.

    Attributes:
        replaced: run here now.
        added: are new in its YAML.
        left: are still its own.
        undo: puts back what was there.
    """

    replaced: tuple[str, ...]
    added: tuple[str, ...]
    left: tuple[str, ...]
    undo: Callable[[], None]

    def in_words(self, version: str) -> str:
        """The one line that is logged."""
        return (
            f"mergekit {version}: replaced {', '.join(self.replaced) or 'nothing'}; "
            f"added {', '.join(self.added) or 'nothing'}; "
            f"left as they are: {', '.join(self.left) or 'none'}"
        )


def replace_in(
    table: dict[str, Any],
    names: Sequence[str],
    replacement: Callable[[Any], Any | None],
    new: Callable[[MethodSpec], Any],
) -> Replaced:
    """Puts the replacements of ``names`` into a registry (method by name), and beside them the
    methods that it lacks. ``replacement`` gives None for a method that it does not know."""
    before = dict(table)
    fast = {n: replacement(table[n]) for n in names if n in table}
    found = {name: method for name, method in fast.items() if method is not None}
    added = {spec.name: new(spec) for spec in new_methods(tuple(table))}
    table.update(found | added)

    def undo() -> None:
        for name, method in (found | added).items():
            if table.get(name) is method:  # someone else's replacement stays
                if name in before:
                    table[name] = before[name]
                else:
                    del table[name]

    left = [name for name in before if name not in found]
    return Replaced(tuple(found), tuple(added), tuple(left), undo)
