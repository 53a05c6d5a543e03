"""Make a trained body branch heed how long the body's vector is, which its LayerNorm takes out.

    python examples/tiny_family/keep_length.py runs/adapter/body.safetensors runs/body/train longer/body.safetensors

TRAIN: the shards that `bolid shard` writes; their people say what length is usual. Go on training from the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bolid.backends.body import BodyEncoder
from bolid.formats.adapter import flat_tensors, load_adapter, nested_state_dict, save_adapter
from bolid.method.body_condition import norm_preserving_projection
from bolid.models.families import get_family
from bolid.train_adapter.data import fused_bodies, read_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="body.safetensors")
    parser.add_argument("train", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--body-encoder", type=Path, help="by default the tiny family's")
    args = parser.parse_args()
    table = read_table(args.train, BodyEncoder(args.body_encoder or get_family("tiny").require("body_encoder")))
    tensors, record = load_adapter(args.adapter, "body")
    longer = norm_preserving_projection(nested_state_dict(tensors), fused_bodies(table))
    save_adapter(args.out, flat_tensors(longer), record)


if __name__ == "__main__":
    main()
