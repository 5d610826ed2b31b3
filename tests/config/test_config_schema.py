"""The YAML of a merge: what is read, what is refused, and in which words."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magic_fast.config import MergeConfig
from magic_fast.errors import ConfigError
from magic_fast.methods.registry import built_in

TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 0.5
      density: 0.4
  - model: b
parameters:
  normalize: true
dtype: float32
out_dtype: bfloat16
"""


def refusal(text: str, **kwargs: str) -> str:
    with pytest.raises(ConfigError) as caught:
        MergeConfig.from_yaml(text, **kwargs)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def ties(extra: str = "", **top: object) -> dict[str, object]:
    return {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}], **top}


def test_fields_of_a_plain_yaml() -> None:
    config = MergeConfig.from_yaml(TIES)
    assert config.merge_method == "ties"
    assert config.preset == "mergekit"
    assert config.model_references == ("base", "a", "b")
    assert config.donor == "base"
    assert (config.dtype, config.out_dtype) == ("float32", "bfloat16")
    assert config.models is not None and config.models[0].parameters["density"] == 0.4
    assert config.calibrate is None and config.seed is None and config.num_layers is None
    assert config.warnings == ()


def test_donor_without_base_is_the_first_model() -> None:
    config = MergeConfig.from_dict(
        {"merge_method": "linear", "models": [{"model": "z"}, {"model": "a"}]}
    )
    assert config.donor == "z"


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "torch.bfloat16"])
def test_dtype_spellings(spelling: str) -> None:
    assert MergeConfig.from_dict(ties(dtype=spelling)).dtype == "bfloat16"


def test_numbers_in_scientific_notation_are_numbers() -> None:
    text = TIES.replace("normalize: true", "lambda: 1e-2")
    assert MergeConfig.from_yaml(text).parameters["lambda"] == 0.01


@pytest.mark.parametrize(
    "reference",
    ["models/base", "./models/base/", {"model": {"path": "models/base"}}, {"path": "models/base"},
     {"model": {"path": "models/base", "revision": None}, "lora": None}],
)  # fmt: skip
def test_model_references(reference: object) -> None:
    assert MergeConfig.from_dict(ties(base_model=reference)).base_model == "models/base"


def test_keys_that_change_nothing_are_accepted() -> None:
    config = MergeConfig.from_dict(
        ties(tokenizer_source=None, tokenizer={"source": "base", "tokens": None}, modules=None,
             chat_template=None)
    )  # fmt: skip
    assert config.warnings == ()
    assert MergeConfig.from_dict(ties(tokenizer_source="base")).tokenizer_source == "base"


def test_random_seed_is_seed() -> None:
    assert MergeConfig.from_dict(ties(random_seed=7)).seed == 7
    with pytest.raises(ConfigError, match="two seeds"):
        MergeConfig.from_dict(ties(random_seed=7, seed=8))


def test_keywords_go_through_the_same_checks() -> None:
    assert MergeConfig(**ties()) == MergeConfig.from_dict(ties())
    with pytest.raises(ConfigError, match="Did you mean 'base_model'"):
        MergeConfig(merge_method="ties", base_modell="x", models=[{"model": "a"}])


def test_copies_are_equal_and_keep_warnings() -> None:
    config = MergeConfig.from_dict(ties(parameters={"int8_mask": True}))
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and twin.warnings == config.warnings


# Faults, each with its words.

FAULTS = [
    ("merge_method: ties", "merge_method: tise", ["line 1", "Did you mean 'ties'"]),
    ("merge_method: ties", "merge_method: TIES", ["Did you mean 'ties'"]),
    ("base_model: base", "base_modle: base", ["unknown key for base_modle", "'base_model'"]),
    ("base_model: base", "", ["missing key for base_model", "Add 'base_model:'"]),
    ("weight: 0.5", "wieght: 0.5", ["unknown parameter for models[0].parameters.wieght", "line 6",
                                     "Did you mean 'weight'"]),
    ("density: 0.4", "density: 0", ["density", "(0, 1]", "got 0."]),
    ("density: 0.4", "density: 1.5", ["never a percent", "got 1.5", "0.015 if 1.5 %"]),
    ("density: 0.4", "density: -1", ["models[0].parameters.density", "line 7", "got -1"]),
    ("density: 0.4", "density: 50", ["Write 0.5 if 50 %"]),
    ("density: 0.4", "density: [1, 0.5, 0]", ["density[2]", "got 0"]),
    ("density: 0.4", "density: yes", ["wrong type", "got True"]),
    ("density: 0.4", "density: []", ["empty list"]),
    ("density: 0.4", "density: [{filter: mlp, value: 2}]", ["density[0].value", "got 2"]),
    ("density: 0.4", "density: [{filter: mlp}]", ["entry without a value"]),
    ("density: 0.4", "density: [{filtre: mlp, value: 1}]", ["Did you mean 'filter'"]),
    ("density: 0.4", "density: [{filter: mlp, value: 1}, 0.5]", ["mixed list", "- value: 0.5"]),
    ("density: 0.4", "density: [{filter: 3, value: 1}]", ["bad filter", "got 3"]),
    ("weight: 0.5", "weight: .nan", ["finite number", "got nan"]),
    ("weight: 0.5", "weight: heavy", ["wrong type", "'heavy'"]),
    ("normalize: true", "normalize: [0, 1]", ["gradient of something that is not a number"]),
    ("normalize: true", "normalize: 2", ["true or false", "got 2"]),
    ("normalize: true", "rescale: l7", ["keep_probability", "'l7'"]),
    ("normalize: true", "{lambda: 1, scale: 2}", ["two names of one parameter"]),
    ("dtype: float32", "dtype: int8", ["dtype", "expected one of float32", "'int8'"]),
    ("dtype: float32", "preset: mergkit", ["Did you mean 'mergekit'"]),
    ("merge_method: ties", "merge_method: della\npreset: peft", ["preset without this method"]),
    ("dtype: float32", "seed: -1", ["seed", "got -1"]),
    ("dtype: float32", "models: []", ["key given twice", "lines 3 and 11"]),
    ("dtype: float32", "slices: []", ["one of models, slices, modules, got models and slices"]),
    ("dtype: float32", "modules: {x: 1}", ["modules.x", "got models and modules"]),
    ("dtype: float32", "modules: {x: {model: 1}}", ["unknown key for modules.x.model",
                                                    "one of models, slices, parameters"]),
    ("dtype: float32", "name: x", ["mergekit-multi"]),
    ("dtype: float32", "tokenizer_source: onion", ["not merged", "'onion'"]),
    ("dtype: float32", "tokenizer: {tokens: {a: {source: {kind: nil}}}}", ["kind", "'nil'"]),
    ("dtype: float32", "tokenizer: {tokens: {a: {source: {kind: model_token, model: a}}}}",
     ["one of token and token_id"]),
    ("dtype: float32", "tokenizer: {pad_to_multiple_of: 0}", ["pad_to_multiple_of", "got 0"]),
    ("dtype: float32", "tokenizer: {surce: base}", ["Did you mean 'source'"]),
    ("dtype: float32", "chat_template: atuo", ["chat_template", "'atuo'"]),
    ("dtype: float32", "ties: 1", ["Write 'merge_method: ties'"]),
    ("- model: b", "- model: {model: {path: b}, lora: {path: 3}}", ["path of a checkpoint, got 3"]),
    ("- model: b", "- model: {model: {path: b, revision: x}}", ["'revision', which is not"]),
    ("- model: b", "- model: 3", ["expected the path of a checkpoint, got 3"]),
    ("- model: b", "- model: base", []),
    ("- model: b", "- density: 0.4", ["missing key for models[1].model",
                                  "move it under 'parameters:'"]),
    ("  - model: b", "  - {model: b, layer_range: [0, 2]}", ["belong to 'slices:'"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "words"), FAULTS, ids=[new or "no base" for _, new, _ in FAULTS]
)
def test_fault(old: str, new: str, words: list[str]) -> None:
    assert old in TIES
    text = TIES.replace(old, new, 1)
    if not words:  # not a fault: the base may stand in the list
        assert MergeConfig.from_yaml(text).model_references == ("base", "a")
        return
    message = refusal(text, source="merge.yml")
    for word in words:
        assert word in message, message
    assert "merge.yml" in message


def test_all_faults_come_in_one_message_in_order() -> None:
    text = TIES.replace("weight:", "wieght:").replace("0.4", "4").replace("float32", "f31")
    lines = refusal(text, source="merge.yml").splitlines()
    assert lines[0] == "3 problems in merge.yml:"
    places = [line.split(" for ")[1].split(":")[0] for line in lines[1:]]
    assert places == [
        "models[0].parameters.wieght (merge.yml, line 6)",
        "models[0].parameters.density (merge.yml, line 7)",
        "dtype (merge.yml, line 11)",
    ]


def test_whole_message_of_one_fault() -> None:
    assert refusal(TIES.replace("0.4", "40"), source="m.yml") == (
        "value out of range for models[0].parameters.density (m.yml, line 7): expected a finite "
        "number in (0, 1] (a fraction, never a percent: 0.5 keeps half), got 40. "
        "Write 0.4 if 40 % is meant."
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["an empty document"]),
        ("- a\n- b", ["a list"]),
        ("ties", ["'ties'"]),
        ("a: [1", ["bad YAML", "line"]),
        ("a: 1\n b: 2", ["bad YAML", "line 2"]),
        ("a: 1\n---\nb: 2", ["several documents", "mergekit-multi"]),
        ("1: 2", ["not text"]),
        ("a: &x [*x]", ["endless aliases"]),
        ("a: !!python/object:os.system x", ["bad YAML"]),
        ("a: \x00", ["bad YAML"]),
        ("models: {a: 1}", ["models"]),
        ("merge_method: linear", ["got none of them"]),
        ("merge_method: linear\nmodels: []", ["empty list"]),
        ("merge_method: [1]\nmodels: 3", ["merge_method", "models"]),
        ("merge_method: linear\nmodels: [a]", ["models[0]"]),
        ("merge_method: linear\nparameters: 3\nmodels: [{model: a}]", ["parameters"]),
    ],
)
def test_bad_documents(text: str, words: list[str]) -> None:
    message = refusal(text)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("data", [None, 3, [1], {1: 2}])
def test_from_dict_refuses_what_is_no_mapping(data: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        MergeConfig.from_dict(data)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abm: -[]{}&*\n\t'\"#|>!1.e", max_size=60))
def test_any_text_is_read_or_refused_as_a_config_error(text: str) -> None:
    try:
        MergeConfig.from_yaml(text)
    except ConfigError:
        pass


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        MergeConfig.from_file(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="directory"):
        MergeConfig.from_file(tmp_path)
    binary = tmp_path / "x.yml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        MergeConfig.from_file(binary)


def test_paths_against_the_current_directory_then_the_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "a", there / "a", there / "base"):
        folder.mkdir(parents=True)
    (there / "merge.yml").write_text(TIES)
    monkeypatch.chdir(here)
    config = MergeConfig.from_file(there / "merge.yml")
    assert config.resolve_path("a").resolve() == here / "a"
    assert config.resolve_path("base").resolve() == there / "base"
    with pytest.raises(ConfigError, match="missing checkpoint for b"):
        config.resolve_path("b")


def test_a_folder_may_have_a_plus_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "b+lora").mkdir()
    (tmp_path / "merge.yml").write_text(TIES.replace("- model: b", "- model: b+lora"))
    assert "b+lora" in MergeConfig.from_file(tmp_path / "merge.yml").model_references


def test_a_model_with_an_adapter(tmp_path: Path) -> None:
    """``model+adapter``, or mergekit's mapping; each part is looked for by itself, and one may have
    a plus in its own name."""
    for name in ("b", "lora", "c+d"):
        (tmp_path / name).mkdir()
    for written, adapter in (("b+lora", "lora"), ("b+c+d", "c+d"), ("c+d+lora", "lora")):
        (tmp_path / "merge.yml").write_text(TIES.replace("- model: b", f"- model: {written}"))
        config = MergeConfig.from_file(tmp_path / "merge.yml")
        assert written in config.model_references
        model = written.removesuffix(f"+{adapter}")
        assert config.resolve_model(written) == (tmp_path / model, tmp_path / adapter)
    mapping = "- model: {model: {path: b}, lora: {path: lora, revision: null}}"
    (tmp_path / "merge.yml").write_text(TIES.replace("- model: b", mapping))
    config = MergeConfig.from_file(tmp_path / "merge.yml")
    assert config.model_references == ("base", "a", "b+lora")
    with pytest.raises(ConfigError, match=r"b\+x: expected both parts of model\+adapter"):
        config.resolve_model("b+x")


# What has no effect is said, kept, and no error.


@pytest.mark.parametrize(
    ("method", "where", "parameter", "words"),
    [
        ("ties", "top", "int8_mask", "no effect"),
        ("task_arithmetic", "expert", "density", "it belongs to ties"),
        ("task_arithmetic", "top", "rescale", "no such parameter"),
        ("ties", "top", "filter_wise", "it belongs to model_stock"),
        ("ties", "base", "weight", "the base has no parameters"),
        ("ties", "expert", "normalize", "Set it under the top-level"),
    ],
)
def test_warnings(
    method: str, where: str, parameter: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    data: dict[str, object] = {"merge_method": method, "base_model": "base"}
    models: list[dict[str, object]] = [{"model": "base"}, {"model": "a"}]
    owner = {"top": data, "base": models[0], "expert": models[1]}[where]
    owner["parameters"] = {parameter: 0.5 if parameter in ("density", "weight") else True}
    with caplog.at_level(logging.WARNING, logger="magic_fast"):
        config = MergeConfig.from_dict({**data, "models": models})
    (warning,) = config.warnings
    assert parameter in warning and words in warning
    assert warning in caplog.text


def test_base_of_a_method_without_one_warns_only_when_unlisted() -> None:
    def read(*names: str) -> tuple[str, ...]:
        models = [{"model": name} for name in names]
        data = {"merge_method": "linear", "base_model": "base", "models": models}
        return MergeConfig.from_dict(data).warnings

    assert read("base", "a") == ()
    assert "only donates config" in read("a", "b")[0]
    assert "listed twice" in read("base", "a", "a")[0]


# How many models, which ranges.


@pytest.mark.parametrize(
    ("method", "models", "words"),
    [
        ("slerp", ["base", "a", "b"], "exactly 1 beside base_model for slerp, got 2"),
        ("slerp", ["a", "b"], "exactly 1 beside base_model for slerp, got 2"),
        ("slerp", ["base"], "got 0"),
        ("passthrough", ["a", "b"], "exactly 1 for passthrough, got 2"),
        ("ties", ["base"], "at least 1 beside base_model"),
        ("ties", ["base", "a", "base"], "base listed twice"),
    ],
)
def test_number_of_models(method: str, models: list[str], words: str) -> None:
    data = {"merge_method": method, "base_model": "base", "models": [{"model": m} for m in models],
            "parameters": {"t": 0.5}}  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        MergeConfig.from_dict(data)
    assert words in str(caught.value)


def slerp(parameters: dict[str, object]) -> MergeConfig:
    models = [{"model": "base"}, {"model": "a"}]
    return MergeConfig.from_dict(
        {"merge_method": "slerp", "base_model": "base", "models": models, "parameters": parameters}
    )


def test_slerp_needs_t_in_range() -> None:
    assert slerp({"t": [0, 0.5, 1]}).parameters["t"] == [0, 0.5, 1]
    with pytest.raises(ConfigError, match=r"missing parameter for parameters\.t"):
        slerp({})
    with pytest.raises(ConfigError, match=r"t\[1\]: expected a finite number in \[0, 1\], got 1.5"):
        slerp({"t": [0, 1.5]})


def sliced(*ranges: object, method: str = "task_arithmetic", base: str = "base") -> MergeConfig:
    sources = [{"model": f"m{i}", "layer_range": r} for i, r in enumerate(ranges)]
    sources[0]["model"] = base
    return MergeConfig.from_dict(
        {"merge_method": method, "base_model": "base", "slices": [{"sources": sources}]}
    )


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        (([0, 2], [3, 3]), "slices[0].sources[1].layer_range"),
        (([0, 2], [3, 1]), "got [3, 1] for m1"),
        (([0, 2], [-1, 1]), "got [-1, 1] for m1"),
        (([0, 2], [0, 3]), "expected 2 layers as in the first source of slices[0]"),
        (([0, 2], [0]), "layer_range"),
        (([0, 2], [0, 1.5]), "layer_range[1]"),
        (([0, 2], None), "layer_range"),
    ],
)
def test_layer_ranges(ranges: tuple[object, ...], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sliced(*ranges)
    assert words in str(caught.value)


def test_an_unlisted_base_takes_the_common_range_only() -> None:
    assert sliced([0, 2], [0, 2], base="m").num_layers == 2
    with pytest.raises(ConfigError, match="List it with its layer_range"):
        sliced([0, 2], [1, 3], base="m")


# Round trip.

_numbers = st.floats(0.01, 1.0) | st.sampled_from([1, 1e-5, 0.1])
_scalar_or_gradient = _numbers | st.lists(_numbers, min_size=1, max_size=4)
_entry = st.fixed_dictionaries(
    {"value": _scalar_or_gradient}, optional={"filter": st.text(min_size=1, max_size=8)}
)
_setting = _scalar_or_gradient | st.lists(_entry, min_size=1, max_size=3)
_names = st.text(alphabet="abcdef/.-é", min_size=1, max_size=8).filter(
    lambda name: name.strip("./-")
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    method = draw(st.sampled_from(sorted(built_in())))
    row = built_in()[method]

    def parameters(scope: str) -> dict[str, object]:
        return {
            spec.name: draw(_setting)
            for spec in row.parameters
            if spec.kind == "float" and spec.scope == scope and spec.name != "gamma"
            if spec.required or draw(st.booleans())
        }  # fmt: skip

    count = draw(st.integers(max(1, row.min_experts), row.max_experts or 4))
    data: dict[str, object] = {
        "merge_method": method,
        "base_model": "the-base",
        "parameters": parameters("per_tensor"),
        "models": [
            {"model": f"x{i}{draw(_names)}", "parameters": parameters("per_model")}
            for i in range(count)
        ],
    }
    optional = {
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "preset": st.sampled_from(["mergekit", "default"]),
        "seed": st.integers(0, 2**64 - 1),
        "calibrate": st.just("wsc") | st.fixed_dictionaries({
            "variant": st.sampled_from(["manifold", "sphere"]),
            "p": st.sampled_from([1, 2, "inf"]),
            "clamp": st.none() | st.just([0.5, 2.0]),
            "tensors": st.sampled_from(["magic", {"include": ["mlp"]}]),
            "sensitive": st.none() | st.just([]) | st.just(["a.weight"]),
        }),
    }  # fmt: skip
    for key, values in optional.items():
        if draw(st.booleans()):
            data[key] = draw(values)
    return data


@settings(max_examples=80, deadline=None)
@given(documents())
def test_to_yaml_reads_back_as_the_same(data: dict[str, object]) -> None:
    config = MergeConfig.from_dict(data)
    again = MergeConfig.from_yaml(config.to_yaml())
    assert again == config
    assert again.model_dump() == config.model_dump()
    assert again.warnings == config.warnings
