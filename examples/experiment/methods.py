"""The methods that are compared: how each makes a person's pictures, by one base, sampler and noise.

To add a method, write a function that makes one person's pictures, and add it to METHODS. Trained ones read their
weights from a folder that baselines.py and `bolid train-adapter` have written; at this size the *mechanism* is what is
compared, not published weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mechanism
import numpy as np
import torch
from baselines import FILE, load_baseline
from build_words import with_build
from dreambooth import SETTINGS, DreamBooth, with_identifier
from pictures import Photos, Wanted, load
from PIL import Image

from bolid.backends.attention import cache_conditions
from bolid.backends.body import fuse_views
from bolid.backends.diffusion import decode_latents, load_base, load_controlnet, load_loras, quiet_diffusers
from bolid.backends.face import FaceModel
from bolid.backends.image_text import ImageTextModel
from bolid.backends.sampling import Control, Guidance, Text, sample
from bolid.formats.adapter import load_adapter, nested_state_dict
from bolid.formats.tensors import read_record
from bolid.generate import generate
from bolid.generate.models import Models
from bolid.generate.shape_map import depth_picture
from bolid.models.families import Family
from bolid.person import Person, PersonReader
from bolid.profile import make_profile
from bolid.run import canonical_json, sha256_file
from bolid.scales import Scale, parse_guidance, parse_scale
from bolid.synth.people import SyntheticPerson, build_words
from bolid.train_adapter.setup import base_sha256
from bolid.views import View, person_crop

BASE, WORDS, DREAMBOOTH, REAL = "base", "build-words", "dreambooth-lora", "real"
ONE, EIGHT, BOTH, SHAPE = "bolid-1", "bolid-8", "bolid-8-both", "shape-8"
ONE_EQUAL, EQUAL = "bolid-1-equal", "bolid-8-equal"
BRANCHES = ("face", "body")
TRAINED = Path("runs/trained")  # a folder a method; bolid/ has BoLID's adapters of equal training


@dataclass(frozen=True)
class Task:
    """One person's pictures to be made."""

    who: SyntheticPerson
    photos: Photos
    asked: Sequence[Wanted]

    @property
    def prompts(self) -> list[str]:
        return [one.prompt for one in self.asked]

    @property
    def seeds(self) -> list[int]:
        return [one.seed for one in self.asked]


class Maker:
    """The models that methods share. `trained`: folder of trained methods. `adapter`: a folder with other branches than
    the family's."""

    def __init__(self, family: Family, trained: Path = TRAINED, adapter: Path | None = None) -> None:
        self.family, self.settings, self.trained = family, family.defaults, trained
        self.shipped = adapter or family.body_adapter.parent
        self._pipes: dict[Path, Any] = {}
        self._baselines: dict[str, mechanism.Trained] = {}
        self._people: dict[tuple[Path, int], Person] = {}
        self._seen: dict[tuple[Path, int], mechanism.Person] = {}

    def make(
        self, method: str, who: SyntheticPerson, photos: Photos, asked: Sequence[Wanted]
    ) -> list[np.ndarray]:  # fmt: skip
        """A picture uint8 [H, W, 3] of each that is asked for."""
        return METHODS[method].make(self, Task(who, photos, asked))

    def lacks(self, method: str) -> str:
        """The files that a method needs and that are not there, or of another base than it is sampled on; or ""."""
        files = METHODS[method].files(self)
        missing = [str(path) for path in files if not path.exists()]
        return ", ".join(missing + [f"{path} of this base" for path in files if self._of_another_base(path)])

    def _of_another_base(self, path: Path) -> bool:
        """Whether this is a trained method's file, and its training had another base."""
        if self.trained not in path.parents or not path.is_file():
            return False
        return read_record(path)["inputs"].get("base") != self.base_sha256

    @cached_property
    def base_sha256(self) -> str:
        """As the records of trained methods name the base."""
        return base_sha256(self.family)

    def models(self, method: str) -> dict[str, str]:
        """SHA-256 of what decides on a method's pictures, and its settings."""
        family, hashes = self.family, {}
        for path in (family.require("base"), *METHODS[method].files(self)):
            for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []:
                hashes[f"{path.parent.name}/{file.relative_to(path.parent)}"] = sha256_file(file)
        settings = {"training": canonical_json(SETTINGS)} if method == DREAMBOOTH else {}
        return hashes | settings | {"size": str(family.image_size), "sampler": canonical_json(self.settings)}

    # ---- pipelines ------------------------------------------------------------------------------------------------

    @cached_property
    def plain(self) -> Any:
        pipe = load_base(self.family, sampler=self.settings)
        cache_conditions(pipe.unet)
        return pipe

    def adapted(self, folder: Path) -> Any:
        """The base with the two branches of a folder."""
        if folder not in self._pipes:
            pipe, states = load_base(self.family, sampler=self.settings), []
            for branch in BRANCHES:
                tensors, _ = load_adapter(folder / f"{branch}.safetensors", branch)
                states.append(nested_state_dict({name: value.to(pipe.unet.dtype) for name, value in tensors.items()}))
            with quiet_diffusers():
                pipe.load_ip_adapter(
                    states, subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None
                )
            cache_conditions(pipe.unet)
            self._pipes[folder] = pipe
        return self._pipes[folder]

    def baseline(self, name: str) -> mechanism.Trained:
        if name not in self._baselines:
            self._baselines[name] = load_baseline(name, self.trained / name / FILE, self.family)
        return self._baselines[name]

    @cached_property
    def depth(self) -> Any:
        return load_controlnet(self.plain, self.family, "depth_controlnet")

    @cached_property
    def dreambooth(self) -> DreamBooth:
        return DreamBooth(self.family)

    def sample(self, pipe: Any, text: Text, seeds: Sequence[int], **given: Any) -> list[np.ndarray]:
        """As `bolid generate` samples: clothes, timesteps and guidance are the family's."""
        if not isinstance(text, tuple):
            text = [self.family.dressed(prompt) for prompt in text]
        latents = sample(
            pipe, text, size=self.family.image_size, steps=self.family.schedule,
            guidance=Guidance(parse_guidance(self.settings.get("guidance", 5.0))),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds], **given,
        )  # fmt: skip
        return decode_latents(pipe, latents)

    def fits(self, prompt: str) -> bool:
        """Whether the base's text encoder reads the whole prompt."""
        return len(self.plain.tokenizer(prompt).input_ids) <= self.plain.tokenizer.model_max_length

    # ---- people ---------------------------------------------------------------------------------------------------

    @cached_property
    def reader(self) -> PersonReader:
        return PersonReader(self.family)

    @cached_property
    def loaded(self) -> Models:
        """The networks of `generate`."""
        return Models()

    @cached_property
    def image_text(self) -> ImageTextModel:
        return ImageTextModel(self.family.require("image_text"))

    @cached_property
    def faces(self) -> FaceModel:
        return FaceModel(self.family.require("face"))

    def person(self, photos: Sequence[Path]) -> Person:
        """As `bolid profile` reads these photos."""
        key = photos[0], len(photos)
        if key not in self._people:
            self._people[key] = self.reader.read(photos)
        return self._people[key]

    def seen(self, who: SyntheticPerson, photos: Sequence[Path]) -> mechanism.Person:
        """The photos' image embeddings and faces, which the baselines are given."""
        key = photos[0], len(photos)
        if key not in self._seen:
            images = load(photos)
            faces = torch.zeros(len(images), mechanism.FACE)
            for row, image in zip(faces, images, strict=True):
                if found := self.faces.detect(image):
                    row.copy_(torch.from_numpy(found[0].embedding))
            self._seen[key] = mechanism.Person(who.name, self.image_text.encode_images(images).float(), faces)
        return self._seen[key]

    def vectors_and_scales(self, face: torch.Tensor | None, body: torch.Tensor) -> dict[str, Any]:
        """c_face, c_body and their scales; without a face its branch is off."""
        scales: list[Scale] = [
            parse_scale(self.settings.get(f"{branch}_scale", 1.0), f"{branch}_scale") for branch in BRANCHES
        ]
        if face is None:
            face, scales[0] = torch.zeros(mechanism.FACE), parse_scale(0.0, "face_scale")
        return {"vectors": (face, body), "scales": scales}


# ---- methods ------------------------------------------------------------------------------------------------------


def base(maker: Maker, task: Task) -> list[np.ndarray]:
    return maker.sample(maker.plain, task.prompts, task.seeds)


def base_with_words(maker: Maker, task: Task) -> list[np.ndarray]:
    """Words for the build from the person's true body ratios; a portrait shows no build."""
    worded = with_build(task.prompts, task.who, maker.fits)
    prompts = [words if one.full else one.prompt for one, words in zip(task.asked, worded, strict=True)]
    return maker.sample(maker.plain, prompts, task.seeds)


def by_mechanism(name: str, photos: int, maker: Maker, task: Task) -> list[np.ndarray]:
    """A trained baseline, given the first so many photos."""
    trained, person = maker.baseline(name), maker.seen(task.who, task.photos.given[:photos])
    if name == "instantid":  # its picture of face keypoints: where the base has them for the same prompt and noise
        points = [_head_keypoints(maker, picture) for picture in base(maker, task)]
        person = mechanism.Person(person.name, person.embeds, person.faces, points)
    one = trained.mechanism
    prompts = [maker.family.dressed(prompt) for prompt in task.prompts]
    with torch.no_grad():
        text, vectors, controls = one.text(prompts, person), one.vectors(person), one.controls(person)
    return maker.sample(trained.pipe, text, task.seeds, vectors=vectors, controls=controls)


def _head_keypoints(maker: Maker, picture: np.ndarray) -> np.ndarray:
    """[17, 3] (0..1, 0..1, confidence) of the largest person in a picture; confidence 0 where nobody is found."""
    found = maker.reader.view_reader.pose.detect([picture])[0]
    if not found:
        return np.zeros((17, 3), np.float32)
    person = max(found, key=lambda one: (one.box[2] - one.box[0]) * (one.box[3] - one.box[1]))
    return person.keypoints / np.array([picture.shape[1], picture.shape[0], 1], np.float32)


def bolid(photos: int, maker: Maker, task: Task, equal: bool = False) -> list[np.ndarray]:
    """BoLID from the first so many photos; `equal`: by the adapters that were trained as long as the baselines."""
    person = maker.person(task.photos.given[:photos])
    pipe = maker.adapted(maker.trained / "bolid" if equal else maker.shipped)
    return maker.sample(pipe, task.prompts, task.seeds, **maker.vectors_and_scales(person.face, person.body_mean))


def bolid_fused(fusion: str, maker: Maker, task: Task) -> list[np.ndarray]:
    """BoLID with the views fused another way: `mean`, the plain mean; `no-confidence`, the product of experts with
    every view of full confidence."""
    person, views = maker.person(task.photos.given), views_of(maker.reader, task.photos.given)
    body = fused(views, fusion, maker.reader.encoder.prior)
    given = maker.vectors_and_scales(person.face, body)
    return maker.sample(maker.adapted(maker.shipped), task.prompts, task.seeds, **given)


Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Mean, log variance [M, D] and confidence [M] of the photos in which a body is found."""


def views_of(reader: PersonReader, photos: Sequence[Path]) -> Views:
    encoded = []
    for image in load(photos):
        (view,) = reader.view_reader.read([image])
        if isinstance(view, View):
            picture, _, points = person_crop(view.image, view.box, view.keypoints, reader.family.view_size)
            features = [view.view_features] if reader.encoder.needs_features else None
            encoded.append(reader.encoder.encode([picture], [points], features))
    mean, logvar, confidence = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return mean, logvar, confidence


def fused(views: Views, fusion: str, population: Any = None) -> torch.Tensor:
    """body_mean [D] by one of the fusions of `bolid_fused`."""
    mean, logvar, confidence = views
    if fusion == "mean":
        return mean.mean(0)
    return fuse_views(mean, logvar, torch.ones_like(confidence), population)[0]


def by_shape(branches: bool, maker: Maker, task: Task) -> list[np.ndarray]:
    """The person's 3D body in the prompt's pose, as a depth map, with or without BoLID's branches. A portrait shows no
    body to follow."""
    person = maker.person(task.photos.given)
    body, size = maker.reader.shapes(person)[0].mean, maker.family.image_size
    given = maker.vectors_and_scales(person.face, person.body_mean) if branches else {}
    pipe = maker.adapted(maker.shipped) if branches else maker.plain
    pictures = []
    for one in task.asked:
        controls = []
        if one.full:
            image = Image.fromarray(depth_picture(body, one.attributes["pose"], size))
            controls = [Control(maker.depth, image, parse_scale(1.0, "shape_scale"))]
        pictures += maker.sample(pipe, [one.prompt], [one.seed], controls=controls, **given)
    return pictures


def bolid_with(options: dict[str, Any], maker: Maker, task: Task) -> list[np.ndarray]:
    """`bolid profile` of eight photos and `bolid generate` with these options."""
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        profile = make_profile(task.photos.given, Path(folder) / "me.safetensors", reader=maker.reader).path
        for one in task.asked:
            (path,) = generate(
                [one.prompt], Path(folder) / one.name, profile=profile, adapter=maker.shipped, seed=one.seed,
                family=maker.family.name, models=maker.loaded, **options,
            )  # fmt: skip
            pictures.append(np.asarray(Image.open(path).convert("RGB")))
    return pictures


def dreambooth_lora(maker: Maker, task: Task) -> list[np.ndarray]:
    """A LoRA for this person alone, trained on all photos."""
    file = maker.trained / DREAMBOOTH / f"{task.who.name}.safetensors"
    maker.dreambooth.train(task.photos.given, build_words(task.who)["gender_word"], file)
    pipe = load_base(maker.family, sampler=maker.settings)
    load_loras(pipe, [(file, 1.0)], maker.family)
    return maker.sample(pipe, with_identifier(task.prompts), task.seeds)


@dataclass(frozen=True)
class Method:
    """`what`: in words, with its source. `simplified`: what was made simpler than there. `files`: the weights that it
    needs beside the base."""

    what: str
    make: Callable[[Maker, Task], list[np.ndarray]]
    files: Callable[[Maker], list[Path]] = lambda maker: []
    simplified: str = ""


def _adapters(maker: Maker, folder: Path) -> list[Path]:
    return [*(folder / f"{branch}.safetensors" for branch in BRANCHES), maker.family.body_encoder]


def _shipped(maker: Maker) -> list[Path]:
    return _adapters(maker, maker.shipped)


def _equal(maker: Maker) -> list[Path]:
    return _adapters(maker, maker.trained / "bolid")


def _depth(maker: Maker) -> list[Path]:
    return [maker.family.depth_controlnet, maker.family.body_encoder, maker.family.body_shape]


def _baseline(name: str, what: str, photos: int, simplified: str = "") -> Method:
    return Method(what, partial(by_mechanism, name, photos), lambda maker: [maker.trained / name / FILE], simplified)


METHODS: dict[str, Method] = {
    BASE: Method("the base alone, no photo", base),
    WORDS: Method("the base alone, the true build in words in full-body prompts, no photo", base_with_words),
    DREAMBOOTH: Method(
        "DreamBooth-LoRA with prior preservation (arXiv:2208.12242; Eq. 9 and 10), eight photos, a training a person",
        dreambooth_lora, simplified="the text encoder is not trained; 32 pictures of the class",
    ),
    "ip-adapter": _baseline("ip-adapter", "IP-Adapter (arXiv:2308.06721), the image embedding of one photo", 1),
    "ip-adapter-attention": _baseline(
        "ip-adapter-attention", "IP-Adapter, self-attention over the image embeddings of eight photos", 8
    ),
    "photomaker": _baseline(
        "photomaker", "PhotoMaker (arXiv:2312.04461), stacked embeddings of four photos at the class word", 8,
        "the image encoder is not trained, no masked loss, the person is there from the first step",
    ),
    "instantid": _baseline(
        "instantid", "InstantID (arXiv:2401.07519), one face, and the places of five face keypoints", 8,
        "two linear layers for the perceiver; COCO's head keypoints, where the base has them",
    ),
    "pulid": _baseline(
        "pulid", "PuLID (arXiv:2404.16022), one face and its photo, alignment and ID losses", 8,
        "few-step pictures by the base itself, every fourth step, for a part of the batch",
    ),
    "upper-bound": _baseline("upper-bound", "the true body ratios through IP-Adapter's layers, no photo", 1),
    ONE_EQUAL: Method("BoLID, one full-body photo, trained as the others", partial(bolid, 1, equal=True), _equal),
    EQUAL: Method("BoLID, eight photos, trained as the others", partial(bolid, 8, equal=True), _equal),
    ONE: Method("BoLID, one full-body photo, the adapters that ship", partial(bolid, 1), _shipped),
    EIGHT: Method("BoLID, eight photos, the adapters that ship", partial(bolid, 8), _shipped),
    "bolid-8-refined": Method(
        "bolid-8 with `--refine-face`", partial(bolid_with, {"refine_face": True}), _shipped
    ),
    "bolid-8-face-guided": Method(
        "bolid-8 with `--face-guidance 1`, whose gradient is the family's own face model's",
        partial(bolid_with, {"face_guidance": 1.0}), _shipped,
    ),
    "bolid-8-body-guided": Method(
        "bolid-8 with `--body-guidance 1`, whose gradient is the body encoder's",
        partial(bolid_with, {"body_guidance": 1.0}), _shipped,
    ),
    "bolid-8-mean": Method(
        "bolid-8, the plain mean of the views instead of the product of experts", partial(bolid_fused, "mean"), _shipped
    ),
    "bolid-8-no-confidence": Method(
        "bolid-8, every view of full confidence", partial(bolid_fused, "no-confidence"), _shipped
    ),
    SHAPE: Method(
        "the base with the 3D body of eight photos (`--body-from shape --pose`), no adapter", partial(by_shape, False),
        _depth,
    ),
    BOTH: Method(
        "BoLID, eight photos, the body from adapter and 3D body (`--body-from both --pose`)", partial(by_shape, True),
        lambda maker: [*_shipped(maker), *_depth(maker)],
    ),
}  # fmt: skip
"""In the order of the tables."""


def seconds_a_picture(maker: Maker, photos: Photos, asked: Sequence[Wanted], who: SyntheticPerson) -> float | None:
    """CPU seconds of one picture by BoLID from eight photos, models and person loaded, four at once; the lesser of two
    runs. None without adapters."""
    if maker.lacks(EIGHT):
        return None
    spent = []
    for _ in range(2):
        begun = time.process_time()
        count = len(maker.make(EIGHT, who, photos, list(asked)[:4]))
        spent.append((time.process_time() - begun) / count)
    return min(spent)
