"""Train the tiny base: a text-to-image StableDiffusionPipeline for 128x96 photos of synthetic people.

    python examples/tiny_family/train_base.py PHOTOS --vae base/vae --out base --minutes 90 --compile
    torchrun --nproc-per-node 2 examples/tiny_family/train_base.py ...        # both cores, one thread each
    python examples/tiny_family/train_base.py ... --device cuda --size 256 192 --widths 128 256 384 --batch 256

A UNet2DConditionModel on latents 8x smaller than the picture and a small CLIPTextModel, trained together from nothing
with v-prediction, min-SNR weighting (gamma 5, arXiv:2303.09556), noise levels drawn half logit-normal
(arXiv:2403.03206) and half uniform, captions dropped 10 % of the time for classifier-free guidance, and an exponential
moving average, which is exported.
The error counts more where the person is, and most at the face (`person_weights`); two fifths of
the photos drawn are portraits. Half of the captions also say in words how the body differs from the mean
(`name_shape`); half of these leave something out (`leave_out`).
Resumable: the same command goes on from OUT/checkpoint.pt; the learning rate falls over the last half of --minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import distributed
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from truth import read_resized, read_truth, store_float8

from bolid.synth.people import POSE_PHRASES, article
from bolid.train_adapter.precision import computing

TOKENS, WIDTH = 40, 128  # longest prompt, and the channels of its states
SHEET = [
    "a full body photo of a woman standing, in a red long-sleeved top and blue trousers, on a beach",
    "a full body photo of a tall slim man waving, in a green short-sleeved top and white shorts, in a room",
    "a full body photo of a short heavy woman with hands on hips, in a yellow short-sleeved top and a purple skirt, "
    "in a meadow",
    "a three-quarter photo of a man with arms raised, in a black long-sleeved top and orange trousers, on a street",
    "a portrait of a woman, in a blue long-sleeved top, in the snow",
    "a full body photo of a heavy man with arms spread, in a white short-sleeved top and black trousers, in a studio",
    "a full body photo of a muscular man walking, in a purple long-sleeved top and green shorts, on a street",
    "a full body photo of a woman squatting, in an orange short-sleeved top and blue trousers, in the snow",
    "a full body photo of a man with very long legs and narrow shoulders standing, in a red short-sleeved top and blue "
    "trousers, in a studio",
    "a full body photo of a man with very short legs and broad shoulders standing, in a red short-sleeved top and blue "
    "trousers, in a studio",
]
SHAPE_WORDS = {  # what the captions call a body whose ratio is below, or above, the mean
    "leg": ("short legs", "long legs"),
    "arm": ("short arms", "long arms"),
    "torso": ("a short torso", "a long torso"),
    "head": ("a small head", "a large head"),
    "shoulder_breadth": ("narrow shoulders", "broad shoulders"),
    "hip_breadth": ("narrow hips", "wide hips"),
    "chest_girth": ("a flat chest", "a full chest"),
    "waist_girth": ("a thin waist", "a thick waist"),
}
PERSON, FACE = 2.0, 4.0  # what the error counts there; 1 elsewhere
PORTRAITS = 0.4  # the share of portraits among the photos drawn: faces are what is learnt last
# Stored as 8-bit floats: on 256 held-out photos the v error was 0.07702 before and 0.07703 after, of a later base with
# its middle levels too 0.09132 and 0.09133. The finest level's attentions would take it to 0.09149.
LOW_LEVELS = ("down_blocks.1.", "down_blocks.2.", "mid_block.", "up_blocks.0.", "up_blocks.1.")
VARIANTS = 6  # captions with such words that each photo gets, beside its own


def name_shape(caption: str, deviations: dict[str, float], rng: np.random.Generator) -> str:
    """The caption with one to three of the body's remarkable ratios in words: "... of a woman with very long legs and
    a small head standing, in ...".

    `deviations`: of the ratios from the population's mean, in standard deviations. A base that never read such words
    has no way to change one ratio alone, and an adapter could only teach it new ones through its cross-attentions.
    """
    remarkable = [name for name in SHAPE_WORDS if abs(deviations[name]) > 0.4]
    chosen = rng.permutation(remarkable)[: rng.integers(1, 4)]
    words = []
    for name in chosen:
        word = SHAPE_WORDS[name][int(deviations[name] > 0)]
        if abs(deviations[name]) > 1.2:
            word = f"a very {word[2:]}" if word.startswith("a ") else f"very {word}"
        words.append(word)
    if not words:
        return caption
    clause = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return re.sub(r"\b(woman|man)\b", rf"\1 with {clause}", caption, count=1)


def leave_out(caption: str, rng: np.random.Generator) -> str:
    """The caption without one of its parts: sleeves (half of the time), framing, pose, clothes or scene.

    Prompts are not always complete, and a base that never saw one that is not mixes up what the others say.
    """
    part = rng.choice(["sleeves", "framing", "pose", "clothes", "scene"], p=[0.5, 0.125, 0.125, 0.125, 0.125])
    who, clothes, scene = caption.rsplit(", ", 2)
    if part == "sleeves":
        clothes = re.sub(r"an? (\w+) (?:long|short)-sleeved", lambda m: f"{article(m[1])} {m[1]}", clothes)
    elif part == "framing":
        who = re.sub(r"^.*?(?: photo|portrait) of ", "", who)
    elif part == "pose":
        who = re.sub(rf" (?:{'|'.join(map(re.escape, POSE_PHRASES.values()))})$", "", who)
    elif part == "clothes":
        return f"{who}, {scene}"
    else:
        return f"{who}, {clothes}"
    return f"{who}, {clothes}, {scene}"


def name_shapes(photos: list[dict[str, Any]], seed: int) -> list[str]:
    """VARIANTS * N captions of the photos that show a body, variant by variant (a portrait's stay as they are)."""
    ratios = np.array([[photo["ratios"][name] for name in SHAPE_WORDS] for photo in photos])
    deviations = (ratios - ratios.mean(0)) / ratios.std(0)
    rng = np.random.default_rng([seed, 1])
    return [
        photo["caption"]
        if photo["attributes"]["framing"] == "portrait"
        else name_shape(photo["caption"], dict(zip(SHAPE_WORDS, row, strict=True)), rng)
        for _ in range(VARIANTS)
        for photo, row in zip(photos, deviations, strict=True)
    ]


def person_weights(photos: list[dict[str, Any]], size: tuple[int, int]) -> torch.Tensor:
    """What the error counts at each latent position, [N, 1, h, w] with a mean of 1: PERSON times as much within the
    person's box as outside it, FACE times within the face's. It moves no optimum, it says what to learn first: the
    scenes are easily learnt, and a face is a few positions of a hundred and ninety.
    """
    h, w = size[0] // 8, size[1] // 8
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


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, with merges learnt from our captions (every word of them becomes one token)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pre_tokenizers_pattern(), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    # Letters that ended no word of the captions still need a token, or a user's new words would be lost.
    for letter in sorted(alphabet):
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS
    )
    return tokenizer


def knows(tokenizer: CLIPTokenizer, captions: list[str]) -> bool:
    """Whether every word of the captions is one token of its own."""
    words = set(re.findall(r"[a-z]+", " ".join(captions).lower()))
    return words <= {token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")}


def pre_tokenizers_pattern():
    from tokenizers import Regex

    return Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def build(
    tokenizer: CLIPTokenizer, size: tuple[int, int], latent_channels: int, widths: tuple[int, ...]
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """A new text encoder and UNet for pictures of `size`; `widths` are the UNet's channels, level by level."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=(size[0] // 8, size[1] // 8),
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        attention_head_dim=tuple(max(1, width // 64) for width in widths),  # the number of heads, in spite of its name
        cross_attention_dim=WIDTH,
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


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, pictures: np.ndarray, device: str) -> torch.Tensor:
    """Scaled latents [2, N, C, h, w] in f16 of the pictures and of their mirror images."""
    rows = []
    for mirror in (False, True):
        parts = []
        for start in range(0, len(pictures), 64):
            x = torch.from_numpy(pictures[start : start + 64]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            x = (x.flip(3) if mirror else x).to(memory_format=torch.channels_last)
            with computing(device):
                z = vae.encode(x).latents * vae.config.scaling_factor
            parts.append(z.half().cpu())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def agreed(seconds: float, world: int) -> float:
    """Rank 0's clock. By clocks of their own the processes would stop at different steps, one waiting for ever."""
    clock = torch.tensor(seconds, dtype=torch.float64)
    if world > 1:
        distributed.broadcast(clock, src=0)
    return float(clock)


def sample_sheet(pipe: StableDiffusionPipeline, path: Path, size: tuple[int, int]) -> None:
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed in range(2):
        generators = [torch.Generator().manual_seed(seed * 100 + i) for i in range(len(SHEET))]
        pictures = pipe(
            SHEET,
            height=size[0],
            width=size[1],
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=generators,
            output_type="np",
        ).images
        rows.append(np.concatenate(list(pictures), 1))
    sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.BICUBIC).save(path)


def _drop_derived_setting(config: Path) -> None:
    """AutoencoderTiny saves `block_out_channels`, which it derives, and then warns of it whenever it is loaded."""
    settings = json.loads(config.read_text())
    settings.pop("block_out_channels", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, earlier runs included")
    parser.add_argument("--limit", type=int, default=40000)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--widths", type=int, nargs="+", default=(64, 128, 192), help="the UNet's channels, by level")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--init", type=Path, help="start from this exported pipeline's text encoder, and UNet if alike")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: a minute at first, then faster")
    parser.add_argument("--sheet-minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    size, device = tuple(args.size), args.device
    vae = AutoencoderTiny.from_pretrained(args.vae).eval().to(device, memory_format=torch.channels_last)
    photos = read_truth(args.photos)[: args.limit]
    rng = np.random.default_rng([args.seed, 2])
    named = [leave_out(told, rng) if rng.random() < 0.5 else told for told in name_shapes(photos, args.seed)]
    captions = [photo["caption"] for photo in photos] + named
    if rank == 0 and not (args.out / "tokenizer" / "tokenizer.json").exists():
        known = CLIPTokenizer.from_pretrained(args.init / "tokenizer") if args.init else None
        if known is None or not knows(known, captions):
            known = build_tokenizer(captions, args.out / "tokenizer")
        known.save_pretrained(args.out / "tokenizer")
    if world > 1:
        distributed.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    tokens = tokenizer(
        ["", *captions], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids.to(device)
    latents = encode_all(vae, read_resized(photos[rank::world], size), device)
    if world > 1:  # each process encoded its share
        shares = [None] * world
        distributed.all_gather_object(shares, latents)
        latents = latents.new_empty(2, len(photos), *latents.shape[2:])
        for first, part in enumerate(shares):
            latents[:, first::world] = part
    latents = latents.to(device)
    places = person_weights(photos, size).to(device)
    places = torch.stack([places, places.flip(3)])  # of the mirror images too
    portrait = np.array([photo["attributes"]["framing"] == "portrait" for photo in photos])
    share = PORTRAITS if 0 < portrait.mean() < 1 else portrait.mean()
    often = np.where(portrait, share / max(1, portrait.sum()), (1 - share) / max(1, (~portrait).sum()))
    if rank == 0:
        longest = int((tokens != tokenizer.pad_token_id).sum(1).max()) + 1
        deviation = latents.float().std()
        print(f"{len(photos)} photos, latents' deviation {deviation:.3f}, longest caption {longest} tokens", flush=True)

    shape = (tokenizer, size, vae.config.latent_channels, tuple(args.widths))
    text, unet = build(*shape)
    if args.init:
        adopt(text, tokenizer, args.init)
        earlier = UNet2DConditionModel.from_pretrained(args.init / "unet", torch_dtype=torch.float32)
        shapes = ({name: weight.shape for name, weight in part.state_dict().items()} for part in (earlier, unet))
        alike = next(shapes) == next(shapes)
        if alike:
            unet.load_state_dict(earlier.state_dict())
        print(f"from the text encoder{' and the UNet' if alike else ' alone'} of {args.init}", flush=True)
    text, unet = text.to(device).train(), unet.to(device, memory_format=torch.channels_last).train()
    denoise = torch.compile(unet, dynamic=False) if args.compile else unet
    average_text, average_unet = copy.deepcopy(text).eval(), copy.deepcopy(unet).eval()
    parameters = [*text.parameters(), *unet.parameters()]
    averages = [*average_text.parameters(), *average_unet.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step, spent = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    parts = {
        "text": text,
        "unet": unet,
        "average_text": average_text,
        "average_unet": average_unet,
        "optimizer": optimizer,
    }
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, spent = state["step"], state["spent"]
    alphas = build_scheduler().alphas_cumprod.to(device)
    began, last, last_sheet, losses = time.time() - spent, time.time(), time.time(), []
    total = args.minutes * 60

    def save(sheet: bool) -> None:
        state = {name: part.state_dict() for name, part in parts.items()} | {"step": step, "spent": time.time() - began}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)
        if sheet:
            sample_sheet(pipeline(vae, average_text, average_unet, tokenizer), args.out / f"sheet-{step:06d}.png", size)
            exported = pipeline(*(copy.deepcopy(part) for part in (vae, average_text, average_unet)), tokenizer)
            exported.to(dtype=torch.float16).save_pretrained(args.out / "export")
            store_float8(args.out / "export" / "unet", lambda name: name.startswith(LOW_LEVELS))
            _drop_derived_setting(args.out / "export" / "vae" / "config.json")

    while (spent := agreed(time.time() - began, world)) < total:
        rng = np.random.default_rng([args.seed, step, rank])
        optimizer.param_groups[0]["lr"] = (
            args.lr * min(1.0, (step + 1) / 300) * min(1.0, max(0.02, (total - spent) / (0.5 * total)))
        )
        index = torch.from_numpy(rng.choice(len(photos), args.batch, p=often)).to(device)
        mirrored = torch.from_numpy(rng.integers(0, 2, args.batch)).to(device)
        dropped = torch.from_numpy(rng.random(args.batch) < 0.1).to(device)
        # Half of the time the photo's own caption, else one of those that name the body's shape.
        named = rng.random(args.batch) < 0.5
        variant = torch.from_numpy(rng.integers(1, VARIANTS + 1, args.batch) * named).to(device)
        # Half of them logit-normal, its mode a little towards noise, where the layout is decided. Half uniform:
        # otherwise a sampler's first and last steps would hardly be learnt.
        t = 1000 / (1 + np.exp(-(0.3 + 1.1 * rng.standard_normal(args.batch))))
        t = np.where(rng.random(args.batch) < 0.5, t, 1000 * rng.random(args.batch))
        t = torch.from_numpy(t.astype(np.int64).clip(0, 999)).to(device)
        x0 = latents[mirrored, index].float()
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(x0.shape, generator=generator, device=device)
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * x0
        snr = (a / (1 - a).clamp(min=1e-8)).flatten()
        weight = snr.clamp(max=5.0) / (snr + 1)
        with computing(device):
            hidden = text(tokens[torch.where(dropped, 0, variant * len(photos) + index + 1)])[0]
            v = denoise(noisy, t, hidden).sample.float()
        squared = (v - target).pow(2)
        error = squared.mean((1, 2, 3))
        counted = (squared * places[mirrored, index]).mean((1, 2, 3))
        loss = (weight.clamp(min=0.05) * counted).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            distributed.all_reduce(flat)
            offset = 0
            for p in parameters:
                if p.grad is not None:
                    p.grad.copy_(flat[offset : offset + p.numel()].view_as(p) / world)
                    offset += p.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        losses.append(error.mean().item())
        step += 1
        if rank == 0 and time.time() - last > 120:
            last = time.time()
            sheet = time.time() - last_sheet > args.sheet_minutes * 60
            save(sheet)
            if sheet:
                last_sheet = time.time()
            samples = step * args.batch * world
            print(
                f"{spent / 60:.1f} min, step {step}, {samples} samples, {samples / spent:.0f} samples/s, "
                f"v error {np.mean(losses[-300:]):.4f}",
                flush=True,
            )
    if rank == 0:
        save(True)
        figures = {
            "steps": step,
            "samples": step * args.batch * world,
            "minutes": round(spent / 60, 1),
            "photos": len(photos),
        }
        (args.out / "figures.json").write_text(json.dumps(figures) + "\n")
        print(math.floor(spent), figures)


if __name__ == "__main__":
    main()
