"""Models that no table has: conservative rules, said aloud, refused where they would be guesses."""

from __future__ import annotations

import pytest

from magic_fast.errors import InputError
from magic_fast.models import Kind, Source, Tensors, roles_of

UNKNOWN = {"model_type": "nobody_knows_it", "vocab_size": 64}


def tensors(**shapes: tuple[int, ...]) -> Tensors:
    return {name.replace("__", "."): (shape, "F32") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "shape", "kind", "units", "words"),
    [
        ("layers.0.mlp.up.weight", (16, 8), Kind.MATRIX, (0,), None),
        ("layers.0.mlp.up.bias", (16,), Kind.BIAS, (0,), None),
        ("layers.0.norm1.weight", (8,), Kind.NORM, (), None),
        ("layers.0.gamma", (8,), Kind.SCALE, (), None),
        ("embed_tokens.weight", (64, 8), Kind.EMBEDDING, (), 0),
        ("lm_head.weight", (64, 8), Kind.HEAD, (0,), 0),
        ("lm_head.bias", (64,), Kind.BIAS, (0,), 0),
        ("final_logits_bias", (1, 64), Kind.BIAS, (), 1),
        ("position_embeddings.weight", (64, 8), Kind.POSITION, (), None),
        ("classifier.weight", (3, 8), Kind.CLASSIFIER, (0,), None),
        ("layers.0.mlp.gate.weight", (4, 8), Kind.ROUTER, (0,), None),
        ("stem.conv.weight", (8, 3, 3, 3), Kind.CONVOLUTION, (0,), None),
        ("cls_token", (1, 1, 8), Kind.TOKEN, (), None),
        ("layers.0.A_log", (8, 4), Kind.STATE, (), None),
        ("bn.running_var", (8,), Kind.STATISTICS, (), None),
        ("layers.0.rotary_emb.inv_freq", (4,), Kind.DERIVED, (), None),
    ],
)
def test_kinds(
    name: str, shape: tuple[int, ...], kind: Kind, units: tuple[int, ...], words: int | None
) -> None:
    roles = roles_of(UNKNOWN, {name: (shape, "F32")})
    assert (roles[name].kind, roles.unit_axes(name)) == (kind, units)
    assert roles.vocabulary_axis(name) == words


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layers.0.q_proj.weight", "U8"),
        ("layers.0.q_proj.weight.absmax", "F32"),
        ("layers.0.q_proj.qweight", "I32"),
        ("layers.0.q_proj.weight_packed", "I32"),
        ("layers.0.q_proj.weight_scale_inv", "F32"),
        ("layers.0.mlp.experts.down_proj_blocks", "U8"),
    ],
)
def test_quantised(name: str, dtype: str) -> None:
    for config in (UNKNOWN, {"model_type": "llama"}):
        assert roles_of(config, {name: ((8, 8), dtype)})[name].kind is Kind.QUANTISED


def test_counters_and_masks() -> None:
    roles = roles_of({}, {
        "bn.num_batches_tracked": ((), "I64"),
        "h.0.attn.bias": ((1, 1, 16, 16), "F32"),
        "h.1.attn.bias": ((1, 1, 16, 16), "BOOL"),
    })  # fmt: skip
    kinds = [role.kind for role in roles.values()]
    assert kinds == [Kind.COUNTER, Kind.DERIVED, Kind.DERIVED]


def test_one_sentence_says_what_was_assumed() -> None:
    roles = roles_of(UNKNOWN, tensors(a__weight=(8, 8)))
    assert roles.source is Source.HEADERS
    assert roles.assumed == (
        "model type 'nobody_knows_it' is not known: axis 0 of every matrix and convolution is "
        "taken to count output units, and names such as embed_tokens and lm_head to have a row "
        "for each word",
    )
    assert roles_of({}, {}).assumed[0].startswith("no model type is stated: ")


@pytest.mark.parametrize(
    ("name", "shape", "got"),
    [
        ("layers.0.experts.up_proj", (4, 8, 16),
         "a stack of matrices [4, 8, 16] of a model that is not known, of which axis 1 or axis 2 "
         "may count output units"),
        ("decoder.upconv.weight", (8, 4, 2, 2),
         "a convolution [8, 4, 2, 2] that may be transposed"),
        ("h.0.attn.c_proj.weight", (8, 8),
         "a matrix [8, 8] that may be stored [in, out], as GPT-2's are"),
        ("layers.0.mixing", (8, 4, 8),
         "a parameter [8, 4, 8] that is used in a way that its name does not tell"),
    ],
)  # fmt: skip
def test_axes_that_nothing_tells_are_refused_on_use(
    name: str, shape: tuple[int, ...], got: str
) -> None:
    roles = roles_of(UNKNOWN, {name: (shape, "F32")})
    with pytest.raises(InputError) as error:
        roles.unit_axes(name)
    assert str(error.value) == (
        f"output units of {name!r}: expected a model whose layout is known, got {got}. "
        "Name the axis with row_axis, or leave the tensor out."
    )


@pytest.mark.parametrize(("widening", "axis"), [((8, 24), 1), ((24, 8), 0)])
def test_square_layers_follow_those_that_are_not(widening: tuple[int, int], axis: int) -> None:
    names = tensors(h__0__attn__c_attn__weight=widening, h__0__attn__c_proj__weight=(8, 8))
    assert {role.units for role in roles_of(UNKNOWN, names).values()} == {(axis,)}


def test_a_length_that_may_be_the_vocabulary_is_refused_on_use() -> None:
    roles = roles_of(UNKNOWN, tensors(mixer__weight=(8, 64)))
    assert roles.unit_axes("mixer.weight") == (0,)
    with pytest.raises(InputError) as error:
        roles.vocabulary_axis("mixer.weight")
    assert str(error.value) == (
        "vocabulary of 'mixer.weight': expected a tensor whose role is known, got an axis of "
        "[8, 64] as long as the vocabulary, and no role that says whether its places are words. "
        "Merge models of one tokenizer, or make their rows agree first."
    )


def test_a_known_model_has_no_such_doubt() -> None:
    """A matrix as wide as the vocabulary is long is a matrix where the tree says so."""
    name = "model.layers.0.mlp.up_proj.weight"
    roles = roles_of({"model_type": "llama", "vocab_size": 64}, {name: ((64, 8), "F32")})
    assert roles.vocabulary_axis(name) is None
