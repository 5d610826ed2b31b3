"""The classes of a model type in the installed transformers, and how each is built without
weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from magic_fast.models.built.visits import configurations

#: Tasks whose class names a type's tensors, the best first; then any other in the alphabet's order.
_TASKS = (
    "PRETRAINING", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM",
    "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC", "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
)  # fmt: skip
_WORDS = "vocab_size"
# Vocabularies of codes, not of words.
_CODES = (
    "type",
    "audio",
    "image",
    "visual",
    "vision",
    "video",
    "code",
    "speech",
    "acoustic",
    "semantic",
)
LABELS = 137
_FIRST_WORD_SIZE = 1_000_003  # above every token id of a default configuration


@cache
def tasks() -> Mapping[str, Mapping[str, Any]]:
    """Task → model type → name or names of classes."""
    from transformers.models.auto import modeling_auto

    start, end = "MODEL_FOR_", "_MAPPING_NAMES"
    return {
        name[len(start) : -len(end)]: value
        for name, value in sorted(vars(modeling_auto).items())
        if name.startswith(start) and name.endswith(end)
    }


def model_types() -> list[str]:
    """Every model type of the installed transformers."""
    from transformers.models.auto import configuration_auto

    known: Any = configuration_auto
    return sorted(known.CONFIG_MAPPING_NAMES)


def config_class(model_type: str) -> Any:
    """The class of a type's configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


@cache
def base_name(model_type: str) -> str | None:
    """The name of a type's class without a head, or None."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name: Any = MODEL_MAPPING_NAMES.get(model_type)
    first: str | None = name[0] if isinstance(name, tuple) else name
    return first


@cache
def names(model_type: str) -> tuple[str, ...]:
    """The names of a type's classes that are built of its own configuration, the one that names
    its tensors first."""
    known = [*_TASKS, *(task for task in tasks() if task not in _TASKS)]
    listed: dict[str, None] = {}
    for task in known:
        found = tasks().get(task, {}).get(model_type, ())
        listed.update(dict.fromkeys([found] if isinstance(found, str) else found))
    if base_name(model_type) is not None:
        listed[base_name(model_type) or ""] = None
    given = tuple(listed)
    for name in given:
        listed.update(dict.fromkeys(_beside(name)))
    config = config_class(model_type)
    found = tuple(name for name in listed if _config_class(name) is config)
    return found or tuple(name for name in given if _config_class(name) is not None)


def _config_class(name: str) -> Any:
    try:
        return getattr(class_of(name), "config_class", None)
    except ImportError:  # it stands for a class that needs a package
        return None


def _beside(name: str) -> list[str]:
    """The other models of a class' module."""
    from transformers import PreTrainedModel

    module = sys.modules.get(getattr(class_of(name), "__module__", ""))
    public = [vars(module).get(n) for n in getattr(module, "__all__", ())] if module else []
    return [
        found.__name__
        for found in public
        if isinstance(found, type) and issubclass(found, PreTrainedModel)
        and not found.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip


def class_of(name: str) -> Any:
    """A class of transformers by its name, or None where it needs a package that is not there."""
    import transformers

    return getattr(transformers, name, None)


def probe(config: Any) -> frozenset[int]:
    """Gives every vocabulary of a configuration a size that nothing else has, ties heads to
    embeddings, and returns those sizes."""
    sizes: list[int] = []
    for path, part in configurations(config):
        for key in sorted(vars(part)):
            spoken = f"{path}.{key}".lower()
            if _WORDS in key and not any(code in spoken for code in _CODES):
                if type(getattr(part, key)) is int:
                    sizes.append(_FIRST_WORD_SIZE + 2 * len(sizes))
                    setattr(part, key, sizes[-1])
        if getattr(part, "tie_word_embeddings", None) is False:
            part.tie_word_embeddings = True
    if getattr(config, "num_labels", None) is not None:
        config.num_labels = LABELS
    return frozenset(sizes)


def _absent_part(config: Any) -> Any:
    """What stands for a part whose class needs a package that is not installed: a module without
    parameters that has the part's configuration."""
    from torch import nn

    part: Any = nn.Module()
    part.config = config
    part.is_absent = True
    return part


@contextmanager
def absent_parts() -> Iterator[None]:
    """Builds models without those of their parts that need a package."""
    from transformers import AutoModel

    original: Any = AutoModel.from_config

    def from_config(config: Any, **settings: Any) -> Any:
        try:
            return original(config, **settings)
        except ImportError:
            return _absent_part(config)

    AutoModel.from_config = from_config  # type: ignore[method-assign]
    try:
        yield
    finally:
        del AutoModel.from_config


def build(name: str, make_config: Callable[[], Any]) -> tuple[Any, frozenset[int]]:
    """A model of class ``name`` on the meta device and the sizes of its vocabularies; of the
    configuration as it is where the class refuses the changes of :func:`probe`."""
    try:
        config = make_config()
        sizes = probe(config)
        with absent_parts():
            return built(name, config), sizes
    except Exception:
        with absent_parts():
            return built(name, make_config()), frozenset()


def built(name: str, config: Any) -> Any:
    """A model of class ``name`` on the meta device."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return class_of(name)(config)
