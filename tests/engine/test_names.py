"""Files of one model in other names meet by the names of transformers' module tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import magic_fast as mf

BERT = {
    "embeddings.word_embeddings.weight": (12, 8),
    "encoder.layer.0.attention.self.query.weight": (8, 8),
    "encoder.layer.1.output.dense.bias": (8,),
}
GPT2 = {
    "wte.weight": (12, 8),
    "h.0.attn.c_attn.weight": (8, 24),
    "h.1.mlp.c_proj.weight": (32, 8),
    "ln_f.weight": (8,),
}
LLAMA = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "lm_head.weight": (12, 8),
}
LLAVA = {
    "language_model.model.embed_tokens.weight": (12, 8),
    "language_model.model.layers.0.mlp.up_proj.weight": (16, 8),
    "language_model.lm_head.weight": (12, 8),
    "multi_modal_projector.linear_1.weight": (8, 8),
}
NESTED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def nested(name: str) -> str:
    """LLaVA's names since transformers 4.52."""
    for old, new in NESTED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


Shapes = dict[str, tuple[int, ...]]
CASES: dict[str, tuple[str, str, Shapes, Callable[[str], str]]] = {
    "bert": ("bert", "BertModel", BERT, lambda name: f"bert.{name}"),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2, lambda name: f"transformer.{name}"),
    "llava": ("llava", "LlavaForConditionalGeneration", LLAVA, nested),
    **{
        prefix: ("llama", "LlamaForCausalLM", LLAMA, lambda name, p=prefix: p + name)
        for prefix in ("module.", "_orig_mod.", "_forward_module.", "module._orig_mod.")
    },
    "unknown": ("nobody_knows_it", "Own", LLAMA, lambda name: f"module.{name}"),
}


def random(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("calibrate", [None, "sphere"])
@pytest.mark.parametrize("turned", [False, True], ids=["base", "expert"])
@pytest.mark.parametrize("case", CASES)
def test_other_names(case: str, turned: bool, calibrate: str | None, tmp_path: Path) -> None:
    """The result has the names of the base and the values of the merge by hand."""
    model_type, architecture, shapes, rename = CASES[case]
    config = {"model_type": model_type, "architectures": [architecture]}
    config |= {"tie_word_embeddings": False, "vocab_size": 12}
    torch.manual_seed(0)
    models: list[dict[str, Tensor]] = [
        {name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(3)
    ]
    paths = []
    for number, tensors in enumerate(models):
        other = (number == 0) == turned
        named = {rename(name) if other else name: x for name, x in tensors.items()}
        paths.append(write(tmp_path / str(number), named, config))
    document = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": path, "parameters": {"weight": 0.5}} for path in paths[1:]],
    }
    report = mf.merge_checkpoints(document, tmp_path / "out", calibrate=calibrate)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {rename(n) if turned else n for n in shapes}
    assert len(report.tensors) == len(shapes)
    base, *experts = models
    for name in shapes:
        delta = sum(0.5 * (e[name] - base[name]) for e in experts)
        got = found[rename(name) if turned else name] - base[name]
        if calibrate is None:
            assert torch.allclose(got, torch.as_tensor(delta), atol=1e-6), name
        else:  # in the same direction
            angle = torch.nn.functional.cosine_similarity
            assert float(angle(got.flatten(), torch.as_tensor(delta).flatten(), dim=0)) > 0.9


def experts(kind: str) -> dict[str, Tensor]:
    """Mixtral's experts, four of [6, 4], one by one or stacked; the same values for the same
    seed."""
    layer = "model.layers.0."
    single = {
        (e, w): torch.randn(4, 6) if w == 2 else torch.randn(6, 4)
        for e in range(4)
        for w in (1, 2, 3)
    }
    router = torch.randn(4, 4)
    if kind == "single":
        name = layer + "block_sparse_moe.experts.{}.w{}.weight"
        return {layer + "block_sparse_moe.gate.weight": router} | {
            name.format(*place): x for place, x in single.items()
        }
    pairs = [torch.cat([single[e, 1], single[e, 3]]) for e in range(4)]
    return {
        layer + "mlp.gate.weight": router,
        layer + "mlp.experts.gate_up_proj": torch.stack(pairs),
        layer + "mlp.experts.down_proj": torch.stack([single[e, 2] for e in range(4)]),
    }


MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


@pytest.mark.parametrize("options", [{}, {"memory": 1 << 20}, {"calibrate": "wsc"}])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("base", ["single", "stacked"])
def test_experts_single_and_stacked(
    base: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The merge of both layouts is, bit for bit, that of files which all have the base's."""
    other = {"single": "stacked", "stacked": "single"}[base]
    results = []
    for layouts in ((base, other, base), (base, base, base)):
        paths = []
        for seed, kind in enumerate(layouts):
            torch.manual_seed(seed)
            place = tmp_path / f"{''.join(layouts)}{seed}"
            paths.append(write(place, experts(kind), MIXTRAL))
        document = {
            "merge_method": method,
            "base_model": paths[0],
            "models": [{"model": path, "parameters": {"weight": 0.4}} for path in paths[1:]],
        }
        out = tmp_path / f"out{len(results)}"
        mf.merge_checkpoints(document, out, **options)
        results.append(load_file(out / "model.safetensors"))
    mixed, plain = results
    assert mixed.keys() == plain.keys()
    for name, x in plain.items():
        if not options.get("calibrate") or base == "stacked":
            assert torch.equal(mixed[name], x), name
        else:
            assert torch.allclose(mixed[name], x, atol=1e-6), name


@pytest.mark.parametrize("base", ["single", "stacked"])
def test_a_lacking_expert_is_not_made_up(base: str, tmp_path: Path) -> None:
    other = {"single": "stacked", "stacked": "single"}[base]
    files = {kind: experts(kind) for kind in (base, other)}
    files["single"].pop("model.layers.0.block_sparse_moe.experts.2.w3.weight")
    paths = [write(tmp_path / kind, x, MIXTRAL) for kind, x in files.items()]
    document = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": paths[1], "parameters": {"weight": 0.5}}],
    }
    with pytest.raises(mf.CheckpointError):
        mf.merge_checkpoints(document, tmp_path / "out")


def test_another_layout_is_said_to_be_one(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's stacks are transposed in the files of the hub: no range of bytes."""
    layer = "model.language_model.layers.0.mlp.experts."
    config = {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": {"model_type": "qwen3_vl_moe_text", "hidden_size": 4},
    }
    single = {
        f"{layer}{e}.{name}_proj.weight": torch.randn(6, 4)
        for e in range(2)
        for name in ("gate", "up")
    }
    turned = {f"{layer}gate_up_proj": torch.randn(2, 4, 12)}
    paths = [write(tmp_path / str(k), x, config) for k, x in enumerate((single, turned))]
    document = {
        "merge_method": "task_arithmetic",
        "base_model": paths[0],
        "models": [{"model": paths[1], "parameters": {"weight": 0.5}}],
    }
    with pytest.raises(mf.CheckpointError, match=r"layout of|missing tensor") as caught:
        mf.merge_checkpoints(document, tmp_path / "out")
    assert "complete" not in str(caught.value)
    assert not (tmp_path / "out").exists()


VISION = {
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (8, 8),
    "model.multi_modal_projector.linear_1.weight": (8, 8),
}


@pytest.mark.parametrize("donor", ["both", "text"])
def test_a_text_model_meets_the_text_part_of_a_multimodal_one(
    donor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The names of a LLaVA since transformers 4.52, and those of a Llama."""
    text = random(LLAMA, 1)
    own = random(LLAMA, 2)
    both = {name.replace("model.", "model.language_model."): x for name, x in own.items()}
    both |= random(VISION, 3)
    sizes = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    write(tmp_path / "text", text, {"model_type": "llama", **sizes})
    parts = {"text_config": {"model_type": "llama", **sizes}}
    write(tmp_path / "both", both, {"model_type": "llava", "tie_word_embeddings": False, **parts})
    other = {"both": "text", "text": "both"}[donor]
    mf.merge_checkpoints(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / donor),
            "models": [{"model": str(tmp_path / other), "parameters": {"weight": 0.25}}],
        },
        tmp_path / "out",
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    base, expert = (own, text) if donor == "both" else (text, own)
    want = {name: x + 0.25 * (expert[name] - x) for name, x in base.items()}
    if donor == "both":
        want = {n.replace("model.", "model.language_model."): x for n, x in want.items()}
        want |= random(VISION, 3)
    else:
        assert "2 tensors outside its text part are left out" in caplog.text
    torch.testing.assert_close(found, want)
