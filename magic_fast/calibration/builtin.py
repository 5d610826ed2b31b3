"""The calibrations that the package brings, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from magic_fast.recipe import Granularity, RowFunction, Variant


@dataclass(frozen=True)
class Calibration:
    """One calibration.

    Attributes:
        name: in ``calibrate=``, ``calibrate:`` and ``--variant``, or ``--space`` for what runs on
            a merged model only.
        summary, use_when, paper, arxiv: for people.
        needs: what it is made of: sums of ``rows``, whole ``tensors``, samples (``data``), singular
            values (``spectrum``) or ``depth``.
        space: ``weight`` for the variants of WSC, else the word of ``--space``.
        granularity: what shares a ξ where the settings do not say.
        function: of a registered one.
    """

    name: str
    summary: str
    use_when: str
    paper: str = ""
    arxiv: str = ""
    needs: str = "rows"
    space: str = "weight"
    granularity: Granularity = Granularity.ROW
    function: RowFunction | None = None


_MAGIC = ("MAGIC", "2512.19320")
#: Ours.
CALIBRATIONS: Mapping[str, Calibration] = {
    c.name: c
    for c in (
        Calibration(
            Variant.MANIFOLD.value,
            "WSC: each row scaled to the surface that the experts' rows span",
            "the paper's calibration is wanted; rows of different experts are nearly orthogonal",
            *_MAGIC,
        ),
        Calibration(
            Variant.MANIFOLD_EXACT.value,
            "WSC manifold without the assumption that the experts' rows are orthogonal",
            "few experts whose changes overlap",
            "a least-squares form of MAGIC's manifold",
        ),
        Calibration(
            Variant.SPHERE.value,
            "norm restoration: each row, or each tensor, of the change gets the experts' mean norm",
            "the first to try; after a mean it never shrinks",
            *_MAGIC,
        ),
        Calibration(
            Variant.SPECTRAL.value,
            "spectral norm restoration: the largest singular value gets the experts' mean",
            "few directions carry the change",
            *_MAGIC,
            needs="tensors",
            granularity=Granularity.TENSOR,
        ),
        Calibration(
            "fsc",
            "FSC: each layer's change scaled until its features are as large as the experts'",
            "samples are at hand, and the merge's scale is off or untuned",
            *_MAGIC,
            needs="data",
            space="feature",
        ),
        Calibration(
            "dsc",
            "DSC: WSC, then FSC on its result",
            "both are wanted in one pass",
            *_MAGIC,
            needs="data",
            space="dual",
        ),
        Calibration(
            "svc",
            "singular values divided by how far the experts over-agree along them",
            "experts share directions, which a sum counts several times",
            "singular value calibration",
            needs="spectrum",
            space="svc",
        ),
        Calibration(
            "lines",
            "the change scaled by depth: alpha in the first block, alpha + beta in the last",
            "early layers hold what all tasks share",
            "LiNeS",
            "2410.17146",
            needs="depth",
            space="lines",
        ),
    )
}
ON_MERGED_MODELS = tuple(name for name, c in CALIBRATIONS.items() if c.space != "weight")
SPACES = ("weight", *(CALIBRATIONS[name].space for name in ON_MERGED_MODELS))
