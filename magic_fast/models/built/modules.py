"""What each parameter of a module of torch or transformers is, by the module's class."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from magic_fast.models.built.trees import Records
from magic_fast.models.roles import Kind

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

#: (class, parameter) → kind and unit axes of parameters that a forward uses by itself. Read in the
#: forward of each class; tests/models/test_bare_parameters.py computes them.
BARE: dict[tuple[str, str], tuple[Kind, tuple[int, ...] | None]] = {
    ("Llama4TextExperts", "gate_up_proj"): (Kind.MATRIX, (0, 2)),
    ("Llama4TextExperts", "down_proj"): (Kind.MATRIX, (0, 2)),
    ("InklingSharedExperts", "gate_proj"): (Kind.MATRIX, (0, 1)),
    ("InklingSharedExperts", "up_proj"): (Kind.MATRIX, (0, 1)),
    ("InklingSharedExperts", "down_proj"): (Kind.MATRIX, (0, 1)),
    ("JetMoeParallelExperts", "weight"): (Kind.MATRIX, (0, 1)),
    ("DbrxExpertGLU", "w1"): (Kind.MATRIX, (0,)),
    ("DbrxExpertGLU", "v1"): (Kind.MATRIX, (0,)),
    ("DbrxExpertGLU", "w2"): (Kind.MATRIX, (1,)),  # axis 0 counts the inputs of all experts
    ("LongcatFlashExperts", "gate_up_proj"): (Kind.MATRIX, (0, 1)),
    ("LongcatFlashExperts", "down_proj"): (Kind.MATRIX, (0, 1)),
    ("Step3p7Experts", "gate_up_proj"): (Kind.MATRIX, (0, 1)),
    ("Step3p7Experts", "down_proj"): (Kind.MATRIX, (0, 1)),
    ("QuantLinear", "weight"): (Kind.MATRIX, (0,)),
    ("QuantEmbedding", "weight"): (Kind.EMBEDDING, ()),
    ("FunnelRelMultiheadAttention", "r_kernel"): (Kind.MATRIX, (1, 2)),
    ("CsmCodebooksHead", "weight"): (Kind.HEAD, (0, 2)),
    ("RecurrentGemmaRglru", "input_gate_weight"): (Kind.MATRIX, (0, 2)),
    ("RecurrentGemmaRglru", "recurrent_gate_weight"): (Kind.MATRIX, (0, 2)),
    ("ZambaMambaMixer", "x_proj_weight"): (Kind.MATRIX, (0, 1)),
    ("ZambaMambaMixer", "dt_proj_weight"): (Kind.MATRIX, (0, 1)),
    ("XLNetRelativeAttention", "q"): (Kind.MATRIX, (1, 2)),
    ("XLNetRelativeAttention", "k"): (Kind.MATRIX, (1, 2)),
    ("XLNetRelativeAttention", "v"): (Kind.MATRIX, (1, 2)),
    ("XLNetRelativeAttention", "r"): (Kind.MATRIX, (1, 2)),
    ("XLNetRelativeAttention", "o"): (Kind.MATRIX, (0,)),
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): (Kind.MATRIX, (1,)),
    ("T5Gemma2MultiModalProjector", "mm_input_projection_weight"): (Kind.MATRIX, (1,)),
    ("InklingRelativeLogits", "proj"): (Kind.MATRIX, (1,)),
    ("Inkling2RelativeLogits", "proj"): (Kind.MATRIX, (1,)),
    ("XCLIPModel", "prompts_visual_projection"): (Kind.MATRIX, (1,)),
    ("SwiftFormerEfficientAdditiveAttention", "w_g"): (Kind.MATRIX, (1,)),
    ("AMSoftmaxLoss", "weight"): (Kind.CLASSIFIER, (1,)),
    ("Glm5NextTextIndexer", "index_kpool_compress_gate"): (Kind.MATRIX, (0,)),
}
_HYPER = re.compile(r"Hyper(Connection|Head)$")  # `fn` goes through F.linear
_ROUTER = re.compile(r"Router$")
_NORM = re.compile(r"Norm(\d+d)?$|GRN$|RMSNorm")
# Names of parameters that are used by themselves, in the order in which they are tried.
_NAMED: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"^(A|A_log|D|dt_bias|dt_proj_bias|time_decay|time_first|recurrent_param)$"),
     Kind.STATE),
    (re.compile(r"pos_bias_[uv]$|^bias_[uv]$|^r_[rsw]_bias$"), Kind.BIAS),
    (re.compile(r"pos|relative|attention_biases|^rel_|emb_rel|_ape$|time_embeddings"),
     Kind.POSITION),
    (re.compile(r"(^|_)bias(es)?(_|$)|^b\d$"), Kind.BIAS),
    (re.compile(
        r"token|cls|class_emb|query|queries|latent(s|_query|s_[12]d)?$|probe|mask_emb|spec_embed"
        r"|newline|separator|image_(begin|end|sep)|prompt|memory_embedding|object_pointer|^pad_"
        r"|level_embed|silence|feature_extensor|eoi_embedding|spatial_embedding|seg_embed"
        r"|label_embeddings|codevectors|z_L_init"
    ), Kind.TOKEN),
)  # fmt: skip
_SCALES = re.compile(
    r"(?!.*proj$)(scale|gate|gamma|lambda|alpha|beta|time_mix|translate|temperature|mix|static_weight|^scaling$)"
)
_DERIVED = re.compile(r"position_ids|freq|mask|token_type_ids|sin|cos|^bias$")
_PLACES = re.compile(r"pos|wpe|relative|rel_|time_embed", re.IGNORECASE)
GATES = frozenset({"gate", "router", "wg", "classifier", "switch", "shared_expert_gate"})


@dataclass(frozen=True)
class Place:
    """Where a module stands in its model.

    Attributes:
        name: its local name.
        parent: the class of the module that holds it.
        words: sizes that only vocabularies have.
        labels: sizes that only classifiers have.
        output: whether it gives the model's logits over words.
        router: whether it chooses among the experts beside it.
        outside: whether it stands outside the base model, in a head of a task.
    """

    name: str = ""
    parent: str = ""
    words: frozenset[int] = frozenset()
    labels: frozenset[int] = frozenset()
    output: bool = False
    router: bool = False
    outside: bool = False


def records_of(module: nn.Module, place: Place) -> Records:
    """Local name → (kind, unit axes, vocabulary axis, dimensions) of the parameters and buffers
    that the module itself owns."""
    records: Records = {}
    for name, tensor in module._parameters.items():
        if tensor is not None:
            kind, units = _parameter(module, name, tensor, place)
            records[name] = (str(kind), units, _axis(tensor, place.words), tensor.dim())
    for name, buffer in module._buffers.items():
        if buffer is not None:
            kind = _buffer(module, name, buffer)
            records[name] = (str(kind), (), _axis(buffer, place.words), buffer.dim())
    return records


def _axis(tensor: Tensor, sizes: Iterable[int]) -> int | None:
    return next((a for a, n in enumerate(tensor.shape) if n in sizes), None)


def _parameter(
    module: nn.Module, name: str, tensor: Tensor, place: Place
) -> tuple[Kind, tuple[int, ...] | None]:
    owner = type(module).__name__
    if (owner, name) in BARE:
        return BARE[owner, name]
    if isinstance(module, nn.Linear):
        return _linear(name, tensor, place, 0)
    if owner == "Conv1D":  # transformers' linear layer with its weight [in, out]
        return _linear(name, tensor, place, 1 if name == "weight" else 0)
    if isinstance(module, _TRANSPOSED) and name == "weight":
        return Kind.CONVOLUTION, _transposed(module)
    if isinstance(module, _CONVS) and name == "weight":
        logits = _axis(tensor, place.words) == 0
        return (Kind.HEAD if logits else Kind.CONVOLUTION), (0,)
    if isinstance(module, (*_TRANSPOSED, *_CONVS)):
        return Kind.BIAS, (0,)
    if isinstance(module, nn.Embedding) and name == "weight":
        places = _PLACES.search(place.name) or _PLACES.search(owner)
        if places and _axis(tensor, place.words) is None:
            return Kind.POSITION, ()
        return Kind.EMBEDDING, ()
    if isinstance(module, _RECURRENT):
        return (Kind.MATRIX, (0,)) if name.startswith("weight") else (Kind.BIAS, (0,))
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return Kind.MATRIX, (0,)
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return _expert(module, name, tensor)
    if type(module).__name__ == "ParametrizationList":
        return (Kind.CONVOLUTION, (0,)) if name == "original1" else (Kind.SCALE, ())
    if _NORM.search(owner):
        return (Kind.BIAS, ()) if name == "bias" else (Kind.NORM, ())
    if isinstance(module, nn.ParameterList):  # its names are numbers
        name = place.parent.lower()
    return _bare(owner, name, tensor)


def _linear(name: str, tensor: Tensor, place: Place, axis: int) -> tuple[Kind, tuple[int, ...]]:
    if name == "bias":
        return Kind.BIAS, (0,)
    if name != "weight":
        return Kind.SCALE, ()  # of a subclass: the range of a quantised layer
    units = tensor.shape[axis]
    if place.output or units in place.words:
        return Kind.HEAD, (axis,)
    if place.router:
        return Kind.ROUTER, (axis,)
    if place.outside and (units in place.labels or units <= 2):
        return Kind.CLASSIFIER, (axis,)
    return Kind.MATRIX, (axis,)


def _transposed(module: Any) -> tuple[int, ...] | None:
    """[in, out ÷ groups, …]: with as many groups as inputs each unit is a place of both axes;
    with fewer it is no product of axes."""
    if module.groups == 1:
        return (1,)
    return (0, 1) if module.groups == module.in_channels else None


def _expert(module: Any, name: str, tensor: Tensor) -> tuple[Kind, tuple[int, ...] | None]:
    if tensor.dim() == 3:
        return Kind.MATRIX, (0, 2) if module.is_transposed else (0, 1)
    return (Kind.BIAS, (0, 1)) if name.endswith("bias") else _bare("", name, tensor)


def bare_kind(owner: str, name: str, tensor: Tensor) -> Kind:
    """What a parameter is that class ``owner`` uses by itself, by its name and shape."""
    return _bare(owner, name, tensor)[0]


def _bare(owner: str, name: str, tensor: Tensor) -> tuple[Kind, tuple[int, ...] | None]:
    """A parameter that a forward uses by itself."""
    if name == "weight" and tensor.dim() == 2 and _ROUTER.search(owner):
        return Kind.ROUTER, (0,)
    if tensor.dim() == 2 and _HYPER.search(owner) and name in ("fn", "hc_fn"):
        return Kind.MATRIX, (0,)
    if tensor.dim() == 2 and _PLACES.search(owner) and name in ("weight", "embedding"):
        return Kind.POSITION, ()
    for pattern, kind in _NAMED:
        if pattern.search(name):
            return kind, ()
    if tensor.dim() < 2 or tensor.numel() == max(tensor.shape) or _SCALES.search(name):
        return Kind.SCALE, ()
    return Kind.PARAMETER, None


def _buffer(module: nn.Module, name: str, buffer: Tensor) -> Kind:
    if name.startswith(("running_mean", "running_var")):
        return Kind.STATISTICS
    if buffer.dim() == 0 and not buffer.is_floating_point():
        return Kind.COUNTER
    if name in module._non_persistent_buffers_set:
        return Kind.DERIVED
    frozen = _NORM.search(type(module).__name__) and buffer.dim() == 1
    if frozen and name in ("weight", "bias"):
        return Kind.NORM if name == "weight" else Kind.BIAS
    if _DERIVED.search(name):
        return Kind.DERIVED
    return Kind.BIAS if name.endswith("bias") else Kind.BUFFER
