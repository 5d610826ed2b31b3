"""Element-wise methods that are recipes: hand-worked cases of the ones without recordings, and of
the presets of systems that were not recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import magic_fast as mf
from support.backends import backend_params

of = torch.tensor
backends = pytest.mark.parametrize("backend", backend_params())


@backends
def test_magmax(backend: str) -> None:
    """The entry of largest magnitude with its sign; on equal magnitude the later expert; λ = ½."""
    taus = [of([1.0, -4.0, 2.0, 0.0]), of([-3.0, 2.0, -2.0, 0.0])]
    got = mf.merge_task_vectors(taus, "magmax", backend=backend)
    assert torch.equal(got, of([-1.5, -2.0, -1.0, 0.0]))
    assert torch.equal(
        mf.merge_task_vectors(taus[::-1], "magmax", scale=1.0, backend=backend),
        of([-3.0, -4.0, 2.0, 0.0]),
    )
    assert torch.equal(mf.merge_task_vectors(taus[:1], "magmax", backend=backend), taus[0] / 2)


@backends
def test_emr_unified(backend: str) -> None:
    """The largest magnitude of the elected sign; a zero vote counts as negative."""
    taus = [of([1.0, -4.0, 2.0, 0.0, 3.0]), of([2.0, 2.0, -2.0, 0.0, -1.0])]
    got = mf.merge_task_vectors(taus, "emr_unified", backend=backend)
    assert torch.equal(got, of([2.0, -4.0, -2.0, 0.0, 3.0]))
    assert torch.equal(got, mf.emr(None, taus).unified)


@backends
def test_sd_mecha_ties(backend: str) -> None:
    """n = 10, q = 0.2: everything from the 8th smallest magnitude on (3 entries). Votes are
    counted, an even count drops the element, the sum is divided by the contributors, weights play
    no part."""
    a = of([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    b = of([10.0, 1, 1, 1, 1, 1, 1, 8, -9.5, 11])
    got = mf.merge_task_vectors([a, b], "ties", preset="sd_mecha", backend=backend)
    assert torch.equal(got, of([10.0, 0, 0, 0, 0, 0, 0, 8, 0, 10.5]))
    mass = mf.merge_task_vectors([a, b], "ties", preset="sd_mecha", vote="mass", backend=backend)
    assert torch.equal(mass, of([10.0, 0, 0, 0, 0, 0, 0, 8, -9.5, 10.5]))


def test_sd_mecha_keeps_all_ties_and_counts_its_own_way() -> None:
    """n = 231, q = 0.2: 231 − ⌊184.8⌋ + 1 = 48 entries, where ties-merging keeps 47."""
    x = torch.arange(1.0, 232.0)
    for preset, kept in (("sd_mecha", 48), ("magic", 47)):
        found = mf.merge_task_vectors([x], "ties", preset=preset)
        assert int((found != 0).sum()) == kept
    tied = mf.merge_task_vectors([torch.ones(10)], "ties", preset="sd_mecha")
    assert torch.equal(tied, torch.ones(10))


@backends
def test_fusion_bench_ties(backend: str) -> None:
    """One threshold per expert over the model (3 of 10 entries), zero votes take the sign of all
    votes of the model (+), the contributors are summed, λ = 0.3."""
    zero = {"a": torch.zeros(4), "b": torch.zeros(2, 3)}
    experts = [
        {"a": of([10.0, -9, 1, 1]), "b": of([[8.0, 1, 1], [1, 1, 1]])},
        {"a": of([1.0, 9, 1, 7]), "b": of([[-8.0, 1, 1], [1, 1, 1]])},
    ]
    got = mf.merge(zero, experts, "ties", preset="fusion_bench", backend=backend)
    torch.testing.assert_close(got["a"], of([3.0, 2.7, 0.0, 2.1]))
    torch.testing.assert_close(got["b"], of([[2.4, 0.0, 0.0], [0.0, 0.0, 0.0]]))


@backends
def test_fusion_bench_sums(backend: str) -> None:
    """Task arithmetic has λ = 0.3 there too; slerp and the plain mean are ours."""
    taus = [of([1.0, 2.0]), of([3.0, -1.0])]
    got = mf.merge_task_vectors(taus, "task_arithmetic", preset="fusion_bench", backend=backend)
    torch.testing.assert_close(got, of([1.2, 0.3]))
    mean = mf.merge_task_vectors(taus, "average", preset="fusion_bench", backend=backend)
    assert torch.equal(mean, of([2.0, 0.5]))


def test_presets_refuse_what_their_system_lacks() -> None:
    for preset, method in (("sd_mecha", "sce"), ("fusion_bench", "consensus_ta")):
        with pytest.raises(mf.InputError, match=f"method '{method}' under preset '{preset}'"):
            mf.merge_task_vectors([torch.ones(2)], method, preset=preset)


# consensus_ta. τ: 5, 1, 4, 0 and 1, 1, 3, −2; the sum 6, 2, 7, −2.
# λ = 0.4: |5| > 0.4·1 yes, |1| > 0.4·5 no → 1; |1| > 0.4·1 both → 2; |4| > 0.4·3, |3| > 0.4·4 → 2;
# |0| > 0.4·2 no, |−2| > 0 yes → 1.
TAUS = [of([5.0, 1.0, 4.0, 0.0]), of([1.0, 1.0, 3.0, -2.0])]


@backends
@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [0.0, 2.0, 7.0, 0.0]),
        ({"min_tasks": 1}, [6.0, 2.0, 7.0, -2.0]),
        ({"min_tasks": 3}, [0.0, 0.0, 0.0, 0.0]),
        ({"scale": 0.5}, [0.0, 1.0, 3.5, 0.0]),
        # expert 1 with λ = 0.1: 1 > 0.1·5 counts too
        ({"tall_mask_lambda": [0.4, 0.1]}, [6.0, 2.0, 7.0, 0.0]),
        # strict: |1| > 1·|1| is false; |4| > 1·3 true, |3| > 1·4 false
        ({"tall_mask_lambda": 1.0}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_consensus_ta(backend: str, settings: dict[str, object], want: list[float]) -> None:
    got = mf.merge_task_vectors(TAUS, "consensus_ta", backend=backend, **settings)
    assert torch.equal(got, of(want))


@backends
def test_consensus_ta_on_ties(backend: str) -> None:
    """Half of each trimmed: 5, 0, 4, 0 and 0, 0, 3, −2; voted and summed: 5, 0, 7, −2. The masks
    compare raw task vectors: element 1: |1| > 0.4·1 twice, but Δ is 0 there; element 2 both."""
    got = mf.merge_task_vectors(TAUS, "consensus_ta", on="ties", density=0.5, backend=backend)
    assert torch.equal(got, of([0.0, 0.0, 7.0, 0.0]))
    # opposite signs: the sum keeps both, TIES the elected one
    taus = [of([4.0]), of([-1.0])]
    plain = mf.merge_task_vectors(taus, "consensus_ta", min_tasks=1, backend=backend)
    ties = mf.merge_task_vectors(taus, "consensus_ta", on="ties", min_tasks=1, backend=backend)
    assert plain.item() == 3.0 and ties.item() == 4.0


@backends
def test_consensus_ta_with_masks_fed_in(backend: str) -> None:
    masks = [of([1, 1, 0, 0]).bool(), of([1, 0, 0, 1]).bool()]
    got = mf.merge_task_vectors(TAUS, "consensus_ta", masks=masks, backend=backend)
    assert torch.equal(got, of([6.0, 0.0, 0.0, 0.0]))
    with pytest.raises(mf.InputError, match="task mask for the tensor: expected one per expert"):
        mf.merge_task_vectors(TAUS, "consensus_ta", masks=masks[:1])
    with pytest.raises(mf.InputError, match="task mask of expert 1"):
        mf.merge_task_vectors(TAUS, "consensus_ta", masks=[masks[0], None])


def test_consensus_ta_of_magic_trims_the_whole_model() -> None:
    """20 % of ten entries, and one more, over both tensors; then the sum and the masks."""
    taus = [{"a": of([9.0, 8, 1, 1, 1]), "b": of([7.0, 1, 1, 1, 1])}]
    got = mf.merge_task_vectors(taus, "consensus_ta", preset="magic", min_tasks=1)
    assert torch.equal(got["a"], of([9.0, 8, 0, 0, 0]))
    assert torch.equal(got["b"], of([7.0, 0, 0, 0, 0]))


def test_task_masks() -> None:
    masks = mf.task_masks(None, TAUS)
    assert [m.tolist() for m in masks] == [[True, True, True, False], [False, True, True, True]]
    both = mf.consensus_mask(masks)
    assert both.tolist() == [False, True, True, False]
    base = {"w": of([1.0, 1.0, 1.0, 1.0]).bfloat16(), "ids": torch.arange(3)}
    experts = [{"w": (base["w"] + t).bfloat16(), "ids": base["ids"]} for t in TAUS]
    found = mf.task_masks(base, experts)
    assert [list(f) for f in found] == [["w"], ["w"]]  # integer tensors have none
    assert all(torch.equal(f["w"], m) for f, m in zip(found, masks, strict=True))
    assert torch.equal(mf.consensus_mask(found)["w"], both)
    # against a merged model: the first expert itself. τ_0 > λ·0; τ_1: |τ_1| > 0.4·|τ_0 − τ_1|
    own = mf.task_masks(base, experts, experts[0])
    assert own[0]["w"].tolist() == [True, True, True, False]
    assert own[1]["w"].tolist() == [False, True, True, True]


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(mf.InputError, match="tall_mask_lambda of expert 0: expected >= 0"):
        mf.task_masks(None, TAUS, tall_mask_lambda=-1.0)
    with pytest.raises(mf.InputError, match="shape of expert 1"):
        mf.task_masks(None, [torch.ones(2), torch.ones(3)])
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(mf.InputError, match="min_tasks: expected 1 to 2, the number of masks"):
        mf.consensus_mask([mask, mask], min_tasks=3)
    with pytest.raises(mf.InputError, match=r"masks\[1\]: expected bool or uint8"):
        mf.consensus_mask([mask, torch.ones(2)])
    with pytest.raises(mf.InputError, match="masks for method 'ties': expected none"):
        mf.merge_task_vectors(TAUS, "ties", masks=[None, None])


def test_emr_rebuilds_task_models() -> None:
    """One ρ per expert, over all tensors together."""
    base = {"a": torch.ones(2), "b": torch.ones(1).bfloat16(), "n": torch.tensor([7])}
    taus = [{"a": of([2.0, -3.0]), "b": of([1.0])}, {"a": of([4.0, 1.0]), "b": of([-2.0])}]

    def expert(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": base["a"] + t["a"], "b": (base["b"] + t["b"]).bfloat16(), "n": base["n"]}

    found = mf.emr(base, [expert(t) for t in taus])
    assert torch.equal(found.unified["a"], of([4.0, -3.0]))
    assert torch.equal(found.unified["b"], of([-2.0]))
    assert found.masks[0]["a"].tolist() == [True, True]
    assert found.masks[0]["b"].tolist() == [False]
    assert found.masks[1]["a"].tolist() == [True, False]
    # expert 0: (2.5 + 1) / (3.5 + 0); expert 1: (2.5 + 2) / (2 + 2)
    assert found.rescale == [1.0, 1.125]
    rebuilt = found.task_model(base, 1)
    assert torch.equal(rebuilt["a"], of([1 + 4.5, 1.0]))
    assert rebuilt["b"].dtype == torch.bfloat16 and rebuilt["b"].item() == 1 - 2.25
    assert torch.equal(rebuilt["n"], base["n"])
    nothing = mf.emr(None, [torch.zeros(3)])
    assert nothing.rescale == [0.0]
    assert torch.equal(nothing.task_model(torch.ones(3), 0), torch.ones(3))


def test_alignment_brings_all_to_the_smallest_norm() -> None:
    """‖τ‖ = 5, 10 and 0: the second is halved, the zero one has no length to take."""
    taus = [of([3.0, 4.0]), of([0.0, 10.0]), of([0.0, 0.0])]
    got = mf.merge_task_vectors(taus, "task_arithmetic", align="min_norm")
    assert torch.equal(got, of([3.0, 9.0]))
    mean = mf.merge_task_vectors(taus[:2], "average", align="min_norm")
    assert torch.equal(mean, of([1.5, 4.5]))
    zero = torch.zeros(2)
    assert torch.equal(mf.merge_task_vectors([zero, zero], "ties", align="min_norm"), zero)
    found = mf.merge_task_vectors(taus, "average", align="min_norm", details=True)
    assert found.rescale_factors == (1.0, 0.5, 1.0)


def test_alignment_measures_before_the_trim_and_multiplies_the_rescale() -> None:
    taus = [of([3.0, 4.0]), of([6.0, 8.0])]
    got = mf.merge_task_vectors(
        taus, "ties", density=0.5, rescale="l1", align="min_norm", reduce="sum", details=True
    )
    # 7/4 and 14/8 restore the L1 norm; the second is halved
    assert got.rescale_factors == (1.75, 0.875)
    assert torch.equal(got.merged, of([0.0, 14.0]))
    # one threshold over the model, one alignment per tensor
    models = [{"a": t, "b": t / 2} for t in taus]
    whole = mf.merge_task_vectors(
        models, "ties", density=0.5, preset="ties_merging", align="min_norm", reduce="sum"
    )
    assert torch.equal(whole["a"], of([6.0, 8.0]))


@pytest.mark.parametrize("backend", backend_params())
def test_alignment_on_every_backend(backend: str) -> None:
    """(3 + 3) / 2 and (4 + 4) / 2: the factor of the second is 1/2, in every backend's own sums."""
    taus = [of([3.0, 4.0]), of([6.0, 8.0])]
    got = mf.merge_task_vectors(taus, "average", align="min_norm", backend=backend)
    assert torch.equal(got, of([3.0, 4.0]))
