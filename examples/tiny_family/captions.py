"""The captions that the tiny base learns from, and their vocabulary.

A photo's own caption comes from its renderer. Variants of it also say in words how the body differs from the mean
(`name_shape`), and leave something out (`leave_out`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

from bolid.synth.people import POSE_PHRASES, article

TOKENS = 40  # of the longest prompt
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

    A base that never saw an incomplete prompt mixes up what the remaining words say.
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


def write_captions(photos: list[dict[str, Any]], seed: int) -> list[str]:
    """(1 + VARIANTS) * N captions: the photos' own, then variant by variant with shape words; half of these leave
    something out."""
    rng = np.random.default_rng([seed, 2])
    variants = [leave_out(text, rng) if rng.random() < 0.5 else text for text in name_shapes(photos, seed)]
    return [photo["caption"] for photo in photos] + variants


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
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS)


def knows(tokenizer: CLIPTokenizer, captions: list[str]) -> bool:
    """Whether every word of the captions is one token of its own."""
    words = set(re.findall(r"[a-z]+", " ".join(captions).lower()))
    return words <= {token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")}


def pre_tokenizers_pattern():
    from tokenizers import Regex

    return Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
