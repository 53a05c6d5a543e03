"""Gamma_body: photos of a person -> c_body (BoLID section 5.2), a variational autoencoder over views.

Every view gives a Gaussian over z. A product of experts fuses the views. The decoder rebuilds the body of a held-out
view *given that view's pose*, so z keeps what the pose does not determine: proportions and build.

Shapes: B people, M views of one person, N views in a flat batch, K = 17 COCO keypoints, D body dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bolid.method.body_views import (
    ENCODER_BONES,
    LIMBS,
    PATCHES,
    Skeleton,
    Views,
    patch_sizes,
    skeleton,
    visible_patches,
)
from bolid.method.keypoints import KEYPOINTS

# ---- the networks -------------------------------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True)
    )


def _strided(size: tuple[int, int]) -> tuple[int, int]:
    """The size of a patch after two convolutions of stride 2."""
    return -(-size[0] // 4), -(-size[1] // 4)


class PatchEncoder(nn.Module):
    """The patches of one kind -> `out_dim` numbers each."""

    def __init__(self, size: tuple[int, int], width: int, parts: int, out_dim: int, channels: int = 4) -> None:
        super().__init__()
        self.convs = nn.Sequential(_conv(channels, width), _conv(width, 2 * width, 2), _conv(2 * width, 3 * width, 2))
        flat = 3 * width * math.prod(_strided(size))
        # One linear layer for each part: an arm and a leg share the filters alone.
        self.weight = nn.Parameter(torch.randn(parts, flat, out_dim) / math.sqrt(flat))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, parts, channels, h, w] => [N, parts * out_dim]"""
        n, parts = patches.shape[:2]
        x = self.convs(patches.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return torch.einsum("npf,pfo->npo", x.reshape(n, parts, -1), self.weight).flatten(1)


class CropEncoder(nn.Module):
    """The patches of a Gaussian-weighted crop -> one vector."""

    def __init__(self, width: int, detail: float, channels: int = 4) -> None:
        super().__init__()
        sizes = patch_sizes(detail)
        self.torso = PatchEncoder(sizes["torso"], width, 1, 96, channels)
        self.bust = PatchEncoder(sizes["bust"], width, 1, 64, channels)
        self.limb = PatchEncoder(sizes["limb"], width // 2, len(LIMBS), 16, channels)
        self.out_dim = 96 + 64 + 16 * len(LIMBS)

    def forward(self, views: Views) -> torch.Tensor:
        """[N, out_dim]"""
        return torch.cat([self.torso(views.torso), self.bust(views.bust), self.limb(views.limb)], dim=1)


def at_detail(state: dict[str, torch.Tensor], before: float, now: float) -> dict[str, torch.Tensor]:
    """A BodyVAE's weights for patches of detail `now`, from those for detail `before`.

    A finer map is averaged to the coarser one, so the new network starts with the old one's output.
    """
    state = dict(state)
    for part in PATCHES:
        name = f"crop_encoder.{part}.weight"
        if before == now or name not in state:
            continue
        coarse, fine = (_strided(patch_sizes(detail)[part]) for detail in (before, now))
        places = math.prod(fine)
        pooling = F.adaptive_avg_pool2d(torch.eye(places).view(places, 1, *fine), coarse).flatten(1)
        parts, flat, out_dim = state[name].shape
        weight = state[name].view(parts, flat // math.prod(coarse), math.prod(coarse), out_dim)
        state[name] = torch.einsum("yx,pcxo->pcyo", pooling, weight).flatten(1, 2)
    return state


VIEWS = ("crop", "mask", "pooled", "both")
POOLED = ("pooled", "both")  # those with image-text features


class BodyVAE(nn.Module):
    """q(z | views) and p(view | z, pose) (Kingma & Welling 2014; BoLID section 5.2).

    `view`: "crop" (patches cut along the bones), "mask" (the same of the person's mask, without colour), "pooled"
    (image-text features of width `feature_dim`, pooled at the keypoints) or "both" of crop and pooled.
    `detail`: how finely the patches are sampled, 1, 1.5 or 2. Raises ValueError for another view.
    """

    def __init__(
        self, body_dim: int = 64, width: int = 24, hidden_dim: int = 256, view: str = "crop", feature_dim: int = 0,
        detail: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"view is one of {', '.join(VIEWS)}, not {view!r}")
        self.body_dim, self.view, self.feature_dim = body_dim, view, feature_dim if view in POOLED else 0
        self.detail = detail
        pose_dim = len(ENCODER_BONES) * 3
        in_dim = KEYPOINTS * 3 + pose_dim + len(ENCODER_BONES)
        if view != "pooled":
            self.crop_encoder = CropEncoder(width, detail, 2 if view == "mask" else 4)
            in_dim += self.crop_encoder.out_dim
        if view in POOLED:
            self.features = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, 24))
            in_dim += KEYPOINTS * 24
        self.head = nn.Sequential(
            nn.BatchNorm1d(in_dim), nn.Linear(in_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
        )  # fmt: skip
        # Normed, so that views start far apart: else InfoNCE begins with all people alike.
        self.mean = nn.Sequential(nn.Linear(hidden_dim, body_dim), nn.BatchNorm1d(body_dim))
        # A linear skip connection past the head, which drops weak evidence of a view though it adds up over several.
        self.direct = nn.Linear(in_dim, body_dim, bias=False)
        nn.init.zeros_(self.direct.weight)
        self.logvar = nn.Linear(hidden_dim, body_dim)
        self.decoder = nn.Sequential(
            nn.Linear(body_dim + pose_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, len(ENCODER_BONES) + OUTLINE_DIM),
        )  # fmt: skip

    @property
    def evidence_dim(self) -> int:
        """E, the length of `evidence`."""
        return int(self.direct.in_features)

    def evidence(self, views: Views) -> torch.Tensor:
        """What `encode` sees of the views, standardised: keypoints, bones and patches, [N, E]."""
        bones = skeleton(views.keypoints)
        visible = bones.points[:, :KEYPOINTS, 2:] > 0
        middle = bones.points[:, [5, 6]].mean(1, keepdim=True)
        placed = (bones.points[:, :KEYPOINTS, :2] - middle[..., :2]) / bones.scale[:, None, None] * visible
        parts = [placed.flatten(1), views.keypoints[..., 2], _pose(bones), bones.log_lengths]
        if self.view != "pooled":
            parts.append(self.crop_encoder(views))
        if self.view in POOLED:
            if views.features is None:
                raise ValueError("this body encoder needs the image-text features of the views")
            parts.append((self.features(views.features.float()) * visible).flatten(1))
        return self.head[0](torch.cat(parts, dim=1))

    def encode(self, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
        """q(z | one view) without the prior: mean [N, D], logvar [N, D]."""
        return self.encode_evidence(self.evidence(views))

    def encode_evidence(self, evidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` from what `evidence` gives."""
        hidden = self.head[1:](evidence)
        return self.mean[1](self.mean[0](hidden) + self.direct(evidence)), self.logvar(hidden).clamp(-6, 6)

    def decode(self, z: torch.Tensor, bones: Skeleton) -> tuple[torch.Tensor, torch.Tensor]:
        """p(view | z, pose): z [N, D] and a view's pose => log-lengths [N, bones], outline [N, OUTLINE_DIM].

        The pose is the directions and the confidence of the bones; lengths and widths must come from z.
        """
        out = self.decoder(torch.cat([z, _pose(bones)], dim=1))
        return out[:, : len(ENCODER_BONES)], out[:, len(ENCODER_BONES) :]


def _pose(bones: Skeleton) -> torch.Tensor:
    return torch.cat([bones.directions.flatten(1), bones.confidence], dim=1)


OUTLINE_SIZES = {part: (h // 2, w // 2) for part, (h, w) in PATCHES.items()}
OUTLINE_DIM = sum(math.prod(size) * (len(LIMBS) if part == "limb" else 1) for part, size in OUTLINE_SIZES.items())


def outline_target(views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's target, the edges in the body's patches, and which places are visible; both [N, OUTLINE_DIM].

    Edges, not colours: clothes change their colour from photo to photo, the outline of the body under them less.
    """
    values, weights = [], []
    for part, patch in (("torso", views.torso), ("bust", views.bust), ("limb", views.limb)):
        grey = patch[:, :, :-1].mean(dim=2)  # the last channel is the keypoint weight
        dx = F.pad(grey[..., 2:] - grey[..., :-2], (1, 1))
        dy = F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
        # As many places whatever the detail, so that a reconstruction weighs as much.
        edges = F.adaptive_avg_pool2d((dx**2 + dy**2 + 1e-4).sqrt(), OUTLINE_SIZES[part])
        edges = edges / edges.mean(dim=(-2, -1), keepdim=True)
        values.append(edges.sqrt().flatten(1))
        weights.append(visible_patches(patch).flatten(2).expand(*edges.shape[:2], edges[0, 0].numel()).flatten(1))
    return torch.cat(values, dim=1), torch.cat(weights, dim=1)


BONE_STD, OUTLINE_STD = 0.1, 0.4  # standard deviations of the decoder's Gaussians: the noise of one photo
EDGE_MEASUREMENTS = 20  # the outline's places are far from independent: they count as so many measurements

# ---- fusion and the ELBO -------------------------------------------------------------------------------------------


def fuse(mean: torch.Tensor, logvar: torch.Tensor, confidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Product of experts: N(0, I) times every view's Gaussian, precisions scaled by the confidence (section 5.2).

    mean, logvar [B, M, D], confidence [B, M] (0 = the view is not there) => body_mean, body_logvar [B, D].
    Adding a view adds a precision >= 0: it never raises the uncertainty. No view at all gives the prior.
    """
    precision = torch.exp(-logvar) * confidence[..., None]
    body_precision = 1 + precision.sum(dim=1)
    return (precision * mean).sum(dim=1) / body_precision, -body_precision.log()


class BodyPrior(NamedTuple):
    """How encoded bodies are distributed over people: N(mean, covariance)."""

    mean: torch.Tensor  # [D]
    covariance: torch.Tensor  # [D, D]


def aggregated_posterior(body_mean: torch.Tensor, body_logvar: torch.Tensor) -> BodyPrior:
    """The Gaussian with the moments of the aggregated posterior, the prior that fits the encoder best (Tomczak &
    Welling 2018, arXiv:1705.07120): the covariance of the fused means of P people plus their mean variance.

    body_mean, body_logvar [P, D], P at least 2.
    """
    covariance = torch.cov(body_mean.double().T) + torch.diag(body_logvar.double().exp().mean(0))
    return BodyPrior(body_mean.mean(0), covariance.to(body_mean))


def draw_body(prior: BodyPrior, normal: torch.Tensor) -> torch.Tensor:
    """A body [D] drawn from the prior, from `normal` [D] of N(0, I)."""
    mean, covariance = (part.double() for part in prior)
    return (mean + torch.linalg.cholesky(covariance) @ normal.double()).to(normal)


def mean_under_prior(body_mean: torch.Tensor, body_logvar: torch.Tensor, prior: BodyPrior) -> torch.Tensor:
    """The fused mean [D] with `prior` in place of N(0, I), from what `fuse` gives, [D] each.

    The covariance fills in what the views leave open from what they show; N(0, I) has no covariances. Not in the paper.
    """
    mean, covariance = (part.double() for part in prior)
    precision = body_logvar.double().neg().exp()  # of the views' and 1 of N(0, I)
    evidence = (precision - 1).clamp_min(0)
    # (S^-1 + P)^-1 (S^-1 m + P body_mean), without an inverse of S
    system = torch.eye(len(mean), dtype=mean.dtype) + covariance * evidence
    return torch.linalg.solve(system, mean + covariance @ (precision * body_mean)).to(body_mean)


def loss_identity(
    half_a: tuple[torch.Tensor, torch.Tensor], half_b: tuple[torch.Tensor, torch.Tensor], temperature: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE between two disjoint halves of each person's views (van den Oord et al. 2018, Eq. 4): loss and accuracy,
    scalars. On the cosine of the fused means [B, D].
    """
    logits = F.normalize(half_a[0], dim=-1) @ F.normalize(half_b[0], dim=-1).T / temperature
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss, (logits.argmax(1) == labels).float().mean()


def kl_divergence(body_mean: torch.Tensor, body_logvar: torch.Tensor) -> torch.Tensor:
    """KL(q(z | views) || N(0, I)), [B], in nats."""
    return 0.5 * (body_mean**2 + body_logvar.exp() - 1 - body_logvar).sum(dim=-1)


def loss_view_reconstruction(
    model: BodyVAE, z: torch.Tensor, views: Views, bone_std: float = BONE_STD, outline_std: float = OUTLINE_STD
) -> torch.Tensor:
    """-log p(view | z, pose) up to a constant, [N], in nats: z [N, D] comes from the person's other views."""
    bones = skeleton(views.keypoints)
    log_lengths, outline = model.decode(z, bones)
    target, weight = outline_target(views)
    bone_error = F.smooth_l1_loss(log_lengths / bone_std, bones.log_lengths / bone_std, reduction="none")
    edge_error = ((outline - target) / outline_std) ** 2 / 2
    edge_error = EDGE_MEASUREMENTS * (edge_error * weight).sum(1) / weight.sum(1).clamp_min(1e-6)
    return (bone_error * bones.confidence).sum(-1) + edge_error


def body_distance(model: BodyVAE, mean: torch.Tensor, target: torch.Tensor, views: Views) -> torch.Tensor:
    """The distance of the bodies `mean` and `target` [N, D] as the decoder draws them in the pose of `views`, [N], in
    the nats of `loss_view_reconstruction`: L_id by the body encoder.

    The vectors themselves also hold skin, hair and face; bone lengths and outline are the body alone. Over 4,000 pairs
    of the tiny family's training people this distance correlates with that of the true body ratios at 0.68, the
    vectors' own at 0.45.
    """
    bones = Skeleton(*(part.detach() for part in skeleton(views.keypoints)))
    lengths, outline = model.decode(mean, bones)
    other_lengths, other_outline = model.decode(target, bones)
    weight = outline_target(views)[1]
    bone_error = ((lengths - other_lengths) / BONE_STD).square() / 2
    edge_error = ((outline - other_outline) / OUTLINE_STD).square() / 2
    edge_error = EDGE_MEASUREMENTS * (edge_error * weight).sum(1) / weight.sum(1).clamp_min(1e-6)
    return (bone_error * bones.confidence).sum(-1) + edge_error
