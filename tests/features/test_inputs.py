"""What a loader yields, and what the model is called with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import magic_fast as mf
from features.families import moved


class Strict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Scaled(Strict):
    """As many a forward: a second argument that may be left out."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.linear(x if scale is None else x * scale)


class Pair(Strict):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x + y)


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
Y = torch.rand(8, 1, generator=torch.Generator().manual_seed(1)) + 1
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)


def found(kind: Callable[[], nn.Module], data: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    base = kind()
    report = mf.calibrate_features(base, [moved(base, 1)], moved(base, 2), {"a": data}, **options)[
        1
    ]
    coefficient = report.layers[0].coefficient
    assert coefficient is not None
    return coefficient


class Nothing(Strict):
    """Requires nothing, as transformers' models."""

    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        assert x is not None
        return self.linear(x)


class Unnamed(Strict):
    def forward(self, *x: Tensor) -> Tensor:
        return self.linear(x[0])


@pytest.mark.parametrize("kind", [Strict, Nothing, Unnamed])
@pytest.mark.parametrize("sequential", [False, True], ids=["", "sequential"])
def test_labels_are_refused(kind: Callable[[], nn.Module], sequential: bool) -> None:
    with pytest.raises(
        mf.InputError,
        match=r"^batch 0 of task 'a': expected the model's arguments, got a list of 2 tensors "
        r"\(\[4, 6\], \[4, 1\]\), which may be inputs and labels\. Say what the model is called "
        r"with by inputs=, a function of the batch \(inputs=lambda batch: batch\[0\]\), or make it "
        r"a mapping of the model's argument names\.$",
    ):
        found(kind, LOADER, sequential=sequential)
    got = found(kind, LOADER, inputs=lambda batch: batch[0], sequential=sequential)
    assert torch.equal(got, found(kind, [X[:4], X[4:]], sequential=sequential))


@pytest.mark.parametrize("sequential", [False, True], ids=["", "sequential"])
def test_labels_never_become_an_optional_argument(
    sequential: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    base = Scaled()
    report = mf.calibrate_features(
        base, [moved(base, 1)], moved(base, 2), {"a": LOADER}, sequential=sequential
    )[1]
    want = found(Strict, [X[:4], X[4:]], sequential=sequential)
    assert torch.equal(report.layers[0].coefficient, want)  # type: ignore[arg-type]
    assert report.warnings == [
        "data of task 'a': the model is called with 1 of a batch's 2 values, as many as its "
        "forward requires; the others may be labels. inputs= says what it is called with"
    ]
    assert report.warnings[0] in caplog.text
    given = {"a": DataLoader(TensorDataset(X, Y), batch_size=4)}
    probed = mf.sensitive_layers(base, [moved(base, 1)], data=given)
    assert report.warnings[0] in probed.warnings


def test_what_inputs_gives_is_what_the_model_gets() -> None:
    plain = found(Scaled, [X[:4], X[4:]])
    by_place = found(Scaled, LOADER, inputs=tuple)
    by_name = found(Scaled, LOADER, inputs=lambda b: {"x": b[0], "scale": b[1]})
    one_value = found(Scaled, [{"picture": X}], inputs=lambda b: b["picture"])
    assert torch.equal(by_place, by_name)
    assert not torch.allclose(by_place, plain)
    assert torch.allclose(one_value, plain)


def test_a_tuple_is_unpacked_where_nothing_else_can_be_meant() -> None:
    assert torch.equal(found(Pair, [(X, X)]), found(Pair, [{"x": X, "y": X}]))
    alone = DataLoader(TensorDataset(X), batch_size=4)
    assert torch.equal(found(Strict, alone), found(Strict, [X[:4], X[4:]]))


def test_iterators_are_read_once() -> None:
    def batches() -> Iterator[Any]:
        yield from LOADER

    assert torch.equal(
        found(Strict, batches(), inputs=lambda b: b[0]), found(Strict, [X[:4], X[4:]])
    )


def _missing(batch: Any) -> Any:
    return batch["pixels"]


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "bare_tuple": (
        (X, X), None,
        "data of task 'a': expected an iterable of batches, got a tuple of 2 tensors ([8, 6], [8, "
        "6]), which may be one batch of inputs and labels, or several batches. Pass a list of "
        "batches.",
    ),
    "bare_tuple_with_inputs": (
        (X, X), lambda batch: batch,
        "data of task 'a': expected an iterable of batches, got a tuple of 2 tensors ([8, 6], [8, "
        "6]), which may be one batch of inputs and labels, or several batches. Pass a list of "
        "batches.",
    ),
    "no_function": (
        LOADER, "images",
        "inputs: expected a function from a batch to the model's arguments, got str. inputs=lambda "
        "batch: batch[0] takes the first of what a loader yields.",
    ),
    "its_own_error": (
        [{"images": X, "labels": Y}], _missing,
        "inputs for batch 0 of task 'a': expected the model's arguments, got KeyError: 'pixels'. "
        "The batch was a mapping of images, labels.",
    ),
    "nothing": (
        LOADER, lambda batch: None,
        "inputs for batch 0 of task 'a': expected the model's arguments as a mapping, a tuple or "
        "one value, got None.",
    ),
    "too_many": (
        LOADER, tuple,
        "batch 0 of task 'a': expected what the model takes, got its refusal, TypeError: "
        "Strict.forward() takes 2 positional arguments but 3 were given. It was called with 2 "
        "arguments, [4, 6], [4, 1], of a tuple that was unpacked. Is the data of the right "
        "modality?",
    ),
    "other_width": (
        [torch.ones(4, 5)], None,
        "batch 0 of task 'a': expected what the model takes, got its refusal, RuntimeError: mat1 "
        "and mat2 shapes cannot be multiplied (4x5 and 6x3). It was called with 1 argument, "
        "[4, 5]. Is the data of the right modality?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, inputs, message = REFUSED[name]
    with pytest.raises(mf.InputError, match=f"^{re.escape(message)}$"):
        found(Strict, data, inputs=inputs)


def test_sensitive_layers_take_the_same() -> None:
    torch.manual_seed(0)
    base = Scaled()
    experts = {"one": moved(base, 1), "two": moved(base, 2)}
    got = mf.sensitive_layers(base, experts, data={"a": LOADER}, inputs=lambda b: b[0])
    want = mf.sensitive_layers(base, list(experts.values()), data={"a": [X[:4], X[4:]]})
    assert got.scores == want.scores


def test_a_fault_of_ours_does_not_blame_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from magic_fast.calibration.features import sites

    def broken(*_: Any) -> Any:
        raise RuntimeError("an operator that is not there.")

    monkeypatch.setattr(sites.Site, "features", broken)
    with pytest.raises(
        mf.InputError,
        match=r"^layer 'linear' at batch 0 of task 'a': expected one that can be run with the "
        r"weights of base and experts, got RuntimeError: an operator that is not there\. The layer "
        r"itself takes the batch, so the data is not to blame: please report it\.$",
    ):
        found(Strict, [X])


def test_errors_of_ours_keep_their_words() -> None:
    class Refusing(Strict):
        def forward(self, x: Tensor) -> Tensor:
            raise mf.NonFiniteError("values of 'linear': expected finite ones, got NaN.")

    with pytest.raises(mf.NonFiniteError, match=r"^values of 'linear': expected finite"):
        found(Refusing, [X])
