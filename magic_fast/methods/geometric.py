"""Methods between directions, over the Gram matrix of the vectors: one read for the inner products,
K coefficients in float64, one read to add up. No torch is imported before a rule is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from magic_fast.errors import InputError
from magic_fast.methods.parameters import WEIGHT, flag, number
from magic_fast.methods.spec import MethodSpec, Paper, ParameterSpec, Question
from magic_fast.ops.directions import Directions, Rule


def _rule(function: str, /, *arguments: Any, whole: bool = False, **options: Any) -> Rule:
    """A function of :mod:`magic_fast.reference.geometric` over the Gram matrix; ``whole``: of the
    whole tensor's alone, on the CPU: the one synchronisation of such a method."""

    def rule(gram: Any) -> Any:
        call = getattr(import_module("magic_fast.reference.geometric"), function)
        if not whole:
            return call(gram, *arguments, **options)
        return call(gram[0].cpu(), *arguments, **options)[None]

    return rule


def _slerp(asked: Question) -> Directions:
    """Between the base and one expert, or between two task vectors (two whole models without a
    base)."""
    arguments = asked.arguments
    t: float = arguments["t"]
    if asked.preset == "magic":
        if asked.experts != 2:
            raise InputError(
                f"experts for method 'slerp' of preset 'magic': expected 2, got {asked.experts}."
            )
        if t != 0.5:
            raise InputError(f"t for method 'slerp' of preset 'magic': expected 0.5, got {t}.")
        return Directions(_rule("slerp_magic"), axis=-1)
    member = asked.has_base and asked.experts == 1
    if not member and asked.experts != 2:
        raise InputError(
            "experts for method 'slerp': expected one with a base, or two, got "
            f"{asked.experts}. Spherical interpolation runs between two models."
        )
    return Directions(_rule("slerp", t), -1 if arguments.get("per_row", False) else None, member)


def _nuslerp(asked: Question) -> Directions:
    """Whole tensors, last-dimension rows, or fibres along dimension 0."""
    if asked.experts != 2:
        raise InputError(
            f"experts for method 'nuslerp': expected 2, got {asked.experts}. Spherical "
            "interpolation runs between two models; multislerp and karcher take more."
        )
    axis = None
    if not asked.arguments["nuslerp_flatten"]:
        axis = 0 if asked.arguments["nuslerp_row_wise"] else -1
    return Directions(_rule("nuslerp", asked.weights()), axis)


def _multislerp(asked: Question) -> Directions:
    normalize, eps = asked.arguments["normalize_weights"], asked.arguments["eps"]
    options = {"normalize": normalize, "eps": eps, "name": asked.name}
    return Directions(_rule("multislerp", asked.weights(), whole=True, **options))


def _karcher(asked: Question) -> Directions:
    """Of whole models; a base is one of them."""
    options = {name: asked.arguments[name] for name in ("max_iter", "tol")}
    return Directions(_rule("karcher", whole=True, **options), member=True)


def _model_stock(asked: Question) -> Directions:
    if asked.experts < 2:
        raise InputError(
            f"experts for method 'model_stock': expected at least 2, got {asked.experts}. It "
            "measures the angle between them."
        )
    rule = _rule("model_stock", absolute=asked.preset == "mergekit")
    return Directions(rule, -1 if asked.arguments["filter_wise"] else None)


_ARC = Paper("Animating Rotation with Quaternion Curves (Shoemake, 1985)")
_HOLDS = "one tensor of every model, and Δ"

METHODS = (
    MethodSpec(
        "slerp",
        (
            ParameterSpec("t", low=0.0, high=1.0, required=True, preset_defaults={"magic": 0.5}),
            flag("per_row", False),
        ),
        max_experts=1,
        directions=_slerp,
        summary="along the arc between two models",
        use_when="two models",
        reads="2",
        holds="one tensor of both models",
        paper=_ARC,
    ),
    MethodSpec(
        "nuslerp",
        (WEIGHT, flag("nuslerp_flatten", True), flag("nuslerp_row_wise", False)),
        base="optional",
        min_experts=2,
        max_experts=2,
        directions=_nuslerp,
        summary="along the arc between two models or two changes",
        use_when="two models with weights",
        paper=_ARC,
        reads="2",
        holds=_HOLDS,
    ),
    MethodSpec(
        "multislerp",
        (WEIGHT, flag("normalize_weights", True), number("eps", 1e-8, 0.0, low_open=True)),
        base="optional",
        directions=_multislerp,
        summary="weighted mean of directions in the tangent space at their sum",
        use_when="several models of like norm",
        paper=Paper("mergekit"),
        may_refuse=True,
        reads="2",
        holds=_HOLDS,
    ),
    MethodSpec(
        "karcher",
        (ParameterSpec("max_iter", kind="int", default=10, low=1), number("tol", 1e-5, 0.0)),
        base="member",
        directions=_karcher,
        summary="the point on the sphere nearest to all models",
        use_when="several models of like norm",
        paper=Paper("Riemannian centre of mass (Karcher, 1977)"),
        reads="2",
        holds=_HOLDS,
    ),
    MethodSpec(
        "model_stock",
        (flag("filter_wise", False),),
        min_experts=2,
        directions=_model_stock,
        summary="mean change, shortened by how little the experts agree",
        use_when="runs of one task",
        paper=Paper("Model Stock", "2403.19522"),
        reads="2",
        holds=_HOLDS,
    ),
)
