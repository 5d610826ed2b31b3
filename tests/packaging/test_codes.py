"""The numbers of words: `recipe/codes.py` against the enums of the C headers and
`kernels/words.py`, which cannot import it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import pytest

from magic_fast.ops.cuda.calls import RULE
from magic_fast.recipe import codes

#: Enum of C → what its members begin with, and the table or class that has their numbers.
C_ENUMS: dict[str, tuple[str, object]] = {
    "mf_dtype": ("MF_", codes.DTYPES),
    "mf_trim": ("MF_TRIM_", codes.CpuTrim),
    "mf_tie_rule": ("MF_TIES_", codes.TIE_RULES),
    "mf_rescale": ("MF_RESCALE_", codes.RESCALES),
    "mf_vote": ("MF_VOTE_", codes.VOTES),
    "mf_vote_on": ("MF_VOTE_", codes.VOTES_ON),
    "mf_zero_vote": ("MF_ZERO_", codes.ZERO_VOTES),
    "mf_contributors": ("MF_", codes.CONTRIBUTORS),
    "mf_reduce": ("MF_", codes.REDUCES),
    "mf_consensus": ("MF_CONSENSUS_", codes.ConsensusKind),
    "mf_variant": ("MF_", codes.VARIANTS),
    "mf_eps_mode": ("MF_EPS_", codes.EPS_MODES),
    "mf_direction": ("MF_", codes.DIRECTIONS),
    "mf_gpu_kind": ("MF_GPU_", codes.GpuTrim),
    "mf_gpu_key": ("MF_KEY_", codes.Key),
}
#: Of the C surface alone.
NOT_WORDS = {"mf_status", "mf_isa"}
#: Words that another table has under the same number: a factor, not a norm; the same along a row;
#: a mask in CUDA.
NOT_IN_C = {"KEEP_PROBABILITY", "SPECTRAL", "VARIED"}

#: Words of kernels/words.py → the table or class that has them, and their name there.
TRITON_WORDS: dict[str, tuple[object, str]] = {
    "KEEP_ALL": (codes.GpuTrim, "ALL"),
    **{word: (codes.GpuTrim, word) for word in ("ABOVE", "BAND", "RANDOM", "BYTES", "VARIED")},
    "NO_VOTE": (codes.VOTES, "NONE"),
    **{word: (codes.VOTES, word) for word in ("MASS", "COUNT")},
    **{f"ZERO_{word}": (codes.ZERO_VOTES, word) for word in ("POSITIVE", "NEGATIVE", "MAJORITY")},
    "ZERO_DROP": (codes.ZERO_VOTES, "DROP"),
    **{word: (codes.CONTRIBUTORS, word) for word in ("AGREEING", "NONZERO")},
    "EVERYBODY": (codes.CONTRIBUTORS, "ALL"),
    **{word: (codes.REDUCES, word) for word in ("SUM", "MEAN", "WEIGHTED_MEAN", "MAX")},
    "NO_CONSENSUS": (codes.ConsensusKind, "NONE"),
    "BY_LAMBDA": (codes.ConsensusKind, "LAMBDA"),
    "GIVEN": (codes.ConsensusKind, "GIVEN"),
    **{w: (codes.Integers, w) for w in vars(codes.Integers) if w.isupper() and w != "END"},
    **{w: (codes.Floats, w) for w in vars(codes.Floats) if w.isupper() and w != "END"},
    **{f"BY_{word}": (codes.Key, word) for word in ("MAGNITUDE", "VARIANCE", "SCORE")},
    "EXACT": (codes.TIE_RULES, "EXACT"),
    "KEEP_EQUAL": (codes.TIE_RULES, "KEEP_ALL"),
    "DROP_EQUAL": (codes.TIE_RULES, "DROP_ALL"),
    **{word: (codes.VARIANTS, word) for word in ("MANIFOLD", "SPHERE")},
    **{f"EPS_{word}": (codes.EPS_MODES, word) for word in ("ABSOLUTE", "RELATIVE", "NONE")},
    **{word: (codes.DIRECTIONS, word) for word in ("FREE", "GROW", "SHRINK")},
}


def numbers_of(table: object) -> dict[str, int]:
    """Word → number of a table (by enum members or strings) or a class of constants."""
    if isinstance(table, Mapping):
        named = {key.name if isinstance(key, Enum) else str(key): n for key, n in table.items()}
        # dtypes that other tests met are kept in their table
        return {w: n for w, n in named.items() if n is not None and not w.startswith("torch.")}
    return {word: n for word, n in vars(table).items() if word.isupper()}


def c_enums(source: str) -> dict[str, dict[str, int]]:
    """Enum → member → number."""
    plain = re.sub(r"//[^\n]*", "", source)
    return {
        name: {m: int(n) for m, n in re.findall(r"(\w+)\s*=\s*(\d+)", body)}
        for name, body in re.findall(r"typedef enum (\w+) \{(.*?)\}", plain, re.S)
    }


def c_fields(source: str, struct: str) -> tuple[str, ...]:
    """Names of the fields of a struct, in order."""
    plain = re.sub(r"//[^\n]*", "", source)
    body = re.search(rf"typedef struct {struct} \{{(.*?)\}}", plain, re.S)
    assert body is not None, struct
    return tuple(n for line in body[1].split(";") for n in re.findall(r"(\w+)\s*(?=,|$)", line))


def triton_words(source: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """(word → number, fields of Rule) of kernels/words.py, which imports Triton."""
    numbers: dict[str, int] = {}
    fields: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            (target,) = node.targets
            numbers[ast.unparse(target)] = ast.literal_eval(node.value.args[0])
        elif isinstance(node, ast.ClassDef) and node.name == "Rule":
            fields = [ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)]
    return numbers, tuple(fields)


def differences_from_c(source: str) -> list[str]:
    """What the enums of a header say otherwise."""
    found = []
    for name, members in c_enums(source).items():
        if name in NOT_WORDS:
            continue
        prefix, table = C_ENUMS[name]
        theirs = {member.removeprefix(prefix): n for member, n in members.items()}
        ours = {w: n for w, n in numbers_of(table).items() if w not in NOT_IN_C}
        if theirs != ours:
            found.append(f"{name}: {theirs}, here {ours}")
    return found


def differences_from_triton(source: str) -> list[str]:
    """What kernels/words.py says otherwise."""
    numbers, fields = triton_words(source)
    ours = {word: numbers_of(table)[name] for word, (table, name) in TRITON_WORDS.items()}
    found = [
        f"{word}: {numbers.get(word)}, here {ours.get(word)}"
        for word in sorted({*numbers, *ours})
        if numbers.get(word) != ours.get(word)
    ]
    if fields != codes.Rule._fields:
        found.append(f"Rule: {fields}, here {codes.Rule._fields}")
    return found


@pytest.fixture(scope="module")
def headers(root: Path) -> str:
    names = ("magic_fast.h", "magic_fast_cuda.h")
    return "\n".join((root / "csrc/include" / name).read_text() for name in names)


@pytest.fixture(scope="module")
def words(root: Path) -> str:
    return (root / "kernels/words.py").read_text()


def test_c_has_the_same_numbers(headers: str) -> None:
    assert set(c_enums(headers)) == {*C_ENUMS, *NOT_WORDS}
    assert differences_from_c(headers) == []


def test_triton_has_the_same_numbers(words: str) -> None:
    assert differences_from_triton(words) == []


def test_cuda_takes_the_fields_of_the_rule_that_its_struct_has(headers: str) -> None:
    assert RULE == c_fields(headers, "mf_gpu_rule")
    assert [field for field in codes.Rule._fields if field in RULE] == list(RULE)


@pytest.mark.parametrize(
    ("line", "planted", "place"),
    [
        ("MF_ZERO_MAJORITY = 2", "MF_ZERO_MAJORITY = 3", "mf_zero_vote"),
        ("MF_GPU_BYTES = 4", "MF_GPU_BYTES = 4, MF_GPU_MORE = 6", "mf_gpu_kind"),
        ("MF_SUM = 0, MF_MEAN = 1", "MF_MEAN = 0, MF_SUM = 1", "mf_reduce"),
    ],
)
def test_a_number_that_differs_in_c_is_seen(
    headers: str, line: str, planted: str, place: str
) -> None:
    assert line in headers
    (found,) = differences_from_c(headers.replace(line, planted))
    assert found.startswith(place)


@pytest.mark.parametrize(
    ("line", "planted", "place"),
    [
        ("AGREEING = tl.constexpr(0)", "AGREEING = tl.constexpr(1)", "AGREEING"),
        ("LEAST = tl.constexpr(9)", "", "LEAST"),
        ("MAX = tl.constexpr(3)", "MAX = tl.constexpr(3)\nMEDIAN = tl.constexpr(4)", "MEDIAN"),
        ("    factored: int = 0", "    factor: int = 0", "Rule"),
        ("    vote: int = 0\n    zero_vote: int = 0\n",
         "    zero_vote: int = 0\n    vote: int = 0\n", "Rule"),
    ],
)  # fmt: skip
def test_a_number_that_differs_in_triton_is_seen(
    words: str, line: str, planted: str, place: str
) -> None:
    assert line in words
    (found,) = differences_from_triton(words.replace(line, planted))
    assert found.startswith(place)
