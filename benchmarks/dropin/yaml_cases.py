"""The YAML of the merges that are compared, and what kind of method each is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Parameters at the top of the YAML; for nuslerp two experts, for the methods on pairs one.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 0.7, "density": 0.3},
    "breadcrumbs": {"weight": 0.5, "density": 0.7, "gamma": 0.02},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.7, "gamma": 0.02},
    "sce": {},
    "model_stock": {},
    "karcher": {},
    "multislerp": {"weight": 0.4},
    "ram": {},
    "ramplus_tl": {},
    "slerp": {"t": 0.4},
    "nuslerp": {"weight": 0.5},
    "nearswap": {"t": 0.001},
}
RANDOM: dict[str, dict[str, Any]] = {
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "della_linear": {"weight": 0.5, "density": 0.5},
}
EXPERTS = {"slerp": 1, "nearswap": 1, "nuslerp": 2}
WHOLE = ("linear", "karcher", "multislerp", "nuslerp")  # no base here
FLOAT32 = ("ramplus_tl",)  # written in float32 by mergekit, whatever the YAML's dtype
VOTES = ("ties", "breadcrumbs_ties", "sce")
#: Where sums over a tensor, or functions of them, scale the values.
NORMS = ("sce", "model_stock", "karcher", "multislerp", "slerp", "nuslerp")


def configuration(models: Sequence[Path], method: str, dtype: str) -> dict[str, Any]:
    """The YAML of one merge."""
    base, *experts = models
    experts = experts[: EXPERTS.get(method)]
    parameters = dict((METHODS | RANDOM)[method])
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(path)} for path in experts],
        "dtype": dtype,
        "parameters": parameters,
    }
    if method in ("slerp", "nearswap"):  # mergekit wants the base among the models
        document["models"].insert(0, {"model": str(base)})
    if method not in WHOLE:
        document["base_model"] = str(base)
    return document
