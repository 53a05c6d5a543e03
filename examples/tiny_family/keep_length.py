"""Make a trained body branch heed how long the body's vector is, which its LayerNorm takes out.

    python examples/tiny_family/keep_length.py runs/adapter/body.safetensors runs/body/train longer/body.safetensors

TRAIN: the shards that `bolid shard` writes; their people say what length is usual. Go on training from the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from bolid.backends.body import BodyEncoder
from bolid.families import get_family
from bolid.formats.adapter import load_adapter, nested_state_dict, save_adapter
from bolid.method.body_condition import keep_length
from bolid.train_adapter import fuse_context, read_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="body.safetensors")
    parser.add_argument("train", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    args = parser.parse_args()
    table = read_table(args.train, BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder")))
    rows = [torch.from_numpy(rows) for rows in table.people]
    present = [torch.ones_like(photos, dtype=torch.bool) for photos in rows]
    bodies, _, _ = fuse_context(table, pad_sequence(rows, batch_first=True), pad_sequence(present, batch_first=True))
    tensors, record = load_adapter(args.adapter, "body")
    image_proj = keep_length(nested_state_dict(tensors), bodies)["image_proj"]
    save_adapter(args.out, {**tensors, **{f"image_proj.{name}": tensor for name, tensor in image_proj.items()}}, record)


if __name__ == "__main__":
    main()
