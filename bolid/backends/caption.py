"""Captions of photos: the text file beside a photo, or any image-text-to-text model of transformers."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bolid.errors import BolidError

if TYPE_CHECKING:
    from bolid.models.families import Family

QUESTION = "Describe the person in this photo, their clothes, what they do and where they are, in one sentence."
MAX_TOKENS = 60  # of a caption; CLIP reads 75
MAX_BYTES = 10_000  # a caption; anything longer is some other file
CAPTION_SUFFIXES = (".txt", ".caption")


def caption_for(photo: Path | str) -> str:
    """The caption in `<photo's name>.txt`, or else `.caption`, beside the photo, as one line; "" when there is none.

    Raises BolidError for a caption file that cannot be read, is no text, or is far too long to be a caption.
    """
    for suffix in CAPTION_SUFFIXES:
        path = Path(photo).with_suffix(suffix)
        if path.exists() and not path.is_file():
            raise BolidError(f"its caption {path.name} is no file", "remove it, or write the caption into a file")
        try:
            with open(path, "rb") as file:
                return decode_caption(file.read(MAX_BYTES + 1))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise BolidError(f"its caption cannot be read: {error.strerror}", f"check {path}") from error
    return ""


def decode_caption(data: bytes) -> str:
    """The bytes of a caption file as one line: UTF-8, UTF-16 or UTF-32 with a mark, or else the likeliest encoding.

    Raises BolidError for what is no text, or is longer than MAX_BYTES.
    """
    if len(data) > MAX_BYTES:
        raise BolidError("its caption is too long to be one", f"shorten the file to {MAX_BYTES} bytes, or remove it")
    # The mark of UTF-32 begins with that of UTF-16.
    marks = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
             (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
    encoding = next((name for mark, name in marks if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = _guessed(data)
    if "\0" in text:
        raise BolidError("its caption is no text", "write the caption again, or remove the file")
    return " ".join(text.split())


def _guessed(data: bytes) -> str:
    """Text in an encoding that no mark names. Of equally likely ones Windows' western one; "\\0" for no text."""
    from charset_normalizer import from_bytes

    found = from_bytes(data)
    best = found.best()
    if best is None:
        return "\0"
    western = any(one.chaos == best.chaos and "cp1252" in one.could_be_from_charset for one in found)
    return data.decode("cp1252") if western else str(best)


def captioner_path(caption: str, family: Family) -> str:
    """The model of --caption: the family's own for "blip2", else the folder or name as given.

    "" for "none" and "sidecar". Raises BolidError where the family's model is missing.
    """
    if caption in ("none", "sidecar"):
        return ""
    if caption != "blip2":
        return caption
    if not family.has("caption"):
        raise BolidError(
            f"there is no captioning model for --caption blip2: looked for {family.caption}",
            "get it with `bolid models pull FAMILY --only caption` (15 GB) and the --family that it was pulled for, "
            "name another model, or write captions into .txt files beside the photos",
        )
    return str(family.require("caption"))


class Captioner:
    """An image-text-to-text model of transformers (BLIP-2, LLaVA, ...), from a folder or the Hugging Face cache.

    float16 on CUDA, float32 elsewhere; safetensors only, and no code from the model's repository is run.
    Raises BolidError when it is not there, or is no such model.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        import torch

        from bolid.backends.diffusion import quiet_diffusers

        self.device = torch.device(device)
        with quiet_diffusers():
            from transformers import AutoModelForImageTextToText, AutoProcessor

            # transformers reports a wrong or missing model as almost any kind of exception.
            try:
                self.processor = AutoProcessor.from_pretrained(model, local_files_only=True)
                network = AutoModelForImageTextToText.from_pretrained(
                    model, local_files_only=True, use_safetensors=True,
                    dtype=torch.float16 if self.device.type == "cuda" else torch.float32,
                )  # fmt: skip
            except Exception as error:
                there = Path(model).is_dir()
                raise BolidError(
                    f"no captioning model {model}: {(str(error).splitlines() or [type(error).__name__])[0]}"
                    if there
                    else f"no captioning model {model}: it is no folder, and the Hugging Face cache does not have it",
                    "give an image-text-to-text model of transformers with .safetensors weights"
                    if there
                    else f"fetch it with: hf download {model}",
                ) from error
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.processor.tokenizer.padding_side = "left"  # new tokens go to the right

    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """One line for each picture (uint8 [H,W,3] RGB, any sizes), all in one batch, the likeliest words."""
        if not images:
            return []
        import torch
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images]
        if getattr(self.processor, "chat_template", None):
            # Chat models need a question; captioning models do best without one.
            question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
            text = self.processor.apply_chat_template(question, add_generation_prompt=True)
            inputs = self.processor(
                images=[[picture] for picture in pictures], text=[text] * len(pictures), return_tensors="pt",
                padding=True,
            )  # fmt: skip
        else:
            inputs = self.processor(images=pictures, return_tensors="pt")
        inputs = inputs.to(self.device, self.network.dtype)
        with torch.no_grad():
            tokens = self.network.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
        if "input_ids" in inputs:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        words = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in words]
