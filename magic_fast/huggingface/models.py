"""Models of transformers by their structure alone: built without weights, which are read layer by
layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.streamed import forbid_weights
from magic_fast.checkpoint import Checkpoint
from magic_fast.errors import CheckpointError, missing_package


def library() -> Any:
    """The package transformers.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers", "to run models of checkpoints", "hf") from None
    return transformers


def model_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """(class, configuration) of a checkpoint, as its config.json names them.

    Raises:
        CheckpointError: it does not, or names a class that transformers lacks. Code that lies
            beside a checkpoint is never run.
    """
    transformers = library()
    names = checkpoint.config.get("architectures") or []
    where = f"config of {checkpoint.path!r}"
    if checkpoint.folder is None or len(names) != 1:
        raise CheckpointError(
            f"{where}: expected a config.json with one name under 'architectures', got "
            f"{'no folder' if checkpoint.folder is None else names!r}. Name the model's folder."
        )
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(
            f"{where}: expected an architecture of transformers {transformers.__version__}, got "
            f"{names[0]!r}. A model with code of its own can be calibrated in Python: "
            "mf.calibrate_features."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: expected a configuration that transformers reads, got {error}"
        ) from None
    return found, config


def build_structure(checkpoint: Checkpoint) -> nn.Module:
    """The model without weights: its parameters are on the meta device, its buffers are real."""
    kind, config = model_class(checkpoint)
    with without_weights():
        model: nn.Module = kind(config)
    model.tie_weights()  # type: ignore[operator]
    forbid_weights(model)
    for module in model.modules():  # cached keys and values of all samples would be held
        own = getattr(module, "config", None)
        if getattr(own, "use_cache", False):
            own.use_cache = False  # type: ignore[union-attr]
    return model.eval()


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made within it lose their parameters' values as they register them; buffers, which a
    checkpoint need not have, keep theirs."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """(name in the model → name in the checkpoint, names that the checkpoint lacks).

    Names may differ by the prefix of the base model, and by what transformers renames on loading;
    a tied parameter is stored under any of its names. Buffers that a checkpoint lacks keep the
    value that they were built with.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        tied.setdefault(id(parameter), []).append(name)
    renamed = _renamed(model, checkpoint)
    found, missing = {}, []
    for name, tensor in tensors.items():
        names = [name, *(n for n in tied.get(id(tensor), ()) if n != name)]
        forms = [f for n in names for f in (n, prefix + n, n.removeprefix(prefix))]
        stored = next((f for f in forms if f in checkpoint), None)
        stored = stored or next((renamed[n] for n in names if n in renamed), None)
        info = checkpoint.resolve(stored) if stored is not None else None
        if info is not None and info.shape == tuple(tensor.shape):
            found[name] = info.name  # of tied names the stored one
        elif name in parameters:
            missing.append(name)
    return found, missing


def _renamed(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the model → stored name, where transformers only renames (since version 5). What it
    also cuts or joins has no entry."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        changes = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [c for c in changes if isinstance(c, WeightRenaming)]
        state, prefix = model.state_dict(keep_vars=True), getattr(model, "base_model_prefix", "")
        return {
            rename_source_key(name, renamings, [], prefix, state)[0]: name for name in checkpoint
        }
    except (ImportError, AttributeError, TypeError):  # no public interface: other versions differ
        return {}


def load_whole(checkpoint: Checkpoint) -> nn.Module:
    """The model with its weights, by transformers itself, which knows older layouts of names."""
    kind, _ = model_class(checkpoint)
    try:
        model: nn.Module = kind.from_pretrained(
            checkpoint.folder, dtype="auto", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"model {checkpoint.path!r}: expected one that transformers loads, got {error}"
        ) from None
    return model.eval()


def materialise(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters and buffers their values (in float32, on the values' device), tied ones
    together."""
    made: dict[int, nn.Parameter] = {}
    for name, value in tensors.items():
        owner, _, local = name.rpartition(".")
        module = model.get_submodule(owner)
        if local in module._buffers:
            module._buffers[local] = value
            continue
        kept = module._parameters[local]
        own = made.get(id(kept))
        if own is None:
            own = made[id(kept)] = nn.Parameter(value.float(), requires_grad=False)
        module._parameters[local] = own


def move_buffers(model: nn.Module, device: str) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(torch.device(device))
