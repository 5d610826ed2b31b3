"""What ``merge_adapters`` refuses: each in words, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import magic_fast as mf
from adapters.adapter_files import MODULES, draw_lora, write_ia3, write_peft
from magic_fast.adapters import open_adapter
from magic_fast.errors import (
    CheckpointError,
    InputError,
    MagicFastError,
    NonFiniteError,
    OutputError,
)

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(2):
        write_peft(tmp_path / str(k), draw_lora(k, rank=2 + k))
    return tmp_path


def refusal(
    folder: Path, kind: type[MagicFastError], *names: str, out: str = "out", **options: Any
) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind) as caught:
        mf.merge_adapters([folder / name for name in names or ("0", "1")], folder / out, **options)
    assert sorted(folder.rglob("*")) == before
    return str(caught.value).replace(str(folder), "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected a whole number of at least 1, got 0."),
        ({"rank": True}, "rank: expected a whole number of at least 1, got True."),
        ({"on": "both"}, "on: expected one of 'weights', 'factors', got 'both'."),
        (
            {"dtype": "float64"},
            "dtype: expected one of 'float32', 'float16', 'bfloat16', got 'float64'.",
        ),
        (
            {"on": "factors"},
            "on='factors': expected preset 'peft', whose rule it is, got 'default'. Pass "
            "preset='peft', or leave out on.",
        ),
        (
            {"on": "factors", "preset": "peft", "method": "task_arithmetic", "calibrate": "wsc"},
            "rank and calibrate with on='factors': expected neither, got one. They are about the "
            "changes of weights: leave out on, or them.",
        ),
        (
            {"on": "factors", "preset": "peft", "method": "task_arithmetic"},
            "rank of 'model.layers.0.mlp.down_proj' in /1: expected 2 as of the other adapters, "
            "got 3. Choose on='weights', where ranks may differ.",
        ),
        (
            {"method": "ties", "preset": "ties_merging"},
            "method 'ties' under preset 'ties_merging' for adapters: expected thresholds tensor by "
            "tensor, got one over the model. Choose another preset.",
        ),
        (
            {"method": "pcb"},
            "method 'pcb' under preset 'default' for adapters: expected thresholds tensor by "
            "tensor, got one over the model. Pass scope='tensor'.",
        ),
        (
            {"weights": [1, 2]},
            "parameter 'weights' for method 'average': expected one of align, scale, got an "
            "unknown one.",
        ),
        ({"masks": [{}]}, "masks: expected 2 mappings from names, got [{}]."),
        (
            {"calibrate": {"sensitive": ["q_proj"]}},
            "sensitive tensor 'q_proj': expected a tensor of the model, got an unknown name. Check "
            "the list against the model's tensor names.",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings(folder: Path, options: dict[str, Any], message: str) -> None:
    assert refusal(folder, InputError, **options) == message


def test_no_list(folder: Path) -> None:
    for wrong in (str(folder / "0"), []):
        with pytest.raises(InputError, match="adapters: expected a list of paths"):
            mf.merge_adapters(wrong, folder / "out")


def test_other_base_models(folder: Path) -> None:
    write_peft(folder / "other", draw_lora(2), base_model_name_or_path="models/other")
    assert refusal(folder, InputError, "0", "other") == (
        "base model of /other: expected 'base' as of /0, got 'models/other'. Adapters of different "
        "models do not add up; where the two are the same, name it by base_model."
    )
    mf.merge_adapters([folder / "0", folder / "other"], folder / "out", base_model="models/base")
    config = (folder / "out" / "adapter_config.json").read_text()
    assert '"base_model_name_or_path": "models/base"' in config


def test_other_base_models_of_kohya(folder: Path) -> None:
    down, up = torch.ones(2, 3), torch.ones(4, 2)
    state = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}
    for name in ("sd_v1", "sdxl_base_v1-0"):
        path = folder / f"{name}.safetensors"
        save_file(state, path, metadata={"ss_base_model_version": name})
    message = refusal(folder, InputError, "sd_v1.safetensors", "sdxl_base_v1-0.safetensors")
    assert "expected 'sd_v1' as of /sd_v1.safetensors, got 'sdxl_base_v1-0'" in message
    paths = [folder / "sd_v1.safetensors", folder / "sdxl_base_v1-0.safetensors"]
    mf.merge_adapters(paths, folder / "out.safetensors", base_model="sd")
    assert open_adapter(folder / "out.safetensors").base_model == "sd"


def test_adapters_that_are_not_there(folder: Path) -> None:
    assert refusal(folder, CheckpointError, "0", "away") == (
        "Adapter not found for /away: expected PEFT's folder or a .safetensors file, got nothing "
        "there. Correct the path."
    )


def test_a_base_model_that_no_file_names(folder: Path) -> None:
    state = {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(4, 2)}
    save_file(state, folder / "d.safetensors")
    message = refusal(folder, InputError, "d.safetensors", base_model="sd")
    assert message.startswith("base_model for diffusers' files: expected none, got one.")


def test_an_alpha_that_is_no_number(folder: Path) -> None:
    state = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 3),
        "lora_unet_x.lora_up.weight": torch.ones(4, 2),
        "lora_unet_x.alpha": torch.tensor(float("nan")),
    }
    save_file(state, folder / "k.safetensors")
    assert refusal(folder, CheckpointError, "k.safetensors") == (
        "scaling 'lora_unet_x.alpha' in /k.safetensors: expected a finite number, got nan. "
        "Download the adapter again."
    )


def test_weights_of_peft_without_their_configuration(folder: Path) -> None:
    (folder / "0" / "adapter_model.safetensors").rename(folder / "alone.safetensors")
    assert refusal(folder, CheckpointError, "alone.safetensors") == (
        "Adapter without its configuration for /alone.safetensors: expected adapter_config.json "
        "beside weights of PEFT, which has their scaling, got none. Name the folder that holds "
        "both."
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"lora_alpha": None}, "lora_alpha in /bad/adapter_config.json: expected a finite number"),
        ({"lora_alpha": "x"}, "lora_alpha in"),
        ({"alpha_pattern": [1]}, "alpha_pattern in"),
        ({"alpha_pattern": {"(": 2}}, "expected regular expressions, got '('"),
        ({"rank_pattern": {"q_proj": None}}, "expected names and numbers"),
        ({"target_modules": [1, "q_proj"]}, "target_modules in"),
        ({"target_modules": "("}, "expected a regular expression, got '('"),
    ],
    ids=str,
)
def test_damaged_settings(folder: Path, setting: dict[str, Any], words: str) -> None:
    write_peft(folder / "bad", draw_lora(2), **setting)
    assert words in refusal(folder, CheckpointError, "0", "bad")


@pytest.mark.parametrize("text", ["[]", "{", '{"unet.lora_alpha": null}'])
def test_damaged_headers(folder: Path, text: str) -> None:
    state = {"unet.x.lora_A.weight": torch.ones(2, 3), "unet.x.lora_B.weight": torch.ones(4, 2)}
    save_file(state, folder / "d.safetensors", metadata={"lora_adapter_metadata": text})
    message = refusal(folder, CheckpointError, "d.safetensors")
    assert message.startswith(("lora_adapter_metadata in the header of", "lora_alpha in"))


def test_other_shapes(folder: Path) -> None:
    write_peft(folder / "wide", draw_lora(2, MODULES | {Q: (24, 18)}))
    assert refusal(folder, InputError, "0", "wide") == (
        f"module '{Q}' in /wide: expected the shape [24, 16] as in /0, got [24, 18]. Merge "
        "adapters of one base model."
    )


def test_other_kinds(folder: Path) -> None:
    write_ia3(folder / "ia3", {Q: torch.ones(24, 1)})
    assert refusal(folder, CheckpointError, "0", "ia3") == (
        "adapter /ia3: expected LoRA in peft's naming as /0 is, got IA3 in peft's naming. Merge "
        "adapters of one kind and naming."
    )


def test_whole_tensors(folder: Path) -> None:
    write_peft(folder / "whole", draw_lora(2))
    state = load_file(folder / "whole" / "adapter_model.safetensors")
    state["base_model.model.lm_head.weight"] = torch.ones(3, 3)
    save_file(state, folder / "whole" / "adapter_model.safetensors")
    message = refusal(folder, CheckpointError, "0", "whole")
    assert message.startswith("tensor 'lm_head.weight' in /whole: expected factors only")
    assert message.endswith("`magic-fast merge` takes MODEL+/whole for a model.")


def test_dora(folder: Path) -> None:
    write_peft(folder / "dora", draw_lora(2), use_dora=True)
    assert "got DoRA (use_dora) without one" in refusal(folder, CheckpointError, "0", "dora")


def test_values_that_are_not_finite(folder: Path) -> None:
    lora = draw_lora(2)
    lora.factors[Q][1][0, 0] = float("nan")
    write_peft(folder / "nan", lora)
    assert refusal(folder, NonFiniteError, "0", "nan") == (
        f"tensor 'base_model.model.{Q}.lora_B.weight' in /nan: expected finite values, got NaN or "
        "infinity. Leave that adapter out."
    )


def test_overflow(folder: Path) -> None:
    message = refusal(folder, NonFiniteError, dtype="float16", scale=1e30)
    assert message == (
        "module 'model.layers.0.mlp.down_proj' of the result: expected values within "
        "torch.float16, got an overflow. Pass dtype='float32'."
    )


def test_outputs_in_the_way(folder: Path) -> None:
    message = refusal(folder, OutputError, out="0")
    assert message.startswith("output folder '/0': expected it missing or empty")
    assert refusal(folder, InputError, out="new.safetensors").startswith(
        "output '/new.safetensors': expected a folder, which PEFT's adapters are"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, "rank and on='factors' for IA3: expected neither, got one."),
        ({"calibrate": "spectral"}, "calibrate for IA3: expected a variant by rows"),
        (
            {"calibrate": "wsc", "preset": "peft", "method": "task_arithmetic"},
            "calibrate for IA3 under preset 'peft': expected none, got one.",
        ),
    ],
)
def test_ia3(folder: Path, options: dict[str, Any], words: str) -> None:
    for name in ("a", "b"):
        write_ia3(folder / name, {Q: torch.ones(24, 1)})
    assert refusal(folder, InputError, "a", "b", **options).startswith(words)


def test_a_disk_that_fills_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from magic_fast.checkpoint import REAL

    free: Callable[[str], int] = lambda path: 10  # noqa: E731
    monkeypatch.setattr(type(REAL), "free_bytes", lambda self, path: free(path))
    assert "Disk" in refusal(folder, OutputError, out="new")
