"""What names, shapes and dtypes alone tell of a tensor: rules for models that no table has, and for
tensors that a model's tree lacks.

They claim little. What a wrong guess would spoil in silence is left open, with the reason: the axis
of output units in a stack of matrices or a transposed layer, words in a tensor that is just as long
as the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from magic_fast.models.lookup import said_tied
from magic_fast.models.quantised import QUANTISED_NAME
from magic_fast.models.roles import Block, Kind, Role, Tensors

_DERIVED = re.compile(
    r"(^|[._])(inv_freq|position_ids|masked_bias|token_type_ids|cos_cached|sin_cached|causal_mask)$"
)
_STATE = re.compile(r"(^|\.)(A|A_log|D|dt_bias|time_decay|time_first)$")
_NORM = re.compile(r"norm|(^|[._])ln(_?\w{1,3})?[._]|layer_?norm", re.IGNORECASE)
_PLACES = re.compile(r"pos_?emb|position|(^|\.)wpe\.|relative", re.IGNORECASE)
_WORDS = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embeddings?|token_embedding"
    r"|shared|embed_tokens_per_layer|emb)(\.weight)?$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output_layer|unembed|shared_head\.head|predictions\.decoder)\.weight$"
)
_ENDS = re.compile(r"^(output|head|decoder)\.weight$")  # a head if as long as the vocabulary
_HEAD_BIAS = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|predictions(\.decoder)?)\.bias$|^decoder\.bias$"
)
_LOOKED_UP = re.compile(  # of words or of others
    r"(^|\.)(?!\w*proj)\w*embed\w*(\.weight)?$", re.IGNORECASE
)
_CLASSES = re.compile(
    r"(^|\.)((classifier|score)(\.|$)|(qa_outputs|classification_head\.out_proj)\.)"
    # the last layer of timm's, torchvision's and others' models: nothing before it, or nested once
    r"|^(fc|output|proj_out|head_dist|heads?(\.(fc|head|l|\d+))?)\.weight$"
)
_TOKENS = re.compile(r"token|cls|query|queries|latent|probe|newline")
_ROUTER = re.compile(r"(^|\.)(router|(mlp|block_sparse_moe|moe|ffn)\.gate)(\.\w+)?\.weight$")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)\.weight$")
_WIDENS = re.compile(r"(^|\.)(c_attn|c_fc)\.weight$")
_TRANSPOSED = re.compile(r"transpose|deconv|up_?conv|up_?sampl|conv_?t(r|\d|\.)", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|\.)\w*experts?(\.|$|_)")
_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)\.")


@dataclass(frozen=True)
class Headers:
    """The tensors of one model, and what all of them show together.

    Attributes:
        tensors: name → (shape, dtype).
        vocabulary: the sizes of vocabularies by the configuration.
        inputs_first: whether matrices named as GPT-2's are stored [in, out], by those of them that
            are not square; None where none shows it.
    """

    tensors: Tensors
    vocabulary: frozenset[int] = frozenset()
    inputs_first: bool | None = field(default=None)

    @classmethod
    def of(cls, tensors: Tensors, config: Mapping[str, Any]) -> Headers:
        """What ``tensors`` show under ``config``."""
        parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        sizes = frozenset(
            part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)
        )
        lengths = {
            shape[0] for name, (shape, _) in tensors.items() if shape and _WORDS.search(name)
        }
        if lengths and not lengths & sizes:
            sizes = frozenset()  # the embeddings were resized, and the configuration does not say
        shapes = {
            shape for name, (shape, _) in tensors.items()
            if _WIDENS.search(name) and len(shape) == 2 and shape[0] != shape[1]
        }  # fmt: skip
        shown = {rows < columns for rows, columns in shapes}
        return cls(tensors, sizes, shown.pop() if len(shown) == 1 else None)

    def ties(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The head that has the values of the one embedding of words, where none is stored and the
        configuration asks for it, or says nothing and names a class with a head: transformers
        leaves out what is the default."""
        said = said_tied(config)
        names = config.get("architectures") or ["LMHead"]
        headless = all(str(n).endswith("Model") and "LMHead" not in str(n) for n in names)
        if not config or said is False or (said is None and headless):
            return {}
        roles = {name: self.role(name) for name in self.tensors if not _NUMBER.search(name)}
        words = [n for n, r in roles.items() if r.vocabulary == 0 and r.kind is Kind.EMBEDDING]
        has_head = any(role.kind is Kind.HEAD for role in roles.values())
        return {"lm_head.weight": words[0]} if len(words) == 1 and not has_head else {}

    def role(self, name: str) -> Role:
        """What tensor ``name`` is by its header."""
        shape, dtype = self.tensors[name]
        kind, units, doubt = self._kind(name, shape, dtype)
        words = self._words(name, shape, kind)
        unexplained = words is None and kind in _MAY_HAVE_WORDS and any(
            n in self.vocabulary for n in shape
        )  # fmt: skip
        number = _NUMBER.search(name)
        return Role(
            kind,
            units,
            vocabulary=words,
            block=Block(name[: number.start()].rstrip("."), int(number[1])) if number else None,
            canonical=name,
            targets=(name,),
            module=name.rpartition(".")[0],
            units_doubt=doubt,
            words_doubt=f"an axis of {list(shape)} as long as the vocabulary, and no role that "
            "says whether its places are words" if unexplained else None,
        )  # fmt: skip

    def _kind(
        self, name: str, shape: tuple[int, ...], dtype: str
    ) -> tuple[Kind, tuple[int, ...] | None, str | None]:
        whole = dtype.startswith(("I", "U")) or dtype == "BOOL"
        simple = self._simple(name, shape, whole)
        if simple is not None:
            return simple, (0,) if simple is Kind.BIAS and len(shape) == 1 else (), None
        if len(shape) < 2:
            return (Kind.NORM if _NORM.search(name) else Kind.SCALE), (), None
        if _PLACES.search(name):
            return Kind.POSITION, (), None
        if _HEAD.search(name) or (_ENDS.search(name) and shape[0] in self.vocabulary):
            return Kind.HEAD, (0,), None
        if _WORDS.search(name) or (len(shape) == 2 and _LOOKED_UP.search(name)):
            return Kind.EMBEDDING, (), None
        if _EXPERTS.search(name) and len(shape) == 3:
            return Kind.MATRIX, None, (
                f"a stack of matrices {list(shape)} of a model that is not known, of which axis 1 "
                "or axis 2 may count output units"
            )  # fmt: skip
        if not name.endswith("weight"):
            token = _TOKENS.search(name if len(shape) == 3 else name.rpartition(".")[2])
            if math.prod(shape) == max(shape) or (token and len(shape) == 2):  # a vector, or some
                return Kind.TOKEN if token else Kind.SCALE, (), None
        if not name.endswith("weight") and len(shape) == 3:
            kind = Kind.TOKEN if _TOKENS.search(name) else Kind.PARAMETER
            known = kind is Kind.TOKEN
            return kind, () if known else None, None if known else (
                f"a parameter {list(shape)} that is used in a way that its name does not tell"
            )  # fmt: skip
        return self._weight(name, shape)

    def _weight(
        self, name: str, shape: tuple[int, ...]
    ) -> tuple[Kind, tuple[int, ...] | None, str | None]:
        if len(shape) > 2:
            turned = _TRANSPOSED.search(name) is not None
            return Kind.CONVOLUTION, None if turned else (0,), (
                f"a convolution {list(shape)} that may be transposed" if turned else None
            )  # fmt: skip
        if _CONV1D.search(name):
            if self.inputs_first is None:
                return Kind.MATRIX, None, (
                    f"a matrix {list(shape)} that may be stored [in, out], as GPT-2's are"
                )  # fmt: skip
            return Kind.MATRIX, (1,) if self.inputs_first else (0,), None
        if _CLASSES.search(name):
            return Kind.CLASSIFIER, (0,), None
        return (Kind.ROUTER if _ROUTER.search(name) else Kind.MATRIX), (0,), None

    def _simple(self, name: str, shape: tuple[int, ...], whole: bool) -> Kind | None:
        """Kinds that have no axes of units, or only a bias's."""
        if QUANTISED_NAME.search(name) or (whole and len(shape) > 1 and name.endswith("weight")):
            return Kind.QUANTISED
        mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
        if _DERIVED.search(name) or (name.endswith("bias") and (mask or whole)):
            return Kind.DERIVED
        if name.endswith(("running_mean", "running_var")):
            return Kind.STATISTICS
        if whole:
            return Kind.BUFFER if shape else Kind.COUNTER
        if _STATE.search(name):
            return Kind.STATE
        return Kind.BIAS if name.endswith("bias") else None

    def _words(self, name: str, shape: tuple[int, ...], kind: Kind) -> int | None:
        """The axis whose places are words: of embeddings and heads that are as long as the
        vocabulary, or of any length where the configuration does not tell it."""
        if name.endswith("final_logits_bias"):
            return len(shape) - 1
        fits = bool(shape) and (not self.vocabulary or shape[0] in self.vocabulary)
        heads = kind is Kind.HEAD or _WORDS.search(name) or _HEAD_BIAS.search(name)
        return 0 if fits and heads else None


_MAY_HAVE_WORDS = frozenset(
    {Kind.MATRIX, Kind.BIAS, Kind.SCALE, Kind.PARAMETER, Kind.EMBEDDING, Kind.TOKEN}
)
