"""FusionBench's ``BaseAlgorithm`` over our merge. Imported by this package's front alone."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from fusion_bench.method.base_algorithm import BaseAlgorithm
from fusion_bench.mixins import auto_register_config
from fusion_bench.modelpool import BaseModelPool
from omegaconf import OmegaConf
from torch import Tensor, nn

from magic_fast.api.tensors.merge import merge
from magic_fast.errors import InputError
from magic_fast.methods.arguments import python_name
from magic_fast.methods.presets import check_preset
from magic_fast.methods.registry import find_method
from magic_fast.methods.spec import MethodSpec

OWN = "fusion_bench"


@auto_register_config
class MagicFastAlgorithm(BaseAlgorithm):  # type: ignore[misc]
    """Any method of docs/methods.md, calibrated on request, over the models of a pool.

    Args:
        merge_method: ``ties``, ``task_arithmetic``, ``dare_ties``, ``iso_c``, ``tsv_m``, …
        parameters: of the method, by the names of the YAML or of Python (``density``, ``lambda`` or
            ``scale``, ``weight`` or ``weights``: a number, or one for each of ``model_names``).
        calibrate: None, ``wsc``, or settings such as ``{variant: sphere}``.
        preset: whose rules and defaults hold; None: FusionBench's for the methods of that preset
            (task arithmetic, TIES over the whole model, …), ours for the others.
        seed: of the random trims.
        backend: a name that ``mf.backends()`` lists; None chooses.

    ``_target_`` of a configuration is ``magic_fast.integrations.fusion_bench.MagicFastAlgorithm``.
    """

    def __init__(
        self,
        merge_method: str = "ties",
        parameters: Mapping[str, Any] | None = None,
        calibrate: Any = None,
        preset: str | None = None,
        seed: int | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    @torch.no_grad()
    def run(self, modelpool: Any) -> nn.Module:
        """The pool's models merged onto ``_pretrained_``: a new module, the pool's untouched. Of
        models with ``_fusion_bench_target_modules`` only these parts are merged.

        Raises:
            InputError: no models, no ``_pretrained_`` where the method needs one, something that is
                no module; and what ``mf.merge`` refuses.
        """
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        spec = find_method(self.merge_method)
        base = self._base(pool, spec)
        experts = [_module(pool, name) for name in pool.model_names]
        if not experts:
            raise InputError(
                f"models of the pool for {self.merge_method!r}: expected at least one beside "
                "'_pretrained_', got none."
            )
        settings: dict[str, Any] = {
            "preset": self.preset or _preset(self.merge_method),
            "calibrate": _plain(self.calibrate),
            "seed": self.seed,
            "backend": self.backend,
            **_arguments(spec, _plain(self.parameters) or {}),
        }
        start = experts[0] if base is None else base
        targets = getattr(start, "_fusion_bench_target_modules", None)
        if targets is None:
            whole: nn.Module = merge(base, experts, self.merge_method, **settings)
            return whole
        parts = [_parts(m, targets) for m in experts]
        merged = merge(
            None if base is None else _parts(base, targets), parts, self.merge_method, **settings
        )
        result = deepcopy(start)
        result.load_state_dict(merged, strict=False)
        return result

    def _base(self, pool: Any, spec: MethodSpec) -> nn.Module | None:
        if spec.base == "none":
            return None
        if pool.has_pretrained:
            return _module(pool, "_pretrained_")
        if spec.base == "required":
            raise InputError(
                f"models of the pool for {self.merge_method!r}: expected '_pretrained_', the model "
                f"that the others were trained from, got {', '.join(pool.model_names) or 'none'}."
            )
        return None


def _module(pool: Any, name: str) -> nn.Module:
    found = pool.load_model(name)
    if not isinstance(found, nn.Module):
        raise InputError(
            f"model {name!r} of the pool: expected a module, got {type(found).__name__}. Load it "
            "as a module, or merge the checkpoints by `magic-fast merge`, which streams them."
        )
    return found


def _parts(model: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    heads = tuple(f"{name}." for name in targets)
    return {name: t for name, t in model.state_dict().items() if name.startswith(heads)}


def _plain(value: Any) -> Any:
    """OmegaConf's containers as Python's."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _preset(method: str) -> str | None:
    try:
        check_preset(OWN, method)
    except InputError:
        return None
    return OWN


def _arguments(spec: MethodSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        known = spec.find(name)  # an unknown one is refused by the merge, with the nearest name
        found[name if known is None else python_name(known)] = value
    return found
