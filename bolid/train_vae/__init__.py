"""`bolid train-vae`: training shards in, the body encoder out."""

from __future__ import annotations

from bolid.train_vae.command import TrainVaeResult, train_vae
from bolid.train_vae.config import TrainVaeConfig

__all__ = ["TrainVaeConfig", "TrainVaeResult", "train_vae"]
