"""Distillation: a new body encoder keeps the vector space of an earlier one, its teacher.

Shapes: N views in the table, P people and M views of each in a step, D body dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bolid.errors import BolidError
from bolid.train_vae.config import TrainVaeConfig
from bolid.train_vae.data import ViewTable, encode_table, read_views

if TYPE_CHECKING:
    import torch

    from bolid.method.body_vae import BodyVAE


def load_teacher(train: str | Path, table: ViewTable, config: TrainVaeConfig, device: str) -> tuple[Teacher, str]:
    """(the teacher of --distill-from on the same photos, the sha256 that names its space). Raises BolidError for one
    whose space the student cannot have."""
    from bolid.backends.body import BodyEncoder

    encoder = BodyEncoder(config.distill_from, device)
    model, feature_dim = encoder.model, 0 if table.views.features is None else table.views.features.shape[-1]
    if encoder.body_dim != config.body_dim or model.feature_dim not in (0, feature_dim):
        raise BolidError(
            f"--distill-from {config.distill_from} has a space of {encoder.body_dim} dimensions and the input "
            f"{model.view}",
            "give its --body-dim, and shards of the family that it was trained with",
        )
    same = model.detail == config.detail and (model.view == "mask") == (config.view == "mask")
    own_table = table if same else read_views(train, model.detail, masks=model.view == "mask")
    return Teacher(model, own_table, device), encoder.space


class Teacher:
    """Distillation from another body encoder (Hinton et al. 2015), so that the new one keeps its vector space.

    The target of a half's fused body is the teacher's, fused from the person's views that are *not* in that half. So
    the student also learns how far to trust few views, and bad ones.
    """

    def __init__(self, model: BodyVAE, table: ViewTable, device: str) -> None:
        import torch

        self.model = model
        mean, logvar, confidence = encode_table(model, table, device)
        self.precision = torch.exp(-logvar) * confidence[:, None]  # [N, D]
        self.weighted = self.precision * mean  # [N, D]
        self.whole = self.precision.new_empty(
            len(self.precision), 2, self.precision.shape[1]
        )  # of a row's person, all views
        for rows in table.people:
            self.whole[rows] = torch.stack([self.weighted[rows].sum(0), self.precision[rows].sum(0)])
        bodies = torch.stack([self.whole[rows[0], 0] / (1 + self.whole[rows[0], 1]) for rows in table.people])
        self.variance = bodies.var(0)

    def loss(self, body_mean: torch.Tensor, rows: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Mean squared error of body_mean [P, D], in variances of the population. `rows` [P * M] of the table are the
        step's views, `used` [P, M] says which of them body_mean came from.
        """
        rows = rows.view(used.shape).to(self.whole.device)
        again = (rows[:, :, None] == rows[:, None, :]).tril(-1).any(2)  # who has few photos gives some twice
        counted = (used & ~again)[..., None]
        weighted, precision = self.whole[rows[:, 0]].unbind(1)
        weighted = weighted - (self.weighted[rows] * counted).sum(1)
        precision = precision - (self.precision[rows] * counted).sum(1)
        target = weighted / (1 + precision)
        return ((body_mean - target).square() / self.variance).mean()
