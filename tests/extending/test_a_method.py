"""Methods that are registered from outside of the package, as docs/contributing/add-a-method.md
shows them: the files here are its examples."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import magic_fast as mf
from adapters.adapter_files import draw_lora, write_peft
from magic_fast.cli import main
from magic_fast.engine.plan.modes import Mode, modes
from magic_fast.methods import registry
from magic_fast.plugins import entry_points_of
from magic_fast.recipe import Recipe

HERE = Path(__file__).parent
EXAMPLES = ("trimmed_magmax", "trimmed_mean")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both examples, for the time of a test."""
    before = dict(registry.registered())
    for name in EXAMPLES:
        monkeypatch.delitem(sys.modules, f"extending.{name}", raising=False)
        importlib.import_module(f"extending.{name}")
    yield
    table: Any = registry.registered()
    table.clear()
    table.update(before)


def by_hand(method: str, taus: Sequence[Tensor]) -> Tensor:
    """Δ of the defaults in plain PyTorch."""
    if method == "trimmed_mean":
        ordered = torch.stack(list(taus)).sort(dim=0).values
        return ordered[1:-1].mean(dim=0)
    trimmed = [mf.trim(tau, "magnitude", 0.2)[0] for tau in taus]
    stacked = torch.stack(trimmed)
    winner = stacked.abs().flip(0).argmax(dim=0)  # of equals the last
    return stacked.flip(0).gather(0, winner[None])[0] * 0.5


def draw(k: int, *, seed: int = 0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (33, 17), "b": (17,), "conv": (4, 3, 2, 2)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    experts = [
        {n: x + 0.1 * torch.randn(x.shape, generator=generator) for n, x in base.items()}
        for _ in range(k)
    ]
    return base, experts


def config_of(method: str, models: Path, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / f"expert-{k}")} for k in range(3)],
        **changes,
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


# The page.


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_shows_the_file(name: str, root: Path) -> None:
    source = (HERE / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 30
    assert f"```python\n{source}```" in (root / "docs/contributing/add-a-method.md").read_text()


# On tensors.


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("method", EXAMPLES)
def test_values(method: str, k: int) -> None:
    base, experts = draw(k)
    if method == "trimmed_mean" and k < 3:
        with pytest.raises(mf.InputError, match=f"expected at least 3, got {k}"):
            mf.merge(base, experts, method)
        return
    merged = mf.merge(base, experts, method)
    for name, start in base.items():
        taus = [e[name] - start for e in experts]
        torch.testing.assert_close(merged[name], start + by_hand(method, taus))
        alone = mf.merge_task_vectors(taus, method)
        torch.testing.assert_close(alone, by_hand(method, taus))
        halves = [t.bfloat16() for t in taus]
        assert mf.merge_task_vectors(halves, method).dtype is torch.bfloat16


@pytest.mark.parametrize("method", EXAMPLES)
def test_calibration_sweep_and_merge_into(method: str) -> None:
    base, experts = draw(4)
    plain = mf.merge(base, experts, method)
    calibrated = mf.merge(base, experts, method, calibrate="wsc")
    want, _ = mf.calibrate_weights(base, experts, plain, calibration="wsc")
    recipes = [{"method": method, "scale": s} for s in (0.5, 1.0)] + [{"method": "ties"}]
    swept = mf.sweep(base, experts, recipes, calibrate="wsc")
    assert not torch.equal(calibrated["w"], plain["w"])
    model = {n: torch.zeros_like(t) for n, t in base.items()}
    mf.merge_into(model, base, experts, method)
    for name in base:
        torch.testing.assert_close(calibrated[name], want[name])
        assert torch.equal(model[name], plain[name])
        for recipe, result in zip(recipes, swept, strict=True):
            one = mf.merge(base, experts, calibrate="wsc", **recipe)
            torch.testing.assert_close(result[name], one[name])


def test_numbers_of_experts() -> None:
    """A number for each, and one for all."""
    taus = [torch.arange(1.0, 11.0), torch.arange(1.0, 11.0)]
    got = mf.merge_task_vectors(taus, "trimmed_magmax", density=[0.1, 0.3], scale=1.0)
    assert torch.equal(got, torch.tensor([0.0] * 7 + [8, 9, 10]))
    with pytest.raises(mf.InputError, match=r"density of expert 0: expected a fraction in \(0, 1"):
        mf.merge_task_vectors(taus, "trimmed_magmax", density=20.0)


@pytest.mark.parametrize("method", EXAMPLES)
def test_adapters(method: str, tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        paths.append(tmp_path / str(seed))
        write_peft(paths[-1], draw_lora(seed))
    report = mf.merge_adapters(paths, tmp_path / "out", method)
    assert report.method == method and (tmp_path / "out/adapter_model.safetensors").is_file()


# On checkpoints.


@pytest.mark.parametrize("calibrate", [None, "wsc"])
@pytest.mark.parametrize("method", EXAMPLES)
def test_checkpoints(method: str, calibrate: str | None, tiny_models: Path, tmp_path: Path) -> None:
    config = config_of(method, tiny_models, parameters={"lambda": 0.7})
    mf.merge_checkpoints(config, tmp_path / "out", calibrate=calibrate)
    base, *experts = (
        tensors_of(tiny_models / n) for n in ("base", "expert-0", "expert-1", "expert-2")
    )
    want = mf.merge(base, experts, method, scale=0.7, calibrate=calibrate)
    got = tensors_of(tmp_path / "out")
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=2**-7, atol=0)
    record = json.loads((tmp_path / "out/magic_fast.json").read_text())
    assert record["method"] == method
    assert ("method_source" in record["settings"]) == (method == "trimmed_mean")


def test_recipes_stream_and_functions_hold(tiny_models: Path, tmp_path: Path) -> None:
    for method, mode, words in (
        ("trimmed_magmax", Mode.STREAM, ""),
        ("trimmed_mean", Mode.TORCH, "method trimmed_mean looks at whole tensors"),
    ):
        plan = mf.plan_checkpoints(config_of(method, tiny_models), tmp_path / "out")
        found = modes(plan.steps, 1 << 20, "cpu", None)
        assert {(way.mode, way.why) for way in found.values()} == {(mode, words)}


@pytest.mark.parametrize("method", EXAMPLES)
def test_sweep_of_checkpoints(method: str, tiny_models: Path, tmp_path: Path) -> None:
    config = config_of(method, tiny_models)
    report = mf.sweep_checkpoints(config, tmp_path / "out", {"lambda": [0.3, 1.0]})
    assert len(report.reports) == 2
    one = config_of(method, tiny_models, parameters={"lambda": 0.3})
    mf.merge_checkpoints(one, tmp_path / "one")
    swept = tensors_of(tmp_path / "out" / "lambda=0.3")
    for name, tensor in tensors_of(tmp_path / "one").items():
        assert torch.equal(tensor, swept[name])


def test_changed_code_is_not_resumed(tiny_models: Path, tmp_path: Path) -> None:
    """A finished result of another function is not taken for this one's."""

    def halved(task_vectors: Tensor) -> Tensor:
        return task_vectors.mean(dim=0) / 2

    config = config_of("resumed", tiny_models)
    mf.register_method("resumed", halved)
    mf.merge_checkpoints(config, tmp_path / "out")
    mf.merge_checkpoints(config, tmp_path / "out", resume=True)

    def halved(task_vectors: Tensor) -> Tensor:  # type: ignore[no-redef]
        return task_vectors.mean(dim=0) / 4

    mf.register_method("resumed", halved)
    with pytest.raises(
        mf.MagicFastError, match=r"method_source: was [0-9a-f]{16} of .*, is [0-9a-f]{16}"
    ):
        mf.merge_checkpoints(config, tmp_path / "out", resume=True)


# From the command line.


def run(*words: str, plugins: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MAGIC_FAST_PLUGINS": plugins, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "magic_fast", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_command(tiny_models: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text(yaml.safe_dump(config_of("trimmed_magmax", tiny_models, calibrate="wsc")))
    done = run("merge", str(path), str(tmp_path / "out"), plugins="trimmed_mean,trimmed_magmax")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/magic_fast.json").read_text())["method"] == "trimmed_magmax"
    broken = run("methods", plugins="trimmed_magmax,no_such_module")
    assert broken.returncode == 2 and "got 'no_such_module': ModuleNotFoundError" in broken.stderr


def test_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    assert "trimmed_mean" in capsys.readouterr().out
    assert main(["methods", "trimmed_magmax"]) == 0
    text = capsys.readouterr().out
    assert "the largest change of each entry, if the trim keeps it" in text
    assert "reads        2" in text and "lambda/scale (Python: scale) = 0.5" not in text
    assert "density = 0.2" in text and "MagMax, arXiv 2407.06322" in text
    assert main(["methods", "trimmed_mean", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["form"] == "whole tensor" and fields["backends"] == "torch"
    assert [p["name"] for p in fields["parameters"]] == ["drop", "lambda/scale"]


def test_the_document_has_the_package_only(root: Path) -> None:
    assert "trimmed" not in (root / "docs/catalog.md").read_text()
    assert not set(EXAMPLES) & set(registry.built_in())


def test_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package's module registers its method when a name is unknown."""
    facts = tmp_path / "firsts-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: firsts\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[magic_fast.methods]\nfirst = firsts\nbad = nobody\n")
    (tmp_path / "firsts.py").write_text(
        "import magic_fast as mf\n\n\n"
        "@mf.register_method('first_expert')\n"
        "def first(task_vectors):\n    return task_vectors[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    entry_points_of.cache_clear()
    mf.merge(torch.zeros(2), [torch.ones(2)], "average")
    assert "firsts" not in sys.modules
    experts = [torch.ones(2), torch.zeros(2)]
    assert torch.equal(mf.merge(torch.zeros(2), experts, "first_expert"), torch.ones(2))
    assert "first_expert" in registry.names()
    with pytest.raises(mf.InputError, match=r"'firts_expert': .* Did you mean 'first_expert'"):
        mf.merge(torch.zeros(2), experts, "firts_expert")
    entry_points_of.cache_clear()
    monkeypatch.delitem(sys.modules, "firsts")


# What is refused.


def word(task_vectors: Tensor, *, how: str = "x") -> Tensor:
    return task_vectors[0]


def bare(task_vectors: Tensor, *, alpha=0.5) -> Tensor:  # type: ignore[no-untyped-def]
    return task_vectors[0]


def positional(task_vectors: Tensor, alpha: float = 0.5) -> Tensor:
    return task_vectors[0]


def anything(task_vectors: Tensor, **more: float) -> Tensor:
    return task_vectors[0]


def seeded(task_vectors: Tensor, *, seed: int = 0) -> Tensor:
    return task_vectors[0]


def typed(task_vectors: Tensor, *, dtype: int = 0) -> Tensor:
    return task_vectors[0]


def listed(task_vectors: Tensor, *, q: Sequence[float] = (0.1, 0.2)) -> Tensor:
    return task_vectors[0]


def nothing() -> Tensor:
    return torch.zeros(0)


def plain(task_vectors: Tensor) -> Tensor:
    return task_vectors[0]


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        (
            "mine",
            word,
            "parameter 'how' of method 'mine': expected the annotation float, int, bool",
        ),
        ("mine", bare, "parameter 'alpha' of method 'mine': expected the annotation .* got none"),
        ("mine", positional, r"expected \(task_vectors, \*, parameter: float = 0.5, ...\), got"),
        ("mine", anything, r"signature of method 'mine': .* Put a '\*' before the parameters"),
        ("mine", nothing, "signature of method 'mine'"),
        ("mine", seeded, "parameter 'seed' of method 'mine': expected a name that merge"),
        ("mine", typed, "parameter 'dtype' of method 'mine': expected a name that merge"),
        ("mine", listed, "default of parameter 'q' of method 'mine': .* One value stands for all"),
        ("mine", 3, "method 'mine': expected a function, got 3"),
        ("my method", plain, "name of a new method: expected letters, .* got 'my method'"),
        ("ties", plain, "expected one that is free, got 'ties', which magic_fast itself has"),
        ("trimmed_mean", plain, "which extending.trimmed_mean.trimmed_mean registered"),
    ],
)
def test_bad_registrations(name: str, function: Any, words: str) -> None:
    with pytest.raises(mf.InputError, match=words):
        mf.register_method(name, function)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            lambda t: t,
            r"method 'odd' for 'w': expected .* of shape \(4,\) .* one of shape \(2, 4\)",
        ),
        (lambda t: 3.0, "got float. Correct the function"),
        (lambda t: t[0] > 0, "got one of torch.bool"),
        (lambda t: t[0] + t.new_zeros(3), "got RuntimeError: The size of tensor"),
        (lambda t: t[0] / 0 * 0, "NaN or infinity in the merged model for 'w'.* flat index 0"),
    ],
    ids=["shape", "type", "dtype", "raises", "nan"],
)
def test_bad_results(made: Callable[[Tensor], Any], words: str) -> None:
    def odd(task_vectors: Tensor) -> Any:
        return made(task_vectors)

    mf.register_method("odd", odd)
    with pytest.raises(mf.InputError, match=words):
        mf.merge({"w": torch.zeros(4)}, [{"w": torch.ones(4)}] * 2, "odd")


def test_a_recipe_for_others_is_refused() -> None:
    def lonely(num_experts: int) -> Recipe:
        return Recipe((1.0,))

    mf.register_method("lonely", lonely)
    with pytest.raises(mf.InputError, match=r"expected .* a Recipe of 2 experts, got one of 1"):
        mf.merge_task_vectors(torch.zeros(2, 3), "lonely")


def test_every_kind_of_parameter() -> None:
    """As the function gets them; None where its own rule holds. It may replace itself."""
    seen: dict[str, Any] = {}

    def kinds(
        task_vectors: Tensor,
        *,
        weights: Sequence[float],
        count: int = 2,
        flag: bool = False,
        how: Literal["sum", "mean"] = "sum",
        limit: float | None = None,
    ) -> Tensor:
        seen.update(weights=weights, count=count, flag=flag, how=how, limit=limit)
        return task_vectors[0]

    for _ in range(2):
        mf.register_method("kinds", kinds, base="optional")
    experts = [torch.ones(3), torch.zeros(3)]
    mf.merge(None, experts, "kinds", weights=torch.tensor([0.5, 1.0]), how="mean", flag=True)
    assert seen == {"weights": (0.5, 1.0), "count": 2, "flag": True, "how": "mean", "limit": None}
    mf.merge(torch.zeros(3), experts, "kinds", weights=2, limit=1)
    assert (seen["weights"], seen["limit"]) == ((2.0, 2.0), 1.0)
    with pytest.raises(mf.InputError, match=r"parameter 'weights' .* got none"):
        mf.merge(None, experts, "kinds")
    with pytest.raises(mf.InputError, match="how for method 'kinds': expected one of sum, mean"):
        mf.merge(None, experts, "kinds", weights=1, how="max")


def test_whole_models(tiny_models: Path, tmp_path: Path) -> None:
    """``base="none"``: the function sees the models; the base of a YAML is for the calibration."""

    def last(task_vectors: Tensor) -> Tensor:
        return task_vectors[-1]

    mf.register_method("last", last, base="none")
    experts = [torch.ones(3), torch.full((3,), 2.0)]
    assert torch.equal(mf.merge(None, experts, "last"), experts[1])
    for calibrate in (None, "wsc"):
        config = config_of("last", tiny_models)
        mf.merge_checkpoints(config, tmp_path / str(calibrate), calibrate=calibrate)
    got, want = tensors_of(tmp_path / "None"), tensors_of(tiny_models / "expert-2")
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_a_seed_goes_to_the_recipe() -> None:
    from magic_fast.recipe import Trim, TrimRule

    def dropped(num_experts: int, *, seed: int = 0) -> Recipe:
        trim = Trim(TrimRule.RANDOM, density=(0.5,) * num_experts, seed=seed)
        return Recipe((1.0,) * num_experts, trim)

    mf.register_method("dropped", dropped)
    taus = torch.ones(1, 64)
    one, two = (mf.merge_task_vectors(taus, "dropped", seed=s) for s in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, mf.merge_task_vectors(taus, "dropped", seed=1))


def test_words_that_are_taken() -> None:
    """Every keyword of the calls that take a method's parameters."""
    import inspect

    from magic_fast.methods.signature import TAKEN

    own = {"weights", "scale", "seed", "method_params"}
    calls = (mf.merge, mf.merge_task_vectors, mf.merge_into, mf.merge_adapters, mf.sweep)
    named = {name for call in calls for name in inspect.signature(call).parameters}
    assert named - own <= set(TAKEN)
