"""Make a trained branch count less or more at scale 1: its values times WEIGHT, which is what a scale does.

    python examples/tiny_family/weigh_adapter.py runs/adapter/face.safetensors 0.5 bolid/tiny/adapter/face.safetensors

So that scale 1 is what pictures are best at, and every program that loads the file finds that without being told.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bolid.formats.adapter import load_adapter, save_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="face.safetensors or body.safetensors")
    parser.add_argument("weight", type=float)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tensors, record = load_adapter(args.adapter, args.adapter.stem)
    for name, tensor in tensors.items():
        if name.endswith("to_v_ip.weight"):
            tensors[name] = tensor * args.weight
    weight = args.weight * record["config"].get("weighed", 1.0)
    save_adapter(args.out, tensors, {**record, "config": {**record["config"], "weighed": weight}})


if __name__ == "__main__":
    main()
