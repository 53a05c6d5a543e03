"""PhotoMaker (Li et al., arXiv:2312.04461): stacked ID embeddings in place of the class word; LoRA on the attention.

The prompt's class word ("woman", "man") is the trigger. It is written once for each photo; the text state of each copy
is fused with that photo's image embedding by two MLPs and takes its place. So the person enters through the text's own
cross-attention. LoRAs on the UNet's attention are trained with the fusing MLPs; the target photo is none of the photos.

Simplified: photos are the family's image embeddings (the paper also trains layers of the image encoder, and blanks
other people's pixels); the person is there from the first step (the paper begins with the plain prompt for the first
steps of sampling); no masked loss.

Shapes: B batch, M photos, E image embedding, L tokens, C channels of the text states.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from mechanism import Draw, Mechanism, Person, Table
from torch import nn

from bolid.backends.diffusion import encode_prompts
from bolid.backends.sampling import Text
from bolid.models.families import Family

TRIGGER = re.compile(r"\b(woman|man)\b")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 8
MOST = 4  # photos: as the paper trains with


class Fuse(nn.Module):
    """Text states [N, C] of the class word and image embeddings [N, E] -> stacked ID embeddings [N, C]."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(size, channels)
        self.first = nn.Sequential(
            nn.LayerNorm(2 * channels), nn.Linear(2 * channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.second = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, text: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        x = text + self.first(torch.cat([text, self.project(embeds)], -1))
        return self.norm(x + self.second(x))


class PhotoMaker(Mechanism):
    """See the module."""

    most = MOST

    def __init__(self, pipe: Any, family: Family, size: int, seed: int) -> None:
        from peft import LoraConfig

        super().__init__(pipe, family, size, seed)
        torch.manual_seed(seed % 2**63)
        self.fuse = Fuse(size, pipe.text_encoder.config.hidden_size)
        pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)), "photomaker")
        lora = {f"lora.{name}": p for name, p in pipe.unet.named_parameters() if ".lora_" in name}
        self.parameters = {**lora, **{f"fuse.{name}": p for name, p in self.fuse.named_parameters()}}

    def predict(self, table: Table, draw: Draw) -> torch.Tensor:
        photos = [
            table.embeds[context[present]] if not dropped else table.embeds[:0]
            for context, present, dropped in zip(draw.context, draw.present, draw.drop_image.tolist(), strict=True)
        ]
        states = self.stacked(draw.captions, photos)
        return self.unet(draw.noisy, draw.timesteps, encoder_hidden_states=states).sample

    def stacked(self, captions: Sequence[str], photos: Sequence[torch.Tensor]) -> torch.Tensor:
        """Text states [B, L, C] of captions, with the photos [M, E] of each at the copies of its class word."""
        written, places = zip(*map(self.repeated, captions, map(len, photos)), strict=True)
        with torch.no_grad():
            states = encode_prompts(self.pipe, written)[0]
        rows = [b for b, at in enumerate(places) for _ in at]
        columns = [place for at in places for place in at]
        if not rows:
            return states
        embeds = torch.cat([theirs[: len(at)] for theirs, at in zip(photos, places, strict=True)])
        fused = self.fuse(states[rows, columns], embeds.to(states))
        return states.index_put((torch.tensor(rows), torch.tensor(columns)), fused)

    def repeated(self, caption: str, copies: int) -> tuple[str, list[int]]:
        """(the caption with its class word written so often, the place of each copy's last token)."""
        found = TRIGGER.search(caption)
        if not found or not copies:
            return caption, []
        word, tokenizer = found[0], self.pipe.tokenizer
        heads = [caption[: found.start()] + " ".join([word] * (n + 1)) for n in range(copies)]
        places = [len(tokenizer(head).input_ids) - 2 for head in heads]  # after the start, before the end
        kept = [place for place in places if place < tokenizer.model_max_length - 1]
        return (heads[-1] + caption[found.end() :]), kept

    def text(self, prompts: Sequence[str], person: Person) -> Text:
        return self.stacked(prompts, [person.embeds[:MOST]] * len(prompts)), None
