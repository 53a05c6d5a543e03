"""Make a trained body branch see everybody further from the mean person: mean + FACTOR (c_body - mean) is projected.

    python examples/tiny_family/stretch_body.py body.safetensors runs/body/train 1.2 stretched/body.safetensors

TRAIN: the shards that `bolid shard` writes; their people say who the mean person is. Pictures do not go all the way
from the mean person to the one who is asked for; this takes them further. The branch must heed how long a vector is
(keep_length.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bolid.backends.body import BodyEncoder
from bolid.formats.adapter import flat_tensors, load_adapter, nested_state_dict, save_adapter
from bolid.method.body_condition import compose_projection
from bolid.models.families import get_family
from bolid.train_adapter.data import fused_bodies, read_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="body.safetensors")
    parser.add_argument("train", type=Path)
    parser.add_argument("factor", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    args = parser.parse_args()
    table = read_table(args.train, BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder")))
    mean = fused_bodies(table).mean(0)
    tensors, record = load_adapter(args.adapter, "body")
    scaling, offset = args.factor * torch.eye(len(mean)), (1 - args.factor) * mean
    stretched = compose_projection(nested_state_dict(tensors), scaling, offset)
    factor = args.factor * record["config"].get("stretched", 1.0)
    save_adapter(args.out, flat_tensors(stretched), {**record, "config": {**record["config"], "stretched": factor}})


if __name__ == "__main__":
    main()
