"""DreamBooth-LoRA with prior preservation (Ruiz et al., arXiv:2208.12242; BoLID Eq. 9 and 10): a training per person.

From one person's conditioning photos it trains a LoRA on the attention of the frozen base's UNet, for "a photo of a q
woman" (q: a word that no caption has), while pictures that the base made of "a photo of a woman" keep the class as it
is. The file is a LoRA in diffusers' own layout; `bolid generate --lora` takes it too. A record beside it has the
seconds that it took.

Simplified: the text encoder is not trained (as in diffusers' LoRA example by default), and the class has PRIOR pictures
instead of 200 a photo.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bolid.backends.diffusion import encode_latents, encode_prompts, load_base, quiet_diffusers
from bolid.backends.sampling import Guidance, sample
from bolid.errors import BolidError
from bolid.formats.images import read_photo
from bolid.method.dreambooth import loss_dreambooth
from bolid.method.losses import alpha_bar, noise_level
from bolid.models.families import Family
from bolid.run import canonical_json, derive_seed, run_record, sha256_file, write_atomic
from bolid.train_adapter.denoiser import training_schedule

IDENTIFIER = "q"  # one token of the tiny base, in none of its captions
PRIOR = 32  # pictures of each class
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of self- and cross-attention
KIND = "dreambooth-lora"
WHO = re.compile(r"\b(woman|man)\b")


@dataclass(frozen=True)
class Settings:
    """Of one person's training."""

    steps: int = 200
    batch_size: int = 4  # photos a step, and as many pictures of the class
    rank: int = 8
    learning_rate: float = 1e-3
    prior_weight: float = 1.0


SETTINGS = Settings()


def with_identifier(prompts: Sequence[str]) -> list[str]:
    """The prompts with "q woman" for "woman"."""
    return [WHO.sub(rf"{IDENTIFIER} \1", prompt, count=1) for prompt in prompts]


class DreamBooth:
    """Trains one person after another on the same base; the class pictures are made once."""

    def __init__(self, family: Family, settings: Settings = SETTINGS) -> None:
        self.family, self.settings = family, settings
        self.pipe: Any = load_base(family)
        self.priors: dict[str, torch.Tensor] = {}

    def prior(self, noun: str) -> torch.Tensor:
        """Latents [PRIOR,C,h,w] of the base's own pictures of "a photo of a NOUN"."""
        if noun not in self.priors:
            self.priors[noun] = self._make_prior(noun)
        return self.priors[noun]

    def _make_prior(self, noun: str) -> torch.Tensor:
        sampler = load_base(self.family, sampler=self.family.defaults)
        generators = [torch.Generator().manual_seed(derive_seed(0, KIND, noun, i)) for i in range(PRIOR)]
        return sample(
            sampler, [f"a photo of a {noun}"] * PRIOR, size=self.family.image_size,
            steps=self.family.schedule, guidance=Guidance(self.family.guidance), generators=generators,
        )  # fmt: skip

    def train(self, photos: Sequence[Path], noun: str, out: Path, seed: int = 0) -> Path:
        """Write the person's LoRA to `out`, and its record beside it; `noun`: "woman" or "man"."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        if not photos:
            raise BolidError("DreamBooth has no photos to train on", "give at least one photo of the person")
        prior, chosen, unet = self.prior(noun), self.settings, self.pipe.unet
        started, cpu = time.monotonic(), time.process_time()
        latents = encode_latents(self.pipe, [self._fitted(path) for path in photos])[:, 0]
        text = encode_prompts(self.pipe, [f"a photo of a {IDENTIFIER} {noun}", f"a photo of a {noun}"])[0]
        torch.manual_seed(derive_seed(seed, KIND, "initial") % 2**63)
        unet.add_adapter(LoraConfig(r=chosen.rank, lora_alpha=chosen.rank, target_modules=list(LAYERS)), KIND)
        try:
            self._optimize(latents, prior, text, seed)
            layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name=KIND))
        finally:
            unet.unload_lora()
            unet.requires_grad_(False)
        out.parent.mkdir(parents=True, exist_ok=True)
        with quiet_diffusers():
            StableDiffusionPipeline.save_lora_weights(out.parent, layers, weight_name=out.name)
        hashes = {f"photo_{i:03d}": sha256_file(path) for i, path in enumerate(photos)}
        record = run_record(KIND, family=self.family, config={**asdict(chosen), "noun": noun}, seed=seed, inputs=hashes)
        record["seconds"] = {"wall": time.monotonic() - started, "cpu": time.process_time() - cpu}
        write_atomic(out.with_suffix(".json"), canonical_json(record))
        return out

    def _fitted(self, path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        height, width = self.family.image_size
        return np.asarray(ImageOps.fit(Image.fromarray(read_photo(path)), (width, height), Image.Resampling.LANCZOS))

    def _optimize(self, latents: torch.Tensor, prior: torch.Tensor, text: torch.Tensor, seed: int) -> None:
        """`text` [2,L,E]: of the person, of the class."""
        chosen, unet, schedule = self.settings, self.pipe.unet, training_schedule(self.pipe)
        parameters = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=chosen.learning_rate, weight_decay=1e-2)
        is_prior = torch.arange(2 * chosen.batch_size) >= chosen.batch_size
        states = text[is_prior.long()]
        for step in range(chosen.steps):
            generator = torch.Generator().manual_seed(derive_seed(seed, KIND, step))
            rows = torch.randint(len(latents), (chosen.batch_size,), generator=generator)
            others = torch.randint(len(prior), (chosen.batch_size,), generator=generator)
            x = torch.cat([latents[rows], prior[others]])
            noise = torch.randn(x.shape, generator=generator)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(x),), generator=generator)
            alphas = alpha_bar(schedule, timesteps)
            noisy = noise_level(x, noise, alphas)
            prediction = unet(noisy, timesteps, encoder_hidden_states=states).sample
            loss = loss_dreambooth(
                prediction, noisy, x, alphas, is_prior, prediction_type=schedule.config.prediction_type,
                prior_weight=chosen.prior_weight,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()


def cost(folder: Path) -> str:
    """What the LoRAs in `folder` took, for the table: "200 steps of 4 photos, 0.5 CPU minutes and 90 kB a person"."""
    files = sorted(folder.glob("*.safetensors"))
    records = [json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) for file in files]
    config = records[0]["config"]
    minutes = sum(record["seconds"]["cpu"] for record in records) / len(records) / 60
    size = sum(file.stat().st_size for file in files) / len(files) / 1000
    steps = f"{config['steps']} steps of {config['batch_size']} photos"
    return f"{steps} and as many class pictures, {minutes:.1f} CPU minutes and {size:.0f} kB a person"
