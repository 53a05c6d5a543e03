"""The measures of section 6, on plain tensors.

Shapes: N pictures, D features, K = 17 COCO keypoints, P people, R ratios.
"""

from __future__ import annotations

import torch

BONES: dict[str, tuple[tuple[int, int], ...]] = {
    "upper_arm": ((5, 7), (6, 8)),
    "forearm": ((7, 9), (8, 10)),
    "thigh": ((11, 13), (12, 14)),
    "shin": ((13, 15), (14, 16)),
    "torso": ((5, 11), (6, 12)),
    "shoulders": ((5, 6),),
    "hips": ((11, 12),),
}
"""Bones by name: pairs of COCO keypoints, left and right where there are two."""


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """FID between features `a` [N, D] and `b` [M, D] (BoLID Eq. 15; Heusel et al., arXiv:1706.08500).

    |mu_a - mu_b|^2 + Tr(S_a) + Tr(S_b) - 2 Tr sqrt(S_a S_b), where the last trace is the nuclear norm of A B^T with
    A, B the centred features over sqrt(N - 1): no matrix square root, and exact also for N < D. Needs N, M >= 2.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError("the Frechet distance needs two pictures or more on both sides")
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).pow(2).sum()
    a, b = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    # For N > D the triangular factors carry all: ||A B^T||_* = ||R_a R_b^T||_*.
    r_a, r_b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (a, b))
    trace = torch.linalg.svdvals(r_a @ r_b.T).sum()
    return max(0.0, float(mean + a.pow(2).sum() + b.pow(2).sum() - 2 * trace))


def bone_ratios(keypoints: torch.Tensor, least_confidence: float = 0.5) -> torch.Tensor:
    """Lengths of BONES over torso + thigh + shin, [..., 7], from keypoints [..., K, 3] (pixels, pixels, confidence).

    Left and right are averaged by confidence; a bone with an end below `least_confidence` counts as not seen (nan), and
    so do all ratios when torso, thigh or shin are not seen. Foreshortening is in them: compare averages over pictures.
    """
    points, confidence = keypoints[..., :2], keypoints[..., 2]
    lengths = []
    for pairs in BONES.values():
        length = torch.stack([(points[..., i, :] - points[..., j, :]).norm(dim=-1) for i, j in pairs], -1)
        weight = torch.stack([torch.minimum(confidence[..., i], confidence[..., j]) for i, j in pairs], -1)
        weight = weight * (weight >= least_confidence)
        lengths.append((length * weight).sum(-1) / weight.sum(-1))  # 0 / 0 = nan: not seen
    bones = torch.stack(lengths, -1)
    names = list(BONES)
    scale = sum(bones[..., names.index(name)] for name in ("torso", "thigh", "shin"))
    return bones / scale[..., None]


def r2_scores(truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Coefficient of determination of each column, [R], from truth and predicted [P, R]; 1 is perfect, 0 the mean's."""
    residual = (truth - predicted).pow(2).sum(0)
    return 1 - residual / (truth - truth.mean(0)).pow(2).sum(0)
