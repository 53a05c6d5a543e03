"""The metrics of `evaluate`, and what it returns: values with intervals, of one folder of pictures or of several."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bolid.evaluate.pictures import Picture, PictureFolder

if TYPE_CHECKING:
    import torch


FALSE_ACCEPT_RATE = 0.01  # of face verification
SIGNIFICANCE = 0.05  # of all differences of a comparison together

HIGHER, LOWER = "higher", "lower"
# Name -> (which is better, what it measures), in the order of every table.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "text_score": (HIGHER, "cosine of picture and prompt (CLIP-T)"),
    "image_score": (HIGHER, "mean cosine of picture and held-out photos (CLIP-I)"),
    "face_found": (HIGHER, "share of pictures in which a face is found"),
    "face_similarity": (HIGHER, "cosine of the face and the person's mean face on held-out photos"),
    "face_tar": (
        HIGHER,
        f"share of pictures whose face passes for the person's at {FALSE_ACCEPT_RATE:.0%} false accepts",
    ),
    "person_found": (HIGHER, "share of pictures with a person, from the shoulders down"),
    "bone_ratio_error": (
        LOWER,
        "mean difference of bone lengths over torso + thigh + shin, person by person; foreshortened legs count little",
    ),
    "width_profile_distance": (LOWER, "mean difference of silhouette widths over torso + thigh + shin"),
    "body_ratio_error": (LOWER, "mean relative error of the 3D body ratios, person by person"),
    "body_ratio_correlation": (
        HIGHER,
        "correlation over people of 3D body ratios, measured in the pictures, with the true ones",
    ),
    "body_shape_mm": (
        LOWER,
        "mean distance of the surface from the true body's at rest (PVE-T-SC), mm, person by person",
    ),
    "body_shape_floor_mm": (LOWER, "the same of as many held-out photos: the reader's own error"),
    "body_rank1": (HIGHER, "share of pictures whose body is nearest to the right person of all"),
    "body_auc": (HIGHER, "share of other people whose body is further off; 0.5 is chance"),
    "copy_paste": (LOWER, "nearest conditioning photo's cosine minus nearest held-out photo's, of equally many"),
    "face_copy_paste": (
        LOWER,
        "angle of the face to the nearest held-out photo minus that to the nearest conditioning photo, over the angle "
        "of these two (copy-paste of MultiID-Bench); 1: a copy",
    ),
    "clothing_leak": (LOWER, "probability of the conditioning photos' outfit instead of the one asked for"),
    "disturbance": (LOWER, "1 - cosine of the pictures with and without adapter, same prompt and seed"),
    "lpips_diversity": (HIGHER, "LPIPS distance between pictures of one person and prompt"),
    "tower_lpips_diversity": (
        HIGHER,
        "LPIPS distance between pictures of one person and prompt, on the family's tower, without learned weights",
    ),
    "fid": (LOWER, "Frechet distance of the features to those of the held-out photos (BoLID Eq. 15)"),
    "fid_extrapolated": (LOWER, "FID extrapolated over 1/N to infinitely many pictures"),
    "kid": (LOWER, "kernel distance of the features (unbiased)"),
    "inception_score": (HIGHER, "inception score over the named classes, one split"),
}


PER_PICTURE = (
    "text_score", "image_score", "face_found", "face_similarity", "face_tar", "person_found", "body_rank1", "body_auc",
    "copy_paste", "face_copy_paste", "clothing_leak", "disturbance", "diversity",
)  # fmt: skip
"""The scores of single pictures; "diversity" is either of the two LPIPS rows above."""


GROUPS: dict[str, tuple[str, ...]] = {
    "body": ("body_ratio_correlation", "body_ratio_error", "body_auc", "body_rank1", "body_shape_mm",
             "body_shape_floor_mm", "bone_ratio_error", "width_profile_distance", "person_found"),
    "face": ("face_similarity", "face_tar", "face_found"),
    "copies": ("face_copy_paste", "copy_paste", "clothing_leak"),
    "prompt": ("text_score", "image_score", "disturbance"),
    "diversity": ("lpips_diversity", "tower_lpips_diversity"),
    "quality": ("fid", "fid_extrapolated", "kid", "inception_score"),
}  # fmt: skip
"""The benchmark's headings, and the metrics under each."""


@dataclass(frozen=True)
class Metric:
    """One value (None where it could not be measured), its 95 % interval, n, and the evaluator that measured it."""

    value: float | None
    n: int
    measured_by: str
    note: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one folder of pictures."""

    pictures: int
    references: int  # held-out photos
    people: int
    metrics: dict[str, Metric]
    ratios: dict[str, dict[str, float]]
    """Body ratios by name: {"true", "pictures"}, means over people; empty without ground truth."""
    held_out: dict[str, Any]
    """{"excluded": reference photos that made a profile, "checked": whether records or --profile name those photos}."""
    notes: list[str]
    rejected: dict[str, list[str]]
    measurements: dict[str, dict[str, float]] = field(default_factory=dict)
    """By name: {"true", "pictures"}, means over people, and {"error", "floor"}, mean absolute errors; cm and kg."""


@dataclass
class PictureScores:
    """A folder's pictures and the scores of each."""

    name: str
    folder: PictureFolder
    pictures: list[Picture]
    people: list[str]  # each picture's, "" where unknown
    scores: dict[str, torch.Tensor]  # name -> f64 [N], nan where not measured
    per_person: dict[str, dict[str, float]]  # metric -> person -> value
    bodies: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, kw_only=True)
    """Person -> body ratios, true and of the pictures, f64 [R] each; empty below five people."""


@dataclass
class Scored(PictureScores):
    """The same with the folder's metrics; the report draws from these."""

    evaluation: Evaluation


@dataclass(frozen=True)
class Difference:
    """Another method's figure minus the first one's, over pairs of equal person and prompt."""

    value: float | None
    low: float | None
    high: float | None
    pairs: int
    paired_by: str  # "picture" or "person"
    p: float | None = None
    """The p-value of no difference, by Holm's correction for all figures and methods compared."""

    @property
    def differs(self) -> bool:
        """Whether the difference is significant at 5 %, with the correction."""
        return self.p is not None and self.p <= SIGNIFICANCE


@dataclass(frozen=True)
class Comparison:
    """Several methods' metrics, and the differences of each from the first."""

    baseline: str
    methods: dict[str, Evaluation]
    differences: dict[str, dict[str, Difference]]  # method -> metric
    bounds: dict[str, Evaluation] = field(default_factory=dict)
    """Of a benchmark: what real photos of the person and of others reach (bounds.py)."""
