"""Calibrations that are registered from outside of the package, as
docs/contributing/add-a-calibration.md shows them: the files here are its examples."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import magic_fast as mf
from adapters.adapter_files import draw_lora, write_peft
from engine.engine_models import MIB, Models, different, environment, read_out
from magic_fast import ops
from magic_fast.calibration import as_calibration, catalog, registry
from magic_fast.cli import main
from magic_fast.config import MergeConfig
from magic_fast.engine.plan.modes import Mode
from magic_fast.errors import BackendError
from magic_fast.ops.registry import implementation
from magic_fast.plugins import entry_points_of
from magic_fast.recipe import EpsMode, Granularity, Variant
from support.backends import available_backends, backend_params
from support.calibrations import CalibrationCase, calibration_cases
from support.oracle import assert_within_budget, truth

HERE = Path(__file__).parent
EXAMPLES = ("median_norm", "nuclear_norm")
TIES = {"density": 0.3, "weight": 0.7}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both examples, for the time of a test."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    for name in EXAMPLES:
        monkeypatch.delitem(sys.modules, f"extending.{name}", raising=False)
        importlib.import_module(f"extending.{name}")
    yield


def draw(k: int = 4, shape: tuple[int, ...] = (37, 65), dtype: torch.dtype = torch.float32) -> Any:
    """A base, and experts whose rows moved by different lengths."""
    generator = torch.Generator().manual_seed(k)
    base = torch.randn(shape, generator=generator)
    lengths = torch.rand((k, shape[0], *[1] * (len(shape) - 1)), generator=generator) + 0.05
    experts = base + 0.1 * lengths * torch.randn((k, *shape), generator=generator)
    return base.to(dtype), [e.to(dtype) for e in experts]


def median(taus: Tensor, change: Tensor) -> Tensor:
    """ξ [rows] in float64, from the vectors themselves."""
    norms = torch.linalg.vector_norm(taus.flatten(2), dim=-1)
    return norms.quantile(0.5, dim=0) / torch.linalg.vector_norm(change.flatten(1), dim=-1)


# The page.


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_shows_the_file(name: str, root: Path) -> None:
    source = (HERE / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 30
    assert (
        f"```python\n{source}```" in (root / "docs/contributing/add-a-calibration.md").read_text()
    )


# On tensors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", backend_params())
def test_values_by_hand(backend: str, dtype: torch.dtype) -> None:
    """An average, against the formula in float64 on the vectors themselves."""
    base, experts = draw(dtype=dtype)
    got = mf.merge(base, experts, "average", calibrate="median_norm", backend=backend)
    taus = torch.stack([e.double() - base.double() for e in experts])
    change = taus.mean(0)
    want = base.double() + median(taus, change).clamp(0.1, 10.0)[:, None] * change
    # twice: of the result itself, and of an average of four experts in float32
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def _cases() -> list[Any]:
    """Those of every variant, once: dtypes, layouts, contents, settings, recipes."""
    return [
        pytest.param(case, id=case.word.removeprefix("manifold-"))
        for case in dict.fromkeys(calibration_cases())
        if case.variant is Variant.MANIFOLD and case.eps_mode is EpsMode.RELATIVE and case.guards
    ]


@pytest.mark.parametrize("case", _cases())
@pytest.mark.parametrize("backend", backend_params())
def test_within_the_contract(backend: str, case: CalibrationCase) -> None:
    """As every calibrated merge: float64 truth, and the error of plain float32 and an ulp."""
    job = case.job()
    function = registry.resolved("median_norm", job.name)
    assert job.calibration is not None
    job = replace(job, calibration=replace(job.calibration, variant=function))
    try:
        ops.merge([job], backend=backend)
    except BackendError as error:
        assert backend != "torch"
        pytest.skip(str(error))
    assert_within_budget(job.out, truth(job))


@pytest.mark.parametrize("backend", backend_params())
def test_bits_of_a_built_in_variant(backend: str) -> None:
    """The same formula, fused and not; and of more rows than are worked on at a time."""

    @mf.register_calibration("like_sphere")
    def like_sphere(gram: Tensor, dots: Tensor, norm2: Tensor) -> Tensor:
        return gram.diagonal(dim1=-2, dim2=-1).sqrt().mean(-1) / norm2.sqrt()

    shape = (1100, 1000) if backend == "native" else (37, 65)
    base, experts = draw(3, shape, torch.bfloat16)
    for granularity in ("row", "tensor"):
        asked = [mf.WeightCalibration(v, granularity) for v in ("like_sphere", "sphere")]  # type: ignore[arg-type]
        got, want = (mf.merge(base, experts, "ties", calibrate=s, backend=backend) for s in asked)
        assert torch.equal(got, want)
        merged = mf.merge(base, experts, "ties", backend=backend)
        (got, found), (want, wanted) = (
            mf.calibrate_weights(base, experts, merged, calibration=s, backend=backend)
            for s in asked
        )
        assert torch.equal(got, want)
        a, b = found.tensors[0], wanted.tensors[0]
        torch.testing.assert_close(a.coefficient, b.coefficient, rtol=1e-6, atol=0)
        assert a.magnitude_after == pytest.approx(b.magnitude_after, rel=1e-6)


class Plain:
    """What is required of a backend, and nothing beside: no sums of rows, no calibrations."""

    name = "plain"

    def __init__(self) -> None:
        core = implementation("native")
        self.select, self.merge, self._core = core.select, core.merge, core

    def why_not(self) -> str | None:
        return None

    def supports(self, job: ops.Job) -> str | None:
        return "it calibrates nothing" if job.calibration else self._core.supports(job)


@pytest.mark.skipif("native" not in available_backends(), reason="its core is what merges here")
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_backend_that_merges_and_no_more(own_registry: None, granularity: str) -> None:
    mf.register_backend("plain", Plain, devices=("cpu",))
    settings = {"variant": "median_norm", "granularity": granularity}
    base, experts = draw(3, (1100, 1000), torch.bfloat16)
    merged = mf.merge(base, experts, "ties")
    results = [
        (
            mf.merge(base, experts, "ties", calibrate=settings, backend=name),
            mf.calibrate_weights(base, experts, merged, calibration=settings, backend=name)[0],
        )
        for name in ("plain", "native")
    ]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=torch.finfo(got.dtype).eps, atol=0)
    with pytest.raises(BackendError, match="it calibrates nothing"):
        mf.merge(base, experts, "ties", calibrate="sphere", backend="plain")


def test_models_and_settings() -> None:
    """State dicts, the choice of tensors, strength, clamp, sides and experts that do not count."""
    base, experts = draw()
    models = [{"a.weight": x, "embed.weight": x, "norm.weight": x[:, 0]} for x in (base, *experts)]
    merged = mf.merge(models[0], models[1:], "average", calibrate="median_norm")
    plain = mf.merge(models[0], models[1:], "average")
    assert torch.equal(merged["embed.weight"], plain["embed.weight"])
    assert torch.equal(merged["norm.weight"], plain["norm.weight"])
    taus = torch.stack([e.double() - base.double() for e in experts])
    change = taus.mean(0)
    xi = median(taus, change)
    for settings, factor in (
        ({"strength": 0.5}, xi.sqrt()),
        ({"clamp": (0.1, 1.2)}, xi.clamp(max=1.2)),
        ({"direction": "shrink"}, torch.where(xi < 1, xi, 1.0)),
        ({"sensitive": ["a"]}, torch.where(xi < 1, xi, 1.0)),
        ({"scale": 0.5}, 0.5 * xi),
        ({"tensors": mf.TensorFilter(exclude=("weight",))}, torch.ones_like(xi)),
    ):
        calibrate = {"variant": "median_norm", **settings}
        got = mf.merge(models[0], models[1:], "average", calibrate=calibrate)["a.weight"]
        torch.testing.assert_close(got.double(), base.double() + factor[:, None] * change)
    some = mf.merge(base, experts, "task_arithmetic", weights=[1, 0, 1, 1], calibrate="median_norm")
    rest = [experts[0], *experts[2:]]
    torch.testing.assert_close(
        some, mf.merge(base, rest, "task_arithmetic", calibrate="median_norm")
    )
    into = {n: torch.zeros_like(t) for n, t in models[0].items()}
    mf.merge_into(into, models[0], models[1:], "average", calibrate="median_norm")
    recipes = [{"method": "ties"}, {"method": "average"}]
    swept = mf.sweep(models[0], models[1:], recipes, calibrate="median_norm")[1]
    for name in merged:
        assert torch.equal(into[name], merged[name]) and torch.equal(swept[name], merged[name])


def test_task_vectors_and_guards() -> None:
    """Without a base; rows without a direction are left alone, whatever the function returns."""
    taus = [torch.tensor([[3.0, 4.0], [0, 0], [1, 0]]), torch.tensor([[3.0, 4.0], [0, 0], [-1, 0]])]
    got = mf.merge_task_vectors(taus, "average", calibrate="median_norm", nonfinite="propagate")
    assert torch.equal(got, torch.tensor([[3.0, 4.0], [0, 0], [0, 0]]))
    broken = [taus[0], taus[1].clone().fill_(torch.nan)]
    with pytest.raises(mf.NonFiniteError, match=r"expert 1 .* flat index 0"):
        mf.merge_task_vectors(broken, "average", calibrate="median_norm")
    kept = mf.merge_task_vectors(
        broken, "average", calibrate="median_norm", nonfinite="propagate", backend="native"
    )
    assert bool(kept.isnan().all())


@pytest.mark.parametrize("offset", [0, 600_000])
def test_places_of_what_is_not_finite(offset: int) -> None:
    """As of any merge: the index in the whole tensor, in whichever block of rows it lies."""
    base, experts = draw(2, (800, 1000))
    for broken, what in ((base, "the base"), (experts[1], "expert 1")):
        broken.view(-1)[offset + 7] = torch.inf
        for call in (mf.merge, calibrated):
            with pytest.raises(mf.NonFiniteError, match=f"{what} .* flat index {offset + 7}"):
                call(base, experts, "average", calibrate="median_norm")
        broken.view(-1)[offset + 7] = 0.0
    base, experts = base.half(), [e.half() for e in experts]
    experts[0].view(-1)[offset] = 60000.0
    with pytest.raises(mf.NonFiniteError, match=f"overflow at flat index {offset}"):
        mf.merge(
            base, experts, "task_arithmetic", scale=1.0, weights=[1.5, 1.0],
            calibrate={"variant": "median_norm", "clamp": (1, 1), "scale": 2.0},
        )  # fmt: skip


def calibrated(base: Tensor, experts: list[Tensor], method: str, calibrate: str) -> Tensor:
    merged = mf.merge(base.nan_to_num(), [e.nan_to_num() for e in experts], method)
    merged.nan_to_num_(0, 0, 0)
    return mf.calibrate_weights(base, experts, merged, calibration=calibrate)[0]  # type: ignore[no-any-return]


# Whole tensors.


def test_whole_tensors() -> None:
    base, experts = draw()
    got = mf.merge(base, experts, "ties", calibrate="nuclear_norm")
    change = mf.merge(base, experts, "ties").double() - base.double()
    sums = [torch.linalg.svdvals(e.double() - base.double()).sum() for e in experts]
    xi = torch.stack(sums).mean() / torch.linalg.svdvals(change).sum()
    torch.testing.assert_close(got.double(), base.double() + xi * change, rtol=0, atol=2e-6)
    with pytest.raises(mf.InputError, match="granularity: expected 'tensor' with variant 'nucl"):
        mf.WeightCalibration("nuclear_norm", Granularity.ROW)
    with pytest.raises(mf.BackendError, match="nuclear_norm looks at whole tensors"):
        mf.merge(base, experts, "ties", calibrate="nuclear_norm", backend="native")


def test_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no factor on rows: it returns the change itself; it may ask for the name."""
    names = []

    @mf.register_calibration("clipped", needs="tensors", gives="change")
    def clipped(task_vectors: Tensor, change: Tensor, *, name: str) -> Tensor:
        names.append(name)
        return change.clamp(-0.01, 0.01)

    base, experts = draw()
    model = {"a.weight": base}
    merged = mf.merge(model, [{"a.weight": e} for e in experts], "average", calibrate="clipped")
    plain = mf.merge(base, experts, "average")
    torch.testing.assert_close(merged["a.weight"], base + (plain - base).clamp(-0.01, 0.01))
    again, report = mf.calibrate_weights(base, experts, plain, calibration="clipped", name="b")
    torch.testing.assert_close(again, merged["a.weight"])
    assert names == ["a.weight", "b"]
    length = (again - base).norm() / torch.stack([(e - base).norm() for e in experts]).mean()
    assert report.tensors[0].magnitude_after == pytest.approx(float(length), rel=1e-4)
    with pytest.raises(mf.InputError, match=r"strength: expected 1\.0 with variant 'clipped'"):
        mf.WeightCalibration("clipped", strength=0.5)


def test_a_closed_form_of_weights_alone() -> None:
    """Inputs of a task modelled by the span of its change: traces of products, one number for each
    tensor of any shape, another formula for embeddings."""

    @mf.register_calibration("by_span", needs="tensors")
    def by_span(task_vectors: Tensor, change: Tensor, name: str = "") -> Tensor:
        found = []
        for tau in task_vectors:
            t, d = (x.reshape(len(x), -1) for x in (tau, change))
            if "embed" in name:
                weights = t.square().sum(1)
                a, m, c = ((weights * (x * y).sum(1)).sum() for x, y in ((t, t), (d, d), (t, d)))
            elif tau.dim() == 1:
                a, m, c = ((x * y).sum() for x, y in ((t, t), (d, d), (t, d)))
            else:
                own, merged = t @ t.T, d @ t.T
                a, m, c = own.square().sum(), merged.square().sum(), (own * merged).sum()
            found.append((a / m).sqrt() * (c / (a * m).sqrt()).clamp(0.05, 1).sqrt())
        return torch.stack(found).mean()

    everything = {"variant": "by_span", "tensors": mf.TensorFilter(include=(".",))}
    for name, shape in (("a.weight", (6, 9)), ("embed.weight", (6, 9)), ("norm.weight", (50,))):
        base, (expert, *_) = draw(1, shape)
        equal = [{name: expert} for _ in range(3)]
        for method, options in (("average", {}), ("task_arithmetic", {"scale": 1.0})):
            got = mf.merge({name: base}, equal, method, calibrate=everything, **options)
            torch.testing.assert_close(got[name], expert)  # ξ: 1 of a mean, 1/3 of a sum


# Checkpoints, the configuration and the command.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("m") / "m")


@pytest.mark.parametrize("name", EXAMPLES)
def test_checkpoints(models: Models, name: str, tmp_path: Path) -> None:
    """Row sums stream in pieces, whole tensors are held; the bits are those of tensors."""
    config = models.config("ties", parameters=TIES, calibrate=name)
    plan = mf.plan_checkpoints(config, tmp_path / "out", memory=4 * MIB)
    modes = {way.mode for way in plan.budget.modes.values()}
    report = mf.merge_checkpoints(config, tmp_path / "out", memory=4 * MIB)
    want = models.merged("ties", calibrate=name, density=0.3, weights=[0.7] * 3)
    assert not different(read_out(tmp_path / "out"), want)
    if "native" in available_backends():
        assert modes == ({Mode.STREAM} if name == "median_norm" else {Mode.STREAM, Mode.TORCH})
    tensors = {t.name: t for t in report.tensors}
    found = tensors["model.layers.0.mlp.up_proj.weight"]
    assert found.calibrated and found.rows == 301 and found.magnitude_after is not None
    document = json.loads((tmp_path / "out" / "magic_fast.json").read_text())
    assert name in json.dumps(document)


def test_merged_elsewhere(models: Models, tmp_path: Path) -> None:
    """On disk as in memory, by the command."""
    merged = models.merged("average")
    from engine.engine_models import write_model

    write_model(tmp_path / "merged", merged)
    experts = [str(models.folder / f"expert-{k}") for k in range(3)]
    arguments = ["calibrate", "--base", str(models.folder / "base"), "--experts", *experts]
    arguments += ["--merged", str(tmp_path / "merged"), str(tmp_path / "out"), "-q"]
    assert main([*arguments, "--variant", "median_norm", "--strength", "0.5"]) == 0
    settings = mf.WeightCalibration("median_norm", strength=0.5)
    want, _ = mf.calibrate_weights(models.base, models.experts, merged, calibration=settings)
    assert not different(read_out(tmp_path / "out"), want)


def test_configuration_and_commands(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = models.config("ties", parameters=TIES, calibrate={"variant": "median_norm", "p": 2})
    config = MergeConfig.from_yaml(text)
    assert config.calibrate is not None and config.calibrate.variant == "median_norm"
    assert MergeConfig.from_yaml(config.to_yaml()) == config
    path = tmp_path / "config.yml"
    path.write_text(models.config("ties", parameters=TIES))
    assert (
        main(["merge", str(path), str(tmp_path / "out"), "--calibrate", "median_norm", "-q"]) == 0
    )
    want = models.merged("ties", calibrate="median_norm", density=0.3, weights=[0.7] * 3)
    assert not different(read_out(tmp_path / "out"), want)
    capsys.readouterr()
    for name in EXAMPLES:
        assert main(["methods", name]) == 0
        out = capsys.readouterr().out
        found = catalog.find_calibrator(name)
        assert found is not None and found.summary in out and found.use_when in out
        assert "clamp = [0.1, 10]" in out and "eps_mode" not in out
        assert as_calibration(name) == mf.WeightCalibration(name)
        way = next(way for way in found.use if way.startswith("YAML: "))
        spelled = way.removeprefix("YAML: ").split(" (or ")[0]
        assert yaml.safe_load(spelled)["calibrate"] == {"variant": name}
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["calibrations"]
    assert [c["name"] for c in listed][-2:] == list(EXAMPLES)
    with pytest.raises(
        mf.ConfigError, match=r"'nuclear_norm', got 'median'.*Did you mean 'median_"
    ):
        MergeConfig.from_yaml(models.config("ties", calibrate={"variant": "median"}))


def test_another_function_does_not_continue(models: Models, tmp_path: Path) -> None:
    """What a finished folder was made by is known by the text of the function."""
    config = models.config("ties", parameters=TIES, calibrate="median_norm")
    mf.merge_checkpoints(config, tmp_path / "out")
    mf.merge_checkpoints(config, tmp_path / "out", resume=True)
    registry._REGISTERED.pop("median_norm")

    @mf.register_calibration("median_norm")
    def other(gram: Tensor, dots: Tensor, norm2: Tensor) -> Tensor:
        return norm2 + 1

    with pytest.raises(mf.InputError, match="what is done to the tensors"):
        mf.merge_checkpoints(config, tmp_path / "out", resume=True)


def test_adapters(tmp_path: Path) -> None:
    for k in range(3):
        write_peft(tmp_path / str(k), draw_lora(k))
    paths = [tmp_path / str(k) for k in range(3)]
    report = mf.merge_adapters(paths, tmp_path / "out", calibrate="median_norm")
    made = [m.calibration for m in report.modules if m.calibration and m.calibration.calibrated]
    assert made and all(m.magnitude_after != m.magnitude_before for m in made)
    with pytest.raises(mf.InputError, match="'nuclear_norm', which looks at whole tensors"):
        mf.merge_adapters(paths, tmp_path / "other", calibrate="nuclear_norm")


# What is refused.


def test_names() -> None:
    def f(gram: Tensor, dots: Tensor, norm2: Tensor) -> Tensor:
        return norm2

    for name in ("sphere", "lines", "median_norm"):
        with pytest.raises(mf.InputError, match=f"expected one that is not taken, got '{name}'"):
            mf.register_calibration(name, f)
    for name in ("wsc", "none", "Big", "a-b", "", "dual"):
        with pytest.raises(mf.InputError, match="expected lower case letters"):
            mf.register_calibration(name, f)
    assert mf.register_calibration("mine", f) is f
    mf.register_calibration("mine", f)  # the same again, as a notebook does
    with pytest.raises(
        mf.InputError, match=r"expected None, 'wsc', .*'mine' or a Weight.*got 'min'"
    ):
        mf.merge(*draw(), "average", calibrate="min")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (3, {}, r"expected one of \(gram, dots, norm2\), got 3"),
        (lambda gram: gram, {}, r"expected one of \(gram, dots, norm2\), got one of \(gram\)"),
        (lambda a, b, c: a, {"needs": "tensors"}, r"expected one of \(task_vectors, change\)"),
        (lambda a, b, c: a, {"needs": "data"}, "expected 'rows' or 'tensors', got 'data'"),
        (lambda a, b, c: a, {"gives": "change"}, "expected 'coefficients' with needs='rows'"),
    ],
)
def test_signatures(function: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(mf.InputError, match=message):
        mf.register_calibration("bad", function, **options)


def _fails(gram: Tensor, dots: Tensor, norm2: Tensor) -> Tensor:
    raise ZeroDivisionError("no rows")


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda g, d, n: g, r"numbers of shape \(37,\), got float64 of shape \(37, 4, 4\)"),
        (lambda g, d, n: n.sum(), r"numbers of shape \(37,\), got float64 of shape \(\)"),
        (lambda g, d, n: n.long(), r"floating numbers of shape \(37,\), got int64"),
        (lambda g, d, n: n / (n - n[3]), "finite coefficients, got inf in row 3"),
        (lambda g, d, n: n.fill_(1), "expected a function that leaves its inputs alone"),
        (_fails, "expected a function that runs, got ZeroDivisionError: no rows"),
        (lambda g, d, n: "big", "expected a function that runs, got"),
    ],
)
def test_faults(function: Callable[..., Any], message: str, backend: str) -> None:
    if backend not in available_backends():
        pytest.skip(f"{backend} is not under test")
    mf.register_calibration("bad", function)
    base, experts = draw()
    with pytest.raises(mf.InputError, match=f"calibration 'bad' for 'w': .*{message}"):
        mf.merge(base, experts, "average", calibrate="bad", backend=backend, name="w")


def test_settings_without_a_meaning() -> None:
    with pytest.raises(mf.InputError, match="calibration p: expected 2 with variant 'median_norm'"):
        mf.WeightCalibration("median_norm", p=1)


# Packages.


PACKAGE = """
import magic_fast as mf

@mf.register_calibration("packaged", summary="twice the change")
def packaged(gram, dots, norm2):
    return norm2 * 0 + 2
"""


def test_entry_points(tmp_path: Path) -> None:
    """Found by a process that imports nothing of it; a broken one is named."""
    facts = tmp_path / "toy-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    entries = "packaged = toy:packaged\nbroken = toy_missing:f\nidle = toy:mf"
    (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{entries}\n")
    (tmp_path / "toy.py").write_text(PACKAGE)
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    code = (
        "import sys, torch, magic_fast as mf\n"
        "a, b = torch.zeros(1, 2), [torch.ones(1, 2)]\n"
        "mf.merge(a, b, 'average', calibrate='sphere')\n"
        "print('toy' in sys.modules)\n"
        "print(mf.merge(a, b, 'average', calibrate='packaged').tolist())\n"
        "for word in ('broken', 'idle'):\n"
        "    try:\n"
        "        mf.merge(a, b, 'average', calibrate=word)\n"
        "    except mf.InputError as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:2] == ["False", "[[2.0, 2.0]]"]
    assert "'packaged' or a WeightCalibration, got 'broken' (toy_missing:f cannot" in lines[2]
    assert "got 'idle' (magic_fast.calibrations has it, but does not register it)" in lines[3]
    command = [sys.executable, "-m", "magic_fast", "methods"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "packaged" in run.stdout and "twice the change" in run.stdout


def test_nothing_is_loaded_for_a_known_word() -> None:
    entry_points_of.cache_clear()
    assert mf.WeightCalibration("sphere").variant is Variant.SPHERE
    mf.WeightCalibration("median_norm")
    assert entry_points_of.cache_info().misses == 0
