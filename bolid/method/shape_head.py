"""The shape head: a network beside the body encoder's own head that predicts the body's shape from a view.

c_body keeps what tells people apart; the lengths of single bones are only partly in it. This head is trained on people
whose shape is known. It gives each view a Gaussian over R numbers of the shape, standardised over people, so views are
fused as c_body is (`body_vae.fuse`). What the numbers say of the shape is learnt apart, from other people
(`bolid.body.body_vector`). Not in the paper.

Shapes: N views, B people, M views of each, E numbers of evidence (`BodyVAE.evidence`), R readings.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bolid.method.body_vae import fuse


class ShapeHead(nn.Module):
    """Evidence of a view -> a Gaussian over R readings of the shape, without the prior N(0, I)."""

    def __init__(self, evidence: int, readings: int, width: int = 192, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(evidence, width), nn.GELU(),
            nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
        )  # fmt: skip
        self.direct = nn.Linear(evidence, readings)
        self.mean = nn.Linear(width, readings, bias=False)
        self.logvar = nn.Linear(width, readings)
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.direct.weight)
        nn.init.zeros_(self.logvar.weight)
        nn.init.constant_(self.logvar.bias, 2.0)  # eight views together are about as sure as the population

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor]) -> ShapeHead:
        """The frozen head with these weights. Raises KeyError or RuntimeError where they are not a head's."""
        head = cls(state["direct.weight"].shape[1], *state["logvar.weight"].shape)
        head.load_state_dict({name: value.float() for name, value in state.items()})
        head.eval().requires_grad_(False)
        return head

    def forward(self, evidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, E] => mean, logvar [N, R]."""
        hidden = self.hidden(evidence)
        return self.direct(evidence) + self.mean(hidden), self.logvar(hidden).clamp(-4, 6)


def loss_readings(
    head: ShapeHead, evidence: torch.Tensor, confidence: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log p(target | views) up to a constant, squared error), means over people and readings, scalars.

    evidence [B, M, E], confidence [B, M] (0: the view is left out), target [B, R].
    """
    people, views = confidence.shape
    mean, logvar = (part.view(people, views, -1) for part in head(evidence.flatten(0, 1)))
    fused, uncertain = fuse(mean, logvar, confidence)
    error = (fused - target) ** 2
    return 0.5 * (uncertain + error * (-uncertain).exp()).mean(), error.mean()
