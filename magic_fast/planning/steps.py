"""From a configuration to the steps of a plan: sources looked up, parameters to recipes, shapes
checked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from magic_fast.calibration import TensorFilter, WeightCalibration, sensitive_from_file
from magic_fast.checkpoint import Checkpoint
from magic_fast.config import MergeConfig, OutputTensor, Source, resolve_layout
from magic_fast.engine import Input, Step, common_shape
from magic_fast.engine.plan.step import FLOATS
from magic_fast.engine.sources.tied import same_values
from magic_fast.errors import InputError
from magic_fast.methods.presets import build_recipe
from magic_fast.methods.registry import find_method
from magic_fast.methods.statistics import recipe_of_statistics
from magic_fast.models import Kind
from magic_fast.models.choice import EVERYTHING, TensorChoice
from magic_fast.planning.pause_gc import no_collection
from magic_fast.planning.quantised import QuantisedInputs
from magic_fast.planning.shared_settings import refuse_uneven
from magic_fast.planning.stacks import counted_stack
from magic_fast.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger("magic_fast")
_FLOATS = frozenset(FLOATS)
_WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class View:
    """A checkpoint as the layout sees it."""

    checkpoint: Checkpoint
    choice: TensorChoice = EVERYTHING

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    def names(self) -> Iterable[str]:
        return iter(self.checkpoint)

    def has(self, name: str) -> bool:
        return name in self.checkpoint

    def counted_stack(self) -> str | None:
        return counted_stack(self.checkpoint)

    def left_out(self) -> frozenset[str]:
        return self.choice.left_out(self.checkpoint.roles) if self.choice else frozenset()

    def is_derived(self, name: str) -> bool:
        return self.checkpoint.roles[name].kind is Kind.DERIVED

    def is_loaded(self, name: str) -> bool:
        return self.checkpoint.roles[name].loaded


def input_of(models: Mapping[str, Checkpoint], model: str, name: str) -> Input:
    info = models[model].resolve(name)
    return Input(model, info, info.shape)


def read_tensor(models: Mapping[str, Checkpoint], model: str, name: str) -> Tensor:
    """A whole stored tensor."""
    from magic_fast.engine.execute.whole import tensor_of

    source = input_of(models, model, name)
    data = bytearray(source.nbytes)
    models[model].read_into(source.info.name, data)
    return tensor_of(source, data)


def calibration_of(config: MergeConfig) -> WeightCalibration | None:
    """The ``calibrate:`` block as settings."""
    arguments = config.calibration_arguments()
    return None if arguments is None else calibration_from(arguments)


def calibration_from(arguments: dict[str, Any]) -> WeightCalibration:
    """Settings from :meth:`magic_fast.config.calibrate.CalibrateConfig.as_dict`; a file of scores
    is read."""
    arguments = dict(arguments)
    if isinstance(arguments["tensors"], Mapping):
        arguments["tensors"] = TensorFilter(**arguments["tensors"])
    if isinstance(arguments["sensitive"], Mapping):
        arguments["sensitive"] = sensitive_from_file(**arguments["sensitive"])
    for name in ("direction", "granularity"):  # absent: the settings' own default
        if arguments.get(name) is None:
            arguments.pop(name, None)
    return WeightCalibration(**arguments)


def steps_of(
    config: MergeConfig,
    models: Mapping[str, Checkpoint],
    calibration: WeightCalibration | None,
    *,
    seed: int,
    compat: str | None,
    allow_truncation: bool,
) -> tuple[list[Step], int | None]:
    """One step per output tensor, and the number of rows embeddings were cut to (None: none
    were)."""
    with no_collection():
        choice = TensorChoice(config.include, config.exclude)
        if choice:
            choice.check([model.roles for model in models.values()])
        layout = resolve_layout(config, {name: View(c, choice) for name, c in models.items()})
        if calibration is not None:
            calibration.check_names(t.name for t in layout)
        builder = _Builder(config, models, calibration, seed, compat, allow_truncation)
        steps = [builder.step(tensor) for tensor in layout]
        refuse_uneven(steps)
        if builder.counters:
            _LOG.warning(
                "%d counters differ and stay as in %s: %s%s", len(builder.counters), config.donor,
                builder.counters[0], ", …" if len(builder.counters) > 1 else "",
            )  # fmt: skip
        if builder.statistics:
            _LOG.warning(
                "%d running means and variances are the experts' mean: %s%s",
                len(builder.statistics), builder.statistics[0],
                ", …" if len(builder.statistics) > 1 else "",
            )  # fmt: skip
        return steps, builder.vocab_size


@dataclass
class _Builder:
    config: MergeConfig
    models: Mapping[str, Checkpoint]
    calibration: WeightCalibration | None
    seed: int
    compat: str | None
    allow_truncation: bool
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        self._quantised = QuantisedInputs(self.models)
        self._method = find_method(self.config.merge_method)
        self._whole = self._method.base == "none"
        self.counters: list[str] = []
        self.statistics: list[str] = []
        self._recipes: dict[tuple[int, ...], tuple[dict[str, Any], Recipe | None]] = {}

    def _recipe(self, tensor: OutputTensor, num_experts: int) -> tuple[dict[str, Any], Any]:
        """Arguments and recipe, which tensors of the same parameters share as they share those."""
        key = (id(tensor.parameters), id(tensor.expert_parameters), num_experts)
        if key not in self._recipes:
            config, recipe = self.config, None
            arguments = tensor.arguments(config.merge_method) | {"seed": self.seed}
            if self._method.recipe is not None:
                recipe = build_recipe(
                    config.merge_method,
                    num_experts,
                    arguments,
                    preset=config.preset,
                    compat=self.compat,
                )
            self._recipes[key] = arguments, recipe
        return self._recipes[key]

    def _source(self, source: Source) -> Input:
        return input_of(self.models, source.model, source.tensor_name)

    def _stays(self, inputs: Sequence[Input]) -> bool:
        """Whether a tensor is the first model's whatever the method: a counter that differs, a
        buffer that is the same in all models, however infinite its masks are."""
        first = inputs[0]
        if first.info.name.endswith((".weight", ".bias")):
            return False
        kind = self.models[first.model].roles[first.info.name].kind
        if kind is not Kind.COUNTER and first.info.dtype not in _FLOATS:
            return False  # compared as they are copied
        if kind not in (Kind.COUNTER, Kind.DERIVED, Kind.BUFFER):
            return False
        same = all(
            same_values(
                self.models[first.model], first.info.name, self.models[i.model], i.info.name
            )
            for i in inputs[1:]
        )
        if kind is Kind.COUNTER and not same:
            self.counters.append(first.info.name)
        return same != (kind is Kind.COUNTER)

    def step(self, tensor: OutputTensor) -> Step:
        config = self.config
        base = None if tensor.base is None else self._source(tensor.base)
        experts = tuple(self._source(s) for s in tensor.experts)
        inputs = (*([base] if base else []), *experts)
        if self._quantised and self._quantised.holds(inputs):
            first = inputs[0].info
            return Step(tensor.name, first.shape, first.dtype, None, inputs, copy=True)
        if len(inputs) > 1 and self._stays(inputs):
            own = inputs[0]
            return Step(
                tensor.name, own.shape, own.info.dtype, None, inputs[:1], copy=True, exact=True
            )
        shape, truncated = common_shape(tensor.name, inputs, allow_truncation=self.allow_truncation)
        if truncated:
            self.vocab_size = shape[0]
            inputs = tuple(replace(i, shape=shape) for i in inputs)
            base, experts = (inputs[0], inputs[1:]) if base else (None, inputs)
        if not {i.info.dtype for i in inputs} <= _FLOATS:
            odd = next((i for i in inputs if i.info.dtype != inputs[0].info.dtype), None)
            if odd is not None:
                raise InputError(
                    f"dtype of '{tensor.name}' in {odd.model}: expected {inputs[0].info.dtype} as "
                    f"in {inputs[0].model}, got {odd.info.dtype}. Integer tensors are not merged; "
                    "they must agree."
                )
            return Step(tensor.name, shape, inputs[0].info.dtype, None, inputs, copy=True)
        cast = _WORDS[config.dtype] if config.dtype else None
        stored = self.models[inputs[0].model].stored_dtype(inputs[0].info.name)
        word = _WORDS[config.out_dtype] if config.out_dtype else (cast or stored)
        if not experts:  # nothing but the base
            return Step(tensor.name, shape, word, None, inputs, cast=cast, copy=True)
        arguments, recipe = self._recipe(tensor, len(experts))
        method = config.merge_method
        if base and self.models[base.model].roles[base.info.name].kind is Kind.STATISTICS:
            mean = recipe_of_statistics(method, len(experts))
            if mean is not None:
                method, arguments, recipe = "average", {}, mean
                self.statistics.append(tensor.name)
        weights: Any = arguments.get("weights", (1.0,) * len(experts))
        if recipe is not None:
            weights = recipe.weights
        resolved = None
        if self.calibration is not None and base is not None:
            resolved = self.calibration.resolve(
                tensor.name, shape, weights, role=self.models[base.model].roles[base.info.name]
            )
        if self._whole and resolved is None:
            base = None
        return Step(
            tensor.name, shape, word, base, experts, recipe, method, arguments,
            config.preset, self._whole, calibration=resolved, cast=cast,
        )  # fmt: skip
