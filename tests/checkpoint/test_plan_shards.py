"""Where tensors go: limits, names, order, alignment; and which bytes have been written."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magic_fast.checkpoint import (
    DTYPE_BITS,
    Coverage,
    TensorSpec,
    parse_header,
    plan_shards,
    shard_index,
)
from magic_fast.errors import InputError

sizes = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL"]), st.integers(0, 40)),
    min_size=1,
    max_size=20,
)


@given(sizes, st.integers(1, 500))
def test_every_tensor_once_in_order_within_the_limit(what, limit):
    specs = [TensorSpec(f"t{n}", dtype, (count,)) for n, (dtype, count) in enumerate(what)]
    plans = plan_shards(specs, limit)
    assert plans == plan_shards(specs, limit)
    placed = [info for plan in plans for info in plan.tensors]
    assert sorted(info.name for info in placed) == sorted(spec.name for spec in specs)
    first = 0
    for plan in plans:
        names = {int(info.name[1:]) for info in plan.tensors}
        assert names == set(range(first, first + len(names)))  # shards hold runs of the order given
        first += len(names)
        size = sum(info.nbytes for info in plan.tensors)
        assert size <= limit or len(plan.tensors) == 1
        assert plan.file_size == len(plan.header) + size
        parsed = parse_header(plan.header[8:], plan.file_size, plan.file)
        assert {i.name: i for i in plan.tensors} == dict(parsed.tensors)
        assert all(info.offset % (DTYPE_BITS[info.dtype] // 8) == 0 for info in plan.tensors)
    for before, after in pairwise(plans):  # no shard is closed too early
        size = sum(info.nbytes for info in before.tensors)
        number = min(int(info.name[1:]) for info in after.tensors)
        assert size + specs[number].nbytes > limit


def test_names_of_files():
    specs = [TensorSpec(name, "U8", (4,)) for name in "abc"]
    assert [plan.file for plan in plan_shards(specs)] == ["model.safetensors"]
    assert [plan.file for plan in plan_shards(specs, 4)] == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    assert [plan.file for plan in plan_shards(specs, 4, file_name="x.safetensors")] == [
        "x.safetensors"
    ]


def test_order_is_kept_for_one_dtype():
    specs = [TensorSpec(name, "BF16", (4,)) for name in "zaqb"]
    (plan,) = plan_shards(specs)
    assert "".join(info.name for info in plan.tensors) == "zaqb"


def test_plans_can_be_sent_to_another_process():
    plans = plan_shards([TensorSpec("a", "U8", (4,))])
    assert pickle.loads(pickle.dumps(plans)) == plans


def test_index():
    specs = [TensorSpec("b", "F32", (2,)), TensorSpec("a", "BF16", (3,))]
    assert shard_index(plan_shards(specs, 8)) == {
        "metadata": {"total_size": 14},
        "weight_map": {
            "a": "model-00002-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
        },
    }


def test_refusals():
    spec = TensorSpec("a", "U8", (4,))
    with pytest.raises(InputError, match="Nothing to write"):
        plan_shards([])
    with pytest.raises(InputError, match="Bad shard size"):
        plan_shards([spec], 0)
    with pytest.raises(InputError, match="Tensor written twice for the output"):
        plan_shards([spec, spec], 4)


def test_coverage_stays_small():
    coverage = Coverage()
    for start in (4, 0, 12, 8, 16):
        coverage.add(start, start + 4)
    assert coverage.missing(20) == [] and len(coverage._starts) == 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_coverage_is_a_set_of_bytes(ranges):
    coverage, truth = Coverage(), set()
    for start, stop in ranges:
        coverage.add(start, stop)
        truth |= set(range(start, stop))
    for end in (0, 7, 30, 40):
        missing = {n for start, stop in coverage.missing(end) for n in range(start, stop)}
        assert missing == set(range(end)) - truth
    gaps = coverage.missing(40)
    assert all(a < b for a, b in gaps)
    assert all(left[1] < right[0] for left, right in pairwise(gaps))
