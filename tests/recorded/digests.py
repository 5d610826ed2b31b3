"""What a result's bytes are: SHA-256 of values and of the files of an output."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: What a record says of the program and not of the result. ``steps`` hashes how the plan spells
#: its recipes, which may be respelled without a byte of a tensor changing.
NOT_OF_THE_RESULT = frozenset({"versions", "version", "steps"})
_MADE_WITH = re.compile(r"^Made with magic_fast .*$", re.MULTILINE)


def digest(value: Any) -> str:
    """Of tensors dtype, shape and bytes; of objects their fields by name."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous().flatten()
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield bytes(x.view(torch.uint8).numpy()) if x.numel() else b""
    elif isinstance(value, nn.Module):
        yield from _parts(value.state_dict())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(str(key)).encode()
            yield from _parts(item)
    elif dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from _parts(dict(sorted(fields.items())))
    elif isinstance(value, list | tuple):
        yield f"{len(value)} of".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Enum):
        yield from _parts(value.value)
    elif isinstance(value, float):
        yield value.hex().encode()
    elif value is None or isinstance(value, str | int):
        yield repr(value).encode()
    else:
        raise TypeError(f"no digest of {type(value)}")


def folder_digests(out: Path) -> dict[str, str]:
    """File → SHA-256 of what the merge decides about it."""
    files = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    root = out.parent if out.is_file() else out
    return {p.relative_to(root).as_posix(): _file_digest(p) for p in files}


def _file_digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        label = header.get("__metadata__", {})
        if "magic_fast" in label:  # what run made it
            label["magic_fast"] = _without(json.loads(label["magic_fast"]))
            data = json.dumps(header).encode() + rest
    elif path.name in ("magic_fast.json", "sweep.json"):
        data = json.dumps(_without(json.loads(data))).encode()
    elif path.name == "README.md":
        data = _MADE_WITH.sub("", data.decode()).encode()
    return hashlib.sha256(data).hexdigest()


def _without(value: Any) -> Any:
    """JSON without what is not of the result."""
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in NOT_OF_THE_RESULT}
    return [_without(v) for v in value] if isinstance(value, list) else value
