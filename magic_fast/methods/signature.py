"""The parameters of a user's method, read from the signature of its function."""

from __future__ import annotations

import hashlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from magic_fast.errors import InputError
from magic_fast.methods.parameters import WEIGHT, scale
from magic_fast.methods.spec import ParameterSpec

#: Keywords that calls, commands and configurations have for themselves, beside ``seed``.
TAKEN = (
    "adapters", "allow_embedding_truncation", "backend", "base", "base_model", "calibrate",
    "compat", "details", "device", "dtype", "exclude", "experts", "include", "masks", "memory",
    "method", "model",
    "name", "nonfinite", "on", "out", "preset", "progress", "rank", "recipes", "resume",
    "row_axis", "task_vectors",
)  # fmt: skip
_FIRST = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_OTHERS = inspect.Parameter.KEYWORD_ONLY
_KINDS: Mapping[Any, Literal["float", "int", "bool"]] = {float: "float", int: "int", bool: "bool"}
#: Those that a YAML calls otherwise.
_COMMON = {"weights": WEIGHT, "scale": scale()}
_TYPES = "float, int, bool, Literal['word', ...] or Sequence[float]"


@dataclass(frozen=True)
class Signature:
    """What a function takes.

    Attributes:
        home: the function's module and name.
        makes_recipe: whether it returns a recipe.
        parameters: of the method.
        keywords: those that the function is called with, in its own words.
    """

    home: str
    makes_recipe: bool
    parameters: tuple[ParameterSpec, ...]
    keywords: tuple[str, ...]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords that are given; the function's own default holds for the others."""
        return {name: given[name] for name in self.keywords if name in given}


def read_signature(name: str, function: Callable[..., Any]) -> Signature:
    """The signature of what is to be the method ``name``.

    Raises:
        InputError: the name, or a parameter, is none that a method can have.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(
            "name of a new method: expected letters, digits and underscores, the first no digit, "
            f"got {name!r}."
        )
    if not callable(function):
        raise InputError(f"method {name!r}: expected a function, got {function!r:.80}.")
    signature = inspect.signature(function)
    makes_recipe = _is_recipe(signature.return_annotation)
    kinds = [p.kind for p in signature.parameters.values()]
    others = list(signature.parameters.values())[1:]
    if not kinds or kinds[0] not in _FIRST or any(k is not _OTHERS for k in kinds[1:]):
        takes = "num_experts" if makes_recipe else "task_vectors"
        raise InputError(
            f"signature of method {name!r}: expected ({takes}, *, parameter: float = 0.5, ...), "
            f"got {signature}. Put a '*' before the parameters."
        )
    keywords = tuple(p.name for p in others)
    parameters = tuple(
        _parameter(name, p, _evaluated(p.annotation, function))
        for p in others
        if not (makes_recipe and p.name == "seed")
    )
    return Signature(_home(function), makes_recipe, parameters, keywords)


def source_of(function: Callable[..., Any]) -> str:
    """A digest of the function's source, and its home: it tells one version of a function from
    another, but not what the function calls."""
    try:
        text = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # typed at a prompt, or no function of Python
        return f"unknown, of {_home(function)}"
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} of {_home(function)}"


def _home(function: Callable[..., Any]) -> str:
    named = inspect.unwrap(function)
    name = getattr(named, "__qualname__", type(named).__qualname__)
    return f"{getattr(named, '__module__', '?')}.{name}"


def _is_recipe(annotation: Any) -> bool:
    word = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return word.rpartition(".")[2] == "Recipe"


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """An annotation that is text (``from __future__ import annotations``) as a type; None where it
    names what is not there."""
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return get_type_hints(holder, globalns=names)["it"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return None


def _parameter(method: str, p: inspect.Parameter, annotation: Any) -> ParameterSpec:
    what = f"parameter {p.name!r} of method {method!r}"
    if p.name in TAKEN or p.name == "seed":
        raise InputError(
            f"{what}: expected a name that merge() and its kin do not use, got one that they do. "
            "Choose another."
        )
    members = _members(annotation)
    words = [get_args(m) for m in members if get_origin(m) is Literal]
    each = {m for m in members if get_origin(m) in (Sequence, list, tuple)}
    plain = members - each
    if words and len(members) == 1 and all(isinstance(word, str) for word in words[0]):
        spec = ParameterSpec(p.name, kind="choice", choices=words[0])
    elif each and plain <= {float} and all(get_args(m)[:1] == (float,) for m in each):
        spec = ParameterSpec(p.name, "per_model")
    elif plain <= _KINDS.keys() and len(members) == 1:
        spec = ParameterSpec(p.name, kind=_KINDS[plain.pop()])
    else:
        got = "none" if p.annotation is p.empty else str(p.annotation)
        advice = "Names in it must be there when the program runs." if annotation is None else ""
        raise InputError(f"{what}: expected the annotation {_TYPES}, got {got}. {advice}".rstrip())
    common = _COMMON.get(p.name)
    if common is not None and (common.scope, common.kind) == (spec.scope, spec.kind):
        spec = replace(spec, name=common.name, aliases=common.aliases, argument=p.name)
    if p.default is p.empty:
        return replace(spec, required=True)
    if p.default is not None and not spec.accepts(p.default):
        raise InputError(
            f"default of {what}: expected {spec.expected()}, got {p.default!r}. One value stands "
            "for all experts."
        )
    return replace(spec, default=p.default)  # None: absent, and the function's own rule holds


def _members(annotation: Any) -> set[Any]:
    """The types of a union without None; float alone of int and float."""
    union = get_origin(annotation) in (Union, types.UnionType)
    members = set(get_args(annotation) if union else (annotation,)) - {type(None)}
    return members - {int} if float in members else members
