"""From what a user names, a folder or a file, to the weights files it means, or a refusal."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from magic_fast.errors import CheckpointError

from .header import LENGTH_BYTES
from .messages import problem, shown
from .strict_json import load_json_object

_LOG = logging.getLogger("magic_fast")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LFS_PREFIX = b"version https://git-lfs"
MAX_INDEX_BYTES = 100_000_000

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GGUF = "a GGUF file, whose weights are quantised or laid out for llama.cpp"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (a PyTorch pickle checkpoint)",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"GGUF": _GGUF,
    b"<!DOCTYP": "a web page",
    b"<html": "a web page",
}
# of a safetensors file: the upper half of the length, and the first byte of the JSON
_HEADER_BELOW_4_GIB = b"\0\0\0\0{"


@dataclass(frozen=True)
class Located:
    """Where the weights of one checkpoint are.

    Attributes:
        folder: the checkpoint's folder, or None for a bare file.
        files: paths of the weights files, in order.
        weight_map: tensor name to path, as the index says, or None without an index.
        index: path of the index, or None.
    """

    folder: str | None
    files: tuple[str, ...]
    weight_map: dict[str, str] | None = None
    index: str | None = None


def locate(path: str) -> Located:
    """Find the weights files that ``path`` means; headers are not looked at.

    Raises:
        CheckpointError: nothing there, a hub id, pickles, an ambiguous folder, a bad index, a
            missing shard.
    """
    try:
        if os.path.isdir(path):
            return _in_folder(path)
        if os.path.isfile(path):
            return _bare_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    raise _not_found(path)


def refuse_foreign(prefix: bytes, path: str) -> None:
    """Raise a `CheckpointError` where a file's first bytes show a well known other format."""
    if prefix.startswith(LFS_PREFIX[: len(prefix)]) and len(prefix) >= LENGTH_BYTES:
        raise problem(
            "File not downloaded",
            path,
            "its content",
            "a git-lfs pointer",
            "Run `git lfs pull` in that folder, or download the file again",
        )
    if prefix[4:9] == _HEADER_BELOW_4_GIB:
        return  # its length may well begin with the bytes of a pickle: 640 is 80 02
    for magic, kind in _FOREIGN.items():
        if prefix.startswith(magic):
            advice = (
                _CONVERT if "pickle" in kind else "Download the safetensors files of this model"
            )
            raise problem("Not a safetensors file", path, "a safetensors file", kind, advice)


_CONVERT = (
    "Pickles can run code when loaded and are never opened here: convert the checkpoint to "
    "safetensors where you trust it, for example with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
)


def _bare_file(path: str) -> Located:
    if path.endswith(".safetensors"):
        return Located(None, (path,))
    if path.endswith(PICKLE_SUFFIXES):
        raise problem("Pickle checkpoint", path, "safetensors", "a pickle", _CONVERT)
    if path.endswith(INDEX_SUFFIX):
        raise problem(
            "Not a checkpoint",
            path,
            "a folder or a .safetensors file",
            "an index",
            "Name the folder that holds it",
        )
    with open(path, "rb") as file:
        refuse_foreign(file.read(len(LFS_PREFIX)), path)
    raise problem(
        "Not a checkpoint",
        path,
        "a folder or a .safetensors file",
        "another file",
        "Name the model's folder",
    )


def _in_folder(folder: str) -> Located:
    names = sorted(os.listdir(folder))
    weights = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if INDEX_NAME in indices:
        indices = [INDEX_NAME]
    if len(indices) > 1:
        raise _ambiguous(folder, "one index", indices)
    if indices:
        located = _by_index(folder, indices[0], weights)
        if located is not None:
            return located
    if not weights:
        raise _no_weights(folder, names)
    chosen = [SINGLE_NAME] if SINGLE_NAME in weights else weights
    if len(chosen) > 1:
        chosen = _numbered(folder, weights)
    return Located(
        folder, tuple(_existing(os.path.join(folder, name), "a file") for name in chosen)
    )


def _by_index(folder: str, index_name: str, weights: list[str]) -> Located | None:
    """What an index names; None where it is stale: all of that is gone, and model.safetensors is
    there."""
    index = os.path.join(folder, index_name)
    if os.path.getsize(index) > MAX_INDEX_BYTES:
        raise problem(
            "Oversized index",
            index,
            f"at most {MAX_INDEX_BYTES} bytes",
            f"{os.path.getsize(index)} bytes",
        )
    with open(index, "rb") as file:
        raw = file.read()
    refuse_foreign(raw[: len(LFS_PREFIX)], index)
    weight_map = load_json_object(raw, "Corrupt index", index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise problem(
            "Corrupt index", index, 'a "weight_map" from tensors to files', shown(weight_map)
        )
    names = {name for name in weight_map.values() if isinstance(name, str)}
    if SINGLE_NAME in weights and names.isdisjoint(os.listdir(folder)):
        _LOG.warning("%s names files that are all gone: %s is read.", index, SINGLE_NAME)
        return None
    files: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in files:
            files[name] = _shard(folder, index, tensor, name)
    if SINGLE_NAME in weights and SINGLE_NAME not in files:
        raise _ambiguous(folder, f"{index_name} to name {SINGLE_NAME}", [index_name, SINGLE_NAME])
    return Located(
        folder,
        tuple(sorted(files.values())),
        {tensor: files[name] for tensor, name in weight_map.items()},
        index,
    )


def _shard(folder: str, index: str, tensor: str, name: object) -> str:
    """The path of a shard that an index names: within the folder by its name.

    A link may lead anywhere: caches of model hubs are made of links.
    """
    where = f"tensor {shown(tensor)} in {index}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise problem("Corrupt index", where, "the name of a file", shown(name))
    if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
        raise problem(
            "Index naming a path outside the folder",
            where,
            "a file inside the folder",
            shown(name),
            "Do not trust this checkpoint: download it again from its source",
        )
    if name.endswith(PICKLE_SUFFIXES):
        raise problem("Pickle checkpoint", where, "a .safetensors file", shown(name), _CONVERT)
    return _existing(os.path.join(folder, name), f"a file, as {index} names it")


def _existing(path: str, expected: str) -> str:
    """``path`` if it is an ordinary file (opening a pipe would wait for ever) or a link to one."""
    if not os.path.isfile(path):
        got = "a broken link" if os.path.islink(path) else "no such file"
        raise problem("Missing shard", path, expected, got, "Download the missing file")
    return path


def _numbered(folder: str, weights: list[str]) -> list[str]:
    """The one complete set of ``stem-00001-of-0000N.safetensors`` among files without an index."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in weights:
        match = _NUMBERED.fullmatch(name)
        if match:
            sets.setdefault((match["stem"], int(match["count"])), {})[int(match["number"])] = name
    if len(sets) != 1:
        raise _ambiguous(folder, f"{SINGLE_NAME}, an index, or one set of numbered shards", weights)
    ((stem, count), members) = next(iter(sets.items()))
    if len(members) != count or min(members) < 1 or max(members) > count:
        absent = next((n for n in range(1, count + 1) if n not in members), 0)
        raise problem(
            "Missing shard",
            f"{os.path.join(folder, stem)}-{absent:05d}-of-{count:05d}.safetensors",
            f"{count} shards",
            f"{len(members)}",
            "Download the missing file",
        )
    return [members[number] for number in sorted(members)]


def _ambiguous(folder: str, expected: str, names: Iterable[str]) -> CheckpointError:
    listed = list(names)
    got = ", ".join(listed[:8]) + (" …" if len(listed) > 8 else "")
    return problem(
        "Ambiguous weights", folder, expected, got, "Remove what does not belong, or name one file"
    )


def _no_weights(folder: str, names: list[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return problem(
            "Pickle checkpoint", folder, "a .safetensors file", ", ".join(pickles[:4]), _CONVERT
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return problem(
            "No weights",
            folder,
            "a .safetensors file",
            f"{gguf[0]}: {_GGUF}",
            "Download the safetensors files of this model",
        )
    got = ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "an empty folder"
    return problem("No weights", folder, "a .safetensors file", got, "Name the folder of a model")


def _not_found(path: str) -> CheckpointError:
    if os.path.islink(path):
        return problem(
            "Broken link",
            path,
            "a model's folder",
            "a link to nothing",
            "Restore what it points to",
        )
    if _HUB_ID.fullmatch(path) and not os.path.isdir(os.path.dirname(path)):
        return problem(
            "Model not found",
            path,
            "a local folder",
            "a name as on a model hub",
            f"Models are read from local folders: run `hf download {path} --local-dir {path}` "
            "first, or give the folder's path",
        )
    return problem(
        "Model not found",
        path,
        "an existing folder or .safetensors file",
        "nothing there",
        "Correct the path",
    )


def _unreadable(path: str, error: OSError) -> CheckpointError:
    return problem(
        "Unreadable checkpoint",
        error.filename or path,
        "to read it",
        error.strerror or str(error),
        "Check its permissions and the disk",
    )
