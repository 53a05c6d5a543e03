"""`bolid train-adapter`: training shards, a body encoder and a frozen base in; the two adapters out."""

from __future__ import annotations

from bolid.train_adapter.command import TrainAdapterResult, train_adapter
from bolid.train_adapter.config import TrainAdapterConfig
from bolid.train_adapter.plan import TrainAdapterPlan, plan_training

__all__ = ["TrainAdapterConfig", "TrainAdapterPlan", "TrainAdapterResult", "plan_training", "train_adapter"]
