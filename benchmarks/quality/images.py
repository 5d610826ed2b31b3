"""Images: a tiny ViT on scikit-learn's digits; a task is a transform and a frozen head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quality.problem import PARTS, Problem, Score, State, fit, score_logits, state_of, trainable
from quality.settings import BASE, Scenario

SIZES = (1000, 100, 150, 50, 497)  # original images of each part
TESTED = {"validation": 100, "test": 250}  # images of a task that are scored, at most
WIDTH = 64
BATCH = 64
NOISE = 0.1  # added to the pixels in training
HEAD_NORM = 0.5  # of the rows of a random head
GAIN = 1e3  # of images/tiny
LOOSE = ("cls_token", "position_embeddings")  # parameters that are in no layer

Transform = Callable[[Tensor], Tensor]


def chain(*parts: Transform) -> Transform:
    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    return run


def permuted(pixels: int, seed: int) -> Transform:
    """``pixels`` of the 64 change places; always the same."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(64, generator=generator)[:pixels]
    order = torch.arange(64)
    order[chosen] = chosen[torch.randperm(pixels, generator=generator)]
    return lambda x: x.flatten(1)[:, order].view(-1, 8, 8)


def quarter(turns: int) -> Transform:
    return lambda x: torch.rot90(x, turns, (1, 2))


def identity(x: Tensor) -> Tensor:
    return x


def mirror(x: Tensor) -> Tensor:
    return x.flip(2)


def inverted(x: Tensor) -> Tensor:
    return 1 - x


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def quadrants(x: Tensor) -> Tensor:
    return torch.roll(x, (4, 4), (1, 2))


def checkered(x: Tensor) -> Tensor:
    odd = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 1
    return torch.where(odd, 1 - x, x)


def striped(x: Tensor) -> Tensor:
    return torch.where(torch.arange(8) % 2 == 1, 1 - x, x)


def darker(x: Tensor) -> Tensor:
    return x.square()


def lighter(x: Tensor) -> Tensor:
    return x.sqrt()


PRETRAINING = (
    identity, mirror, inverted, quarter(2), transposed, permuted(16, 900), permuted(16, 901),
    darker, lighter,
)  # fmt: skip


def _variants(common: Transform, first: int) -> dict[str, tuple[Transform, bool]]:
    """One new transform and four variants of it, for the pre-trained head."""
    tasks = {"plain": (common, False)}
    for i in range(4):
        tasks[f"variant {i + 1}"] = (chain(common, permuted(16, first + i)), False)
    return tasks


#: (regime, development) → {task: (transform, relabelled)}.
TASKS: dict[tuple[str, bool], dict[str, tuple[Transform, bool]]] = {
    ("easy", False): {
        "identity": (identity, True), "mirror": (mirror, True), "inverted": (inverted, True),
        "half turn": (quarter(2), True), "transposed": (transposed, True),
    },
    ("easy", True): {
        "permuted 0": (permuted(16, 900), True), "permuted 1": (permuted(16, 901), True),
        "darker": (darker, True), "inverted mirror": (chain(inverted, mirror), True),
        "lighter half turn": (chain(lighter, quarter(2)), True),
    },
    ("correlated", False): _variants(chain(quarter(1), inverted), 21),
    ("correlated", True): _variants(permuted(64, 5), 41),
    ("hard", False): {
        "relabelled": (identity, True), "inverted mirror": (chain(inverted, mirror), True),
        "checkered": (checkered, False), "quarter turn": (quarter(1), False),
        "permuted 32": (permuted(32, 31), True), "striped": (striped, False),
        "quadrants": (quadrants, True), "permuted 40": (permuted(40, 30), False),
    },
}  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 8, 8] in [0, 1], labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def split(seed: int, total: int = sum(SIZES)) -> dict[str, Tensor]:
    """Indices of the original images of each part: disjoint, and fixed by the seed."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return dict(zip(PARTS, order.split(SIZES), strict=True))


def new_model() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=2 * WIDTH, image_size=8, patch_size=4, num_channels=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False)


def features(model: nn.Module, images: Tensor) -> Tensor:
    return model(pixel_values=images[:, None]).last_hidden_state[:, 0]


def build(seed: int, scenario: Scenario, *, development: bool, base: State | None) -> Problem:
    """Trains the base (unless its weights are given) and the experts."""
    pixels, labels = digits()
    parts = split(seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_model()
    head = nn.Parameter(torch.randn(10, WIDTH, generator=generator) / WIDTH**0.5)

    def loss_of(
        work: nn.Module, head: Tensor, transforms: tuple[Transform, ...], draw: torch.Generator
    ) -> Tensor:
        rows = parts["train"][torch.randint(SIZES[0], (BATCH,), generator=draw)]
        which = int(torch.randint(len(transforms), (), generator=draw))
        images = transforms[which](pixels[rows])
        images = images + NOISE * torch.randn(images.shape, generator=draw)
        return F.cross_entropy(features(work, images) @ head.T, labels[rows])

    if base is None:
        own = [*model.parameters(), head]
        plan = BASE["images"]
        fit(own, lambda: loss_of(model, head, PRETRAINING, generator), plan.steps, plan.rate)
    else:
        head = nn.Parameter(base["head"])
        model.load_state_dict({n: t for n, t in base.items() if n != "head"})
    head.requires_grad_(False)

    regime = "easy" if scenario.regime == "tiny" else scenario.regime
    tasks = TASKS[regime, development]
    heads, experts = [], []
    for k, (transform, relabelled) in enumerate(tasks.values()):
        draw = torch.Generator().manual_seed(1000 * seed + k)
        random = torch.randn(10, WIDTH, generator=draw) * (HEAD_NORM / WIDTH**0.5)
        heads.append(random if relabelled else head.detach())
        if scenario.regime == "correlated":
            draw.manual_seed(1000 * seed)
        work = copy.deepcopy(model)
        free = trainable(work, LOOSE)
        one = (transform,)
        plan = scenario.expert
        fit(
            free,
            lambda w=work, k=k, t=one, d=draw: loss_of(w, heads[k], t, d),
            plan.steps,
            plan.rate,
        )  # type: ignore[misc]
        experts.append(state_of(work))
    transforms = [t for t, _ in tasks.values()]

    def inputs(part: str, task: int) -> dict[str, Tensor]:
        return {"pixel_values": transforms[task](pixels[parts[part]])[:, None]}

    def score(work: nn.Module, part: str) -> list[Score]:
        rows = parts[part][: TESTED[part]]
        stacked = torch.cat([t(pixels[rows]) for t in transforms])
        with torch.no_grad():
            found = features(work, stacked).split(len(rows))
        return [score_logits(f @ h.T, labels[rows]) for f, h in zip(found, heads, strict=True)]

    model.requires_grad_(False)
    model.eval()
    trained = {**state_of(model), "head": head.detach()}
    problem = Problem(model, experts, list(tasks), inputs, score, trained)
    return problem if scenario.regime != "tiny" else shrunk(problem)


def shrunk(problem: Problem) -> Problem:
    """The same functions with every layer's parameters divided by GAIN and its output multiplied
    by it."""

    def small(state: State) -> State:
        loose = [n for n in state if any(word in n for word in LOOSE)]
        return {n: t if n in loose else t / GAIN for n, t in state.items()}

    model = copy.deepcopy(problem.base)
    model.load_state_dict(small(problem.start))
    for module in model.modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own and not any(n in LOOSE for n in own):
            module.register_forward_hook(_gain)
    experts = [small(e) for e in problem.experts]
    return Problem(model, experts, problem.names, problem.inputs, problem.score, problem.trained)


def _gain(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output * GAIN
