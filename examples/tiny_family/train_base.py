"""Train the tiny base: a text-to-image StableDiffusionPipeline for photos of synthetic people.

    python examples/tiny_family/train_base.py PHOTOS --vae base/vae --out base --minutes 60 --init bolid/tiny/base
    torchrun --nproc-per-node 2 examples/tiny_family/train_base.py ...        # both cores, one thread each
    python examples/tiny_family/train_base.py ... --device cuda --widths 192 384 512 --batch 512 --compile

A UNet2DConditionModel on the autoencoder's latents and a small CLIPTextModel, trained together with v-prediction,
a schedule of zero terminal SNR (arXiv:2305.08891), min-SNR weights (gamma 5, arXiv:2303.09556), noise levels drawn half
logit-normal (arXiv:2403.03206) and half uniform, captions dropped with probability 0.1 for classifier-free guidance,
and a moving average, which is exported. The error counts more where the person is, most at the face
(`person_weights`), and two fifths of the photos drawn are portraits. `captions.py` says what the captions are.
`--init` starts from an earlier base, whose latents may be the first channels of these. The same command resumes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import TOKENS, build_tokenizer, knows, write_captions
from diffusers import AutoencoderTiny, DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from timebox import RANK, WORLD, TimeBox
from torch import distributed, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from truth import read_resized, read_truth, store_float8

from bolid.train_adapter.precision import computing

TEXT_WIDTH = 128
SHEET = [
    "a full body photo of a woman standing, in a red long-sleeved top and blue trousers, on a beach",
    "a full body photo of a tall slim man waving, in a green short-sleeved top and white shorts, in a room",
    "a full body photo of a short heavy woman with hands on hips, in a yellow short-sleeved top and a purple skirt, "
    "in a meadow",
    "a three-quarter photo of a man with arms raised, in a black long-sleeved top and orange trousers, on a street",
    "a portrait of a woman, in a blue long-sleeved top, in the snow",
    "a portrait of a man, in a white short-sleeved top, in a studio",
    "a full body photo of a muscular man walking, in a purple long-sleeved top and green shorts, on a street",
    "a full body photo of a woman squatting, in an orange short-sleeved top and blue trousers, in the snow",
    "a full body photo of a man with very long legs and narrow shoulders standing, in a red short-sleeved top and blue "
    "trousers, in a studio",
    "a full body photo of a man with very short legs and broad shoulders standing, in a red short-sleeved top and blue "
    "trousers, in a studio",
]
FEW_STEPS = (999, 800, 600, 400, 200, 70)  # noise levels of the sampler without guidance
PERSON, FACE = 2.0, 4.0  # what the error counts there; 1 elsewhere
PORTRAITS = 0.4  # the fraction of portraits among the photos drawn: faces are what is learnt last
# Kept as 8-bit floats. Of the middle and lower levels that costs nothing measurable, of the next one 0.2 % of the
# error.
LOW_LEVELS = (
    "down_blocks.1.",
    "down_blocks.2.",
    "down_blocks.3.",
    "mid_block.",
    "up_blocks.0.",
    "up_blocks.1.",
    "up_blocks.2.",
)


def build(
    tokenizer: CLIPTokenizer, latent_size: tuple[int, int], latent_channels: int, widths: tuple[int, ...]
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A new text encoder and UNet; `widths` are the UNet's channels, level by level. Outermost it only convolves: there
    are many positions there, and the content is decided at the inner ones."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (len(widths) - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (len(widths) - 1), "UpBlock2D"),
        attention_head_dim=tuple(max(1, width // 64) for width in widths),  # the number of heads, in spite of its name
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    return text, unet


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pipeline(vae, text, unet, tokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def adopt(text: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Start the text encoder from the one of the pipeline in `folder`, word by word: their tokens' numbers differ."""
    earlier = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    known = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    words = text.get_input_embeddings().weight.detach().clone()
    for word, number in tokenizer.get_vocab().items():
        if word in known:
            words[number] = earlier.get_input_embeddings().weight[known[word]]
    rest = {name: weight for name, weight in earlier.state_dict().items() if "token_embedding" not in name}
    text.load_state_dict(rest, strict=False)
    text.get_input_embeddings().weight.data.copy_(words)


@torch.no_grad()
def adopt_unet(unet: UNet2DConditionModel, folder: Path) -> bool:
    """Start the UNet from the one in `folder`: of the same shape, or of one outer level less, as pictures of half the
    size need. The new level then hands on what it is given: the mean of four positions inwards, each of the four
    outwards. Whether it was taken."""
    earlier = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    deeper = len(unet.down_blocks) - len(earlier.down_blocks)
    inner = {re.sub(r"^down_blocks\.(\d+)", lambda m: f"down_blocks.{int(m[1]) + deeper}", name): weight
             for name, weight in earlier.state_dict().items()}  # fmt: skip
    ours = unet.state_dict()
    if deeper not in (0, 1) or any(name not in ours or ours[name].shape != inner[name].shape for name in inner):
        return False
    unet.load_state_dict(inner, strict=False)
    if deeper:
        down, up, width = unet.down_blocks[0], unet.up_blocks[-1], unet.config.block_out_channels[0]
        for resnet in (*down.resnets, *up.resnets):
            nn.init.zeros_(resnet.conv2.weight)
            nn.init.zeros_(resnet.conv2.bias)
        for resnet in up.resnets:  # of (what comes from inside, the skip connection) the first
            nn.init.zeros_(resnet.conv_shortcut.bias)
            resnet.conv_shortcut.weight.copy_(torch.eye(width, 2 * width)[:, :, None, None])
        halve, double = down.downsamplers[0].conv, unet.up_blocks[-2].upsamplers[0].conv
        nn.init.dirac_(double.weight)
        halve.weight.zero_()
        halve.weight[:, :, 1:, 1:] = torch.eye(width)[:, :, None, None] / 4
        nn.init.zeros_(halve.bias)
        nn.init.zeros_(double.bias)
    return True


def person_weights(photos: list[dict[str, Any]], latent_size: tuple[int, int]) -> torch.Tensor:
    """What the error counts at each latent position, [N, 1, h, w] with a mean of 1: PERSON times as much within the
    person's box as outside it, FACE times within the face's. It moves no optimum, it says what to learn first: the
    scenes are easily learnt, and a face is a few positions of a hundred and ninety.
    """
    h, w = latent_size
    y, x = (np.arange(h)[:, None] + 0.5) / h, (np.arange(w)[None] + 0.5) / w
    weights = np.ones((len(photos), 1, h, w), np.float32)
    for weight, photo in zip(weights, photos, strict=True):
        for box, factor in ((photo["box"], PERSON), (photo["face_box"], FACE)):
            if box:
                left, top, right, bottom = np.array(box) / np.tile([photo["width"], photo["height"]], 2)
                # A position counts when its cell touches the box.
                inside = (y > top - 0.5 / h) & (y < bottom + 0.5 / h) & (x > left - 0.5 / w) & (x < right + 0.5 / w)
                weight[0, inside] = factor
    return torch.from_numpy(weights / weights.mean())


@torch.no_grad()
def encode(vae: AutoencoderTiny, photos: list[dict[str, Any]], mirrored: np.ndarray, size: tuple[int, int]):
    """Scaled latents [N, C, h, w] in f16 of the photos, or of their mirror images where `mirrored` [N] says so."""
    parts = []
    for start in range(0, len(photos), 64):
        rows = slice(start, start + 64)
        x = torch.from_numpy(read_resized(photos[rows], size)).permute(0, 3, 1, 2).to(vae.device).float() / 127.5 - 1
        flip = torch.from_numpy(mirrored[rows]).to(x.device)
        x = torch.where(flip[:, None, None, None], x.flip(3), x).to(memory_format=torch.channels_last)
        with computing(x.device):
            parts.append((vae.encode(x).latents * vae.config.scaling_factor).half())
    return torch.cat(parts)


@dataclass
class Photos:
    """Photos of a batch."""

    x0: torch.Tensor  # latents [B, C, h, w]
    weights: torch.Tensor  # [B, 1, h, w]: what the error counts
    tokens: torch.Tensor  # [B, TOKENS], of the captions
    person: list[torch.Tensor]  # for each branch of an adapter a vector of the photo's person, [B, 1, D]

    def where(self, these: torch.Tensor, others: Photos) -> Photos:
        """These photos where `these`, bool [B], says so, and others elsewhere."""

        def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.where(these.view(-1, *[1] * (a.ndim - 1)), a, b)

        person = [choose(*pair) for pair in zip(self.person, others.person, strict=True)]
        parts = (self.x0, others.x0), (self.weights, others.weights), (self.tokens, others.tokens)
        return Photos(*(choose(*pair) for pair in parts), person)


@dataclass
class TrainingSet:
    """Every photo, or its mirror image, as latents; its captions as tokens."""

    latents: torch.Tensor  # f16 [N, C, h, w]
    weights: torch.Tensor  # [N, 1, h, w]
    tokens: torch.Tensor  # int [1 + (1 + VARIANTS) * N, TOKENS]: the empty caption, the photos' own, the variants
    probabilities: np.ndarray  # [N]
    person: Sequence[torch.Tensor] = ()  # for each branch K vectors of the photo's person, [N, K, D]

    def draw(self, rng: np.random.Generator, count: int) -> Photos:
        """Half of the captions are the photos' own, half name the body's shape; a tenth are dropped."""
        n = len(self.latents)
        rows = rng.choice(n, count, p=self.probabilities)
        variants = rng.integers(1, len(self.tokens) // n, count) * (rng.random(count) < 0.5)
        captions = np.where(rng.random(count) < 0.1, 0, variants * n + rows + 1)
        rows, captions = (torch.from_numpy(index).to(self.latents.device) for index in (rows, captions))
        person = [vectors[rows, rng.integers(vectors.shape[1])][:, None] for vectors in self.person]
        return Photos(self.latents[rows].float(), self.weights[rows], self.tokens[captions], person)


def name_of(photo: dict[str, Any]) -> str:
    """Folder, person and file of a photo: "train/p000003/p000003-0.jpg"."""
    return "/".join(photo["path"].parts[-3:])


def encode_new(
    vae: AutoencoderTiny, photos: list[dict[str, Any]], size: tuple[int, int], folder: Path
) -> tuple[torch.Tensor, np.ndarray]:
    """(latents f16 [N, C, h, w], whether they are of the mirror image, bool [N]) of the photos. They are kept in
    `folder`: only photos that are not there yet are encoded, 14 a second on a core."""
    weights = b"".join(p.detach().cpu().half().numpy().tobytes() for p in vae.encoder.parameters())  # as exported
    file = folder / f"latents-{hashlib.sha256(weights).hexdigest()[:8]}.pt"
    kept = torch.load(file, weights_only=True) if file.exists() else {"names": [], "mirrored": [], "latents": None}
    known = set(kept["names"])
    new = [photo for photo in photos if name_of(photo) not in known]
    if new:
        mirrored = np.array([zlib.crc32(name_of(photo).encode()) % 2 == 1 for photo in new])
        shares = [encode(vae, new[RANK::WORLD], mirrored[RANK::WORLD], size).cpu()]
        if WORLD > 1:
            torch.save(shares[0], share := file.with_suffix(f".{RANK}"))
            distributed.barrier()
            shares = [torch.load(share.with_suffix(f".{i}")) for i in range(WORLD)]
        latents = shares[0].new_empty(len(new), *shares[0].shape[1:])
        for i, part in enumerate(shares):
            latents[i::WORLD] = part
        kept = {
            "names": [*kept["names"], *map(name_of, new)],
            "mirrored": [*kept["mirrored"], *mirrored.tolist()],
            "latents": latents if kept["latents"] is None else torch.cat([kept["latents"], latents]),
        }
        if RANK == 0:
            torch.save(kept, file)
    place = {name: i for i, name in enumerate(kept["names"])}
    rows = [place[name_of(photo)] for photo in photos]
    return kept["latents"][rows], np.array(kept["mirrored"])[rows]


def prepare(args: argparse.Namespace, vae: AutoencoderTiny, out: Path) -> tuple[TrainingSet, CLIPTokenizer]:
    """Captions, vocabulary and latents; the latter two are kept in `out`."""
    photos = [row for folder in args.photos for row in read_truth(folder)[: args.limit]]
    captions = write_captions(photos, args.seed)
    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and not (out / "tokenizer").exists():
        tokenizer = CLIPTokenizer.from_pretrained(args.init / "tokenizer") if args.init else None
        if tokenizer is None or not knows(tokenizer, captions):
            tokenizer = build_tokenizer(captions, out / "vocabulary")
        tokenizer.save_pretrained(out / "tokenizer")
    latents, mirrored = encode_new(vae, photos, tuple(args.size), out)
    if WORLD > 1:
        distributed.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    padded = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
    weights = person_weights(photos, tuple(latents.shape[2:]))
    flip = torch.from_numpy(mirrored)[:, None, None, None]
    portrait = np.array([photo["attributes"]["framing"] == "portrait" for photo in photos])
    fraction = PORTRAITS if 0 < portrait.mean() < 1 else portrait.mean()
    probabilities = np.where(portrait, fraction / max(1, portrait.sum()), (1 - fraction) / max(1, (~portrait).sum()))
    data = TrainingSet(
        latents.to(args.device),
        torch.where(flip, weights.flip(3), weights).to(args.device),
        tokenizer(["", *captions], **padded).input_ids.to(args.device),
        probabilities,
    )
    return data, tokenizer


def draw_timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """Half logit-normal, the mode a little towards noise, where the layout is decided; half uniform, or a sampler's
    first and last steps would hardly be learnt. int [count] in 0..999"""
    t = 1000 / (1 + np.exp(-(0.8 + 1.1 * rng.standard_normal(count))))
    t = np.where(rng.random(count) < 0.5, t, 1000 * rng.random(count))
    return t.astype(np.int64).clip(0, 999)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """z_t [B, C, h, w] of x0 at the noise levels t [B]; alphas: alpha-bar [1000]."""
    a = alphas[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def diffusion_loss(
    unet: nn.Module,
    hidden: torch.Tensor,
    x0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    weights: torch.Tensor,
    alphas: torch.Tensor,
    added: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, unweighted squared error of v). x0, noise [B, C, h, w]; hidden [B, S, D]; t [B]; weights [B, 1, h, w];
    alphas: alpha-bar [1000]. The weight of a noise level is min(SNR, 5) / (SNR + 1), but at least 0.05."""
    a = alphas[t].view(-1, 1, 1, 1)
    noisy = add_noise(x0, noise, t, alphas)
    target = a.sqrt() * noise - (1 - a).sqrt() * x0
    squared = (unet(noisy, t, hidden, added_cond_kwargs=added).sample.float() - target).pow(2)
    snr = (a / (1 - a).clamp(min=1e-8)).flatten()
    level = (snr.clamp(max=5.0) / (snr + 1)).clamp(min=0.05)
    return (level * (squared * weights).mean((1, 2, 3))).mean(), squared.mean()


def export(vae: AutoencoderTiny, text: CLIPTextModel, unet: UNet2DConditionModel, tokenizer, out: Path) -> None:
    """A StableDiffusionPipeline in float16, the UNet's middle and lower levels in float8.

    Without a dtype, diffusers converts its networks to float32; transformers goes by the text encoder's config.json.
    """
    parts = (copy.deepcopy(part).to("cpu", torch.float16) for part in (vae, text, unet))
    pipeline(*parts, tokenizer).save_pretrained(out)
    store_float8(out / "unet", lambda name: name.startswith(LOW_LEVELS))
    for name, change in (("vae", {}), ("text_encoder", {"dtype": "float32"})):
        config = out / name / "config.json"
        settings = {**json.loads(config.read_text()), **change}
        if name == "vae":
            settings.pop("block_out_channels", None)  # derived; diffusers warns of it when it loads the file
        config.write_text(json.dumps(settings, indent=2) + "\n")


@torch.no_grad()
def sample_sheet(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Two rows by the few-step sampler, one by twelve steps, without guidance."""
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=1000)
    pipe.set_progress_bar_config(disable=True)
    few, more = {"timesteps": list(FEW_STEPS)}, {"num_inference_steps": 12}
    rows = []
    for seed, sampler in ((0, few), (100, few), (0, more)):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(SHEET))]
        with computing(pipe.device):
            made = pipe(SHEET, guidance_scale=0.0, generator=generators, output_type="np", **sampler).images
        rows.append(np.concatenate(list(made), 1))
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, earlier runs included")
    parser.add_argument("--limit", type=int, default=40000, help="photos of each folder at most")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument(
        "--widths", type=int, nargs="+", default=(64, 64, 128, 192), help="the UNet's channels, by level"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--decay", type=float, default=0.9995, help="of the moving average")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--init", type=Path, help="start from this exported pipeline's text encoder, and UNet if alike")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: a minute at first, then faster")
    parser.add_argument("--sheet-minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if WORLD > 1:
        distributed.init_process_group("gloo")
    vae = AutoencoderTiny.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
    vae.to(args.device, memory_format=torch.channels_last)
    data, tokenizer = prepare(args, vae, args.out)
    text, unet = build(tokenizer, tuple(data.latents.shape[2:]), data.latents.shape[1], tuple(args.widths))
    if args.init:
        adopt(text, tokenizer, args.init)
        print(f"from {args.init}, {'with' if adopt_unet(unet, args.init) else 'without'} its UNet", flush=True)
    networks = {"text": text.to(args.device).train(), "unet": unet.to(args.device, memory_format=torch.channels_last)}
    parameters = [p for network in networks.values() for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    box = TimeBox(
        networks,
        optimizer,
        args.out,
        minutes=args.minutes,
        device=args.device,
        flat=0.4,
        decay=args.decay,
        seed=args.seed,
    )
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet
    alphas = build_scheduler().alphas_cumprod.to(args.device)

    def save() -> None:
        box.save()
        averages = (box.average["text"], box.average["unet"])
        sample_sheet(pipeline(vae, *averages, tokenizer), args.out / f"sheet-{box.step:06d}.png")
        export(vae, *averages, tokenizer, args.out / "export")

    while box.running():
        rng = box.rng()
        photos = data.draw(rng, args.batch)
        t = torch.from_numpy(draw_timesteps(rng, args.batch)).to(args.device)
        generator = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(photos.x0.shape, generator=generator, device=args.device)
        with computing(args.device):
            hidden = text(photos.tokens)[0]
            loss, error = diffusion_loss(denoise, hidden, photos.x0, t, noise, photos.weights, alphas)
        box.update(loss, v_error=error)
        if box.due("line", minutes=2):
            print(box.line(samples=box.step * args.batch * WORLD), flush=True)
        if box.due("sheet", minutes=args.sheet_minutes):
            save()
    if RANK == 0:
        save()
        figures = {"steps": box.step, "samples": box.step * args.batch * WORLD, "minutes": args.minutes}
        (args.out / "figures.json").write_text(json.dumps(figures) + "\n")
        print(box.line(**figures), flush=True)


if __name__ == "__main__":
    main()
