"""A mixture of the weights of two adapters, one of which went on from the other or both from a third: by default the
mean (Wortsman et al., arXiv:2109.01903).

    python examples/tiny_family/mix_adapters.py one/body.safetensors other/body.safetensors mixed/body.safetensors

The record of the result is the second one's, with the sha256 of the first among its inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bolid.formats.adapter import load_adapter, save_adapter
from bolid.run import sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path, help="face.safetensors or body.safetensors")
    parser.add_argument("other", type=Path, help="of the same branch")
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", type=float, default=0.5, help="of the other in the mixture, 0 to 1")
    args = parser.parse_args()
    (one, _), (other, record) = (load_adapter(path, path.stem) for path in (args.one, args.other))
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        parser.error(f"{args.one} and {args.other} have not the same tensors")
    mixed = {name: torch.lerp(one[name].float(), other[name].float(), args.part).to(one[name]) for name in one}
    inputs = {**record["inputs"], "mixed_with": sha256_file(args.one)}
    save_adapter(args.out, mixed, {**record, "inputs": inputs, "config": {**record["config"], "mixed": args.part}})


if __name__ == "__main__":
    main()
