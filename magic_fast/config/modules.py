"""Parts of a model by name, for ``modules:``: vision tower, projector, decoder.

mergekit has a table of architectures that says which tensors a module has. Here the names of the
tensors say it: a module has those below a component of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from magic_fast.errors import ConfigError

#: Names of a module for everything that no other one has: a model of a single module, and the
#: language model of one of several (its tensors may lie at the top, beside the others' prefixes).
REST = ("default", "text_decoder")

#: Where some architectures keep what mergekit's documents call by one name in all of them.
_OTHERWISE = {
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "multi_modal_projector": ("multi_modal_projector", "visual.merger"),
}


def split_modules(names: Iterable[str], modules: Sequence[str], model: str) -> dict[str, str]:
    """Tensor name → the module that has it.

    A tensor belongs to the module whose name, component by component, stands in its own, before
    the number of a block; of several the outermost, of these the longest.

    Args:
        names: of the tensors.
        modules: keys of ``modules:``.
        model: for messages.

    Raises:
        ConfigError: a module without a tensor, or a tensor without a module.

    >>> names = ["visual.blocks.0.w", "visual.merger.w", "model.layers.0.w"]
    >>> split_modules(names, ["vision_tower", "multi_modal_projector", "text_decoder"], "a")
    {'visual.blocks.0.w': 'vision_tower', 'visual.merger.w': 'multi_modal_projector', \
'model.layers.0.w': 'text_decoder'}
    """
    names = list(names)
    rest = [module for module in modules if module in REST]
    if len(rest) > 1:
        raise ConfigError(
            f"two modules for the rest of {model}: expected one of {' and '.join(REST)}, got both. "
            "Remove one."
        )
    components = {m: _components(m, names) for m in modules if m not in REST}
    found = {}
    for name in names:
        matches = [
            (start, -len(part), module)
            for module, part in components.items()
            if (start := _position(part, name)) is not None
        ]
        if matches:
            found[name] = min(matches)[2]
        elif rest:
            found[name] = rest[0]
        else:
            raise ConfigError(
                f"tensor in no module for {name} of {model}: expected it in one of "
                f"{', '.join(modules)}, got a name with none of them. Add a module 'default:' for "
                "all that no other module has."
            )
    empty = [module for module in modules if module not in found.values()]
    if empty:
        raise ConfigError(
            f"module without tensors for {empty[0]!r}: expected it as a component of the names of "
            f"{model}, such as {_tops(names)}, got none with it. Correct the name."
        )
    return found


def _components(module: str, names: Iterable[str]) -> tuple[str, ...]:
    """The path in tensor names that ``module`` stands for."""
    paths = [tuple(path.split(".")) for path in _OTHERWISE.get(module, (module,))]
    return next((p for p in paths if any(_position(p, n) is not None for n in names)), paths[0])


def _position(part: Sequence[str], name: str) -> int | None:
    """Where ``part`` begins among the components of ``name`` before its first number."""
    words = name.split(".")[:-1]  # the last is the parameter's
    numbers = [i for i, word in enumerate(words) if word.isdecimal()]
    words = words[: numbers[0] if numbers else None]
    for start in range(len(words) - len(part) + 1):
        if tuple(words[start : start + len(part)]) == tuple(part):
            return start
    return None


def _tops(names: Iterable[str]) -> str:
    """The first components, to choose from."""
    tops: Mapping[str, None] = dict.fromkeys(name.split(".")[0] for name in names)
    return ", ".join(list(tops)[:6])
