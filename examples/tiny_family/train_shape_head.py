"""Train the head that reads the shape off what a body encoder sees (`bolid.method.shape_head`).

    bolid synth --person-seed 0:1000 --photos 8 --size 192x256 --out photos/train
    python examples/tiny_family/train_shape_head.py photos/train --out runs/body-shape/head.safetensors

The targets are the principal components of the bodies' vertices: centred, of one size, at rest. The people may be those
that the encoder was trained on, for what the readings say of the shape is fitted on others (fit_body_shape.py).
A minute on one core, besides the encoding (fit_body_shape.py says how long) and the meshes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from fit_body_shape import SEALED, Encoded, encode
from make_population import body_of

from bolid.backends.body import BodyEncoder
from bolid.body.mesh import body_model
from bolid.errors import BolidError
from bolid.formats.tensors import save_tensors
from bolid.method.shape_head import ShapeHead, loss_readings
from bolid.models.families import get_family
from bolid.run import run_record

KIND = "shape-head"
READINGS, WIDTH = 16, 128
BATCH, STEPS, LEARNING_RATE, WEIGHT_DECAY = 64, 800, 3e-3, 0.1
DROPOUT, NOISE = 0.3, 0.2  # noise of the evidence, in its standard deviations
STATURE = 1.7  # metres; photos do not show it
MOST = 8  # photos of a person


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


def stacked(people: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """evidence f32 [N, MOST, E] and confidence [N, MOST]; 0 where a photo is missing."""
    evidence = torch.zeros(len(people), MOST, people[0].evidence.shape[1])
    confidence = torch.zeros(len(people), MOST)
    for i, person in enumerate(people):
        count = min(MOST, len(person.confidence))
        evidence[i, :count], confidence[i, :count] = person.evidence[:count].float(), person.confidence[:count]
    return evidence, confidence


def train(people: Sequence[Encoded], seed: int = 0) -> ShapeHead:
    """A head trained to tell the bodies of these people from 1 to MOST of their photos."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    evidence, confidence = stacked(people)
    target = torch.from_numpy(components([person.seed for person in people])).float()
    head = ShapeHead(evidence.shape[2], READINGS, WIDTH, DROPOUT).train()
    optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(people), (BATCH,), generator=random)
        count = torch.randint(1, MOST + 1, (BATCH, 1), generator=random)
        kept = torch.rand(BATCH, MOST, generator=random).argsort(1) < count
        seen = evidence[chosen]
        seen = seen + NOISE * torch.randn(seen.shape, generator=random)
        loss, _ = loss_readings(head, seen, confidence[chosen] * kept, target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="photos/<person>/*.jpg with their truth beside them")
    parser.add_argument("--people", type=int, help="the first so many")
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    parser.add_argument("--work", type=Path, default=Path("runs/body-shape"), help="what was encoded")
    parser.add_argument("--out", type=Path, default=Path("runs/body-shape/head.safetensors"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder"))
    people = encode(args.photos, encoder, args.work, args.people)
    seeds = [person.seed for person in people]
    if max(seeds) >= SEALED:
        raise BolidError(f"people of {SEALED} and more are for figures", "train on others")
    head = train(people)
    record = run_record(
        KIND, family="tiny", config={"people": len(people), "seeds": [min(seeds), max(seeds)]}, inputs=encoder.inputs
    )
    save_tensors(args.out, {name: value.half() for name, value in head.state_dict().items()}, record)
    print(f"{args.out}: {len(people)} people, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
