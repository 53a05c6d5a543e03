"""Make one method's pictures for the protocol.

    python examples/experiment/run.py bolid-8 --work runs/experiment
    python examples/experiment/run.py ip-adapter --baselines runs/baselines --people 4 --prompts 2

Writes pictures/METHOD/<person>/*.png into a folder of WORK named after the size of the run, and renders the photos
beside them. Existing pictures are kept, unless a model behind them has changed.
Methods: base; build-words (the base, the true build in words); ip-adapter, instantid, pulid (one photo);
ip-adapter-attention, photomaker (all conditioning photos); upper-bound (the true body ratios); bolid-1 and bolid-8 (the
first photo, all photos); bolid-1-guided and bolid-8-guided (the same with guidance towards face and body);
bolid-8-equal (all photos, adapters that were trained as long as the baselines); dreambooth-lora (a LoRA trained on all
photos of each person). Ablations: bolid-8-mean and bolid-8-no-confidence (fusion.py), bolid-8-no-id and bolid-8-no-clip
(bolid-8-equal without a loss).
To add a method, write a function that generates one person's pictures, and add it to METHODS.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from baselines import FILE, load_baseline
from baselines import METHODS as BASELINES
from build_words import with_build, write_table
from dreambooth import SETTINGS, DreamBooth, with_identifier
from fusion import ablated_profile
from mechanism import FACE, Person, Trained

import bolid.generate
import bolid.profile
from bolid.backends.body import BodyEncoder
from bolid.backends.face import FaceModel
from bolid.backends.image_text import ImageTextModel
from bolid.backends.pose import PoseModel, weights_file
from bolid.errors import BolidError
from bolid.evaluate.protocol import Protocol, read_protocol
from bolid.formats.images import read_photo
from bolid.generate.guidance import body_guidance, face_guidance
from bolid.models.families import get_family
from bolid.run import canonical_json, sha256_file, write_atomic
from bolid.synth.people import build_words, sample_person
from bolid.train_adapter.setup import base_sha256

EQUAL = "bolid-8-equal"
WORDS = "build-words"
DREAMBOOTH = "dreambooth-lora"
BASE_ALONE = ("base", WORDS)  # no photo, no adapter
GUIDED = ("bolid-1-guided", "bolid-8-guided")
# Methods with adapters of their own -> their folder beside the baselines', and what they are trained with.
OWN_ADAPTERS = {
    EQUAL: ("bolid", "with the baselines' --steps and --batch-size"),
    "bolid-8-no-id": ("bolid-no-id", "with --id-weight 0, else as bolid-8-equal"),
    "bolid-8-no-clip": ("bolid-no-clip", "with --clip-weight 0, else as bolid-8-equal"),
}
FUSED = {"bolid-8-mean": "mean", "bolid-8-no-confidence": "no-confidence"}


@dataclass(frozen=True)
class Task:
    """One person's pictures to be made."""

    person: str
    photos: list[Path]  # for conditioning, in order
    prompts: list[str]
    n: int  # pictures of each prompt
    out: Path
    seed: int


class Bench:
    """The models and folders that the methods share."""

    def __init__(
        self, work: Path, protocol: Protocol, baselines: Path, family: str | None = None, adapter: Path | None = None
    ) -> None:
        self.work = work / f"{len(protocol.people)}-people-{len(protocol.prompts)}-prompts"
        self.protocol, self.baselines, self.adapter = protocol, baselines, adapter
        self.family = get_family(family)
        self.loaded: dict[str, Trained] = {}

    def models(self, method: str) -> dict[str, str]:
        """Hashes of the models behind a method's pictures, and the protocol."""
        family, used = self.family, {"base": base_sha256(self.family), "size": str(self.family.image_size)}
        used |= {"protocol": canonical_json(self.protocol), "sampler": canonical_json(family.defaults)}
        if method in BASELINES:
            used["adapter"] = sha256_file(self.baseline_file(method))
        elif method == DREAMBOOTH:
            used["training"] = canonical_json(SETTINGS)
        elif method not in BASE_ALONE:
            folder = self.adapter_of(method)
            used |= {branch: sha256_file(folder / f"{branch}.safetensors") for branch in ("face", "body")}
            used["body_encoder"] = sha256_file(family.require("body_encoder"))
            used["pose"] = sha256_file(weights_file(family.require("pose")))
        if method in GUIDED:
            encoder = BodyEncoder(family.require("body_encoder"))
            used |= face_guidance(family)[1] | body_guidance(family, encoder)[1]
        return used

    def adapter_of(self, method: str) -> Path:
        """The folder of a BoLID method's adapters."""
        if method not in OWN_ADAPTERS:
            return self.adapter or self.family.body_adapter.parent
        name, settings = OWN_ADAPTERS[method]
        folder = self.baselines / name
        if not (folder / "body.safetensors").is_file():
            raise BolidError(
                f"the adapters of {method} are not trained: looked for {folder / 'body.safetensors'}",
                f"bolid train-adapter train/ --out {folder}, {settings}",
            )
        return folder

    @cached_property
    def image_text(self) -> ImageTextModel:
        return ImageTextModel(self.family.require("image_text"))

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.family.require("base") / "tokenizer")

    def fits(self, prompt: str) -> bool:
        """Whether the base's text encoder reads the whole prompt."""
        return len(self.tokenizer(prompt).input_ids) <= self.tokenizer.model_max_length

    @cached_property
    def faces(self) -> FaceModel:
        return FaceModel(self.family.require("face"))

    @cached_property
    def pose(self) -> PoseModel:
        return PoseModel(self.family.require("pose"))

    def baseline(self, name: str) -> Trained:
        if name not in self.loaded:
            self.loaded[name] = load_baseline(name, self.baseline_file(name), self.family)
        return self.loaded[name]

    @cached_property
    def dreambooth(self) -> DreamBooth:
        return DreamBooth(self.family)

    def baseline_file(self, name: str) -> Path:
        path = self.baselines / name / FILE
        if not path.is_file():
            raise BolidError(
                f"the baseline {name} is not trained: looked for {path}",
                f"python examples/experiment/baselines.py {name} train/ --out {path.parent}",
            )
        return path


def base(bench: Bench, task: Task) -> None:
    """The frozen base: what the words alone give."""
    bolid.generate.generate(task.prompts, task.out, n=task.n, family=bench.family.name, seed=task.seed)


def base_with_words(bench: Bench, task: Task) -> None:
    """The base, with words for the build from the person's true body ratios."""
    prompts = with_build(task.prompts, sample_person(int(task.person[1:])), bench.fits)
    made = bolid.generate.generate(prompts, task.out, n=task.n, family=bench.family.name, seed=task.seed)
    write_table(task.out.parent, task.person, made, [prompt for prompt in task.prompts for _ in range(task.n)])


def ip_adapter(bench: Bench, task: Task) -> None:
    """IP-Adapter on the image embedding of the first photo."""
    _with_images(bench, task, "ip-adapter", task.photos[:1])


def ip_adapter_attention(bench: Bench, task: Task) -> None:
    """IP-Adapter with self-attention over the image embeddings of all photos."""
    _with_images(bench, task, "ip-adapter-attention", task.photos)


def photomaker(bench: Bench, task: Task) -> None:
    """PhotoMaker on all photos."""
    _with_images(bench, task, "photomaker", task.photos)


def instantid(bench: Bench, task: Task) -> None:
    """InstantID on the first photo that shows a face, put where the base has it for the same prompt and noise."""
    own = bench.work / "pictures" / "base" / task.person
    if len(list(own.glob("*.png"))) != len(task.prompts) * task.n:
        raise BolidError(f"InstantID needs the base's pictures of {task.person}", "run.py base, with the same options")
    keypoints = [_head_keypoints(bench, path) for path in sorted(own.glob("*.png"))]
    _with_images(bench, task, "instantid", task.photos, keypoints)


def pulid(bench: Bench, task: Task) -> None:
    """PuLID on the first photo that shows a face."""
    _with_images(bench, task, "pulid", task.photos)


def upper_bound(bench: Bench, task: Task) -> None:
    """The true body ratios, which no photo gives."""
    _with_images(bench, task, "upper-bound", task.photos[:1])


def bolid_1(bench: Bench, task: Task) -> None:
    """BoLID from a profile of the first photo."""
    _with_profile(bench, task, task.photos[:1], "bolid-1")


def bolid_8(bench: Bench, task: Task) -> None:
    """BoLID from a profile of all photos."""
    _with_profile(bench, task, task.photos, "bolid-8")


def bolid_1_guided(bench: Bench, task: Task) -> None:
    """BoLID from a profile of the first photo, guided towards what it shows of face and body."""
    _with_profile(bench, task, task.photos[:1], "bolid-1-guided")


def bolid_8_guided(bench: Bench, task: Task) -> None:
    """BoLID from a profile of all photos, guided towards what they show of face and body."""
    _with_profile(bench, task, task.photos, "bolid-8-guided")


def bolid_8_equal(bench: Bench, task: Task) -> None:
    """BoLID from a profile of all photos, its adapters trained as long as the baselines."""
    _with_profile(bench, task, task.photos, EQUAL)


def bolid_8_no_id(bench: Bench, task: Task) -> None:
    """bolid-8-equal trained without L_id (Eq. 14)."""
    _with_profile(bench, task, task.photos, "bolid-8-no-id")


def bolid_8_no_clip(bench: Bench, task: Task) -> None:
    """bolid-8-equal trained without L_CLIP (Eq. 14)."""
    _with_profile(bench, task, task.photos, "bolid-8-no-clip")


def bolid_8_mean(bench: Bench, task: Task) -> None:
    """bolid-8 with the plain mean of the views instead of the product of experts."""
    _with_profile(bench, task, task.photos, "bolid-8-mean")


def bolid_8_no_confidence(bench: Bench, task: Task) -> None:
    """bolid-8 with every view of full confidence."""
    _with_profile(bench, task, task.photos, "bolid-8-no-confidence")


def dreambooth_lora(bench: Bench, task: Task) -> None:
    """DreamBooth: a LoRA for this person alone, trained on all photos."""
    noun = build_words(sample_person(int(task.person[1:])))["gender_word"]
    file = bench.work / DREAMBOOTH / f"{task.person}.safetensors"
    bench.dreambooth.train(task.photos, noun, file)
    prompts = with_identifier(task.prompts)
    made = bolid.generate.generate(
        prompts, task.out, n=task.n, family=bench.family.name, seed=task.seed, lora=[str(file)]
    )
    write_table(task.out.parent, task.person, made, [prompt for prompt in task.prompts for _ in range(task.n)])


METHODS: dict[str, Callable[[Bench, Task], None]] = {
    "base": base,
    WORDS: base_with_words,
    "ip-adapter": ip_adapter,
    "ip-adapter-attention": ip_adapter_attention,
    "photomaker": photomaker,
    "instantid": instantid,
    "pulid": pulid,
    "upper-bound": upper_bound,
    "bolid-1": bolid_1,
    EQUAL: bolid_8_equal,
    "bolid-8": bolid_8,
    "bolid-1-guided": bolid_1_guided,
    "bolid-8-guided": bolid_8_guided,
    "bolid-8-mean": bolid_8_mean,
    "bolid-8-no-confidence": bolid_8_no_confidence,
    "bolid-8-no-id": bolid_8_no_id,
    "bolid-8-no-clip": bolid_8_no_clip,
    DREAMBOOTH: dreambooth_lora,
}


def _with_images(
    bench: Bench, task: Task, name: str, photos: list[Path], head_keypoints: Sequence[np.ndarray] = ()
) -> None:
    images = [read_photo(path) for path in photos]
    faces = torch.zeros(len(images), FACE)
    for row, image in enumerate(images):
        if found := bench.faces.detect(image):
            faces[row] = torch.from_numpy(found[0].embedding)
    person = Person(task.person, bench.image_text.encode_images(images).float(), faces, list(head_keypoints))
    hashes = {f"photo_{i:03d}": sha256_file(path) for i, path in enumerate(photos)}
    bench.baseline(name).generate(task.prompts, task.out, person, n=task.n, seed=task.seed, photos=hashes)


def _head_keypoints(bench: Bench, picture: Path) -> np.ndarray:
    """[17, 3] (0..1, 0..1, confidence) of the largest person in a picture; confidence 0 where nobody is found."""
    image = read_photo(picture)
    found = bench.pose.detect([image])[0]
    if not found:
        return np.zeros((17, 3), np.float32)
    person = max(found, key=lambda one: (one.box[2] - one.box[0]) * (one.box[3] - one.box[1]))
    return person.keypoints / np.array([image.shape[1], image.shape[0], 1], np.float32)


def _with_profile(bench: Bench, task: Task, photos: list[Path], method: str) -> None:
    folder = bench.work / "profiles" / FUSED.get(method, "") / str(len(photos))
    profile, guidance = folder / f"{task.person}.safetensors", {}
    if method in FUSED:
        ablated_profile(photos, profile, bench.family, FUSED[method])
    else:
        made = bolid.profile.make_profile(photos, profile, family=bench.family.name)
        if method in GUIDED:  # without a face in the photos, only the body guides
            guidance = {"body_guidance": 1.0, "face_guidance": float(made.has_face)}
    bolid.generate.generate(
        task.prompts, task.out, profile=profile, adapter=bench.adapter_of(method), n=task.n, seed=task.seed, **guidance
    )


def run(method: str, protocol: Protocol, bench: Bench, name: str | None = None) -> Path:
    """Generate a method's missing pictures; returns their folder, called `name` or as the method.

    A person for whom the method fails (no body found in the one photo) is reported and left out.
    """
    photos = protocol.photos(bench.work / "photos")
    folder = bench.work / "pictures" / (name or method)
    stamp, models = folder / "models.json", canonical_json(bench.models(method))
    if folder.exists() and not (stamp.is_file() and stamp.read_text(encoding="utf-8") == models):
        shutil.rmtree(folder)
    write_atomic(stamp, models)
    for person, (who, theirs) in zip(protocol.people, photos.items(), strict=True):
        prompts, seed = protocol.prompts_for(person), protocol.picture_seed(person)
        task = Task(who, theirs, prompts, protocol.pictures, folder / who, seed)
        if len(list(task.out.glob("*.png"))) != len(task.prompts) * task.n:
            shutil.rmtree(task.out, ignore_errors=True)
            try:
                METHODS[method](bench, task)
            except BolidError as error:
                if not list(folder.glob("*/*.png")):
                    raise  # no person works
                print(f"{method} leaves out {who}: {error.message}", file=sys.stderr, flush=True)
    return folder


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/experiment"), help="photos, profiles and pictures")
    parser.add_argument("--baselines", type=Path, default=Path("runs/baselines"), help="what baselines.py has written")
    parser.add_argument("--adapter", type=Path, help="BoLID's adapters; by default the family's")
    parser.add_argument("--family", help="by default the chosen one")
    parser.add_argument("--people", type=int, default=0, help="only the first so many people; 0: all")
    parser.add_argument("--prompts", type=int, default=0, help="only the first so many prompts; 0: all")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("method", choices=METHODS)
    args = parser.parse_args()
    protocol = read_protocol(args.people, args.prompts)
    print(run(args.method, protocol, Bench(args.work, protocol, args.baselines, args.family, args.adapter)))


if __name__ == "__main__":
    try:
        main()
    except BolidError as error:
        sys.exit(f"error: {error.message}\n\nhint: {error.hint}")
