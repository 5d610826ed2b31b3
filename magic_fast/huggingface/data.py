"""Calibration samples from files: texts, token ids or images, made into batches of a model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.inputs import Inputs, called_with
from magic_fast.calibration.samples import Sampling
from magic_fast.errors import CheckpointError, InputError, missing_package
from magic_fast.huggingface.models import library

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def batches_by_task(
    data: Mapping[str, Any],
    model: nn.Module,
    folder: str,
    sampling: Sampling,
    inputs: Inputs | None = None,
    warnings: list[str] | None = None,
) -> dict[str, list[Any]]:
    """Task → its batches, of a path, or made by ``inputs`` of those that are given;
    ``warnings`` takes what is left out of these.

    Raises:
        InputError: ``inputs`` without batches that it could take; besides as
            :func:`read_batches` and :func:`called_with`.
    """
    paths = {task: value for task, value in data.items() if isinstance(value, str | Path)}
    if inputs is not None and len(paths) == len(data):
        raise InputError(
            "inputs: expected it with batches, got it with files alone, whose samples are made for "
            "the model already. Leave it out."
        )
    given = called_with({t: v for t, v in data.items() if t not in paths}, inputs, model, warnings)
    return {
        task: read_batches(paths[task], task, model, folder, sampling)
        if task in paths
        else list(given[task])
        for task in data
    }


def read_batches(
    path: str | Path, task: str, model: nn.Module, folder: str, sampling: Sampling
) -> list[dict[str, Tensor]]:
    """The batches of one task.

    Args:
        path: a ``.jsonl`` whose lines are texts, lists of token ids, or objects with ``text``,
            ``input_ids`` or ``image`` (a path relative to the file); a ``.txt`` of one text a line;
            or a folder of images.
        task: for messages.
        model: whose ``forward`` tells what it takes.
        folder: of the checkpoint, with its tokenizer or image processor.
        sampling: how much of it.
    """
    given = Path(path).expanduser()
    rows = list(islice(_rows(given, task), sampling.samples))
    if not rows:
        raise InputError(
            f"data of task {task!r}: expected at least one sample in {str(path)!r}, got none."
        )
    takes = inspect.signature(model.forward).parameters
    reader = _Reader(task, takes, folder, model, sampling)
    size = sampling.batch_size
    return [reader.batch(rows[at : at + size]) for at in range(0, len(rows), size)]


def _rows(path: Path, task: str) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in IMAGES:
                yield {"image": str(file)}
        return
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(
            f"data of task {task!r}: expected a .jsonl, a .txt or a folder of images, got "
            f"{str(path)!r}."
        )
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = line.rstrip("\n") if path.suffix == ".txt" else _json(line)
                    yield _row(row, path, number)
    except OSError as error:
        raise InputError(
            f"data of task {task!r}: expected a file that can be read, got {error}."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"data of task {task!r}: expected UTF-8 text in {str(path)!r}.") from None


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _row(row: Any, path: Path, number: int) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, list):
        row = {"input_ids": row}
    if isinstance(row, dict):
        kept = {k: row[k] for k in ("text", "input_ids", "image") if k in row}
        ids = kept.get("input_ids", [0])
        texts = [kept[k] for k in ("text", "image") if k in kept]
        if kept and ids and _all_of(ids, int) and _all_of(texts, str):
            if "image" in kept:
                kept["image"] = str(path.parent / kept["image"])
            return kept
    raise InputError(
        f"sample in line {number} of {str(path)!r}: expected a text, a list of token ids, or an "
        "object with 'text', 'input_ids' or 'image', got something else."
    )


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(v) is kind for v in values)


class _Reader:
    """Rows of one task to batches; tokenizer and image processor are loaded when first needed."""

    def __init__(
        self,
        task: str,
        takes: Mapping[str, Any],
        folder: str,
        model: nn.Module,
        sampling: Sampling,
    ) -> None:
        self._task, self._takes, self._folder = task, takes, folder
        self._config: Any = getattr(model, "config", None)
        self._sampling = sampling
        self._loaded: dict[str, Any] = {}

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        kinds = {("image" if "image" in r else "", "text" if r.keys() - {"image"} else "")
                 for r in rows}  # fmt: skip
        if len(kinds) > 1:
            raise InputError(
                f"data of task {self._task!r}: expected samples of one kind, got images and texts "
                "mixed."
            )
        made: dict[str, Tensor] = {}
        if "image" in rows[0]:
            self._check("pixel_values", "images")
            made["pixel_values"] = self._pixels([r["image"] for r in rows])
        if rows[0].keys() - {"image"}:
            self._check("input_ids", "text")
            made |= self._tokens([self._ids(r) for r in rows])
        return made

    def _check(self, argument: str, what: str) -> None:
        if argument not in self._takes:
            wanted = "images" if "pixel_values" in self._takes else "text or token ids"
            raise InputError(
                f"data of task {self._task!r}: expected {wanted}, which the model takes, got "
                f"{what}."
            )

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        length = self._sampling.max_length
        if "input_ids" in row:
            return list(row["input_ids"])[:length]
        tokenizer = self._load("AutoTokenizer", "tokenizer", "Or give token ids: 'input_ids'.")
        found: list[int] = tokenizer(row["text"], truncation=True, max_length=length)["input_ids"]
        if not found:
            raise InputError(
                f"data of task {self._task!r}: expected texts of at least one token, got none in "
                f"{row['text']!r}."
            )
        return found

    def _tokens(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        longest = max(map(len, rows))
        pad = getattr(self._config, "pad_token_id", None) or 0
        ids = torch.full((len(rows), longest), int(pad), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
            mask[n, : len(row)] = 1
        made = {"input_ids": ids}
        if "attention_mask" in self._takes:
            made["attention_mask"] = mask
        if "decoder_input_ids" in self._takes:
            start = getattr(self._config, "decoder_start_token_id", None)
            made["decoder_input_ids"] = torch.full((len(rows), 1), int(start or 0))
        return made

    def _pixels(self, paths: Sequence[str]) -> Tensor:
        try:
            from PIL import Image, UnidentifiedImageError
        except ImportError:
            raise missing_package("pillow", "for images", "hf") from None
        processor = self._load("AutoImageProcessor", "image processor", "")
        images = []
        for path in paths:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise InputError(
                    f"image {path!r} of task {self._task!r}: expected one that can be read, got "
                    f"{error}."
                ) from None
        found: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
        return found

    def _load(self, kind: str, what: str, advice: str) -> Any:
        if kind not in self._loaded:
            load: Callable[..., Any] = getattr(library(), kind).from_pretrained
            try:
                self._loaded[kind] = load(self._folder, local_files_only=True)
            except Exception as error:  # each library beneath has its own
                reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
                raise CheckpointError(
                    f"{what} for the data of task {self._task!r}: expected its files in "
                    f"{self._folder!r}, got {type(error).__name__}: {reason} "
                    f"Put them beside the weights.{' ' + advice if advice else ''}"
                ) from None
        return self._loaded[kind]
