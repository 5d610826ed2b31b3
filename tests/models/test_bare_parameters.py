"""Output units of parameters that a forward uses by itself, by running that forward: of the product
that the parameter goes into, each entry depends on one unit alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from magic_fast.models.built.modules import BARE, Place, records_of

pytest.importorskip("transformers", minversion="5.20")

PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "mm", "baddbmm", "einsum", "__rmatmul__"}


class Products(TorchFunctionMode):
    """Notes the products that a parameter, or a view of it, goes into."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.storage = parameter.untyped_storage().data_ptr()
        self.noted: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ in PRODUCTS and any(
            isinstance(a, Tensor) and a.untyped_storage().data_ptr() == self.storage for a in args
        ):
            self.noted.append(result.detach().clone())
        return result


def products(parameter: Tensor, run: Any) -> Tensor:
    """Those products in one row; what the module returns where the parameter was copied first."""
    with Products(parameter) as mode, torch.no_grad():
        output = run()
    return torch.cat([one.flatten() for one in mode.noted or [output]])


def depends_on_single_units(parameter: Tensor, units: tuple[int, ...], run: Any) -> bool:
    """Whether units have entries of the product of their own, all together all of them."""
    before = products(parameter, run)
    places = torch.cartesian_prod(*(torch.arange(parameter.shape[a]) for a in units))
    touched = torch.zeros(before.shape, dtype=torch.int64)
    for place in places.view(-1, len(units)).tolist():
        index: list[Any] = [slice(None)] * parameter.dim()
        for axis, number in zip(units, place, strict=True):
            index[axis] = number
        kept = parameter.data[tuple(index)].clone()
        parameter.data[tuple(index)] += 1.0
        touched += (products(parameter, run) != before).long()
        parameter.data[tuple(index)] = kept
    return bool((touched == 1).all())


def llama4() -> tuple[nn.Module, Any]:
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = SimpleNamespace(
        num_local_experts=2, intermediate_size=3, hidden_size=5, hidden_act="silu"
    )
    module = Llama4TextExperts(config)
    return module, lambda: module(torch.rand(4, 5))


def jetmoe() -> tuple[nn.Module, Any]:
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    module = JetMoeParallelExperts(2, 5, 3)
    return module, lambda: module(torch.rand(4, 5), [2, 2])


def csm() -> tuple[nn.Module, Any]:
    from transformers.models.csm.modeling_csm import CsmCodebooksHead

    module = CsmCodebooksHead(5, 3, 7)
    return module, lambda: module(torch.rand(1, 2, 5), torch.arange(2))


def recurrent_gemma() -> tuple[nn.Module, Any]:
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    module = RecurrentGemmaRglru(SimpleNamespace(num_attention_heads=2, lru_width=6))
    return module, lambda: module(torch.rand(1, 4, 6), torch.arange(4)[None])


def xlnet() -> tuple[nn.Module, Any]:
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    module = XLNetRelativeAttention(XLNetConfig(d_model=6, n_head=2, d_inner=8, dropout=0))
    h, r = torch.rand(4, 1, 6), torch.rand(8, 1, 6)
    return module, lambda: module(h, None, None, None, r, None)


def gemma3() -> tuple[nn.Module, Any]:
    from transformers import Gemma3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    vision = {"hidden_size": 5, "image_size": 8, "patch_size": 2, "num_attention_heads": 1}
    config = Gemma3Config(
        vision_config=vision,
        text_config={"hidden_size": 3, "num_attention_heads": 1},
        mm_tokens_per_image=4,
    )
    module = Gemma3MultiModalProjector(config)
    return module, lambda: module(torch.rand(1, 16, 5))


def swiftformer() -> tuple[nn.Module, Any]:
    from transformers import SwiftFormerConfig
    from transformers.models.swiftformer.modeling_swiftformer import (
        SwiftFormerEfficientAdditiveAttention,
    )

    module = SwiftFormerEfficientAdditiveAttention(SwiftFormerConfig(), dim=6)
    return module, lambda: module(torch.rand(1, 4, 6))


def dbrx() -> tuple[nn.Module, Any]:
    from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

    config = SimpleNamespace(
        hidden_size=5, ffn_hidden_size=3, moe_num_experts=2, ffn_act_fn={"name": "silu"}
    )
    module = DbrxExpertGLU(config)

    def run() -> None:
        for rows in (slice(0, 3), slice(3, 6)):
            module(torch.rand(4, 5), module.w1[rows], module.v1[rows], module.w2[rows])

    return module, run


def longcat() -> tuple[nn.Module, Any]:
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    config = SimpleNamespace(
        expert_ffn_hidden_size=3, hidden_size=5, n_routed_experts=2, zero_expert_num=0,
        hidden_act="silu",
    )  # fmt: skip
    module = LongcatFlashExperts(config)
    return module, lambda: module(torch.rand(4, 5), *each_expert(2))


def step3p7() -> tuple[nn.Module, Any]:
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = SimpleNamespace(
        num_local_experts=2, hidden_size=5, moe_intermediate_size=3, hidden_act="silu"
    )
    module = Step3p7Experts(config)
    return module, lambda: module(torch.rand(4, 5), *each_expert(2))


def each_expert(count: int) -> tuple[Tensor, Tensor]:
    """Four tokens, each to all experts."""
    return torch.arange(count).expand(4, count), torch.ones(4, count)


def funnel() -> tuple[nn.Module, Any]:
    from transformers import FunnelConfig
    from transformers.models.funnel.modeling_funnel import (
        FunnelAttentionStructure,
        FunnelRelMultiheadAttention,
    )

    config = FunnelConfig(d_model=8, n_head=2, d_head=4, attention_dropout=0, hidden_dropout=0)
    module = FunnelRelMultiheadAttention(config, 0)
    structure, x = FunnelAttentionStructure(config), torch.rand(1, 6, 8)
    return module, lambda: module(x, x, x, structure.init_attention_inputs(x))


def ibert() -> tuple[nn.Module, Any]:
    from transformers.models.ibert.quant_modules import QuantLinear

    module = QuantLinear(5, 3)
    return module, lambda: module(torch.rand(4, 5))[0]


MAKERS = (
    llama4, jetmoe, csm, recurrent_gemma, xlnet, gemma3, swiftformer, dbrx, longcat, step3p7,
    funnel, ibert,
)  # fmt: skip


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module, run = request.param()
    for parameter in module.parameters():
        parameter.data = torch.rand_like(parameter)

    def seeded() -> Any:
        torch.manual_seed(1)
        return run()

    return module, seeded


def test_units(made: tuple[nn.Module, Any]) -> None:
    module, run = made
    records = records_of(module, Place())
    tried = 0
    for name, parameter in module.named_parameters(recurse=False):
        if (type(module).__name__, name) in BARE:
            units = records[name][1]
            if units is not None:
                tried += 1
                assert depends_on_single_units(parameter, units, run), name
    assert tried


def test_a_wrong_axis_is_seen() -> None:
    module, run = llama4()
    for parameter in module.parameters():
        parameter.data = torch.rand_like(parameter)

    def seeded() -> None:
        torch.manual_seed(1)
        run()

    assert not depends_on_single_units(module.gate_up_proj, (0, 1), seeded)
