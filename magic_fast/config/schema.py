"""The YAML of mergekit, plus ``preset``, ``seed`` and ``calibrate``: :class:`MergeConfig`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from magic_fast.config.calibrate import CalibrateConfig, Regex, SensitiveScores, TensorPatterns
from magic_fast.config.document import Document, read_document, read_text
from magic_fast.config.entries import (
    Dtype,
    ModelEntry,
    ModuleEntry,
    Node,
    Parameters,
    SliceEntry,
    SourceEntry,
    canonical_dtype,
)
from magic_fast.config.faults import translate
from magic_fast.config.modules import REST
from magic_fast.config.problems import Origin, Problem, raise_problems
from magic_fast.config.problems import Path as YamlPath
from magic_fast.config.references import require_model
from magic_fast.config.semantics import Checker
from magic_fast.config.tokens import Reference, TokenEntry, TokenizerEntry, TokenSource
from magic_fast.errors import ConfigError
from magic_fast.methods.presets import PRESETS

_LOG = logging.getLogger("magic_fast")

#: A word or a pattern, or a list of them.
Words = Annotated[tuple[Regex, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


class MergeConfig(Node):
    """A validated merge: which models, which method, which parameters.

    Build it with :meth:`from_yaml`, :meth:`from_file` or :meth:`from_dict`, or by keywords. All
    of them raise one :class:`~magic_fast.errors.ConfigError` that lists every fault.

    Attributes:
        merge_method: name of the method.
        base_model: the base checkpoint.
        models: whole models; exclusive with ``slices``.
        slices: ranges of layers, stacked in this order.
        modules: name of a part of the model → its own models or slices; instead of both.
        parameters: settings for all models (scalar, gradient, ``{filter, value}`` list).
        dtype: type that inputs are cast to before the merge; None keeps each tensor's own.
        out_dtype: type of the output; None means ``dtype``.
        preset: whose rules and defaults hold; mergekit's unless said otherwise.
        seed: of random trims, below 2**64; None leaves it to the program.
        tokenizer_source: whose vocabulary the result has: ``union``, ``base`` or a model; None
            leaves embeddings as they are.
        tokenizer: the same, with sources of single tokens and padding.
        chat_template: ``auto``, a name or a Jinja template; None for the donor's.
        calibrate: weight-space calibration of the result; None for none.
        include, exclude: which tensors are merged (:class:`~magic_fast.models.TensorChoice`); what
            is left out stays the base's, without one the first model's.
        config_from: model or folder whose small files the result takes; None for the donor's.
        tokenizer_from: model or folder whose tokenizer files the result takes, rows unchanged;
            None for the donor's.

    >>> config = MergeConfig.from_yaml('''
    ... merge_method: ties
    ... base_model: base
    ... models:
    ...   - {model: expert, parameters: {density: 0.5}}
    ... ''')
    >>> config.model_references
    ('base', 'expert')
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    merge_method: str
    base_model: Reference | None = None
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    modules: dict[str, ModuleEntry] | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: Annotated[Dtype | None, BeforeValidator(canonical_dtype)] = None
    out_dtype: Annotated[Dtype | None, BeforeValidator(canonical_dtype)] = None
    preset: Literal[PRESETS] = "mergekit"  # type: ignore[valid-type]
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] | None = None
    tokenizer_source: Reference | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    calibrate: CalibrateConfig | None = None
    include: Words = ()
    exclude: Words = ()
    config_from: Reference | None = None
    tokenizer_from: Reference | None = None

    _warnings: tuple[str, ...] = PrivateAttr(default=())
    _folder: Path | None = PrivateAttr(default=None)
    _places: Mapping[str, Path] = PrivateAttr(default_factory=dict)

    def __init__(self, /, **data: Any) -> None:
        self._load(data, Origin(), None)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, source: str | None = None, folder: Path | None = None
    ) -> MergeConfig:
        """A configuration from plain values.

        Args:
            data: as YAML would give it.
            source: name for messages.
            folder: where relative paths are tried after the current directory.

        Raises:
            ConfigError: with every fault that was found.
        """
        return cls.from_document(Document(data, Origin(source)), folder)

    @classmethod
    def from_yaml(cls, text: str, *, source: str | None = None) -> MergeConfig:
        """A configuration from YAML text; faults are named with their lines. Raises ConfigError."""
        return cls.from_document(read_document(text, source), None)

    @classmethod
    def from_file(cls, path: str | Path) -> MergeConfig:
        """A configuration from a YAML file. Raises ConfigError, for an unreadable file too."""
        path = Path(path)
        return cls.from_document(read_document(read_text(path), str(path)), path.absolute().parent)

    @classmethod
    def from_document(cls, document: Document, folder: Path | None) -> MergeConfig:
        """A configuration from a YAML document that was read already. Raises ConfigError."""
        data, origin = document.data, document.origin
        if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
            raise ConfigError(
                f"bad value for {origin.source or 'the configuration'}: expected a mapping with "
                f"text keys, got {data!r:.80}. Pass what the YAML would hold."
            )
        config = cls.__new__(cls)
        config._load(dict(data), origin, folder)
        return config

    def _load(self, data: dict[str, Any], origin: Origin, folder: Path | None) -> None:
        if "random_seed" in data:
            seed = data.pop("random_seed")
            if data.setdefault("seed", seed) != seed:
                text = f"expected one, got {data['seed']} and {seed}. Remove one."
                raise_problems([Problem(("random_seed",), "two seeds", text)], origin)
        checker = Checker(data).run()
        problems = list(checker.problems)
        try:
            BaseModel.__init__(self, **data)
        except ValidationError as error:
            problems.extend(translate(error, _OWNERS))
        raise_problems(problems, origin)
        self._warnings = tuple(dict.fromkeys(checker.warnings))
        self._folder = folder
        for warning in self._warnings:
            _LOG.warning("%s%s", f"{origin.source}: " if origin.source else "", warning)

    def __eq__(self, other: object) -> bool:
        """Equal settings; where they were read from does not count."""
        if not isinstance(other, MergeConfig):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    __hash__ = None  # type: ignore[assignment]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What has no effect, in words. Also logged once, when the configuration was read."""
        return self._warnings

    @property
    def folder(self) -> Path | None:
        """Where relative paths are tried after the current directory, or None."""
        return self._folder

    @property
    def model_references(self) -> tuple[str, ...]:
        """Every model named, once: ``base_model`` first, then in the order of the document."""
        names = [self.base_model] if self.base_model is not None else []
        for part in self.listings:
            names += [entry.model for entry in part.models or ()]
            for piece in part.slices or ():
                names += [piece.base_model] if piece.base_model is not None else []
                names += [source.model for source in piece.sources]
        return tuple(dict.fromkeys(names))

    @property
    def file_references(self) -> tuple[str, ...]:
        """Every model of which only small files are wanted."""
        named = dict.fromkeys(filter(None, (self.config_from, self.tokenizer_from)))
        return tuple(name for name in named if name not in self.model_references)

    @property
    def listings(self) -> tuple[MergeConfig | ModuleEntry, ...]:
        """What lists models or slices: the configuration itself, and each of its modules."""
        return (self, *(self.modules or {}).values())

    @property
    def donor(self) -> str:
        """The model whose config, tokenizer and tensor names the output takes."""
        return self.model_references[0]

    @property
    def vocabulary(self) -> str | None:
        """Whose vocabulary the result has: ``union``, ``base``, a model, or None (untouched)."""
        return self.tokenizer.source if self.tokenizer is not None else self.tokenizer_source

    @property
    def num_layers(self) -> int | None:
        """Layers of the output where ``slices`` fix it, else None (the donor's number)."""
        main = [module for name, module in (self.modules or {}).items() if name in REST]
        slices = main[0].slices if main else self.slices
        if slices is None:
            return None
        ranges = [part.sources[0].layer_range for part in slices]
        return sum(end - start for start, end in ranges)

    def resolve_path(self, reference: str) -> Path:
        """Where a model lies: what :meth:`with_places` says, else relative to the current
        directory, else to the YAML's folder.

        Raises:
            ConfigError: it is in neither place.
        """
        return self.resolve_model(reference)[0]

    def resolve_model(self, reference: str) -> tuple[Path, Path | None]:
        """:meth:`resolve_path`, and where the adapter of a reference ``model+adapter`` lies.

        Raises:
            ConfigError: one of them is in neither place.
        """
        if reference in self._places:
            return self._places[reference], None
        return require_model(reference, self._folder)

    def with_places(self, places: Mapping[str, Path]) -> MergeConfig:
        """The same configuration, with the folders of models that have no path but a name."""
        config = self.model_copy()
        wanted = (*self.model_references, *self.file_references)
        config._places = {name: places[name] for name in wanted if name in places}
        return config

    def calibration_arguments(self) -> dict[str, Any] | None:
        """:meth:`CalibrateConfig.as_dict` with the file of scores found; None without calibrate.

        Raises:
            ConfigError: the file is neither in the current directory nor in the YAML's folder.
        """
        return None if self.calibrate is None else self.calibrate.arguments_in(self._folder)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without what is left at its default: what :meth:`from_dict` takes."""
        found = self.model_dump(mode="json", exclude_defaults=True)
        found["merge_method"] = self.merge_method
        if self.calibrate is not None:
            own = self.calibrate.model_dump(mode="json", exclude_defaults=True)
            found["calibrate"] = own or "wsc"
        return found

    def to_yaml(self) -> str:
        """YAML that :meth:`from_yaml` reads back as an equal configuration."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


#: Which model describes which mapping of the document.
_OWNERS: dict[YamlPath, type[BaseModel]] = {
    (): MergeConfig,
    ("models",): ModelEntry,
    ("slices",): SliceEntry,
    ("slices", "sources"): SourceEntry,
    ("modules",): ModuleEntry,
    ("tokenizer",): TokenizerEntry,
    ("tokenizer", "tokens"): TokenEntry,
    ("tokenizer", "tokens", "source"): TokenSource,
    ("calibrate",): CalibrateConfig,
    ("calibrate", "tensors"): TensorPatterns,
    ("calibrate", "sensitive"): SensitiveScores,
}
