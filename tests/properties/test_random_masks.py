"""Random trims: known generator words, what a mask depends on, and the statistics of what stays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from magic_fast.recipe import stream_of
from magic_fast.reference.philox import expert_stream, philox_words, random_keep
from support.backends import backend_params

NAME = "model.layers.0.mlp.up_proj.weight"


def words(counter: int, stream: int, seed: int) -> list[int]:
    found: list[int] = philox_words(torch.tensor([counter]), stream, seed)[0].tolist()
    return found


def test_known_words_of_the_generator() -> None:
    assert words(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert stream_of(NAME) == 0x345B65BAF420F1E5
    first, second = (expert_stream(stream_of(NAME), k) for k in (0, 1))
    assert words(0, first, 42) == [0x8E155C47, 0xD9A4C13A, 0xBACD7EE3, 0xC8D4643F]
    assert words(0, second, 42) == [0x9479D246, 0x642D5E8F, 0x9699000C, 0xE8A8A1A6]


def test_known_words_of_all_ones() -> None:
    """The third of the published test vectors: every counter and key bit set."""
    ones = (1 << 64) - 1
    counter = torch.tensor([-1])  # the bits of 2⁶⁴ − 1
    found = philox_words(counter, ones, ones)[0].tolist()
    assert found == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def kept(backend: str, n: int = 64, density: float = 0.5, **where: object) -> Tensor:
    """Keep mask of two experts of ones, by what a merge leaves of them."""
    weights = [1.0, 4.0]
    out = mf.merge_task_vectors(
        torch.ones(2, n), "dare_linear", weights=weights, density=density, rescale="none",
        backend=backend, **where,  # type: ignore[arg-type]
    )  # fmt: skip
    return torch.stack([(out % 4) == 1, out >= 4])


@pytest.mark.parametrize("backend", backend_params())
def test_the_mask_is_the_words_of_the_element(backend: str) -> None:
    """Element i takes word i mod 4 of counter i div 4, and stays if it is below ⌊p·2³²⌋."""
    masks = kept(backend, name=NAME, seed=42, density=0.6)
    bound = math.floor(0.6 * 2**32)
    for k in range(2):
        stream = expert_stream(stream_of(NAME), k)
        for i in range(64):
            assert bool(masks[k, i]) == (words(i // 4, stream, 42)[i % 4] < bound)


@pytest.mark.parametrize("backend", backend_params())
def test_what_a_mask_depends_on(backend: str) -> None:
    plain = kept(backend, name=NAME, seed=42)
    assert torch.equal(plain, kept(backend, name=NAME, seed=42))
    assert not torch.equal(plain, kept(backend, name=NAME, seed=43))
    assert not torch.equal(plain, kept(backend, name=NAME, seed=42 + 2**32))
    assert not torch.equal(plain, kept(backend, name="other", seed=42))
    assert not torch.equal(plain[0], plain[1])
    assert torch.equal(plain, kept(backend, n=257, name=NAME, seed=42)[:, :64])
    state = [{NAME: torch.ones(64)}, {NAME: torch.ones(64)}]
    by_name = mf.merge_task_vectors(
        state, "dare_linear", weights=[1.0, 4.0], density=0.5, rescale="none", seed=42,
        backend=backend,
    )  # fmt: skip
    assert torch.equal((by_name[NAME] % 4) == 1, plain[0])


def test_a_mask_does_not_depend_on_where_a_slab_starts() -> None:
    whole = random_keep(1001, 0.3, seed=9, stream=77, expert=1)
    for start, stop in ((0, 5), (3, 4), (6, 601), (997, 1001)):
        part = random_keep(stop - start, 0.3, seed=9, stream=77, expert=1, offset=start)
        assert torch.equal(part, whole[start:stop])


def test_a_mask_beyond_32_bits_of_elements() -> None:
    """Counters above 2³² use their high word."""
    far = random_keep(8, 0.5, seed=1, stream=5, expert=0, offset=4 * 2**33)
    near = random_keep(8, 0.5, seed=1, stream=5, expert=0, offset=0)
    assert not torch.equal(far, near)
    expected = [w < 2**31 for c in (2**33, 2**33 + 1) for w in words(c, 5, 1)]
    assert far.tolist() == expected


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("backend", backend_params())
def test_keep_rate(backend: str, density: float) -> None:
    """Within 5 standard deviations of a binomial (one draw in a million is not); fixed seed."""
    n = 200_000
    masks = kept(backend, n=n, density=density, seed=3)
    deviation = math.sqrt(n * density * (1 - density))
    for mask in masks:
        assert abs(int(mask.sum()) - n * density) < 5 * deviation
    both = int((masks[0] & masks[1]).sum())
    joint = density**2
    assert abs(both - n * joint) < 5 * math.sqrt(n * joint * (1 - joint))


@pytest.mark.parametrize("backend", backend_params())
def test_dare_keeps_the_mean(backend: str) -> None:
    """÷ density makes up for what is dropped, in expectation."""
    n = 200_000
    merged = mf.merge_task_vectors(
        torch.ones(1, n), "dare_linear", density=0.25, seed=1, backend=backend
    )
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert abs(float(merged.mean()) - 1) < 5 * math.sqrt(0.75 / 0.25 / n)


@pytest.mark.parametrize("backend", backend_params())
def test_della_favours_the_large(backend: str) -> None:
    """The keep rate of each tenth of the ranks follows (q − ε) + 2ε·(rank − 1)/(c − 1)."""
    rows, cols, q, epsilon = 400, 500, 0.5, 0.3
    x = (torch.arange(cols).float() + 1).expand(1, rows, cols).contiguous()
    merged = mf.merge_task_vectors(
        x, "della_linear", density=q, epsilon=epsilon, rescale="none", seed=8, backend=backend
    )
    keep = (merged != 0).float()
    for tenth in range(10):
        block = slice(tenth * cols // 10, (tenth + 1) * cols // 10)
        ranks = torch.arange(cols)[block].double()
        p = float(((q - epsilon) + 2 * epsilon * ranks / (cols - 1)).mean())
        n = rows * cols // 10
        assert abs(float(keep[:, block].mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("backend", backend_params())
def test_density_one_has_no_mask(backend: str) -> None:
    assert bool(kept(backend, density=1.0, seed=4).all())
