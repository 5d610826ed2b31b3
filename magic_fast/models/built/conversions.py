"""How transformers turns the names and tensors of a file into those of a model, as data."""

from __future__ import annotations

from typing import Any

_LEGACY = "legacy"


def conversions_of(model: Any) -> list[Any]:
    """The renamings and conversions of a built model, in the order in which they are applied,
    without those that every model has."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [_plain(transform, model) for transform in transforms]


def legacy() -> list[Any]:
    """The renamings of every model."""
    from transformers import conversion_mapping

    find: Any = conversion_mapping.get_checkpoint_conversion_mapping
    return [_plain(transform, None) for transform in find(_LEGACY)]


def _plain(transform: Any, model: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "from": list(transform.source_patterns),
        "to": list(transform.target_patterns),
    }
    if transform.scope_prefix is not None:
        plain["scope"] = [transform.scope_prefix, transform.base_model_prefix or ""]
    operations = getattr(transform, "operations", None)
    if operations is not None:
        plain["steps"] = [_step(operation, transform, model) for operation in operations]
    kind = type(transform).__name__
    if kind == "GroupWeightRename":
        plain["guarded"] = True
    elif kind == "Inkling2IndexOffsetWeightRename":
        plain["offset"] = transform.offset
    return plain


def _step(operation: Any, transform: Any, model: Any) -> list[Any]:
    """The name of an operation and its axes."""
    kind = type(operation).__name__
    if kind == "Transpose":
        axes = operation.dim0, operation.dim1
        if not operation.check_dims:
            return ["transpose", *axes]
        return ["transpose", *axes, *_told_by_width(model, transform.target_patterns[0], axes)]
    known = {
        "MergeModulelist": "stack",
        "Concatenate": "concatenate",
        "Chunk": "chunk",
        "Split": "chunk",
        "Interleave": "interleave",
    }
    if kind in known:
        return [known[kind], operation.dim]
    if kind == "ErnieFuseAndSplitTextVisionExperts":
        return ["deal", operation.stack_dim]
    if kind == "PermuteForRope":
        return ["permute_rope", 0]
    if kind == "Conv3dToLinear":
        return ["flatten", 1]
    return [kind, 0]


def _told_by_width(model: Any, target: str, axes: tuple[int, int]) -> tuple[str, int]:
    """The field of the configuration and the one of two axes of the parameter that is as long as it
    says: by that a file's layout is told from its transpose."""
    field = "hidden_size"
    width = getattr(model.config.get_text_config(), field)
    shape = next(p.shape for name, p in model.named_parameters() if target in name)
    (axis,) = (axis for axis in axes if shape[axis] == width)
    return field, axis
