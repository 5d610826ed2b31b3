"""``register_method``: a method from a user's function. No torch is imported before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, overload

from magic_fast.errors import InputError, MagicFastError
from magic_fast.methods.registry import is_built_in, register, registered
from magic_fast.methods.signature import Signature, read_signature, source_of
from magic_fast.methods.spec import MethodSpec, Paper
from magic_fast.ops.job import Job
from magic_fast.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


@overload
def register_method(
    name: str,
    function: None = None,
    *,
    summary: str = "",
    use_when: str = "",
    paper: str = "",
    arxiv: str = "",
    base: Literal["required", "optional", "none"] = "required",
    min_experts: int = 1,
    max_experts: int | None = None,
) -> Callable[[F], F]: ...


@overload
def register_method(
    name: str,
    function: F,
    *,
    summary: str = "",
    use_when: str = "",
    paper: str = "",
    arxiv: str = "",
    base: Literal["required", "optional", "none"] = "required",
    min_experts: int = 1,
    max_experts: int | None = None,
) -> F: ...


def register_method(
    name: str,
    function: Callable[..., Any] | None = None,
    *,
    summary: str = "",
    use_when: str = "",
    paper: str = "",
    arxiv: str = "",
    base: Literal["required", "optional", "none"] = "required",
    min_experts: int = 1,
    max_experts: int | None = None,
) -> Any:
    """Adds a merge method; every call, configuration and command then knows it by its name.

    A function whose return annotation is ``Recipe`` (of :mod:`magic_fast.recipe`) takes K, the
    number of experts, and describes a loop over elements: it runs fused on every backend, and
    checkpoints stream. Any other function takes the K task vectors of one tensor, stacked, in
    float32 (float64 of float64 inputs), and returns their merge; it holds whole tensors.
    Calibration, rounding and checks are those of every method. docs/contributing/add-a-method.md
    has examples.

    Parameters of the method are the keyword-only ones of the function: ``float``, ``int``,
    ``bool`` or ``Literal`` words, and ``Sequence[float]`` (or ``float | Sequence[float]``) for one
    number an expert. In a YAML ``weights`` is called ``weight`` and ``scale`` ``lambda``, as of
    every method. A recipe's ``seed: int`` is the seed of the merge.

    Args:
        name: letters, digits and underscores.
        function: what to add; None: this call is a decorator.
        summary: what it does, in a line; default: the first line of the function's docstring.
        use_when: what speaks for it.
        paper: title, or where it comes from; default: the function's module.
        arxiv: the paper's number, or ''.
        base: ``required``; ``optional``: without one the models themselves are merged; ``none``:
            they always are.
        min_experts, max_experts: how many models it takes beside the base; None: any number.

    Returns:
        The function.

    Raises:
        InputError: the name is taken or unusable, or the signature cannot be read.
    """

    def add(function: F) -> F:
        signature = read_signature(name, function)
        check = _count_check(name, min_experts, max_experts)
        _refuse_taken(name, signature.home)
        doc = (inspect.getdoc(function) or "").partition("\n")[0]
        facts: dict[str, Any] = {
            "base": base,
            "min_experts": min_experts,
            "max_experts": max_experts,
            "summary": summary or doc,
            "use_when": use_when,
            "paper": Paper(paper or f"registered by {signature.home}", arxiv),
            "home": signature.home,
        }
        if signature.makes_recipe:
            recipe = _recipe_of(name, function, signature, check)
            register(MethodSpec(name, signature.parameters, recipe=recipe, **facts))
        else:
            run = _function_of(name, function, signature, check, whole=base == "none")
            spec = MethodSpec(
                name, signature.parameters, function=run, reads="1",
                holds="K task vectors, and as much again for what the function makes of them",
                workspace=lambda arguments, num_experts, ndim: 4 * (num_experts + 2),
                may_refuse=True, source=lambda: source_of(function), **facts,
            )  # fmt: skip
            register(spec)
        return function

    if base not in ("required", "optional", "none"):
        raise InputError(
            f"base of method {name!r}: expected 'required', 'optional' or 'none', got {base!r}."
        )
    return add if function is None else add(function)


def _refuse_taken(name: str, home: str) -> None:
    """Refuses a name that the package or another function has. A function may replace itself, as
    when a notebook's cell runs again."""
    other = registered().get(name)
    if is_built_in(name) or (other is not None and other.home != home):
        whose = f"{other.home} registered" if other is not None else "magic_fast itself has"
        raise InputError(
            f"name of a new method: expected one that is free, got {name!r}, which {whose}. "
            "Choose another."
        )


def _count_check(name: str, least: int, most: int | None) -> Callable[[int], None]:
    def check(k: int) -> None:
        if k < least or (most is not None and k > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise InputError(f"experts for method {name!r}: expected {wanted}, got {k}.")

    return check


def _called(name: str, label: str, function: Callable[[], Any]) -> Any:
    """What the user's code returns; its errors say whose they are."""
    try:
        return function()
    except MagicFastError:
        raise
    except Exception as error:
        raise InputError(
            f"method {name!r} for {label}: expected its function to return, got "
            f"{type(error).__name__}: {error}. Correct the function."
        ) from error


def _recipe_of(
    name: str, function: Callable[..., Any], signature: Signature, check: Callable[[int], None]
) -> Callable[[int, Mapping[str, Any]], Recipe]:
    def recipe(k: int, p: Mapping[str, Any]) -> Recipe:
        check(k)
        built = _called(name, f"{k} experts", lambda: function(k, **signature.arguments(p)))
        if not isinstance(built, Recipe) or built.num_experts != k:
            got = f"one of {built.num_experts}" if isinstance(built, Recipe) else repr(built)
            raise InputError(
                f"method {name!r}: expected its function to return a Recipe of {k} experts, got "
                f"{got:.80}. Give the recipe a weight for each expert."
            )
        return built

    return recipe


def _function_of(
    name: str,
    function: Callable[..., Any],
    signature: Signature,
    check: Callable[[int], None],
    *,
    whole: bool,
) -> Callable[[Job, Mapping[str, Any], str], Any]:
    def run(job: Job, arguments: Mapping[str, Any], preset: str) -> Any:
        import torch

        from magic_fast.reference.merge import decision_dtype, task_vectors

        check(len(job.experts))
        base = None if whole else job.base  # else it is there for the calibration alone
        dtype = decision_dtype(base, job.experts)
        label = f"'{job.name}'" if job.name else "the tensor"
        with torch.no_grad():
            taus = torch.empty((len(job.experts), *job.experts[0].shape), dtype=dtype,
                               device=job.experts[0].device)  # fmt: skip
            for tau, expert in zip(taus, job.experts, strict=True):
                tau.copy_(task_vectors(base, [expert], dtype)[0])
            delta = _called(name, label, lambda: function(taus, **signature.arguments(arguments)))
            expected = f"a tensor of shape {tuple(taus.shape[1:])} on {taus.device}"
            if not isinstance(delta, torch.Tensor):
                got = type(delta).__name__
            elif delta.shape != taus.shape[1:] or delta.device != taus.device:
                got = f"one of shape {tuple(delta.shape)} on {delta.device}"
            elif not delta.is_floating_point():
                got = f"one of {delta.dtype}"
            else:
                delta = delta.to(dtype)
                return delta if base is None else base.to(dtype) + delta
        raise InputError(
            f"method {name!r} for {label}: expected its function to return {expected}, floating "
            f"point, got {got}. Correct the function."
        )

    return run
