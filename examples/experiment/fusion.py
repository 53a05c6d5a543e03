"""Ablations of how the views of a profile are fused (BoLID section 5.2): what BoLID does is `bolid profile`.

mean: the plain mean of the views' means and log variances instead of the product of experts.
no-confidence: the product of experts with every view of full confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bolid.backends.body import fuse_views
from bolid.formats.images import read_photo
from bolid.formats.profile import KIND, load_profile, save_profile
from bolid.models.families import Family
from bolid.person import PersonReader
from bolid.profile import make_profile
from bolid.run import run_record
from bolid.views import View, person_crop

FUSIONS = ("mean", "no-confidence")


def views_of(reader: PersonReader, photos: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean, logvar [M, D] and confidence [M] of the photos in which a body is found."""
    encoded = []
    for path in photos:
        (view,) = reader.view_reader.read([read_photo(path)])
        if isinstance(view, View):
            image, _, points = person_crop(view.image, view.box, view.keypoints, reader.family.view_size)
            features = [view.view_features] if reader.encoder.needs_features else None
            encoded.append(reader.encoder.encode([image], [points], features))
    mean, logvar, confidence = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return mean, logvar, confidence


def fused(
    reader: PersonReader, views: tuple[torch.Tensor, torch.Tensor, torch.Tensor], fusion: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """body_mean, body_logvar [D] by one of FUSIONS."""
    mean, logvar, confidence = views
    if fusion == "mean":
        return mean.mean(0), logvar.mean(0)
    return fuse_views(mean, logvar, torch.ones_like(confidence), reader.encoder.population)[:2]


def ablated_profile(photos: Sequence[Path], out: Path, family: Family, fusion: str) -> Path:
    """The profile of `photos`, with the body fused by one of FUSIONS; the face is as it is."""
    make_profile(photos, out, family=family.name)
    made, reader = load_profile(out), PersonReader(family)
    body_mean, body_logvar = fused(reader, views_of(reader, photos), fusion)
    record = run_record(KIND, family=family, config={"fusion": fusion}, inputs=made.record["inputs"])
    save_profile(out, body_mean, body_logvar, made.face, made.view_weights, record, None)
    return out
