"""Three tensors in two shards, and the output folder that holds them."""

from __future__ import annotations

from pathlib import Path

from magic_fast.checkpoint import OutputFolder, TensorSpec, plan_shards

SPECS = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "U8", (5,)), TensorSpec("c", "I64", ())]
DATA = {"a": bytes(range(24)), "b": b"hello", "c": bytes(8)}
PLANS = plan_shards(SPECS, 24)


def write_all(output: OutputFolder, plans=PLANS) -> None:
    output.create_shards(plans)
    for name, data in DATA.items():
        output.write(name, data)


def make(path: Path, **options) -> str:
    with OutputFolder(path, **options) as output:
        write_all(output)
        return output.finalise()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
