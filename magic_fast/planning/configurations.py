"""Whether the weights of several models mean the same: what their configurations say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from magic_fast.checkpoint import Checkpoint, ModelFolder
from magic_fast.errors import CheckpointError
from magic_fast.models.lookup import text_parts

#: Fields that weights are trained under, by what their names have in common. Rotary embeddings and
#: heads are compared by what they come to.
_MEANING = re.compile(
    r"(^|_)(act(ivation)?(_fn|_function)?|eps(ilon)?|window|softcap(ping)?|multiplier|topk(_prob)?)$"
    r"|^(use_)?sliding_window|^layer_types$|rotary|^query_pre_attn_scalar$|^num_experts_per_tok$"
    r"|^logits?_scal(e|ing)$|^(routed_)?scaling_factor$|^alibi$|^parallel_attn$|^position_embedding"
    r"|^scale_attn|^attention_bias$|^use_qk_norm$|^qk_layernorm$|^do_layer_norm_before$"
)
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_THETA = ("rope_theta", "rotary_emb_base")


def compare_configurations(
    models: Mapping[str, Checkpoint],
    taken: str | None = None,
    files: Checkpoint | ModelFolder | None = None,
) -> list[str]:
    """One warning for each model whose configuration gives its weights another meaning than the one
    that the result takes, the first one's or that of ``files``, called ``taken``: the fields, and
    both values.

    Raises:
        CheckpointError: attention of other heads, though the tensors have the same shapes.
    """
    first = {} if taken is None or files is None else {taken: files}
    known = {name: _part(one.config) for name, one in {**first, **models}.items() if one.config}
    if len(known) < 2:
        return []
    (chosen, expected), *others = known.items()
    warnings = []
    for name, part in others:
        _check_heads(name, part, chosen, expected)
        differing = list(_differences(part, expected))
        if differing:
            said = ", ".join(f"{key} ({own!r}, there {other!r})" for key, own, other in differing)
            warnings.append(
                f"config.json of {name} differs from that of {chosen} in {said}: their weights "
                "were trained to mean other things. The result takes the configuration of "
                f"{chosen}."
            )
    return warnings


def _part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text part of a configuration, else all of it."""
    return next(iter(text_parts(config)[1:]), config)


def _check_heads(
    name: str, part: Mapping[str, Any], first: str, expected: Mapping[str, Any]
) -> None:
    here, there = _heads(part), _heads(expected)
    same_width = _stated(part, _WIDTHS) == _stated(expected, _WIDTHS)
    if here is not None and there is not None and here != there and same_width:
        raise CheckpointError(
            f"attention heads of {name}: expected {there[0]} of {there[1]} as in {first}, got "
            f"{here[0]} of {here[1]}, by config.json. Rows of other heads do not belong together: "
            "merge models of one architecture."
        )


def _heads(part: Mapping[str, Any]) -> tuple[int, int] | None:
    """How many heads there are, and how wide each is; None where that is not stated."""
    count, width = _stated(part, _HEADS), _stated(part, _WIDTHS)
    size = part.get("head_dim") or (width // count if count and width else None)
    return (count, size) if isinstance(count, int) and isinstance(size, int) else None


def _stated(part: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((part[key] for key in keys if isinstance(part.get(key), int)), None)


def _differences(
    part: Mapping[str, Any], expected: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(field, value, the other's value) of what differs. What one of them leaves to its default is
    not compared."""
    here, there = part.get("model_type"), expected.get("model_type")
    if here and there and here != there:
        yield "model_type", here, there
    for key in expected.keys() & part.keys():
        if _MEANING.search(key) and None not in (part[key], expected[key]):
            same_kind = not isinstance(part[key], list)  # of layers, which may be more or fewer
            if same_kind and part[key] != expected[key]:
                yield key, part[key], expected[key]
    one, other = _rope(part), _rope(expected)
    for key in sorted(one.keys() | other.keys()):
        if key == "rope_theta" and (key not in one or key not in other):
            continue
        if one.get(key) != other.get(key):
            yield key, one.get(key), other.get(key)


def _rope(part: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding, whichever release of transformers wrote it."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        stated = part.get(key)
        rope |= dict(stated) if isinstance(stated, Mapping) else {}
    if "type" in rope:  # as older releases call it
        rope.setdefault("rope_type", rope.pop("type"))
    if rope.get("rope_type") == "default":
        del rope["rope_type"]
    theta = rope.get("rope_theta", next((part[k] for k in _THETA if k in part), None))
    return {k: v for k, v in {**rope, "rope_theta": theta}.items() if v is not None}
