"""Training of the head that reads the shape off what a body encoder sees (`bolid.method.shape_head`).

fit_body_shape.py calls it. The targets are the principal components of the bodies' vertices: centred, of one size, at
rest. Half a minute on one core for 500 people, besides the meshes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from make_population import body_of

from bolid.body.mesh import body_model
from bolid.method.shape_head import ShapeHead, loss_readings

READINGS, WIDTH = 16, 128
BATCH, STEPS, LEARNING_RATE, WEIGHT_DECAY = 64, 400, 3e-3, 0.1
DROPOUT, NOISE = 0.3, 0.2  # noise of the evidence, in its standard deviations
STATURE = 1.7  # metres; photos do not show it


def components(seeds: Sequence[int]) -> np.ndarray:
    """f32 [N, READINGS]: principal components of the people's bodies, standardised."""
    rows = []
    for part in np.array_split(np.array(seeds), len(seeds) // 25 + 1):
        bodies = np.stack([body_of(int(seed)) for seed in part])
        bodies[:, 0] = STATURE
        vertices = body_model().rest(bodies)[:, ::3].astype(np.float32)  # a third tells as much
        vertices -= vertices.mean(1, keepdims=True)
        rows.append((vertices / np.sqrt((vertices**2).sum((1, 2), keepdims=True))).reshape(len(part), -1))
    shapes = np.concatenate(rows)
    shapes -= shapes.mean(0)
    scores = np.linalg.svd(shapes, full_matrices=False)[0][:, :READINGS]
    return scores / scores.std(0)


def train(evidence: torch.Tensor, confidence: torch.Tensor, target: torch.Tensor, seed: int = 0) -> ShapeHead:
    """A head that tells `target` [N, R] from 1 to M views: `evidence` [N, M, E], `confidence` [N, M] (0: no view)."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    people, views = confidence.shape
    head = ShapeHead(evidence.shape[2], target.shape[1], WIDTH, DROPOUT).train()
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(people, (BATCH,), generator=random)
        count = torch.randint(1, views + 1, (BATCH, 1), generator=random)
        kept = torch.rand(BATCH, views, generator=random).argsort(1) < count
        seen = evidence[chosen]
        seen = seen + NOISE * torch.randn(seen.shape, generator=random)
        loss, _ = loss_readings(head, seen, confidence[chosen] * kept, target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return ShapeHead.of_state({name: value.half() for name, value in head.state_dict().items()})
