"""Checkpoints on disk, read and written in place by byte ranges. Standard library only."""

from .coverage import Coverage
from .file_reader import FileReader
from .fs import REAL, FileSystem, HandleCache
from .hashing import InputFile, changed_inputs
from .header import Header, parse_header, serialize_header
from .plan import (
    DEFAULT_SHARD_BYTES,
    FORMAT_METADATA,
    ShardPlan,
    plan_shards,
    shard_index,
    stem_of,
)
from .reader import Checkpoint, ModelFolder, open_checkpoint, open_folder
from .shard_files import ShardFiles
from .sidecar import (
    CONFIG_DTYPES,
    copy_sidecars,
    sidecar_files,
    sidecar_source,
    updated_config,
)
from .tensors import DTYPE_BITS, TensorInfo, TensorSpec, tensor_nbytes
from .writer import OutputFolder

__all__ = [
    "CONFIG_DTYPES",
    "DEFAULT_SHARD_BYTES",
    "DTYPE_BITS",
    "FORMAT_METADATA",
    "REAL",
    "Checkpoint",
    "Coverage",
    "FileReader",
    "FileSystem",
    "HandleCache",
    "Header",
    "InputFile",
    "ModelFolder",
    "OutputFolder",
    "ShardFiles",
    "ShardPlan",
    "TensorInfo",
    "TensorSpec",
    "changed_inputs",
    "copy_sidecars",
    "open_checkpoint",
    "open_folder",
    "parse_header",
    "plan_shards",
    "serialize_header",
    "shard_index",
    "sidecar_files",
    "sidecar_source",
    "stem_of",
    "tensor_nbytes",
    "updated_config",
]
