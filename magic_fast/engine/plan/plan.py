"""A merge of checkpoints as data: for each output tensor its sources, what to do, and its place.
No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os.path import basename
from typing import Any

from magic_fast.checkpoint import Checkpoint, ModelFolder, ShardPlan, plan_shards, stem_of
from magic_fast.checkpoint.fs import REAL
from magic_fast.checkpoint.tokenizer import OutputTokenizer
from magic_fast.engine.plan.budget import Budget, budget_of
from magic_fast.engine.plan.step import Step


@dataclass
class MergePlan:
    """Everything that is known before anything is merged.

    Attributes:
        method: for the reader.
        steps: one per output tensor.
        shards: where each lands.
        models: reference → checkpoint, base first.
        donor: reference of the model whose small files come along.
        out: where the result goes.
        backend: the backend asked for, or None.
        num_layers: layers of the output where slices fixed it.
        vocab_size: where embeddings were cut or aligned, else None.
        tokenizer: where its files are not just those of the donor, else None.
        recipe_text: the configuration as YAML, for the model card.
        warnings: what the user should know.
        memory: bytes that the user allows; None: blocks of the default size, and for what must be
            held whole as much as the machine has free.
        device: where it is merged.
        settings: what decides values beside ``recipe_text``, by the names users know.
        untied: whether weights that the donor's configuration ties are apart in the result.
        config: the configuration that follows the layers, None where it is as in the file.
        files: whose small files come along; None for the donor's.
    """

    method: str
    steps: Sequence[Step]
    shards: Sequence[ShardPlan]
    models: Mapping[str, Checkpoint]
    donor: str
    out: str
    backend: str | None = None
    num_layers: int | None = None
    vocab_size: int | None = None
    recipe_text: str = ""
    warnings: list[str] = field(default_factory=list)
    memory: int | None = None
    device: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: OutputTokenizer | None = None
    untied: bool = False
    config: Mapping[str, Any] | None = None
    files: Checkpoint | ModelFolder | None = None

    def decisions(self) -> str:
        """What is done to each tensor, as text: the same for the same merge, wherever its files
        lie."""
        words: dict[int, str] = {}  # recipes and arguments are shared by many steps

        def word(value: object) -> str:
            found = words.get(id(value))
            if found is None:
                found = words[id(value)] = repr(value)
            return found

        models = {model: number for number, model in enumerate(self.models)}
        files = {f.path: basename(f.path) for m in self.models.values() for f in m.files}
        lines = [self.method]
        for s in self.steps:
            sources = [
                (models[i.model], files[i.info.path], i.info.offset, i.info.dtype, i.shape)
                for i in s.inputs
            ]
            roles = (s.base is not None, s.merged is not None, s.whole, s.copy)
            head = (s.name, s.shape, s.dtype, s.cast, s.method, s.preset, roles)
            how = f"{word(s.recipe)} {word(s.arguments)} {word(s.calibration)}"
            lines.append(f"{head!r} {sources!r} {how}")
        return "\n".join(lines)

    @property
    def input_bytes(self) -> int:
        """Bytes to read, a tensor counted once however many steps use it."""
        seen: dict[tuple[str, int], int] = {}
        for source in (i for s in self.steps for i in s.inputs):
            place = source.info.path, source.info.offset
            # with an adapter on it, it may be read as a wider type than it is stored
            seen[place] = min(source.nbytes, seen.get(place, source.nbytes))
        return sum(seen.values())

    @property
    def output_bytes(self) -> int:
        return sum(s.spec.nbytes for s in self.steps)

    @property
    def disk_needed(self) -> int:
        return sum(shard.file_size for shard in self.shards)

    @cached_property
    def budget(self) -> Budget:
        """What is held in memory, and what may be."""
        return self.budget_with()

    def budget_with(self, *, staged: bool = True) -> Budget:
        """As ``budget``; ``staged``: see :func:`~magic_fast.engine.plan.budget.budget_of`."""
        return budget_of(
            self.steps,
            beside=sum(model.overhead for model in self.models.values()),
            memory=self.memory,
            device=self.device,
            backend=self.backend,
            staged=staged,
        )

    @property
    def peak_memory(self) -> int:
        """Bytes of buffers: the blocks that go round, and tensors that must be held whole."""
        return self.budget.total

    def describe(self) -> dict[str, Any]:
        """Plain values, for ``--dry-run`` and JSON."""
        return {
            "method": self.method,
            "backend": self.backend or "auto",
            "tensors": len(self.steps),
            "inputs": [{"path": c.path, "bytes": c.nbytes} for c in self.models.values()],
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "shards": [
                {"file": s.file, "bytes": s.file_size, "tensors": len(s.tensors)}
                for s in self.shards
            ],
            "peak_memory_bytes": self.peak_memory,
            "memory_allowed_bytes": self.budget.allowed,
            "held": self._describe_held(),
            "disk_needed_bytes": self.disk_needed,
            "disk_free_bytes": free_bytes(self.out),
            "warnings": list(self.warnings),
            "steps": [_describe(step) for step in self.steps],
        }

    def _describe_held(self) -> dict[str, Any] | None:
        """The largest tensor that must be held whole, if any."""
        own = self.budget
        return {"tensor": own.tensor, "bytes": own.held, "why": own.why} if own.held else None


def _describe(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "shape": list(step.shape),
        "dtype": step.dtype,
        "sources": [f"{i.model}:{i.info.name}" for i in step.inputs],
        "action": "copy" if step.copy else ("calibrate" if step.merged else step.method),
        "weights": None if step.recipe is None else list(step.recipe.weights),
        "density": None if step.recipe is None else list(step.recipe.trim.density),
        "scale": None if step.recipe is None else step.recipe.scale,
        "calibrated": step.calibration is not None,
    }


def free_bytes(out: str) -> int:
    """Free bytes where ``out`` will lie."""
    import os

    place = os.path.dirname(os.path.abspath(out))
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return REAL.free_bytes(place)


def place(
    steps: Sequence[Step], out: str, max_shard_size: int, donor: Checkpoint | ModelFolder
) -> list[ShardPlan]:
    """Where every output tensor goes, in files named as the donor's library looks for them; one
    file where ``out`` names one."""
    import os

    single = os.path.basename(out) if out.endswith(".safetensors") else None
    specs, stem = [s.spec for s in steps], stem_of(donor.config)
    return plan_shards(specs, max_shard_size, file_name=single, stem=stem)
