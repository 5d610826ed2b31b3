"""Every tensor of a returned module is written, copied, or the call is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import magic_fast as mf
from magic_fast.api.modules.state import module_like, refuse_blanks, tensors_of


def moved(model: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    g, other = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=g).to(p))
    return other


def trio(base: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    return base, [moved(base, 1), moved(base, 2)]


class Tied(nn.Module):
    """Two Parameter objects over one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = nn.Parameter(self.embed.weight.detach())


class Converted(nn.Module):
    """Its state dict holds copies in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6).bfloat16()
        self._register_state_dict_hook(
            lambda m, state, prefix, meta: {k: v.float().clone() for k, v in state.items()}
        )


class Hidden(nn.Module):
    """A parameter that no state dict shows, and buffers that it does not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.secret = nn.Linear(6, 6), nn.Parameter(torch.randn(3))
        self.register_buffer("cache", torch.randn(4), persistent=False)
        self._register_state_dict_hook(lambda m, s, p, meta: s.pop("secret", None))


@pytest.mark.parametrize("kind", [Tied, Converted, Hidden])
@pytest.mark.parametrize("way", ["merge", "merge_into"])
def test_every_parameter_is_the_mean(kind: type[nn.Module], way: str) -> None:
    torch.manual_seed(0)
    base = kind()
    experts = [copy.deepcopy(base) for _ in range(2)]
    for k, e in enumerate(experts):
        if kind is Tied:  # a deep copy of two parameters has two memories
            e.head.weight = nn.Parameter(e.embed.weight.detach())
        with torch.no_grad():
            for p in e.parameters():
                p.add_(0.1 * (k + 1))
            if kind is Tied:
                e.embed.weight.copy_(base.embed.weight + 0.1 * (k + 1))
    junk = [torch.full((8, 8), 1e30) for _ in range(64)]
    del junk
    if way == "merge":
        made: Any = mf.merge(base, experts, "average")
    else:
        made = copy.deepcopy(base)
        if kind is Tied:
            made.head.weight = nn.Parameter(made.embed.weight.detach())
        mf.merge_into(made, base, experts, "average")
    for name, p in tensors_of(made).items():
        want = sum(tensors_of(e)[name].float() for e in experts) / 2
        torch.testing.assert_close(p.float(), want.to(p.dtype).float(), rtol=1e-5, atol=1e-6)
    if kind is Tied:
        assert made.embed.weight.data_ptr() == made.head.weight.data_ptr()
    if kind is Hidden:
        assert torch.equal(made.cache, base.cache)


def test_a_blank_that_stays_is_our_fault() -> None:
    base = nn.Sequential(nn.Linear(3, 2))
    made = module_like(base, {"0.weight", "0.bias"})
    blanks = {p.data_ptr() for p in made.parameters()}
    with pytest.raises(mf.InternalError, match=r"^tensor '0\.bias' of the merged module: expected"):
        refuse_blanks(made, blanks, {"0.weight"})
    kept = module_like(base, {"0.weight"})
    assert torch.equal(kept[0].bias, base[0].bias) and kept[0].bias is not base[0].bias


def fake() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.randn(4, 3)


class Wrapper(Tensor):
    """As torchao's: values that lie elsewhere."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.detach:
            return args[0]
        raise NotImplementedError(func)


ODD: dict[str, tuple[Any, str]] = {
    "sparse": (
        lambda: torch.randn(4, 3).to_sparse(),
        "expected a dense one, got layout sparse_coo. Make it dense: to_dense().",
    ),
    "meta": (
        lambda: torch.randn(4, 3, device="meta"),
        "expected one with values, got one on the meta device. Load the model without device_map "
        "or offloading, or give its state dict.",
    ),
    "fake": (
        fake,
        "expected one with values, got a fake one (FakeTensor). Make it outside of FakeTensorMode.",
    ),
    "wrapper": (
        lambda: Wrapper(torch.randn(4, 3)),
        f"expected a plain torch.Tensor, got the subclass {Wrapper.__module__}.Wrapper, whose "
        "values lie elsewhere (quantised by torchao, for one). Make it plain first: dequantize().",
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("method", ["average", "ties", "iso_c"])
def test_odd_tensors_are_named(odd: str, method: str) -> None:
    make, message = ODD[odd]
    base, x, good = torch.randn(4, 3), make(), torch.randn(4, 3)
    state = {"w": base}
    for call, what in (
        (lambda: mf.merge(base, [x, good], method), "experts[0]"),
        (lambda: mf.merge(state, [{"w": x}, {"w": good}], method), "tensor 'w' in experts[0]"),
        (lambda: mf.merge_into(dict(state), state, [{"w": good}, {"w": x}], method),
         "tensor 'w' in experts[1]"),
        (lambda: mf.calibrate_weights(state, [{"w": good}], {"w": x}), "tensor 'w' in merged"),
        (lambda: mf.merge_task_vectors([x, good], method), "task_vectors[0]"),
    ):  # fmt: skip
        with pytest.raises(mf.InputError) as error:
            call()
        assert str(error.value) == f"{what}: {message}"


def test_distributed_tensors_are_named(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        with pytest.raises(mf.InputError, match=r"got a distributed one \(DTensor\)\. Gather it"):
            mf.merge(x, [x, x], "average")
        base, experts = trio(nn.Sequential(nn.Linear(6, 8)))
        for m in (base, *experts):
            fully_shard(m)
        with pytest.raises(
            mf.InputError, match=r"tensor '0\.weight' in experts\[0\]: expected the"
        ):
            mf.merge(base, experts, "average")
    finally:
        dist.destroy_process_group()


def test_offloaded_models_are_named() -> None:
    accelerate = pytest.importorskip("accelerate")
    base, experts = trio(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    off = [accelerate.cpu_offload(copy.deepcopy(m), "cpu") for m in (base, *experts)]
    with pytest.raises(mf.InputError, match=r"on the meta device\. Load the model without"):
        mf.merge(off[0], off[1:], "average")
    with pytest.raises(
        mf.InputError, match=r"tensor '0\.weight' in model: expected one with values"
    ):
        mf.merge_into(off[0], base, experts, "average")


FACTORS = (
    "base_model.model.q.lora_A.default.weight", "q.lora_embedding_B", "q.hada_w1_a",
    "q.lokr_w2", "q.lora_magnitude_vector.default.weight",
    "lora_te1_q.lora_up.weight", "q.dora_scale",
)  # fmt: skip


@pytest.mark.parametrize("name", FACTORS)
def test_adapters_are_told(name: str) -> None:
    rows = [{"w": torch.randn(2, 2), name: torch.randn(2, 2)} for _ in range(3)]
    for call in (
        lambda: mf.merge(rows[0], rows[1:], "average"),
        lambda: mf.calibrate_weights(rows[0], rows[1:], rows[0]),
    ):
        with pytest.raises(mf.InputError, match=r"got a factor of an adapter .*mf\.merge_adapters"):
            call()


def test_names_that_only_look_like_factors() -> None:
    rows = [{n: torch.ones(2) * k for n in ("norm_a.weight", "lora_head.weight", "diff.weight")}
            for k in range(3)]  # fmt: skip
    assert mf.merge(rows[0], rows[1:], "average")["diff.weight"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    "change",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: f"module.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: n.replace("body.", "body._orig_mod."),
    ],
)
@pytest.mark.parametrize("kind", ["state", "module"])
def test_wrappers_are_seen_through(change: Any, kind: str) -> None:
    net = nn.Module()
    net.body, net.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)
    base, experts = trio(net)
    wrapped = [{change(n): x for n, x in e.state_dict().items()} for e in experts]
    start = base.state_dict() if kind == "state" else base
    got = mf.merge(start, wrapped, "average")
    want = mf.merge(base.state_dict(), [e.state_dict() for e in experts], "average")
    for name, x in (got if kind == "state" else got.state_dict()).items():
        assert torch.equal(x, want[name])
    back = mf.merge({change(n): x for n, x in base.state_dict().items()}, experts, "average")
    assert list(back) == [change(n) for n in want]


def test_another_prefix_is_told(caplog: pytest.LogCaptureFixture) -> None:
    base, experts = trio(nn.Sequential(nn.Linear(6, 8)))
    other = [{f"student.{n}": x for n, x in e.state_dict().items()} for e in experts]
    got = mf.merge(base.state_dict(), other, "average")
    assert torch.equal(got["0.weight"], mf.merge(base, experts, "average")[0].weight)
    assert "experts[0]: its tensors go by the names of base: 'student.0.weight' is" in caplog.text


def test_a_state_dict_keeps_its_metadata() -> None:
    base, experts = trio(nn.Sequential(nn.BatchNorm1d(3)))
    state = base.state_dict()
    got = mf.merge(state, [e.state_dict() for e in experts], "average")
    assert isinstance(got, OrderedDict) and got._metadata == state._metadata
    found, _ = mf.calibrate_weights(state, [e.state_dict() for e in experts], got)
    assert found._metadata == state._metadata
    plain = mf.merge(dict(state), [dict(e.state_dict()) for e in experts], "average")
    assert type(plain) is dict


def test_a_module_for_a_module() -> None:
    base, experts = trio(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    merged = mf.merge(base, {"a": experts[0], "b": experts[1]}, "average")
    found, _ = mf.calibrate_weights(base, experts, merged, calibration="sphere")
    assert type(found) is nn.Sequential and found is not merged

    def rows(m: nn.Module) -> Tensor:
        return (m[0].weight - base[0].weight).norm(dim=1)  # type: ignore[index,union-attr,no-any-return]

    torch.testing.assert_close(rows(found), (rows(experts[0]) + rows(experts[1])) / 2)
    state, _ = mf.calibrate_weights(base, experts, merged.state_dict(), calibration="sphere")
    for name, x in state.items():
        assert torch.equal(x, found.state_dict()[name])


@pytest.mark.parametrize("method", ["average", "ties", "iso_c", "karcher", "star"])
def test_out_may_want_gradients(method: str) -> None:
    base, experts = torch.randn(8, 6), [torch.randn(8, 6) for _ in range(2)]
    out = nn.Parameter(torch.zeros(8, 6))
    mf.merge(base, experts, method, out=out)
    assert torch.equal(out, mf.merge(base, experts, method)) and out.grad_fn is None


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv_m", "star", "ties"])
def test_autocast_changes_nothing(method: str) -> None:
    base, experts = torch.randn(24, 16), [torch.randn(24, 16) for _ in range(3)]
    want = mf.merge(base, experts, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mf.merge(base, experts, method), want)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mask = nn.BatchNorm1d(3), nn.Parameter(torch.zeros(2))
        self.register_buffer("masked_bias", torch.tensor([0.0, -torch.inf]))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c", "slerp"])
def test_statistics_of_batch_norms(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Counters and equal buffers are the base's; a variance never becomes negative."""
    base = Norms()
    experts = [copy.deepcopy(base) for _ in range(1 if method == "slerp" else 2)]
    for k, e in enumerate(experts):
        e.norm.running_var.fill_(0.3 + 0.1 * k)
        e.norm.running_mean.fill_(-2.0)
        e.norm.num_batches_tracked.fill_(5 + k)
    options = {"t": 0.5} if method == "slerp" else {}
    merged = mf.merge(base, experts, method, **options)
    assert int(merged.norm.num_batches_tracked) == 0
    assert torch.equal(merged.masked_bias, base.masked_bias)
    assert float(merged.norm.running_var.min()) > 0
    want = 0.65 if method == "slerp" else 0.35
    torch.testing.assert_close(merged.norm.running_var, torch.full((3,), want))
    assert "counter norm.num_batches_tracked stays as in base" in caplog.text


@pytest.mark.parametrize("name", ["norm.num_batches_tracked", "masked_bias"])
def test_a_buffer_that_a_model_lacks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As on disk: what is derived or counted need not be in every model."""
    base = Norms().state_dict()
    experts = [{n: x for n, x in base.items() if n != name}, dict(base)]
    merged = mf.merge(base, experts, "average")
    assert torch.equal(merged[name], base[name])
    assert f"experts[0] has no '{name}': it stays as in base" in caplog.text
    lacking = {n: x for n, x in base.items() if n != name}
    assert name not in mf.merge(lacking, [dict(base), dict(base)], "average")
