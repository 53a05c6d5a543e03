"""The trained baselines: one mechanism a method, trained as BoLID's adapters are.

    python examples/experiment/baselines.py ip-adapter train/
    python examples/experiment/baselines.py photomaker train/

`train/` is what `bolid shard` writes; a method's weights go to runs/trained/METHOD. All are trained as equal.toml says.
After a kill, the same command goes on where it stopped. mechanism.py has what they share. At this size the *mechanism*
is what is compared, not the published weights:

ip-adapter: the image embedding of one photo (Ye et al., arXiv:2308.06721; four tokens through one linear layer).
ip-adapter-attention: those of several photos, mixed by one self-attention layer and averaged (the authors' own earlier
method).
photomaker, instantid, pulid: photomaker.py, instantid.py, pulid.py.
upper-bound: the person's true body ratios, which no photo gives, through IP-Adapter's layers: the most that a vector of
this body can do by this training.

Shapes: B batch, M photos, E image embedding.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from instantid import InstantId
from mechanism import FILE, Draw, Mechanism, Person, Table, Trained, train_method, true_ratios
from photomaker import PhotoMaker
from pulid import PuLid
from torch import nn

from bolid.method.body_condition import drop_condition, initial_state, install
from bolid.models.families import Family
from bolid.synth.people import RATIO_NAMES
from bolid.train_adapter.config import TrainAdapterConfig

EQUAL = Path(__file__).with_name("equal.toml")


class PhotoAttention(nn.Module):
    """Image embeddings of a person's photos [B, M, E], `present` bool [B, M] -> one embedding [B, E].

    One layer of self-attention with a residual, averaged over the photos. It starts as the plain average, and the order
    of the photos does not matter.
    """

    def __init__(self, size: int, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, embeds: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        x = self.norm(embeds)
        mixed, _ = self.attention(x, x, x, key_padding_mask=~present, need_weights=False)
        weights = present.to(embeds) / present.sum(1, keepdim=True)
        return ((embeds + mixed) * weights[..., None]).sum(1)


class IpAdapter(Mechanism):
    """One vector a person, through IP-Adapter's basic layout."""

    def __init__(self, pipe: Any, family: Family, size: int, seed: int) -> None:
        super().__init__(pipe, family, size, seed)
        (self.parameters,) = install(pipe.unet, [initial_state(pipe.unet, "body", self.width(), seed=seed)])

    def width(self) -> int:
        """Of the vector."""
        return self.size

    def condition(self, table: Table, draw: Draw) -> torch.Tensor:
        """[B, width]"""
        return table.embeds[draw.context[:, 0]]

    def predict(self, table: Table, draw: Draw) -> torch.Tensor:
        embeds = drop_condition(self.condition(table, draw)[:, None], draw.drop_image)
        added = {"image_embeds": [embeds]}
        return self.unet(draw.noisy, draw.timesteps, encoder_hidden_states=draw.text, added_cond_kwargs=added).sample

    def vectors(self, person: Person) -> list[torch.Tensor]:
        return [person.embeds[0]]


class IpAdapterAttention(IpAdapter):
    """The same of several photos, mixed by self-attention."""

    most = TrainAdapterConfig().max_context

    def __init__(self, pipe: Any, family: Family, size: int, seed: int) -> None:
        super().__init__(pipe, family, size, seed)
        torch.manual_seed(seed % 2**63)
        self.attention = PhotoAttention(size)
        own = {f"attention.{name}": parameter for name, parameter in self.attention.named_parameters()}
        self.parameters = {**self.parameters, **own}

    def condition(self, table: Table, draw: Draw) -> torch.Tensor:
        return self.attention(table.embeds[draw.context], draw.present)

    def vectors(self, person: Person) -> list[torch.Tensor]:
        return [self.attention(person.embeds[None], torch.ones(1, len(person.embeds), dtype=torch.bool))[0]]


class UpperBound(IpAdapter):
    """The true body ratios."""

    def width(self) -> int:
        return len(RATIO_NAMES)

    def condition(self, table: Table, draw: Draw) -> torch.Tensor:
        return table.ratios[table.owner[draw.rows]]

    def vectors(self, person: Person) -> list[torch.Tensor]:
        return [true_ratios(person.name)]


MECHANISMS: dict[str, Callable[[Any, Family, int, int], Mechanism]] = {
    "ip-adapter": IpAdapter,
    "ip-adapter-attention": IpAdapterAttention,
    "photomaker": PhotoMaker,
    "instantid": InstantId,
    "pulid": PuLid,
    "upper-bound": UpperBound,
}
METHODS = tuple(MECHANISMS)


def train_baseline(method: str, train: Path, out: Path, **settings: Any) -> Path:
    """`mechanism.train_method` of a method of MECHANISMS."""
    return train_method(method, MECHANISMS[method], train, out, **settings)


def equal_settings(**changed: Any) -> TrainAdapterConfig:
    """What all methods are trained with (equal.toml)."""
    return TrainAdapterConfig(**{**tomllib.loads(EQUAL.read_text(encoding="utf-8")), **changed})


def load_baseline(method: str, path: Path, family: Family | None = None) -> Trained:
    """A trained method, ready to generate."""
    return Trained(path, MECHANISMS[method], family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("train", type=Path)
    parser.add_argument("--out", type=Path, help="by default runs/trained/METHOD")
    parser.add_argument("--steps", type=int, help="instead of equal.toml's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = equal_settings(**({"steps": args.steps} if args.steps else {}))
    out = args.out or Path("runs/trained") / args.method
    print(train_baseline(args.method, args.train, out, config=config, seed=args.seed))


__all__ = ["FILE", "METHODS", "load_baseline", "train_baseline"]

if __name__ == "__main__":
    main()
