"""What the family's models see in pictures, for `evaluate`: one picture at a time, and all reference photos together.

Shapes: M photos, P people, E embedding, D features, W width profile, R body readings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bolid.errors import BolidError
from bolid.evaluate.pictures import Picture, Source
from bolid.models.families import Family
from bolid.run import Progress, canonical_json, home, run_record

if TYPE_CHECKING:
    from bolid.method.feature_statistics import FeatureStatistics

BATCH = 8
FEATURES = ("auto", "inception", "tower")
CACHE_KIND = "reference-statistics"


@dataclass
class Seen:
    """What the models see in one picture; nan where nothing is seen."""

    embed: torch.Tensor  # f32 [E]
    features: torch.Tensor  # f32 [D]
    logits: torch.Tensor | None  # f32 [C], of InceptionV3
    face: torch.Tensor  # f32 [512]
    keypoints: torch.Tensor  # f32 [17, 3]; confidence 0 where no person is found
    widths: torch.Tensor  # f32 [W]
    reading: torch.Tensor  # f32 [R]


class Models:
    """The family's models, and what features FID, KID and IS are taken from."""

    def __init__(self, family: Family, device: str, features: str) -> None:
        from bolid.backends.face import FaceModel
        from bolid.backends.features import InceptionFeatures, Lpips, alexnet_path, inception_path, tower_name
        from bolid.backends.image_text import ImageTextModel
        from bolid.backends.pose import PoseModel

        self.family, self.device = family, device
        self.image_text = ImageTextModel(family.require("image_text"), device)
        self.pose = PoseModel(family.require("pose"), device)
        self.faces = FaceModel(family.require("face"), device)
        self.tower = tower_name(family.name, self.image_text)
        self.inception: InceptionFeatures | None = None
        self.notes: list[str] = []
        if features == "inception" or (features == "auto" and family.name != "tiny" and inception_path().is_file()):
            self.inception = InceptionFeatures(device)
        elif features == "auto" and family.name != "tiny":
            self.notes.append(
                f"FID, KID and IS are on the family's tower: no InceptionV3 weights at {inception_path()}"
            )
        published = features == "inception" or (features == "auto" and family.name != "tiny")
        self.lpips = Lpips(device) if published and alexnet_path().is_file() else None
        if published and self.lpips is None:
            self.notes.append(f"diversity is on the family's tower: no AlexNet weights at {alexnet_path()}")
        self.feature_name = self.inception.name if self.inception else self.tower
        self.feature_size = self.inception.size if self.inception else self.image_text.embedding_size
        self._texts: dict[str, torch.Tensor] = {}
        self._open_body_reader()

    def _open_body_reader(self) -> None:
        """The probe where the family has one, which no training has seen; else the body encoder."""
        from bolid.backends.body import BodyEncoder
        from bolid.backends.probe import BodyProbe

        self.probe: BodyProbe | None = None
        self.encoder: BodyEncoder | None = None
        if self.family.probe is not None and self.family.probe.exists():
            self.probe = BodyProbe(self.family.probe, self.device)
            self.reader_name, self.reading_size = (
                f"body probe of family {self.family.name}", len(self.probe.ratio_names)
            )  # fmt: skip
        elif "body_encoder" not in self.family.missing():
            self.encoder = BodyEncoder(self.family.require("body_encoder"), self.device)
            self.reader_name = f"body encoder of family {self.family.name} (which the adapter was trained on)"
            self.reading_size = self.encoder.body_dim
        else:
            self.reader_name, self.reading_size = "nothing: the family has no probe and no body encoder", 1

    @property
    def fingerprint(self) -> list[Any]:
        """What a cached reading depends on, beside the photo."""
        family, parts = self.family, ("image_text", "pose", "face", "probe", "body_encoder")
        files = []
        for part in parts:
            path = getattr(family, part)
            inside = sorted(path.rglob("*")) if path is not None and path.is_dir() else [path] if path else []
            files += [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in inside if f.is_file()]
        return [family.name, self.feature_name, self.reader_name, files]

    def perceptual_view(self, image: np.ndarray) -> Any:
        """What `perceptual_distance` compares of a picture, uint8 [H, W, 3]; to be kept, for it costs most."""
        return image if self.lpips is not None else [self.image_text.patch_features([image])]

    def perceptual_distance(self, first: Any, second: Any) -> float:
        """LPIPS of two such views; without AlexNet's weights its formula on the family's own tower."""
        from bolid.method.metrics import perceptual_distance

        if self.lpips is not None:
            return self.lpips.distance(first, second)
        return float(perceptual_distance(first, second))

    def text(self, text: str) -> torch.Tensor:
        """[E], cached."""
        if text not in self._texts:
            self._texts[text] = self.image_text.encode_text([text]).float().cpu()[0]
        return self._texts[text]

    def look(self, images: Sequence[np.ndarray]) -> list[Seen]:
        """What there is to see in each picture."""
        from bolid.views import choose_person

        embeds = self.image_text.encode_images(images).float().cpu()
        features, logits = self.inception.encode(images) if self.inception else (embeds, None)
        found = []
        for i, (image, people) in enumerate(zip(images, self.pose.detect(images), strict=True)):
            seen = Seen(
                embeds[i], features[i], None if logits is None else logits[i], torch.full((512,), math.nan),
                torch.zeros(17, 3), torch.full((16,), math.nan), torch.full((self.reading_size,), math.nan),
            )  # fmt: skip
            person = choose_person(people, "main")
            if not isinstance(person, str):
                self._look_at_person(image, person, seen)
            found.append(seen)
        return found

    def _look_at_person(self, image: np.ndarray, person: Any, seen: Seen) -> None:
        from bolid.backends.silhouette import silhouette
        from bolid.method.keypoints import HEAD, HIPS, KNEES, MIN_CONFIDENCE
        from bolid.method.metrics import width_profile
        from bolid.views import face_of, person_crop, whole_box

        keypoints = person.keypoints
        seen.keypoints = torch.from_numpy(keypoints.astype("float32"))
        if (keypoints[HEAD, 2] >= MIN_CONFIDENCE).any():
            face = face_of(person, self.faces.detect(image))
            if face is not None:
                seen.face = torch.from_numpy(face.embedding)
        to_the_knees = (keypoints[list(HIPS), 2] >= MIN_CONFIDENCE).any() and (
            keypoints[list(KNEES), 2] >= MIN_CONFIDENCE
        ).any()
        if not to_the_knees:
            return
        box = whole_box(person, image.shape[:2])
        mask, points = silhouette(image, box, keypoints)
        seen.widths = width_profile(torch.from_numpy(mask), torch.from_numpy(points))
        if self.probe is not None:
            seen.reading = torch.from_numpy(self.probe.predict([image])[0])
        elif self.encoder is not None:
            pooled = self.image_text.views([image], keypoints[None])[1].float().cpu().numpy()[0]
            cut, _, inside = person_crop(image, box, keypoints, self.family.view_size)
            features = [pooled * (keypoints[:, 2:] >= MIN_CONFIDENCE)] if self.encoder.needs_features else None
            seen.reading = self.encoder.encode([cut], [inside], features)[0][0]


def loaded(source: Source, pictures: Sequence[Picture]) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Batches of (places in `pictures`, images); those that cannot be read are rejected."""
    for start in range(0, len(pictures), BATCH):
        places, images = [], []
        for place in range(start, min(start + BATCH, len(pictures))):
            try:
                images.append(source.load(pictures[place]))
                places.append(place)
            except BolidError as error:
                source.reject(pictures[place], error.message)
        if images:
            yield places, images


# ---- reference photos ---------------------------------------------------------------------------------------------


@dataclass
class References:
    """Held-out photos, as the models see them. `people`: the P names; `owner` [M]: whose photo each is, by number."""

    people: list[str]
    owner: torch.Tensor
    embeds: torch.Tensor  # f32 [M, E]
    faces: torch.Tensor  # f32 [M, 512]
    keypoints: torch.Tensor  # f32 [M, 17, 3]
    widths: torch.Tensor  # f32 [M, W]
    readings: torch.Tensor  # f32 [M, R]
    truth: dict[str, dict[str, float]]  # person -> body ratios
    statistics: FeatureStatistics


def read_references(source: Source, models: Models, tell: Progress) -> References:
    """Look at all photos of `source`, or read what an earlier run saw in the same photos with the same models.

    Cached under BOLID_HOME as safetensors, keyed by the photos' hashes and the models.
    """
    from bolid.formats.tensors import load_tensors, save_tensors
    from bolid.method.feature_statistics import FeatureStatistics

    key = canonical_json([CACHE_KIND, 1, models.fingerprint, [[p.person, p.sha256] for p in source.pictures]])
    path = home() / "evaluate" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    try:
        tensors, record = load_tensors(path, CACHE_KIND)
        rejected = record["config"]["rejected"]
    except (BolidError, KeyError):  # not there, or of no use
        tensors, rejected = _look_at_all(source, models, tell), source.rejected
        save_tensors(path, tensors, run_record(CACHE_KIND, family=models.family, config={"rejected": rejected}))
    source.rejected = rejected
    source.pictures = [source.pictures[row] for row in tensors["rows"].tolist()]
    people = sorted({photo.person for photo in source.pictures})
    truth: dict[str, dict[str, float]] = {}
    for person in people:
        theirs = [photo.truth for photo in source.pictures if photo.person == person]
        if theirs[0] and all(one == theirs[0] for one in theirs):
            truth[person] = theirs[0]
    return References(
        people, torch.tensor([people.index(photo.person) for photo in source.pictures]), tensors["embed"],
        tensors["face"], tensors["keypoints"], tensors["widths"], tensors["reading"], truth,
        FeatureStatistics.from_tensors(tensors),
    )  # fmt: skip


def _look_at_all(source: Source, models: Models, tell: Progress) -> dict[str, torch.Tensor]:
    """What is seen in all photos that can be read, with their `rows` in `source.pictures`, and the statistics."""
    from bolid.method.feature_statistics import FeatureStatistics

    statistics = FeatureStatistics(models.feature_size)
    seen: list[Seen] = []
    rows: list[int] = []
    for places, images in loaded(source, source.pictures):
        found = models.look(images)
        statistics.update(torch.stack([one.features for one in found]))
        seen += [replace(one, features=one.features[:0], logits=None) for one in found]
        rows += places
        tell(places[-1] + 1, len(source.pictures), "looking at reference photos")
    if not seen:
        raise BolidError(f"none of the photos in {source.place} can be read", "give a folder of photos of the person")
    names = ("embed", "face", "keypoints", "widths", "reading")
    tensors = {name: torch.stack([getattr(one, name) for one in seen]) for name in names}
    return {**tensors, "rows": torch.tensor(rows), **statistics.tensors()}
