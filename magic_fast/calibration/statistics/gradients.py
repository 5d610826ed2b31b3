"""The diagonal of the Fisher information of a model on samples, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from magic_fast.calibration.features.batches import batches_of, run_batch, to_device
from magic_fast.calibration.features.padding import Masks, without_padding
from magic_fast.calibration.plainly import plainly
from magic_fast.calibration.sensitivity.divergence import logits_of
from magic_fast.errors import InputError, NonFiniteError
from magic_fast.reference.statistics import sampled_classes


def diagonal_fisher(
    model: nn.Module,
    data: Mapping[str, Any],
    task: str,
    *,
    output: Callable[[Any], Tensor] | None = None,
    draws: int = 1,
    seed: int = 0,
    like_fusion_bench: bool = False,
) -> dict[str, Tensor]:
    """Parameter → E_x E_{y∼p(y|x)} (∂ log p(y|x)/∂θ)², the mean over samples.

    Args:
        model: in evaluation mode; its parameters take gradients.
        data: task → batches.
        output: the model's output → logits [samples, …, classes].
        draws: classes drawn for a sample's expectation. A sequence's log-likelihood is the sum over
            its positions.
        like_fusion_bench: (∂ Σ_samples Σ_y √p·log p/∂θ)² of whole batches instead, over samples.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    found = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in own.items()}
    device = next(iter(own.values())).device
    count = 0

    def add(value: Tensor, share: float) -> None:
        grads = torch.autograd.grad(value, list(own.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(own, grads, strict=True):
            if grad is not None:
                found[name].addcmul_(grad.float(), grad.float(), value=share)

    with plainly(model), torch.enable_grad():
        for number, batch in enumerate(batches_of(data, task)):
            for part in without_padding(model, batch):
                here = to_device(part, device)
                logits = _logits(run_batch(model, here, task, number), output, task, number)
                count += len(logits)
                log_p = torch.log_softmax(logits, -1)
                if not bool(log_p.isfinite().all()):
                    raise NonFiniteError(
                        f"output of the model for batch {number} of task {task!r}: expected finite "
                        "logits, got NaN or infinity. Look at the samples and at the model."
                    )
                keep = _positions(model, here, logits)
                if like_fusion_bench:
                    each = (log_p.detach().exp().sqrt() * log_p).sum(-1)
                    add((each * keep).sum(), 1.0)
                    continue
                for _ in range(draws):
                    drawn = sampled_classes(logits, generator)
                    chosen = log_p.gather(-1, drawn[..., None])[..., 0] * keep
                    chosen = chosen.reshape(len(logits), -1).sum(1)
                    for one in chosen:  # squared sample by sample
                        add(one, 1.0 / draws)
    return {n: f / count for n, f in found.items()}


def _positions(model: nn.Module, batch: Any, logits: Tensor) -> Tensor:
    """1 where an output counts and 0 at padding that could not be cut, [samples, …]."""
    masks = Masks(model, batch)
    decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    mask = masks.of(model.get_decoder() if decoder else model)  # type: ignore[operator]
    if mask is None or mask.shape != logits.shape[:-1]:
        return logits.new_ones(logits.shape[:-1])
    return mask.to(logits)


def _logits(made: Any, output: Callable[[Any], Tensor] | None, task: str, number: int) -> Tensor:
    found = logits_of(made) if output is None else output(made)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise InputError(
            f"output of the model for batch {number} of task {task!r}: expected logits "
            f"[samples, …, classes], got {type(made).__name__}. Say where they are (output=)."
        )
    return found
