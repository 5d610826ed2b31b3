"""The configuration of a model whose layers stand in a new order: what it says of each layer
follows the layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from magic_fast.errors import ConfigError
from magic_fast.models.layer_rules import implied, listed_by_rule
from magic_fast.models.lookup import part_of

_LOG = logging.getLogger("magic_fast")

#: Lists of numbers of layers.
_NUMBERS = (
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids",
    "rope_scaling_layers", "global_attn_indexes", "window_block_indices", "cross_attention_layers",
)  # fmt: skip
#: How many layers at the front are dense.
_DENSE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
#: (period, offset): a layer is of the second kind where its number leaves the offset.
_PERIODS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)
_MTP = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_NOT_LAYERS = ("architectures", "tokens", "token_id", "token_ids", "words_ids")


@dataclass(frozen=True)
class Layer:
    """One layer of the output.

    Attributes:
        part: the part of its model's configuration that describes it.
        model_type: of that part.
        number: in its model.
        count: the layers of its model.
    """

    part: Mapping[str, Any]
    model_type: str
    number: int
    count: int


def follow(
    config: Mapping[str, Any],
    path: str,
    count: int,
    layers: Sequence[Layer],
    *,
    reads: Sequence[str] = (),
    stores_mtp: bool = False,
) -> tuple[dict[str, Any], int]:
    """A copy of ``config`` in which lists, periods and counts are those of ``layers``, and the
    number of layers to state.

    Args:
        config: of the model whose files the output takes.
        path: of the part that describes the layers; "" for the top.
        count: the layers of that model.
        layers: of the output, in its order; those for multi-token prediction are beyond the
            ``count`` of their model.
        reads: the lists that its architecture reads, where they are known.
        stores_mtp: whether layers for multi-token prediction stand behind the others in the file.

    Raises:
        ConfigError: the configuration cannot say of some layer what it is.
    """
    result = copy.deepcopy(dict(config))
    part = part_of(result, path)
    assert isinstance(part, dict)
    main = [layer for layer in layers if layer.number < layer.count]
    if any(layer.number >= layer.count for layer in layers[: len(main)]):
        raise ConfigError(
            "order of layers: expected those for multi-token prediction last, got other layers "
            "behind them. Correct the layer_range."
        )
    if stores_mtp or len(main) < len(layers):
        for key in _MTP:
            if isinstance(part.get(key), int):
                part[key] = len(layers) - len(main)
    in_place = [layer.number for layer in main] == list(range(count))
    if not in_place or any(layer.part != part for layer in main):
        _Follower(part, count, main, tuple(reads)).follow()
    return result, len(main)


class _Follower:
    """Changes one part of a configuration in place."""

    def __init__(
        self, part: dict[str, Any], own_count: int, layers: Sequence[Layer], reads: tuple[str, ...]
    ) -> None:
        self.part = part
        self.old = dict(part)
        self.own_count = own_count
        self.layers = layers
        self.count = len(layers)
        self.reads = reads
        self.model_type = layers[0].model_type

    def follow(self) -> None:
        lists = [key for key, value in self.old.items() if self._is_list(key, value)]
        for key in lists:
            self.part[key] = self._picked(key)
        if "attention_layers" in lists and "attention_types" in self.old:  # of GPT-Neo
            self.part["attention_types"] = [[self.part["attention_layers"], 1]]
        for key in _NUMBERS:
            if isinstance(self.old.get(key), list):
                self.part[key] = self._mapped(key)
        if isinstance(self.old.get("per_layer_config"), dict):
            self.part["per_layer_config"] = {
                str(i): fields
                for i, layer in enumerate(self.layers)
                for number, fields in (layer.part.get("per_layer_config") or {}).items()
                if int(number) == layer.number  # "05", as transformers writes it
            }
        if isinstance(self.old.get("hybrid_override_pattern"), str):
            self.part["hybrid_override_pattern"] = "".join(self._picked("hybrid_override_pattern"))
        for key in listed_by_rule(self.model_type):
            if not self.old.get(key):
                self._write_out(key)
        self._experts()
        if self.old.get("moe_layer_end_index") == self.own_count - 1:
            self.part["moe_layer_end_index"] = self.count - 1
        for key in _DENSE:
            if isinstance(self.old.get(key), int) and "mlp_layer_types" not in lists:
                self._dense(key)
        for period, offset in _PERIODS:
            if isinstance(self.old.get(period), int):
                self._periodic(period, offset)
        if self.old.get("num_kv_shared_layers"):
            self.part["num_kv_shared_layers"] = self.count - self._front(
                "num_kv_shared_layers",
                lambda layer: layer.number < layer.count - layer.part["num_kv_shared_layers"],
            )
        for key in self.reads:
            if key.endswith("types") and key not in self.part and not self._is_known(key):
                _LOG.warning(
                    "config.json does not say %s of the layers: the model gives each layer of the "
                    "output its own by the layer's new number.", key,
                )  # fmt: skip

    def _is_list(self, key: str, value: object) -> bool:
        if not isinstance(value, list) or key in _NUMBERS or key.endswith(_NOT_LAYERS):
            return False
        return len(value) == self.own_count

    def _is_known(self, key: str) -> bool:
        sparse = any(
            self.old.get(f) is not None for f in (*_DENSE, "decoder_sparse_step", "moe_layers")
        )
        return key in listed_by_rule(self.model_type) or (sparse and key == "mlp_layer_types")

    def _value(self, key: str, layer: Layer) -> Any:
        """What a model says of one of its layers."""
        values = layer.part.get(key)
        if not isinstance(values, list | str) or len(values) != layer.count:
            values = implied(layer.model_type, layer.part, key, layer.count) or self.old[key]
        if layer.number >= len(values):
            raise ConfigError(
                f"{key} of layer {layer.number}: expected it in the configuration of each model, "
                f"got {len(values)} entries. Add it to the config.json."
            )
        return values[layer.number]

    def _picked(self, key: str) -> list[Any]:
        return [self._value(key, layer) for layer in self.layers]

    def _mapped(self, key: str) -> list[int]:
        return [
            i for i, layer in enumerate(self.layers) if layer.number in (layer.part.get(key) or ())
        ]

    def _write_out(self, key: str) -> None:
        """Write a list that the model makes by itself, where it would make another one now."""
        known = [implied(y.model_type, y.part, key, y.count) for y in self.layers]
        if any(values is None for values in known):
            return
        wanted = [(values or [])[y.number] for values, y in zip(known, self.layers, strict=True)]
        if wanted != implied(self.model_type, self.part, key, self.count):
            self.part[key] = wanted

    def _experts(self) -> None:
        """Layers with experts: every so many (Qwen MoE, Llama 4)."""
        step = self.old.get("decoder_sparse_step")
        if isinstance(step, int) and step > 0:
            dense = [i for i, y in enumerate(self.layers) if not _is_sparse(y)]
            rule = [i for i in range(self.count) if (i + 1) % step]
            named = self.part.get("mlp_only_layers") or []
            if sorted({*named, *rule}) != dense:
                self.part["mlp_only_layers"] = dense
                self.part["decoder_sparse_step"] = 1
        step = self.old.get("interleave_moe_layer_step")
        if isinstance(step, int) and step > 0 and not isinstance(self.old.get("moe_layers"), list):
            wanted = [i for i, y in enumerate(self.layers) if (y.number + 1) % step == 0]
            if wanted != list(range(step - 1, self.count, step)):
                self.part["moe_layers"] = wanted

    def _dense(self, key: str) -> None:
        """Dense layers at the front: as many, or written out where the model reads a list."""
        kinds = ["dense" if y.number < y.part.get(key, 0) else "sparse" for y in self.layers]
        if "mlp_layer_types" in self.reads:
            if kinds != ["dense" if i < self.old[key] else "sparse" for i in range(self.count)]:
                self.part["mlp_layer_types"] = kinds
            return
        self.part[key] = self._front(key, lambda y: y.number < y.part.get(key, 0))

    def _front(self, key: str, is_first: Callable[[Layer], bool]) -> int:
        """How many layers at the front are of the first kind, and none behind them."""
        kinds = [is_first(layer) for layer in self.layers]
        number = sum(kinds)
        if not all(kinds[:number]):
            behind = kinds.index(False)
            raise ConfigError(
                f"{key} for the new order of layers: expected the layers that it counts together, "
                f"got another one (layer {self.layers[behind].number} of its model, layer {behind} "
                "of the output) between them, which config.json cannot say. Keep these layers "
                "together."
            )
        return number

    def _periodic(self, period: str, offset: str) -> None:
        """A period and an offset that give every layer its kind."""

        def kind(layer: Layer) -> bool:
            return bool(
                layer.number % layer.part[period] == layer.part.get(offset, self.old.get(offset, 0))
            )

        kinds = [kind(layer) for layer in self.layers]
        first = (self.old[period], self.old.get(offset, 0))
        choices = [first, *((p, o) for p in range(1, self.count + 1) for o in range(p))]
        for p, o in choices:
            if kinds == [i % p == o for i in range(self.count)]:
                self.part[period] = p
                if o != self.old.get(offset, 0):
                    self.part[offset] = o
                return
        raise ConfigError(
            f"{period} for the new order of layers: expected one that gives each layer its kind, "
            f"got layers {[y.number for y in self.layers]}, whose kinds have no period. Choose "
            "whole periods of layers."
        )


def _is_sparse(layer: Layer) -> bool:
    if layer.number in (layer.part.get("mlp_only_layers") or ()):
        return False
    return bool((layer.number + 1) % (layer.part.get("decoder_sparse_step") or 1) == 0)
