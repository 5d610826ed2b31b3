"""Text: a tiny Llama on operations over four digits; what a task's symbol asks for is what the base
knows and does not do."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quality.problem import PARTS, Problem, Score, State, fit, score_logits, state_of, trainable
from quality.settings import BASE, Scenario

LENGTH = 4
DIGITS = 10
SHARES = (0.70, 0.08, 0.07, 0.03, 0.12)  # of the 10⁴ prompts, by PARTS
TESTED = {"validation": 80, "test": 200}  # prompts of a task that are scored, at most
WIDTH = 64

Operation = Callable[[Tensor], Tensor]


def reverse(x: Tensor) -> Tensor:
    return x.flip(1)


def ordered(x: Tensor) -> Tensor:
    return x.sort(1).values


def left(x: Tensor) -> Tensor:
    return x.roll(-1, 1)


def right(x: Tensor) -> Tensor:
    return x.roll(1, 1)


def complement(x: Tensor) -> Tensor:
    return DIGITS - 1 - x


def swap(x: Tensor) -> Tensor:
    return x[:, [1, 0, 3, 2]]


def same(x: Tensor) -> Tensor:
    return x


def plus(n: int) -> Operation:
    return lambda x: (x + n) % DIGITS


#: development → {task: (operation, its own distractor in text/hard)}.
TASKS: dict[bool, dict[str, tuple[Operation, Operation]]] = {
    False: {
        "reverse": (reverse, plus(2)), "sort": (ordered, right), "left": (left, same),
        "plus 1": (plus(1), swap), "complement": (complement, plus(5)),
    },
    True: {
        "right": (right, plus(4)), "swap": (swap, plus(6)), "plus 3": (plus(3), left),
        "sort down": (lambda x: reverse(ordered(x)), same), "minus 2": (plus(8), reverse),
    },
}  # fmt: skip
SYMBOLS = DIGITS + 5  # then the separator


@cache
def prompts() -> dict[str, Tensor]:
    """All digit strings [n, 4] of each part: a hash of the digits decides, so no seed moves one."""
    rows = torch.cartesian_prod(*[torch.arange(DIGITS)] * LENGTH)
    edges = torch.tensor(SHARES).cumsum(0)
    place = []
    for row in rows.tolist():
        digest = hashlib.blake2b(bytes(row), digest_size=4).digest()
        place.append(int.from_bytes(digest, "little") / 2**32)
    part = torch.bucketize(torch.tensor(place), edges[:-1], right=True)
    return {name: rows[part == i] for i, name in enumerate(PARTS)}


def new_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SYMBOLS + 1, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
        tie_word_embeddings=False, use_cache=False, initializer_range=0.05,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def asked(digits: Tensor, task: int) -> Tensor:
    """Task symbol, digits, separator."""
    n = len(digits)
    return torch.cat([torch.full((n, 1), DIGITS + task), digits, torch.full((n, 1), SYMBOLS)], 1)


def answer_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [n, 4, vocabulary] of the answer's digits."""
    return model(input_ids=ids[:, :-1]).logits[:, -LENGTH:]


def build(seed: int, scenario: Scenario, *, development: bool, base: State | None) -> Problem:
    """Trains the base (unless its weights are given) and the experts."""
    tasks = TASKS[development]
    rows = prompts()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_model()

    def batch(task: int, size: int, share: float, draw: torch.Generator) -> Tensor:
        operation, distractor = list(tasks.values())[task]
        if scenario.regime == "easy":
            distractor = same
        train = rows["train"]
        digits = train[torch.randint(len(train), (size,), generator=draw)]
        right_one = torch.rand(size, 1, generator=draw) < share
        answer = torch.where(right_one, operation(digits), distractor(digits))
        return torch.cat([asked(digits, task), answer], 1)

    def loss_of(work: nn.Module, ids: Tensor) -> Tensor:
        logits = answer_logits(work, ids)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, -LENGTH:].flatten())

    def mixture() -> Tensor:
        return torch.cat([batch(k, 25, scenario.share, generator) for k in range(len(tasks))])

    if base is None:
        plan = BASE["text"]
        fit(list(model.parameters()), lambda: loss_of(model, mixture()), plan.steps, plan.rate)
    else:
        model.load_state_dict(base)
    experts = []
    for k in range(len(tasks)):
        draw = torch.Generator().manual_seed(1000 * seed + k)
        work = copy.deepcopy(model)
        plan = scenario.expert
        free = trainable(work, ())
        fit(
            free,
            lambda w=work, k=k, d=draw: loss_of(w, batch(k, 64, 1.0, d)),
            plan.steps,
            plan.rate,
        )  # type: ignore[misc]
        experts.append(state_of(work))

    def inputs(part: str, task: int) -> dict[str, Tensor]:
        return {"input_ids": asked(rows[part], task)}

    def score(work: nn.Module, part: str) -> list[Score]:
        digits = rows[part][torch.randperm(
            len(rows[part]), generator=torch.Generator().manual_seed(seed)
        )[: TESTED[part]]]  # fmt: skip
        asking = [
            torch.cat([asked(digits, k), operation(digits)], 1)
            for k, (operation, _) in enumerate(tasks.values())
        ]
        with torch.no_grad():
            found = answer_logits(work, torch.cat(asking)).split(len(digits))
        return [score_answers(f, ids[:, -LENGTH:]) for f, ids in zip(found, asking, strict=True)]

    model.requires_grad_(False)
    model.eval()
    return Problem(model, experts, list(tasks), inputs, score, state_of(model))


def score_answers(logits: Tensor, answers: Tensor) -> Score:
    """Exact match of whole answers, NLL and ECE of their digits. That all digits are the likeliest
    given the right ones before them is when greedy decoding gives the right answer."""
    exact = float(logits.argmax(-1).eq(answers).all(1).double().mean())
    return score_logits(logits.flatten(0, 1), answers.flatten())._replace(metric=exact)
