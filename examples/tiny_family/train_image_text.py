"""Train the tiny family's image-text model: a small open_clip CLIP (ResNet image tower, transformer text tower).

    python examples/tiny_family/train_image_text.py --photos photos/train --val photos/val --out bolid/tiny/image_text

About 20 minutes on one CPU core with the defaults. Run it again after an interruption and it goes on where it stopped.

First the image tower's convolutions learn alone to name the attributes and to find the keypoints (see train_tower).
Then the whole model is trained; its loss has three parts, all with the one learnt temperature:
- CLIP's contrastive loss between pictures and captions. Captions lose some of their phrases at random and change their
  order, so that short prompts work; texts that happen to be true of another picture too do not count as its negatives.
- hard negatives: the caption with one thing changed (another colour, the two colours swapped, another pose, ...).
- for every attribute, the cross-entropy over short prompts that differ in that attribute alone ("a red top" against
  "a blue top", ...): the same idea taken to all the values at once.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from truth import options, parse, read_resized, read_truth, write_card

from bolid.method.keypoints import MIRRORED
from bolid.models.families import get_family
from bolid.run import derive_seed, run_record, write_atomic
from bolid.synth.people import (
    BOTTOMS,
    COLORS,
    FRAMINGS,
    POSE_PHRASES,
    SCENE_PHRASES,
    SLEEVES,
    article,
    bottom_phrase,
)
from bolid.train_adapter.precision import computing

SIDE = 128  # the image tower's input is SIDE x SIDE; portrait-format pictures are letterboxed
PICTURE = (128, 96)
GENERATED = get_family("tiny").image_size
CONTEXT = 48  # tokens

CARD = """
A CLIP for open_clip (ModifiedResNet 1-2-2-1, width 16, on 128x128; text transformer of width 128 with 2 layers and a
vocabulary of its own), trained from scratch on renders of Anny's synthetic people and their captions. It knows only
that world: the words of those captions, and pictures like those renders.

`open_clip.create_model("local-dir:<this directory>")` loads it. Its matrices are stored as 8-bit floats (e4m3), the
rest as fp16.

It was not trained by the plain contrastive loss alone. The image tower first learnt to name the attributes and to find
the 17 keypoints, supervised by the renders' truth; and the contrastive stage had hard negatives (a caption with one
attribute changed, and all the values of one attribute against each other), since those attributes are what it is for.
The accuracies below are zero shot in CLIP's sense (the closest prompt wins), on people it has never seen, but their
vocabulary is that of training.

License: Apache-2.0. The training pictures are renders of Anny (Apache-2.0, shapes CC0).
"""


# ---------------------------------------------------------------- words

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "top_color": tuple(COLORS),
    "bottom_color": tuple(COLORS),
    "pose": tuple(POSE_PHRASES),
    "scene": tuple(SCENE_PHRASES),
    "framing": FRAMINGS,
    "sleeves": SLEEVES,
    "bottom": BOTTOMS,
    "gender": ("woman", "man"),
    "height": ("tall", "short"),
    "weight": ("slim", "heavy", "muscular"),
}
# How much each attribute's prompts count. The height hardly shows in a picture without a scale.
WEIGHTS = {"pose": 3.0, "height": 0.3}

PROMPTS: dict[str, dict[str, list[str]]] = {
    "top_color": {c: [f"{article(c)} {c} top", f"a photo of a person in {article(c)} {c} top"] for c in COLORS},
    "bottom_color": {c: [bottom_phrase(c, kind) for kind in BOTTOMS] for c in COLORS},
    "pose": {name: [phrase, f"a person {phrase}"] for name, phrase in POSE_PHRASES.items()},
    "scene": {name: [phrase, f"a photo {phrase}"] for name, phrase in SCENE_PHRASES.items()},
    "framing": {name: [f"a {name} photo" if name != "portrait" else "a portrait"] for name in FRAMINGS},
}  # fmt: skip
"""The zero-shot prompts of the five attributes that the figures are about: attribute -> value -> texts."""


def truth_of(row: dict[str, Any]) -> dict[str, str]:
    """The attributes a picture shows: a portrait shows no pose and no trousers; "" height or weight says nothing."""
    attributes = row["attributes"]
    truth = {name: attributes[name] for name in ("framing", "scene", "top_color", "sleeves")}
    if attributes["framing"] != "portrait":
        truth |= {name: attributes[name] for name in ("pose", "bottom_color", "bottom")}
    for name in ("gender", "height", "weight"):
        if word := attributes["build"][f"{name}_word"]:
            truth[name] = word
    return truth


def compose(attributes: dict[str, str], rng: random.Random) -> str:
    """A caption that says just these attributes, in one of many wordings."""
    framing = attributes.get("framing")
    head = {
        "full body": ["a full body photo of ", "full body photo of "],
        "three-quarter": ["a three-quarter photo of ", "three-quarter photo of "],
        "portrait": ["a portrait of ", "portrait of "],
        None: ["", "", "a photo of ", "a picture of "],
    }[framing]
    who = [attributes[name] for name in ("height", "weight") if name in attributes] + [
        attributes.get("gender", "person")
    ]
    subject = f"{article(who[0])} {' '.join(who)}"
    if "pose" in attributes:
        subject += f" {POSE_PHRASES[attributes['pose']]}"
    clothes = []
    if "top_color" in attributes or "sleeves" in attributes:
        words = [attributes[name] for name in ("top_color",) if name in attributes]
        words += [f"{attributes['sleeves']}-sleeved"] if "sleeves" in attributes else []
        words.append(rng.choice(["top", "top", "top", "shirt"]))
        clothes.append(f"{article(words[0])} {' '.join(words)}")
    if "bottom_color" in attributes and "bottom" in attributes:
        clothes.append(bottom_phrase(attributes["bottom_color"], attributes["bottom"]))
    elif "bottom" in attributes:
        clothes.append("a skirt" if attributes["bottom"] == "skirt" else attributes["bottom"])
    elif "bottom_color" in attributes:
        clothes.append(f"{attributes['bottom_color']} clothes below")
    rng.shuffle(clothes)
    parts = [f"{rng.choice(['in', 'in', 'wearing'])} {' and '.join(clothes)}"] if clothes else []
    if "scene" in attributes:
        parts.append(SCENE_PHRASES[attributes["scene"]])
    if rng.random() < 0.25:
        rng.shuffle(parts)
    bare = not any(name in attributes for name in ("gender", "height", "weight", "pose", "framing"))
    if bare and parts and rng.random() < 0.5:  # "a red top and blue trousers, on a beach"
        return ", ".join(_stripped(parts, clothes))
    if (
        framing
        and not any(name in attributes for name in ("gender", "height", "weight", "pose"))
        and rng.random() < 0.5
    ):
        start = rng.choice(head).removesuffix(" of ")
    else:
        start = rng.choice(head) + subject
    return rng.choice([", ", ", ", " "]).join([start, *parts])


def _stripped(parts: list[str], clothes: list[str]) -> list[str]:
    """The clothes without their "in" or "wearing"."""
    return [" and ".join(clothes) if clothes and part.endswith(clothes[-1]) else part for part in parts]


def vary(row: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, str]]:
    """A caption of this picture and what it says: its own, or one that says some of the truth."""
    truth = row["truth"]
    if rng.random() < 0.25:
        caption, build = row["caption"], row["attributes"]["build"]
        named = {name: truth[name] for name in truth if name not in ("height", "weight")}
        words = caption.split(",")[0].split()
        named |= {name: truth[name] for name in ("height", "weight") if build[f"{name}_word"] in words}
        return caption, named
    share = rng.choice([0.25, 0.5, 0.8])
    attributes = {name: value for name, value in truth.items() if rng.random() < share}
    if "bottom_color" in attributes:
        attributes["bottom"] = truth["bottom"]
    if not attributes:
        name = rng.choice([name for name in truth if name != "bottom_color"])
        attributes = {name: truth[name]}
    return compose(attributes, rng), attributes


def corrupt(attributes: dict[str, str], rng: random.Random) -> str:
    """The same caption with one attribute changed, or the two colours swapped."""
    wrong = dict(attributes)
    if "top_color" in attributes and "bottom_color" in attributes and rng.random() < 0.3:
        wrong["top_color"], wrong["bottom_color"] = attributes["bottom_color"], attributes["top_color"]
    else:
        name = rng.choice(list(attributes))
        wrong[name] = rng.choice([value for value in ATTRIBUTES[name] if value != attributes[name]])
    return compose(wrong, rng)


def attribute_prompts(rng: random.Random) -> list[tuple[str, str, str]]:
    """(attribute, value, text) for all the values of half the attributes, each attribute in one random wording.

    The five that the figures are about are drawn twice as often as the others."""
    names = rng.sample(list(PROMPTS), 3) + rng.sample([name for name in ATTRIBUTES if name not in PROMPTS], 2)
    rows = []
    for name, values in ((name, ATTRIBUTES[name]) for name in names):
        wording, kind = rng.getrandbits(32), rng.choice(BOTTOMS)
        for value in values:
            attributes = {name: value} | ({"bottom": kind} if name == "bottom_color" else {})
            rows.append((name, value, compose(attributes, random.Random(wording))))
    return rows


def write_tokenizer(directory: Path) -> int:
    """A word-level tokenizer that knows the words of the captions, as transformers files; returns its size."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = {word for text in ("photo picture image person people human lady someone girl guy adult the this of with "
                               "and wearing dressed clothes below shirt top pants jeans dress standing sitting"
                               ).split() for word in [text]}  # fmt: skip
    for _ in range(4000):
        words.update(compose({name: rng.choice(values) for name, values in ATTRIBUTES.items()}, rng)
                     .replace(",", "").split())  # fmt: skip
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\-]+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
        model_max_length=CONTEXT,
    ).save_pretrained(directory)  # fmt: skip
    return len(vocabulary)


# ---------------------------------------------------------------- the model and its training


def write_config(directory: Path) -> dict[str, Any]:
    """open_clip_config.json and the tokenizer's files; returns the model's part of the config."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(directory)
    model = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIDE, "layers": [1, 2, 2, 1], "width": 16, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": vocabulary, "width": 128, "heads": 4, "layers": 2,
            "hf_tokenizer_name": "this directory", "pool_type": "eos", "eos_id": 3,
        },
    }  # fmt: skip
    preprocess = {
        "size": SIDE, "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic",
        "resize_mode": "longest", "fill_color": 127,
    }  # fmt: skip
    write_atomic(
        directory / "open_clip_config.json", json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}, indent=2)
    )
    return model


def encode_text(network: Any, tokens: Any) -> Any:
    """network.encode_text without the padding: the mask is causal, so what follows the last word changes nothing."""
    import torch.nn.functional as F

    length = int((tokens != 0).sum(1).max())
    tokens = tokens[:, :length]
    x = network.token_embedding(tokens) + network.positional_embedding[:length]
    x = network.ln_final(network.transformer(x, attn_mask=network.attn_mask[:length, :length]))
    x = x[range(len(x)), (tokens == 3).int().argmax(1)]
    return F.normalize(x @ network.text_projection, dim=-1)


def augment(pixels: Any, generator: Any) -> tuple[Any, Any]:
    """([B,3,h,w] normalised, affine [B,2,3]) from uint8 [B,h,w,3]: mirror, small moves and zooms, light, blur, noise.

    `affine` maps places of the result to places of the picture, both from -1 to 1.
    """
    import torch
    import torch.nn.functional as F

    x = pixels.permute(0, 3, 1, 2).float() / 255
    b = len(x)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    zoom, flip = uniform(0.92, 1.06), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.zeros(b, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = flip / zoom, 1 / zoom
    affine[:, :, 2] = uniform(-0.06, 0.06, 2)
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), False), padding_mode="border", align_corners=False)
    # Generated pictures are smaller than photos, and are enlarged to the tower's input.
    soft = F.interpolate(F.interpolate(x, GENERATED, mode="bilinear", antialias=True), x.shape[2:], mode="bicubic")
    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, soft, x)
    middle = x.mean((2, 3), keepdim=True)
    x = (x - middle) * uniform(0.85, 1.15, 1, 1, 1) + middle * uniform(0.88, 1.12, 1, 1, 1)
    x = x * uniform(0.96, 1.04, 3, 1, 1) + torch.randn(x.shape, generator=generator) * uniform(0, 0.03, 1, 1, 1)
    return (x.clamp(0, 1) - 0.5) / 0.25, affine


def letterbox(pixels: Any) -> Any:
    """[B,3,SIDE,SIDE] from normalised [B,3,SIDE,w]."""
    import torch.nn.functional as F

    side = (SIDE - pixels.shape[3]) // 2
    return F.pad(pixels, (side, side), value=(127 / 255 - 0.5) / 0.25)


def spread_attention(pool: Any) -> None:
    """Start the attention pooling (8 heads on 4x4 places) with each head looking at its own eighth of the picture.

    As open_clip initialises it, places weigh a tenth of what is seen there, and every head takes the mean: which colour
    is above the other, or where the hands are, is then learnt only after very many pictures.
    """
    import torch

    heads, places = pool.num_heads, pool.positional_embedding.shape[0] - 1
    columns = math.isqrt(places)
    depth = pool.q_proj.in_features // heads
    with torch.no_grad():
        for projection in (pool.q_proj, pool.k_proj):
            projection.weight.mul_(0.3)
            projection.bias.zero_()
        # Place p is marked in channel p; a head's first number is how much of its own marks a place carries.
        pool.positional_embedding.copy_(4.0 * torch.eye(places + 1, pool.q_proj.in_features))
        for head in range(heads):
            row, half = divmod(head, 2)
            own = [1 + row * columns + half * columns // 2 + column for column in range(columns // 2)]
            pool.k_proj.weight[head * depth].zero_()
            pool.k_proj.weight[head * depth, own] = 1.0
            pool.q_proj.weight[head * depth].zero_()
            pool.q_proj.bias[head * depth] = math.sqrt(depth)


def train_tower(network: Any, rows: list[dict[str, Any]], pixels: Any, args: argparse.Namespace) -> None:
    """The image tower's convolutions, with two heads that are thrown away afterwards: every attribute from the last
    map, and each keypoint's place from the maps at strides 8 and 16.

    The contrastive loss alone would come to this as well, but with far more pictures than one core can look at.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    visual, (height, width) = network.visual, PICTURE
    torch.manual_seed(derive_seed(args.seed, "image-text", "heads") % 2**32)
    channels = visual.layer4[-1].conv3.out_channels
    both = nn.ModuleDict({
        "visual": visual,
        "attributes": nn.Linear(channels * (height // 32) * (width // 32), sum(map(len, ATTRIBUTES.values()))),
        "places": nn.Conv2d(channels // 4 + channels // 2, 17, 1),
    })  # fmt: skip
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.lr, weight_decay=0.02)
    checkpoint, first = args.work / "tower.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        both.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    keypoints = torch.tensor([
        [[x / row["width"] * 2 - 1, y / row["height"] * 2 - 1, v] for x, y, v in row["keypoints"]] for row in rows
    ])  # fmt: skip
    wanted = attribute_indices(rows)
    both.train().to(memory_format=torch.channels_last)
    started = time.time()
    for step in range(first, args.tower_steps):
        generator = torch.Generator().manual_seed(derive_seed(args.seed, "tower", step))
        set_rate(optimizer, args.lr, step, args.tower_steps)
        chosen = torch.randperm(len(rows), generator=generator)[: args.batch]
        images, affine = augment(pixels[chosen], generator)
        with computing("cpu"):
            fine, coarse, last = visual.forward_intermediates(images, indices=[2, 3, 4], intermediates_only=True)[
                "image_intermediates"
            ]
            named = both["attributes"](last.flatten(1)).float()
            coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
            maps = both["places"](torch.cat([fine, coarse], 1)).float().flatten(2)
        losses = attribute_losses(named, wanted[chosen])
        # Where the keypoints lie after the picture was moved and mirrored; left and right swap in the mirror.
        truth = keypoints[chosen].clone()
        mirrored = affine[:, 0, 0] < 0
        truth[mirrored] = truth[mirrored][:, MIRRORED]
        truth[..., :2] = (truth[..., :2] - affine[:, None, :, 2]) / affine[:, None, [0, 1], [0, 1]]
        seen = (truth[..., 2] > 0) & (truth[..., :2].abs() < 1).all(-1)
        rows_, columns = fine.shape[2:]
        cell = ((truth[..., 1] + 1) / 2 * rows_).long().clamp(0, rows_ - 1) * columns
        cell = cell + ((truth[..., 0] + 1) / 2 * columns).long().clamp(0, columns - 1)
        place = F.cross_entropy(maps.flatten(0, 1), cell.masked_fill(~seen, -100).flatten())
        loss = sum(WEIGHTS.get(name, 1.0) * value for name, value in losses.items()) / len(losses) + 0.5 * place
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 2.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) * len(chosen) / (time.time() - started)
            each = " ".join(f"{name} {value.item():.2f}" for name, value in losses.items())
            places = f"places {place.item():.2f} {rate:.0f} pictures/s"
            print(f"tower {step + 1}/{args.tower_steps} {each} {places}", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.tower_steps:
            save_checkpoint(checkpoint, both, optimizer, step + 1)


def attribute_indices(rows: list[dict[str, Any]]) -> Any:
    """[N, attributes]: the number of each attribute's value, -100 where a picture does not show it."""
    import torch

    return torch.tensor([
        [values.index(row["truth"][name]) if name in row["truth"] else -100 for name, values in ATTRIBUTES.items()]
        for row in rows
    ])  # fmt: skip


def attribute_losses(logits: Any, wanted: Any) -> dict[str, Any]:
    """The cross-entropy of each attribute that any of the pictures shows; `logits` [B, all values]."""
    import torch.nn.functional as F

    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    return {
        name: F.cross_entropy(part, wanted[:, index])
        for index, (name, part) in enumerate(zip(ATTRIBUTES, parts, strict=True))
        if (wanted[:, index] >= 0).any()
    }


def set_rate(optimizer: Any, rate: float, step: int, steps: int) -> None:
    """A short warm-up, then a cosine down to 1 %."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 50, 0.01 + 0.5 * (1 + math.cos(math.pi * (step + 1) / steps)))


def save_checkpoint(path: Path, network: Any, optimizer: Any, step: int) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(args: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F
    from open_clip.model import CLIP
    from torch import nn
    from transformers import AutoTokenizer

    torch.manual_seed(derive_seed(args.seed, "image-text", "init") % 2**32)
    model = write_config(args.work / "model")
    network = CLIP(**model)
    spread_attention(network.visual.attnpool)
    # A linear reading of the embedding, thrown away afterwards: it teaches the tower faster than texts do.
    head = nn.Linear(model["embed_dim"], sum(map(len, ATTRIBUTES.values())))
    hf = AutoTokenizer.from_pretrained(str(args.work / "model"))

    def tokenize(texts: list[str]) -> torch.Tensor:
        return hf(texts, return_tensors="pt", padding=True, truncation=True, max_length=CONTEXT).input_ids

    rows = read_truth(args.photos, people=args.people, seed=args.seed)
    pixels = torch.from_numpy(read_resized(rows, PICTURE))
    for row in rows:
        row["truth"] = truth_of(row)
    if args.init is not None:
        from safetensors.torch import load_file

        network.load_state_dict({name: value.float() for name, value in load_file(args.init).items()})
    if not (args.work / "checkpoint.pt").is_file():
        train_tower(network, rows, pixels, args)
    # The maps that view features are taken from stay as the tower stage left them: the rest learns faster upon fixed
    # ground, and a body encoder outlives a retraining of the embedding.
    fixed = [getattr(network.visual, name) for name in
             ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "layer1", "layer2", "layer3")]  # fmt: skip
    for module in fixed:
        module.requires_grad_(False)
    trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    plain = [weight for name, weight in trained.items() if weight.ndim < 2 or "embedding" in name]
    decayed = [weight for name, weight in trained.items() if not (weight.ndim < 2 or "embedding" in name)]
    optimizer = torch.optim.AdamW(
        [{"params": [*decayed, *head.parameters()], "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
    )
    wanted = attribute_indices(rows)
    checkpoint, first = args.work / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        nn.ModuleList([network, head]).load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    network.train().to(memory_format=torch.channels_last)
    for module in fixed:
        module.eval()
    started = time.time()
    for step in range(first, args.steps):
        # Everything random in a step comes from (seed, step), so that a resumed run equals an unbroken one.
        rng = random.Random(derive_seed(args.seed, "image-text", step))
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        set_rate(optimizer, args.lr * 2 / 3, step, args.steps)
        chosen = rng.sample(range(len(rows)), min(args.batch, len(rows)))
        batch = [rows[index] for index in chosen]
        attributes = [vary(row, rng) for row in batch]
        hard = [corrupt(facts, rng) for _, facts in attributes[: args.batch // 3]]
        prompts = attribute_prompts(rng)

        with computing("cpu"):
            embedding = network.visual(letterbox(augment(pixels[chosen], generator)[0])).float()
        images = F.normalize(embedding, dim=-1)
        named = attribute_losses(head(embedding), wanted[chosen])
        texts = encode_text(
            network, tokenize([*(text for text, _ in attributes), *hard, *(text for _, _, text in prompts)])
        )
        scale = network.logit_scale.exp()
        own, wrong, short = texts.split([len(batch), len(hard), len(prompts)])

        # Another picture's caption that is true of this one as well is no negative.
        also_true = torch.tensor([
            [i != j and all(row["truth"].get(name) == value for name, value in facts.items())
             for j, (_, facts) in enumerate(attributes)] for i, row in enumerate(batch)
        ])  # fmt: skip
        logits = (scale * images @ own.T).masked_fill(also_true, -torch.inf)
        worst = F.pad(scale * (images[: len(hard)] * wrong).sum(-1), (0, len(batch) - len(hard)), value=-torch.inf)
        against = torch.cat([logits, worst[:, None]], dim=1)
        target = torch.arange(len(batch))
        contrastive = (F.cross_entropy(against, target) + F.cross_entropy(logits.T, target)) / 2

        similarity, attribute_loss, start = scale * images @ short.T, 0.0, 0
        for name in dict.fromkeys(name for name, _, _ in prompts):
            values = ATTRIBUTES[name]
            right = wanted[chosen, list(ATTRIBUTES).index(name)]
            if (right >= 0).any():
                part = F.cross_entropy(similarity[:, start : start + len(values)], right)
                attribute_loss = attribute_loss + WEIGHTS.get(name, 1.0) * part
            start += len(values)
        loss = contrastive + 2.5 * attribute_loss / 5 + 2 * sum(named.values()) / len(named)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            network.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % 25 == 0:
            rate = (step + 1 - first) * len(batch) / (time.time() - started)
            print(" ".join(f"{name} {value.item():.2f}" for name, value in named.items()))
            print(f"step {step + 1}/{args.steps} contrastive {contrastive.item():.3f} attributes "
                  f"{attribute_loss.item() / 5:.3f} scale {scale.item():.1f} {rate:.0f} pictures/s",
                  flush=True)  # fmt: skip
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save_checkpoint(checkpoint, nn.ModuleList([network, head]), optimizer, step + 1)
            config = {"tower_steps": args.tower_steps, "steps": step + 1, "batch": args.batch, "lr": args.lr}
            export(network, args.out, config=config, seed=args.seed)


def export(network: Any, directory: Path, *, config: dict[str, Any], seed: int) -> None:
    """The model in open_clip's layout; matrices as 8-bit floats (e4m3), which open_clip converts on loading. Against
    float16 no zero-shot figure of 1,280 held-out photos changed; the cosine of a caption and its photo does by 0.006.
    """
    import torch

    from bolid.backends.image_text import KIND, WEIGHTS
    from bolid.formats.tensors import save_tensors

    write_config(directory)
    tensors = {
        name: value.to(torch.float8_e4m3fn if value.ndim > 1 else torch.float16) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    save_tensors(directory / WEIGHTS, tensors, run_record(KIND, family="tiny", config=config, seed=seed))


def zero_shot(network: Any, embeddings: Any, choices: Mapping[str, Sequence[str]]) -> Any:
    """[N, len(choices)] probabilities that an image embedding [N,E] shows each choice.

    `choices` maps a name to the texts that describe it; several texts are averaged.
    """
    import torch
    import torch.nn.functional as F

    prototypes = torch.stack([network.encode_text(texts).mean(0) for texts in choices.values()])
    return (network.logit_scale * embeddings @ F.normalize(prototypes, dim=-1).T).softmax(-1)


def measure(photos: Path, model: Path | None = None, *, people: int | None = 200) -> dict[str, float]:
    """Zero-shot accuracy per attribute (0..1) on held-out photos, and how often the right caption of 50 is found."""
    import torch

    from bolid.backends.image_text import ImageTextModel

    network = ImageTextModel(model or get_family("tiny").image_text)
    rows = read_truth(photos, people=people)
    for row in rows:
        row["truth"] = truth_of(row)
    pixels = read_resized(rows, PICTURE)
    images = torch.cat([network.encode_images(list(pixels[i : i + 64])) for i in range(0, len(pixels), 64)])
    figures: dict[str, float] = {}
    for name, prompts in PROMPTS.items():
        shown = [i for i, row in enumerate(rows) if name in row["truth"]]
        guessed = zero_shot(network, images[shown], prompts).argmax(-1)
        values = list(prompts)
        right = [values[guess] == rows[i]["truth"][name] for i, guess in zip(shown, guessed.tolist(), strict=True)]
        figures[f"zero-shot {name.replace('_', ' ')}"] = float(np.mean(right))
    texts = network.encode_text([row["caption"] for row in rows])
    hits = []
    for start in range(0, len(rows) - 49, 50):
        block = images[start : start + 50] @ texts[start : start + 50].T
        hits.append((block.argmax(1) == torch.arange(50)).float().mean().item())
    if hits:
        figures["own caption first among 50"] = float(np.mean(hits))
    figures["held-out pictures"] = len(rows)
    return figures


def main() -> None:
    parser = options("image_text", __doc__)
    parser.add_argument("--people", type=int, default=None, help="use at most so many people")
    parser.add_argument("--init", type=Path, default=None, help="start from the weights in this safetensors file")
    parser.add_argument("--tower-steps", type=int, default=4000, help="steps of the image tower alone")
    parser.add_argument("--steps", type=int, default=2000, help="contrastive steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parse(parser)
    started = time.time()
    train(args)
    figures = measure(args.val, args.out)
    print(json.dumps(figures, indent=2))
    facts = {
        "data": f"{len(read_truth(args.photos, people=args.people, seed=args.seed))} rendered photos at 128x96",
        "steps": f"{args.tower_steps} of the image tower alone, then {args.steps} contrastive ones, of {args.batch} "
        f"pictures each; AdamW {args.lr} and two thirds of it, cosine",
        "minutes in the last run of the script": round((time.time() - started) / 60, 1),
        "machine": "1 of 2 shared CPU cores",
        "seed": args.seed,
    }
    write_card(args.out, "Tiny image-text model", CARD, figures, facts)


if __name__ == "__main__":
    main()
