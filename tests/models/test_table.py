"""The shipped table: what it covers, that it is what the installed transformers says, and that
reading it is light."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from magic_fast.models import table

SAMPLE = (
    "bart", "bert", "clip", "convnext", "gemma3", "gpt2", "gpt_oss", "llama", "nemotron_h",
    "qwen2_5_vl", "qwen3_vl_moe", "t5", "whisper",
)  # fmt: skip


@pytest.fixture(scope="module")
def generate(root: Path) -> ModuleType:
    transformers = pytest.importorskip("transformers")
    made_with = table.heading()["transformers"]
    if transformers.__version__ != made_with:
        pytest.skip(f"the table is of transformers {made_with}, here is {transformers.__version__}")
    path = root / "tools" / "architectures" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate_architectures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_is_that_of_the_tests(root: Path) -> None:
    pinned = (root / ".ci" / "constraints.txt").read_text()
    assert f"transformers=={table.heading()['transformers']}\n" in pinned


def test_how_many_types() -> None:
    types = table.model_types()
    assert len(types) >= 500
    assert types == sorted(set(types))
    assert not set(types) & set(table.heading()["failures"])


def test_every_failure_has_a_reason() -> None:
    assert all(table.heading()["failures"].values())


def test_a_type_that_is_not_there() -> None:
    assert table.entry_of("nobody_knows_it") is None
    assert table.entry_of("") is None
    assert table.entry_of('llama"') is None


def test_a_sample_regenerated(generate: ModuleType) -> None:
    """Parts show modules of other types; of the sample only what it shows by itself is compared."""
    for line in generate.lines(generate.describe_all(SAMPLE, table.model_types()))[1:]:
        name, _, entry = line.partition("\t")
        made, shipped = json.loads(entry), table.entry_of(json.loads(name))
        assert shipped is not None
        assert contained(made, shipped), name


def contained(made: dict, shipped: dict) -> bool:
    """Whether every module of ``made`` is in ``shipped`` with the same records, and all else is
    the same."""
    trees = ("base", "heads", "kinds")
    return (
        {k: v for k, v in made.items() if k not in trees}
        == {k: v for k, v in shipped.items() if k not in trees}
        and within(made["base"], made, shipped["base"], shipped)
        and within(made.get("heads", {}), made, shipped.get("heads", {}), shipped)
    )  # fmt: skip


def within(a: object, made: dict, b: object, shipped: dict) -> bool:
    a, b = (node if isinstance(node, dict) else {"": node} for node in (a, b))
    if a.get("@") != b.get("@"):
        return False
    for number in numbers(a):
        owner, records, *layout = made["kinds"][number]
        if not any(
            [owner, *layout] == [kind[0], *kind[2:]] and records.items() <= kind[1].items()
            for kind in (shipped["kinds"][n] for n in numbers(b))
        ):
            return False
    return all(
        key in b and within(a[key], made, b[key], shipped) for key in a if key not in ("", "@")
    )


def numbers(node: dict) -> list[int]:
    own = node.get("", [])
    return [own] if isinstance(own, int) else own


def test_a_changed_entry_is_seen() -> None:
    shipped = table.entry_of("llama")
    assert shipped is not None and contained(shipped, shipped)
    text = json.dumps(shipped)
    assert not contained(json.loads(text.replace("q_proj", "query")), shipped)
    assert not contained(json.loads(text.replace('"matrix", [0]', '"matrix", [1]')), shipped)


def test_roles_import_nothing_heavy() -> None:
    code = (
        "import sys; from magic_fast.models import roles_of\n"
        "roles_of({'model_type': 'llama'}, {'lm_head.weight': ((4, 2), 'F32')})\n"
        "print(*(m for m in ('torch', 'transformers', 'numpy') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split()
