"""What makes a run that run: everything that decides the bytes of its output, and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from magic_fast._version import __version__
from magic_fast.checkpoint import Checkpoint, InputFile, ShardPlan, changed_inputs, plan_shards
from magic_fast.checkpoint.plan import FORMAT_METADATA
from magic_fast.engine.plan.devices import backend_name
from magic_fast.engine.plan.plan import MergePlan
from magic_fast.methods.registry import registered

LABEL = "magic_fast"  # key of the identity in the header of an output that is a single file


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to be continued, or for a finished output to be its result.

    No path of the machine is in it but those that the configuration itself names.

    Attributes:
        recipe: the configuration as YAML (its hash, where it was read from a header).
        settings: what decides values besides, as plain values: seed, calibration, presets.
        steps: hash of what is done to each tensor.
        layout: hash of the output's headers.
        inputs: every input file as it was when its header was read, named as the configuration
            does.
        backend, device: what computes; their float32 sums differ in the last bits.
        version: of this package.
    """

    recipe: str
    settings: Mapping[str, Any]
    steps: str
    layout: str
    inputs: tuple[InputFile, ...]
    backend: str
    device: str
    version: str = __version__

    def differences(self, now: Identity) -> list[str]:
        """In words, what ``now`` has that this one (before) had not."""
        found = changed_inputs(self.inputs, now.inputs)
        if self.recipe not in (now.recipe, digest(now.recipe)):
            found.append("the configuration")
        for name in sorted(self.settings.keys() | now.settings.keys()):
            was, is_now = self.settings.get(name), now.settings.get(name)
            if was != is_now:
                found.append(f"{name}: {_change(was, is_now)}")
        if self.layout != now.layout:
            found.append("the layout of the output (names, dtypes, shapes, shard size)")
        if not found and self.steps != now.steps:
            found.append("what is done to the tensors")
        for name in ("backend", "device"):
            was, is_now = getattr(self, name), getattr(now, name)
            if was != is_now:
                found.append(f"the {name}: was {was}, is {is_now}")
        if self.version != now.version:
            found.append(f"the version of magic_fast: was {self.version}, is {now.version}")
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Identity:
        """From what ``as_dict`` gave, by way of JSON."""
        if not isinstance(value["settings"], dict):
            raise TypeError("settings")
        own = {f.name: value[f.name] for f in fields(cls)}
        return cls(**own | {"inputs": tuple(InputFile.from_dict(f) for f in value["inputs"])})

    def timeless(self) -> Identity:
        """The same without the inputs' times: no file of an output has a time in it."""
        return replace(self, inputs=tuple(replace(f, mtime_ns=0) for f in self.inputs))

    def label(self) -> str:
        """For the header of an output that is a single file and has no other place for it."""
        short = replace(self.timeless(), recipe=digest(self.recipe))
        return json.dumps(short.as_dict(), sort_keys=True, separators=(",", ":"))


def identity_of(plan: MergePlan, nonfinite: str = "error") -> Identity:
    """The identity of the run of a plan."""
    headers = hashlib.sha256()
    for shard in plan.shards:
        headers.update(shard.file.encode() + b"\0" + shard.header)
    return Identity(
        plan.recipe_text,
        {k: plain(v) for k, v in plan.settings.items()}
        | {"nonfinite": nonfinite}
        | _code_of(plan.method),
        digest(plan.decisions()),
        headers.hexdigest(),
        tuple(
            replace(f, path=name_of(reference, f.path, model.is_file))
            for reference, model in plan.models.items()
            for f in model.files
        ),
        backend_name(plan.backend, plan.device),
        plan.device,
    )


def _code_of(method: str) -> dict[str, str]:
    """What tells the code of a user's function from another's; a recipe stands in the steps."""
    spec = registered().get(method)
    return {} if spec is None or spec.source is None else {"method_source": spec.source()}


def name_of(reference: str, path: str, is_file: bool) -> str:
    """An input file by the name its model has in the configuration."""
    return reference if is_file else os.path.join(reference, os.path.basename(path))


def labelled(plan: MergePlan, identity: Identity) -> list[ShardPlan]:
    """The shards of a plan; the header of a single file also says what run made it."""
    if not plan.out.endswith(".safetensors"):
        return list(plan.shards)
    metadata = {**FORMAT_METADATA, LABEL: identity.label()}
    name = plan.shards[0].file
    return plan_shards([s.spec for s in plan.steps], file_name=name, metadata=metadata)


def digest(text: str) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name))
            for f in fields(value)
            if not f.name.startswith("_")
        }
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value)


def _change(was: Any, now: Any) -> str:
    """What changed; of a group of settings only the members that did."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
        return ", ".join(f"{k} {_change(was.get(k), now.get(k))}" for k in names)
    return f"was {_shown(was)}, is {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "set"
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def label_of(model: Checkpoint) -> Identity | None:
    """What run made an output that is a single file; None where its header does not say."""
    try:
        return Identity.from_dict(json.loads(model.metadata[LABEL]))
    except (KeyError, ValueError, TypeError):
        return None
