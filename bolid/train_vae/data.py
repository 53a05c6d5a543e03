"""What `train-vae` learns from: every view of the training shards in memory, and a step's views drawn from it.

Shapes: N views in the table, P people and M views of each in a step, D body dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.run import derive_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bolid.formats.shards import Sample
    from bolid.method.body_vae import BodyVAE
    from bolid.method.body_views import Views


@dataclass(frozen=True)
class ViewTable:
    """All training views in memory, the patches as uint8: about 8 KB each (at detail 1). N views, sorted by person."""

    views: Views
    people: list[np.ndarray]  # rows of each person
    ratios: torch.Tensor | None = None  # f32 [N, R] the true body ratios, standardised, where all samples hold them


def unused_photos(people: Sequence[np.ndarray]) -> dict[str, int]:
    """Reason -> photos that no training step takes."""
    alone = sum(len(rows) for rows in people if len(rows) < 2)
    return {"the only photo of its person": alone} if alone else {}


def read_views(train: str | Path, detail: float = 1.0, masks: bool = False) -> ViewTable:
    """Training shards -> the patches and keypoints of every view: cut from the photo, or with `masks` from its mask.

    Raises BolidError for shards without masks where those are asked for.
    """
    import numpy as np
    import torch

    from bolid.formats.shards import group_by_person, read_shards
    from bolid.method.body_views import Views

    parts: list[Views] = []
    ratios: list[np.ndarray] = []
    people, count = [], 0
    for _person, samples in group_by_person(read_shards(train)):
        people.append(np.arange(count, count + len(samples)))
        count += len(samples)
        cut = [_crop(sample, detail, masks, train) for sample in samples]
        ratios += [sample.tensors["ratios"] for sample in samples if "ratios" in sample.tensors]
        features = [sample.tensors[name] for sample in samples if (name := "view_features") in sample.tensors]
        parts.append(
            pack(
                np.stack([crop for crop, _ in cut]),
                np.stack([inside for _, inside in cut]),
                np.stack(features) if len(features) == len(samples) else None,
            )
        )
    if not parts:
        empty = torch.empty(0)
        return ViewTable(Views(empty, empty, empty, empty), [])
    pooled = [part.features for part in parts if part.features is not None]
    views = Views(
        torch.cat([part.torso for part in parts]),
        torch.cat([part.bust for part in parts]),
        torch.cat([part.limb for part in parts]),
        torch.cat([part.keypoints for part in parts]),
        torch.cat(pooled) if len(pooled) == len(parts) else None,
    )
    if len(ratios) != count:
        return ViewTable(views, people)
    known = torch.from_numpy(np.stack(ratios)).float()
    return ViewTable(views, people, (known - known.mean(0)) / known.std(0).clamp_min(1e-6))


def _crop(sample: Sample, detail: float, masks: bool, train: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(crop u8 [H, W, 3], or [H, W, 1] of a mask; keypoints [17, 3] over it) of a sample."""
    from bolid.formats.shards import decode_image
    from bolid.method.body_views import view_crop
    from bolid.method.mask_views import MaskView

    if not masks:
        return view_crop(decode_image(sample.image), sample.tensors["keypoints"], detail=detail)
    view = MaskView.of_tensors(sample.tensors)
    if view is None:
        raise BolidError(
            f"{train} holds no masks for --view mask",
            "run extract and shard again with a family that has a segmentation model",
        )
    return view.crop(detail), view.keypoints


def pack(crops: np.ndarray, keypoints: np.ndarray, features: np.ndarray | None) -> Views:
    """Views whose patches are uint8, 0 where not visible (else 1..255): a quarter of the memory."""
    import torch

    from bolid.method.body_views import Views, make_views, visible_patches

    def packed(patch: torch.Tensor) -> torch.Tensor:
        return (((patch + 1) * 127).round().add(1).clamp(1, 255) * visible_patches(patch)).to(torch.uint8)

    views = make_views(torch.from_numpy(crops), torch.from_numpy(keypoints))
    pooled = None if features is None else torch.from_numpy(features)
    return Views(packed(views.torso), packed(views.bust), packed(views.limb), views.keypoints, pooled)


def unpack(views: Views, rows: torch.Tensor) -> Views:
    """The rows of packed views, as the network takes them."""
    from bolid.method.body_views import Views, visible_patches

    def unpacked(patch: torch.Tensor) -> torch.Tensor:
        patch = patch[rows].float()
        return ((patch - 1) / 127 - 1) * visible_patches(patch)

    features = None if views.features is None else views.features[rows].float()
    return Views(unpacked(views.torso), unpacked(views.bust), unpacked(views.limb), views.keypoints[rows], features)


def encode_table(model: BodyVAE, table: ViewTable, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean, logvar [N, D] and confidence [N] of every view, on `device`."""
    import torch

    from bolid.method.body_views import view_confidence

    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(table.views.keypoints)).split(256):
            views = unpack(table.views, rows).to(device)
            parts.append((*model.encode(views), view_confidence(views.keypoints)))
    mean, logvar, confidence = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, logvar, confidence


def draw_halves(
    people: list[np.ndarray], n_people: int, n_views: int, generator: torch.Generator, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step's views: rows [n_people * n_views] of the table, and which belong to half a, [n_people, n_views].

    People come from a seeded permutation of each epoch. Someone with fewer photos than `n_views` gives some twice,
    but always in the same half: no photo is in both.
    """
    import numpy as np
    import torch

    per_epoch = len(people) // n_people
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng(derive_seed(seed, "train-vae", "epoch", epoch)).permutation(len(people))
    rows, in_a = [], []
    for person in order[position * n_people : (position + 1) * n_people]:
        own = people[person][torch.randperm(len(people[person]), generator=generator).numpy()][:n_views]
        split = int(torch.randint(1, len(own), (1,), generator=generator))
        repeat = np.arange(n_views) % len(own)
        rows.append(own[repeat])
        in_a.append(repeat < split)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.stack(in_a))
