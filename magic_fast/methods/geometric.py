"""Methods between directions, over the Gram matrix of the vectors: one read for the inner products,
K coefficients in float64, one read to add up. No torch is imported before a rule is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from magic_fast.errors import InputError
from magic_fast.ops.directions import Directions
from magic_fast.recipe import per_expert


@dataclass(frozen=True)
class Question:
    """What a method has to know of a tensor to say which of its vectors it means.

    Attributes:
        experts: K.
        has_base: whether there is a base.
        arguments: of the method.
        preset: whose rules.
        name: of the tensor, for messages.
    """

    experts: int
    has_base: bool
    arguments: Mapping[str, Any]
    preset: str
    name: str

    def weights(self) -> tuple[float, ...]:
        return per_expert(self.arguments["weights"], self.experts, "weights")


def slerp(asked: Question) -> Directions:
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

        def magic(gram: Any) -> Any:
            from magic_fast.reference.spherical import slerp_magic

            return slerp_magic(gram)

        return Directions(magic, axis=-1)
    member = asked.has_base and asked.experts == 1
    if not member and asked.experts != 2:
        raise InputError(
            "experts for method 'slerp': expected one with a base, or two, got "
            f"{asked.experts}. Spherical interpolation runs between two models."
        )

    def rule(gram: Any) -> Any:
        from magic_fast.reference.spherical import slerp

        return slerp(gram, t)

    return Directions(rule, -1 if arguments.get("per_row", False) else None, member)


def nuslerp(asked: Question) -> Directions:
    """Whole tensors, last-dimension rows, or fibres along dimension 0."""
    if asked.experts != 2:
        raise InputError(
            f"experts for method 'nuslerp': expected 2, got {asked.experts}. Spherical "
            "interpolation runs between two models; multislerp and karcher take more."
        )
    weights, axis = asked.weights(), None
    if not asked.arguments["nuslerp_flatten"]:
        axis = 0 if asked.arguments["nuslerp_row_wise"] else -1

    def rule(gram: Any) -> Any:
        from magic_fast.reference import geometric

        return geometric.nuslerp(gram, weights)

    return Directions(rule, axis)


def multislerp(asked: Question) -> Directions:
    weights, arguments, name = asked.weights(), asked.arguments, asked.name

    def rule(gram: Any) -> Any:
        from magic_fast.reference import geometric

        # on the CPU: the one synchronisation of the method
        found = geometric.multislerp(
            gram[0].cpu(), weights, normalize=arguments["normalize_weights"], eps=arguments["eps"],
            name=name,
        )  # fmt: skip
        return found[None]

    return Directions(rule)


def karcher(asked: Question) -> Directions:
    """Of whole models; a base is one of them."""
    max_iter, tol = asked.arguments["max_iter"], asked.arguments["tol"]

    def rule(gram: Any) -> Any:
        from magic_fast.reference import geometric

        return geometric.karcher(gram[0].cpu(), max_iter=max_iter, tol=tol)[None]

    return Directions(rule, member=True)


def model_stock(asked: Question) -> Directions:
    if asked.experts < 2:
        raise InputError(
            f"experts for method 'model_stock': expected at least 2, got {asked.experts}. It "
            "measures the angle between them."
        )
    absolute = asked.preset == "mergekit"

    def rule(gram: Any) -> Any:
        from magic_fast.reference import geometric

        return geometric.model_stock(gram, absolute=absolute)

    return Directions(rule, -1 if asked.arguments["filter_wise"] else None)


#: What each of these methods asks of a tensor.
GEOMETRIC: Mapping[str, Callable[[Question], Directions]] = {
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
}
