"""Where every tensor of an output goes, known before a byte is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from magic_fast.errors import InputError

from .header import serialize_header
from .messages import shown
from .tensors import DTYPE_BITS, TensorInfo, TensorSpec

DEFAULT_SHARD_BYTES = 5 * 10**9
#: Loaders of the ecosystem refuse a file that does not say which framework's layout it has.
FORMAT_METADATA: Mapping[str, str] = {"format": "pt"}

_NUMBER = re.compile(r"-\d+-of-\d+(?=\.safetensors$)")


@dataclass(frozen=True)
class ShardPlan:
    """One output file: a value that can be sent to another process.

    Attributes:
        file: name within the output folder.
        header: its first bytes: length, JSON, padding.
        tensors: what it holds, in the order of the data; `TensorInfo.path` is ``file``, offsets are
            absolute.
        file_size: bytes of the whole file.
    """

    file: str
    header: bytes
    tensors: tuple[TensorInfo, ...]
    file_size: int


def plan_shards(
    tensors: Sequence[TensorSpec],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    file_name: str | None = None,
    stem: str = "model",
    metadata: Mapping[str, str] = FORMAT_METADATA,
) -> list[ShardPlan]:
    """Divide tensors among shards, in the order given, and place each in its shard.

    A shard is closed when the next tensor would take its data past ``max_shard_bytes``; a tensor
    larger than that has a shard of its own. Within a shard wider elements lie first (order
    otherwise kept), as every tensor must begin at a multiple of its element's size to be viewed in
    place.

    Args:
        tensors: what to write.
        max_shard_bytes: bytes of data in a shard.
        file_name: put everything into this one file.
        stem: what the names of shards begin with; see :func:`stem_of`.
        metadata: the headers' ``__metadata__``.

    Raises:
        InputError: no tensors, a name twice, or a limit below 1.

    >>> specs = [TensorSpec("a", "F32", (4,)), TensorSpec("b", "F32", (4,))]
    >>> [plan.file for plan in plan_shards(specs, 16)]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if not tensors:
        raise InputError(
            "Nothing to write for the output: expected tensors, got none. Check the inputs."
        )
    if max_shard_bytes < 1:
        raise InputError(
            f"Bad shard size for the output: expected at least 1 byte, got {max_shard_bytes}. Use "
            "for example 5GB."
        )
    _refuse_duplicates(tensors)
    groups = [list(tensors)] if file_name else _fill(tensors, max_shard_bytes)
    plans = []
    for number, group in enumerate(groups, 1):
        name = file_name or _shard_name(stem, number, len(groups))
        group.sort(key=lambda spec: -DTYPE_BITS[spec.dtype])  # stable
        header, infos = serialize_header(group, name, metadata)
        plans.append(
            ShardPlan(name, header, infos, len(header) + sum(info.nbytes for info in infos))
        )
    return plans


def shard_index(plans: Sequence[ShardPlan]) -> dict[str, object]:
    """The content of an index: bytes of data in all, and the weight map."""
    infos = [info for plan in plans for info in plan.tensors]
    return {
        "metadata": {"total_size": sum(info.nbytes for info in infos)},
        "weight_map": {info.name: info.path for info in sorted(infos, key=lambda info: info.name)},
    }


def _fill(tensors: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = []
    size = 0
    for spec in tensors:
        if not groups or size + spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    return groups


def stem_of(config: Mapping[str, Any]) -> str:
    """What the names of a model's weights begin with, by its ``config.json``: diffusers looks for
    others in a component's folder than transformers does."""
    return "diffusion_pytorch_model" if "_class_name" in config else "model"


def index_name(shard: str) -> str:
    """The name of the index beside a shard.

    >>> index_name("model-00001-of-00002.safetensors")
    'model.safetensors.index.json'
    """
    return f"{_NUMBER.sub('', shard)}.index.json"


def _shard_name(stem: str, number: int, count: int) -> str:
    part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
    return f"{stem}{part}.safetensors"


def _refuse_duplicates(tensors: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in tensors:
        if spec.name in seen:
            raise InputError(
                "Tensor written twice for the output: expected distinct names, got "
                f"{shown(spec.name)} again. Name each tensor once."
            )
        seen.add(spec.name)
