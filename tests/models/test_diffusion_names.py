"""The shipped names of diffusion models: what the maps hold, both ways; that a file is of a family
as a whole. That they are what diffusers says, tests/integrations/diffusers_checks.py shows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from magic_fast.models import diffusion
from magic_fast.models.diffusion import Naming, families, meanings, recognised
from magic_fast.models.diffusion.names import map_of

FOLDER = Path(diffusion.__file__).parent
SHIPPED: dict[str, Any] = json.loads((FOLDER / "names.json").read_text())


def test_versions_are_those_of_its_environment(root: Path) -> None:
    pinned = (root / "benchmarks" / "peers-diffusers.txt").read_text()
    for package in ("diffusers", "transformers"):
        assert f"\n{package}=={SHIPPED[package]}" in pinned


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.glob("*.json")) < 64_000


def test_every_map_is_used_and_there() -> None:
    used = {part["map"] for parts in families().values() for part in parts.values()}
    assert used == set(SHIPPED["maps"])


def instances(name: str) -> list[tuple[str, str, Any]]:
    """Names of both sides of every entry, numbers filled in, and its rows."""
    plain, found = SHIPPED["maps"][name], []
    for entry in plain["names"]:
        ours, theirs, table, rows = entry + [entry[0], -1, ""][len(entry) - 1 :]
        heads = plain["tables"][table] if table >= 0 else {"": ""}
        for head, other in heads.items():
            found.append((filled(ours, head), filled(theirs, other), rows))
    return found


def filled(pattern: str, numbers: str) -> str:
    """7 where any number may stand."""
    for number in numbers.split():
        pattern = pattern.replace("*", number, 1)
    return pattern.replace("*", "7").replace("@", "weight")


@pytest.mark.parametrize("name", sorted(SHIPPED["maps"]))
def test_both_ways(name: str) -> None:
    """Each name leads to the other, written with dots or kohya's underscores, and to none else."""
    for ours, theirs, _ in instances(name):
        (there,) = map_of(name).links(ours, Naming.DIFFUSERS)
        assert there.names == (ours, theirs)
        assert there in list(map_of(name).links(theirs, Naming.ORIGINAL))
        if ours.endswith(".weight"):
            flat = ours.removesuffix(".weight").replace(".", "_")
            assert list(map_of(name).links(flat, Naming.DIFFUSERS, flat=True)) == [there]


@pytest.mark.parametrize("name", sorted(SHIPPED["maps"]))
def test_rows_are_all_there_once(name: str) -> None:
    parts: dict[str, list[Any]] = defaultdict(list)
    for _, theirs, rows in instances(name):
        parts[theirs].append(rows)
    for theirs, found in parts.items():
        if isinstance(found[0], list):
            rows = [n for _, *spans in found for start, stop in spans for n in range(start, stop)]
            assert sorted(rows) == list(range(found[0][0])), theirs
        else:
            assert len(found) == 1, theirs


def test_halves_that_change_places() -> None:
    (link,) = map_of("flux").links("norm_out.linear.bias", Naming.DIFFUSERS)
    assert link.names[1] == "final_layer.adaLN_modulation.1.bias"
    assert link.rows == (2, ((1, 2), (0, 1)))


@pytest.mark.parametrize(
    ("family", "name", "flat", "expected"),
    [
        ("Stable Diffusion 1", "lora_unet_mid_block_attentions_0_proj_in", True, ["unet"]),
        ("Stable Diffusion 1", "lora_unet_middle_block_1_proj_in", True, ["unet"]),
        ("Stable Diffusion 1", "lora_unet_down_blocks_3_attentions_0_proj_in", True, []),
        ("Stable Diffusion XL", "lora_te2_text_model_encoder_layers_31_mlp_fc2", True,
         ["second text encoder"]),
        ("Stable Diffusion XL", "text_model.encoder.layers.3.mlp.fc2.weight", False,
         ["text encoder", "second text encoder"]),
        ("Wan", "diffusion_model.blocks.39.cross_attn.k_img.weight", False, ["transformer"]),
        ("Wan", "blocks.39.cross_attn.q_img.weight", False, []),
        ("Qwen-Image", "lycoris_transformer_blocks_0_attn_to_q", True, ["transformer"]),
        ("Flux", "transformer.transformer_blocks.0.attn.to_q.weightless", False, []),
    ],
)  # fmt: skip
def test_meanings(family: str, name: str, flat: bool, expected: list[str]) -> None:
    assert [m.part for m in meanings(family, name, flat=flat)] == expected


LDM = "model.diffusion_model."


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "img_in.bias"], {"Flux"}),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale"], set()),
        ([f"{LDM}input_blocks.4.1.proj_in.weight"], {"Stable Diffusion 1", "Stable Diffusion 2",
                                                     "Stable Diffusion XL"}),
        ([f"{LDM}input_blocks.4.1.proj_in.weight", f"{LDM}label_emb.0.0.weight"],
         {"Stable Diffusion XL"}),
        ([f"{LDM}input_blocks.1.1.proj_in.weight", "cond_stage_model.model.ln_final.weight",
          "model_ema.decay"], {"Stable Diffusion 2"}),
        (["model.layers.0.self_attn.q_proj.weight"], set()),
        ([], set()),
    ],
)  # fmt: skip
def test_a_file_is_of_a_family_as_a_whole(names: list[str], expected: set[str]) -> None:
    assert set(recognised(names)) == expected


def test_a_part_with_names_that_are_not_known_is_there_without_places() -> None:
    found = recognised([f"{LDM}mystery.weight", "first_stage_model.encoder.conv_in.weight"])
    assert found["Stable Diffusion 1"]["unet"].places == {}
    assert "text encoder" not in found["Stable Diffusion 1"]


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from magic_fast.models.diffusion import recognised\n"
        "recognised(['img_in.weight'])\n"
        "print(*(m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split()
