"""Quantised inputs: refused by name before anything is merged, copied where all models hold the
same codes and scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

from magic_fast.checkpoint import Checkpoint
from magic_fast.engine import Input
from magic_fast.engine.plan.step import FLOATS
from magic_fast.errors import CheckpointError

#: Bytes of a tensor that are compared before the merge; the merge compares the rest as it copies.
_SAMPLE = 64 * 1024
_INTEGERS = ("U", "I")
_LOAD = "from_pretrained(folder{}){}.save_pretrained(new_folder)"
#: Scheme → what of transformers makes its codes numbers.
_DEQUANTISE = {
    "bitsandbytes": _LOAD.format("", ".dequantize()"),
    "MXFP4": _LOAD.format(", quantization_config=Mxfp4Config(dequantize=True)", ""),
    "FP8": _LOAD.format(", quantization_config=FineGrainedFP8Config(dequantize=True)", ""),
}


class QuantisedInputs:
    """The quantised tensors of the models of one run.

    Raises:
        CheckpointError: one model is quantised and another is not, or by another scheme.
    """

    def __init__(self, models: Mapping[str, Checkpoint]) -> None:
        self._models = models
        self._found = {
            name: model.quantisation
            for name, model in models.items()
            if model.quantisation is not None
        }
        for name, found in self._found.items():
            example = f"'{min(found.codes)}' and {len(found.codes) - 1} more"
            for other in models:
                theirs = self._found.get(other)
                if theirs is None:
                    self._refuse(name, f"{example}; {other} is not quantised")
                elif theirs.scheme != found.scheme:
                    self._refuse(name, f"{example}; {other} holds {theirs.scheme} codes")

    def __bool__(self) -> bool:
        return bool(self._found)

    def holds(self, inputs: Iterable[Input]) -> bool:
        """Whether one of these tensors is quantised, so that it can be copied and no more.

        Raises:
            CheckpointError: it is, and others of them hold other values as far as their beginnings
                tell; or its codes are of a type that is not copied.
        """
        inputs = tuple(inputs)
        one = next((i for i in inputs if self._is_quantised(i)), None)
        if one is None:
            return False
        if one.info.dtype not in FLOATS and not one.info.dtype.startswith(_INTEGERS):
            self._refuse(one.model, f"'{one.info.name}' of {one.info.dtype}")
        first = inputs[0]
        for other in inputs[1:]:
            same = (other.info.dtype, other.shape) == (first.info.dtype, first.shape)
            if not same or self._beginning(other) != self._beginning(first):
                self._refuse(
                    other.model, f"'{other.info.name}', which differs from {first.model}'s"
                )
        return True

    def refuse_unequal(self) -> None:
        """Raise CheckpointError where a tensor that several models have under one name is quantised
        and not the same in all of them."""
        names = dict.fromkeys(name for found in self._found.values() for name in found.tensors)
        for name in sorted(names):
            infos = [(m, c.resolve(name)) for m, c in self._models.items() if name in c]
            self.holds(Input(model, info, info.shape) for model, info in infos)

    def _is_quantised(self, one: Input) -> bool:
        found = self._found.get(one.model)
        return found is not None and one.info.name in found.tensors

    def _beginning(self, one: Input) -> bytes:
        data = bytearray(min(_SAMPLE, one.info.nbytes))
        self._models[one.model].read_into(one.info.name, data, 0, len(data))
        return bytes(data)

    def _refuse(self, model: str, reason: str) -> NoReturn:
        scheme = self._found[model].scheme if model in self._found else "no"
        code = _DEQUANTISE.get(scheme.split(" ")[0])
        way = f" (transformers: AutoModelForCausalLM.{code})" if code else ""
        raise CheckpointError(
            f"quantised model for {model}: expected weights as {', '.join(FLOATS)}, got {scheme} "
            f"codes ({reason}). Codes cannot be averaged: name the model that it was quantised "
            f"from, or make them numbers first{way}."
        )
