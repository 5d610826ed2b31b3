"""The header: what the library writes we read, and the reverse; what is damaged we refuse."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from checkpoint.checkpoint_files import LIBRARY_DTYPES, entry, raw_file
from magic_fast.checkpoint import DTYPE_BITS, TensorSpec, parse_header, serialize_header
from magic_fast.errors import CheckpointError, InputError

_LIBRARY_SIZES = {name: DTYPE_BITS[name] // 8 for name in (*LIBRARY_DTYPES, "BF16", "C64")}


def parse(file: bytes):
    length = int.from_bytes(file[:8], "little")
    return parse_header(file[8 : 8 + length], len(file), "x.safetensors")


names = st.text(min_size=0, max_size=12).filter(
    lambda s: s != "__metadata__" and not any(0xD800 <= ord(c) < 0xE000 for c in s)
)
specs = st.dictionaries(
    names,
    st.tuples(
        st.sampled_from(sorted(_LIBRARY_SIZES)), st.lists(st.integers(0, 5), max_size=4).map(tuple)
    ),
    max_size=6,
).map(lambda d: [TensorSpec(name, *what) for name, what in d.items()])
metadata = st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])), max_size=3)


@given(specs, metadata)
def test_what_we_write_both_read(tensors, meta):
    head, infos = serialize_header(tensors, "x.safetensors", meta)
    data = bytes(i % 251 for i in range(sum(t.nbytes for t in tensors)))
    file = head + data
    assert len(head) % 8 == 0
    header = parse(file)
    assert header.metadata == meta
    # The order of equal positions (empty tensors) is free.
    assert sorted(header.tensors.values(), key=lambda i: i.name) == sorted(
        infos, key=lambda i: i.name
    )
    theirs = dict(safetensors.deserialize(file))
    for info in infos:
        assert theirs[info.name]["dtype"] == info.dtype
        assert tuple(theirs[info.name]["shape"]) == info.shape
        assert bytes(theirs[info.name]["data"]) == file[info.offset : info.offset + info.nbytes]


@given(specs, metadata)
def test_what_the_library_writes_we_read(tensors, meta):
    content = {
        t.name: {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data": bytes((i * 7 + 1) % 256 for i in range(t.nbytes)),
        }
        for t in tensors
    }
    file = _library_bytes(content, meta)
    header = parse(file)
    assert header.metadata == meta
    assert set(header.tensors) == set(content)
    for name, info in header.tensors.items():
        assert (info.dtype, list(info.shape)) == (content[name]["dtype"], content[name]["shape"])
        assert file[info.offset : info.offset + info.nbytes] == content[name]["data"]


def _library_bytes(content, meta):
    """Through numpy for the dtypes it has; the library's own layout either way."""
    import numpy as np

    kinds = {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
        "F16": np.float16, "I32": np.int32, "U32": np.uint32, "F32": np.float32, "F64": np.float64,
        "I64": np.int64, "U64": np.uint64, "C64": np.complex64,
    }  # fmt: skip
    arrays = {}
    for name, tensor in content.items():
        if tensor["dtype"] == "BF16":
            tensor["dtype"] = "U16"
        if tensor["dtype"] == "BOOL":
            tensor["data"] = bytes(b & 1 for b in tensor["data"])
        kind = kinds[tensor["dtype"]]
        arrays[name] = np.frombuffer(tensor["data"], kind).reshape(tensor["shape"])
    return save(arrays, meta or None)


def test_same_bytes_as_the_library_in_its_order():
    import numpy as np

    arrays = {"z": np.zeros((2, 2), np.float32), "a": np.zeros(3, np.int16), "ü": np.zeros(1, "u1")}
    head, _ = serialize_header(
        [TensorSpec("z", "F32", (2, 2)), TensorSpec("a", "I16", (3,)), TensorSpec("ü", "U8", (1,))],
        "x",
        {"format": "pt"},
    )
    assert save(arrays, {"format": "pt"}).startswith(head)


def test_deterministic_and_metadata_sorted():
    tensors = [TensorSpec("b", "F32", (1,)), TensorSpec("a", "F32", (1,))]
    first = serialize_header(tensors, "x", {"b": "1", "a": "2"})
    assert first == serialize_header(tensors, "x", {"a": "2", "b": "1"})
    assert list(json.loads(first[0][8:])) == ["__metadata__", "b", "a"]  # the order given


def test_header_hash_is_of_the_json_bytes():
    import hashlib

    head, _ = serialize_header([TensorSpec("a", "U8", (0,))], "x")
    assert parse(head).header_hash == hashlib.sha256(head[8:]).hexdigest()


BAD = {
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, 6, "offsets for tensor 'b'"),
    "same place": ({"a": entry(), "b": entry()}, 4, "Overlapping offsets"),
    "hole": ({"a": entry(), "b": entry(offsets=(5, 9))}, 9, "Hole between tensors for tensor 'b'"),
    "hole at start": ({"a": entry(offsets=(1, 5))}, 5, "after the header, got byte"),
    "outside": ({"a": entry(shape=[9], offsets=(0, 9))}, 4, "Offsets outside the file for tensor"),
    "outside, huge": (
        {"a": entry(shape=[2**62], offsets=(0, 2**62))}, 4, "Offsets outside the file",
    ),
    "trailing": ({"a": entry()}, 5, "Trailing bytes for x.safetensors: expected a file of"),
    "negative": ({"a": entry(offsets=(-4, 0))}, 4, "Corrupt offsets"),
    "backwards": ({"a": entry(offsets=(4, 0))}, 4, "Corrupt offsets"),
    "float offset": ({"a": entry(offsets=(0, 4.0))}, 4, "Corrupt offsets"),
    "bool offset": ({"a": entry(offsets=(False, 4))}, 4, "Corrupt offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 4))}, 4, "Corrupt offsets"),
    "size": ({"a": entry("F32")}, 4, "expected 16 bytes for F32 [4], got 4 bytes in data_offsets"),
    "half bytes": ({"a": entry("F4", [3], (0, 2))}, 2, "expected whole bytes for F4 [3]"),
    "dtype": ({"a": entry("F31")}, 4, "Unknown dtype for tensor 'a' in x.safetensors"),
    "dtype list": ({"a": entry(["U8"])}, 4, "Unknown dtype"),
    "shape": ({"a": entry(shape=[-4])}, 4, "Corrupt shape"),
    "shape float": ({"a": entry(shape=[4.0])}, 4, "Corrupt shape"),
    "shape bool": ({"a": entry(shape=[True], offsets=[0, 1])}, 1, "Corrupt shape"),
    "shape string": ({"a": entry(shape="4")}, 4, "Corrupt shape"),
    "shape huge": ({"a": entry(shape=[2**63, 0], offsets=[0, 0])}, 0, "Corrupt shape"),
    "many dimensions": ({"a": entry(shape=[1] * 65, offsets=[0, 1])}, 1, "at most 64 sizes"),
    "no object": ({"a": [1]}, 0, "Corrupt header entry"),
    "no fields": ({"a": {}}, 0, "Unknown dtype"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ to hold only strings"),
    "metadata list": ({"__metadata__": []}, 0, "__metadata__ to hold only strings"),
    "duplicate": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "duplicate key",
    ),
    "duplicate inside": (
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "'dtype' twice",
    ),
    "utf-8": (b'{"\xff":1}', 0, "invalid UTF-8"),
    "half character": (
        b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "not Unicode",
    ),
    "half character in metadata": (b'{"__metadata__":{"a":"\\udc00"}}', 0, "valid Unicode"),
    "leading space": (b" {}", 0, "JSON that begins with '{'"),
    "empty": (b"", 0, "JSON that begins with '{'"),
    "list": (b"[]", 0, "JSON that begins with '{'"),
    "cut": (b'{"a":', 0, "not valid JSON"),
    "NaN": (b'{"a":NaN}', 0, "not valid JSON"),
    "zero bytes after": (b"{}\0\0", 0, "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 200_000, 0, "too many nested brackets"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", 0, "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    header, size, message = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        parse(raw_file(header, bytes(size)))
    assert message in str(caught.value)
    assert "expected" in str(caught.value) and "x.safetensors" in str(caught.value)
    str(caught.value).encode()  # can be printed, whatever the names were


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": {}},
        {"__metadata__": None},
        {"a": entry("F4", [4, 2])},
        {
            "a": entry(),
            "b": entry(shape=[0], offsets=[0, 0]),
            "c": entry(shape=[9, 0], offsets=[4, 4]),
        },
        {"": entry("F32", [])},
        {"a": {**entry(), "extra": 1}},
    ],
)
def test_unusual_but_right(header):
    size = 4 if set(header) - {"__metadata__"} else 0
    file = raw_file(header, bytes(size))
    safetensors.deserialize(file)  # the library agrees
    assert len(parse(file).tensors) == len(set(header) - {"__metadata__"})


def test_every_dtype_of_the_library_and_no_other():
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(raw_file({"a": entry("no such dtype")}, bytes(4)))
    listed = str(caught.value).split("one of ")[1].split(" at line")[0]
    assert set(DTYPE_BITS) == {name.strip("` ") for name in listed.split(",")}


VALID = serialize_header(
    [TensorSpec("a", "F32", (2, 2)), TensorSpec("b", "U8", (3,)), TensorSpec("c", "BF16", ())],
    "x",
    {"format": "pt"},
)[0] + bytes(range(21))


@settings(max_examples=400)
@given(st.data())
def test_flipped_bytes_never_crash_and_never_lead_outside(data):
    file = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 22))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    file = file[: len(file) - cut] if cut else file
    try:
        header = parse_whole(bytes(file))
    except CheckpointError as error:
        str(error).encode()
        return
    for info in header.tensors.values():
        assert header.data_start <= info.offset <= info.offset + info.nbytes <= len(file)


def parse_whole(file: bytes):
    from magic_fast.checkpoint.header import header_length

    length = header_length(file[:8], len(file), "x")
    return parse_header(file[8 : 8 + length], len(file), "x")


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
            | st.sampled_from(["F32", "dtype", "shape", "data_offsets"]),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner),
            max_leaves=8,
        ),
        max_size=4,
    )
)  # fmt: skip
def test_any_json_is_parsed_or_refused(value):
    try:
        header = parse(raw_file(value, bytes(8)))
    except CheckpointError:
        return
    assert all(i.offset + i.nbytes <= header.file_size for i in header.tensors.values())


@pytest.mark.parametrize(
    ("prefix", "size", "message"),
    [
        (b"\1\2\3", 3, "Truncated file"),
        (struct.pack("<Q", 100_000_001), 2 * 10**8, "Oversized header"),
        (struct.pack("<Q", 2**64 - 1), 100, "Oversized header"),
        (struct.pack("<Q", 93), 100, "Truncated header"),
    ],
)
def test_lengths(prefix, size, message):
    from magic_fast.checkpoint.header import header_length

    with pytest.raises(CheckpointError, match=message):
        header_length(prefix, size, "x")


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "message"),
    [
        ("a", "float32", (1,), "Unknown dtype for tensor 'a'"),
        ("a", "F32", (-1,), "Bad shape"),
        ("a", "F32", (1.0,), "Bad shape"),
        ("a", "F32", (1,) * 65, "Bad shape"),
        ("a", "F32", (2**40, 2**40), "Bad size"),
        ("a", "F4", (1,), "Bad size"),
        ("__metadata__", "F32", (1,), "Bad name"),
        ("\ud800", "F32", (1,), "Bad name"),
    ],
)
def test_specs_are_checked(name, dtype, shape, message):
    with pytest.raises(InputError, match=message):
        TensorSpec(name, dtype, shape)


def test_a_name_twice_is_refused():
    with pytest.raises(InputError, match="Tensor written twice"):
        serialize_header([TensorSpec("a", "U8", (1,))] * 2, "x")
