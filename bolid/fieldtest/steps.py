"""The steps of the field test: the chain's own commands, small. Each returns the figures that the report shows.

A step raises what its command raises. What a later step needs is a file in the work folder.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.models.families import DEFAULT_FAMILY, MASK_ENCODER, Family
from bolid.run import Progress

RENDERED = (200_000, 200_001)  # people that no model has seen
RENDERED_PHOTOS = 5
MOST_PHOTOS = 6  # of each person
LARGE = 512  # pixels: from this size on, training saves memory


@dataclass
class Bench:
    """What all steps share. ``work``: their files; ``out``: the report's folder, with the pictures."""

    family: Family
    work: Path
    out: Path
    photos: Path | None
    prompt: str
    steps: int
    pictures: int
    device: str
    seed: int
    progress: Progress | None = None
    made: list[str] = field(default_factory=list)  # pictures of the step that runs, below ``out``

    @property
    def body_encoder(self) -> Path:
        """The family's, or the one that `train-vae` has just made."""
        return self.family.body_encoder if self.family.has("body_encoder") else self.work / "body-encoder.safetensors"

    @property
    def adapter(self) -> Path | None:
        """None: the family's own; else the folder that `train-adapter` has just filled."""
        own = self.family.has("body_adapter") and self.family.has("body_encoder")
        return None if own else self.work / "adapter"

    @property
    def person(self) -> list[Path]:
        """The photos of the first person, of which the first half makes the profile."""
        return sorted((self.work / "photos" / "person-1").glob("*.jpg"))


@dataclass(frozen=True)
class Step:
    """``needs``: steps that must have passed. ``without``: why the step is skipped here, "" where it is not."""

    name: str
    title: str
    run: Callable[[Bench], dict[str, Any]]
    needs: Callable[[Bench], Sequence[str]] = lambda bench: ()
    without: Callable[[Bench], str] = lambda bench: ""


# ----------------------------------------------------------------------------------------------------------- photos


def prepare_photos(bench: Bench) -> dict[str, Any]:
    """work/photos/person-N/NNN.jpg: rendered, or copied under names that say nothing."""
    target = bench.work / "photos"
    if bench.photos is None:
        from bolid.synth.render import write_photos

        rendered = bench.work / "rendered"
        for seed in RENDERED:
            write_photos(rendered, seed, RENDERED_PHOTOS)
        found = sorted(path for path in rendered.iterdir() if path.is_dir())
        people = [sorted(folder.glob("*.jpg")) for folder in found]
        kind = "rendered people"
    else:
        people, kind = choose_photos(bench.photos)
    for number, photos in enumerate(people, start=1):
        folder = target / f"person-{number}"
        folder.mkdir(parents=True)
        for place, photo in enumerate(photos):
            _copy_photo(photo, folder / f"{place:03d}.jpg", f"photo {place + 1} of person {number}")
            if bench.photos is None:  # the true proportions, which `evaluate` compares with
                shutil.copyfile(photo.with_suffix(".json"), folder / f"{place:03d}.json")
    return {"photos": sum(map(len, people)), "people": len(people), "kind": kind}


def _copy_photo(photo: Path, target: Path, name: str) -> None:
    """The photo, whatever its format (decoders go by the content), and its caption."""
    from bolid.backends.caption import CAPTION_SUFFIXES

    try:
        shutil.copyfile(photo, target)
        for suffix in CAPTION_SUFFIXES:
            if (caption := photo.with_suffix(suffix)).is_file():
                shutil.copyfile(caption, target.with_suffix(suffix))
    except OSError as error:
        raise BolidError(f"{name} cannot be read: {error.strerror}", "check its permissions") from error


def choose_photos(folder: Path) -> tuple[list[list[Path]], str]:
    """(photos of two people, what they are). One person's photos are halved: training wants two people.

    Raises BolidError for fewer than four photos.
    """
    from bolid.formats.images import list_photos

    by_person: dict[str, list[Path]] = {}
    for person, path in list_photos(folder):
        if path.is_file():
            by_person.setdefault(person, []).append(path)
    people = sorted((photos for photos in by_person.values() if len(photos) >= 2), key=len, reverse=True)
    if len(people) >= 2:
        return [photos[:MOST_PHOTOS] for photos in people[:2]], "photos of two people"
    if people and len(people[0]) >= 4:
        photos = people[0][: 2 * MOST_PHOTOS]
        return [photos[::2], photos[1::2]], "photos of one person, halved into two"
    count = sum(map(len, by_person.values()))
    raise BolidError(
        f"{folder} holds {count} photo{'s' if count != 1 else ''}, too few for every step",
        "give at least 4 of one person, or leave the folder out: people are rendered then",
    )


# ---------------------------------------------------------------------------------------------------- the chain


def run_extract(bench: Bench) -> dict[str, Any]:
    """Photos -> feature shards, and what the models saw."""
    from bolid.extract import extract
    from bolid.formats.shards import read_shards

    result = extract(
        bench.work / "photos", bench.work / "shards", family=bench.family.name, max_bad=1.0, device=bench.device,
        force=True, progress=bench.progress,
    )  # fmt: skip
    if result is None:
        raise BolidError("another process of torchrun or SLURM writes the shards", "start fieldtest by itself")
    samples = list(read_shards(bench.work / "shards"))
    scores = [sample.meta["score"] for sample in samples]
    return {
        "photos used": result.samples,
        "rejected": {reason: len(names) for reason, names in result.rejected.items()},
        "faces found": sum("face" in sample.tensors for sample in samples),
        "confidence of the persons, mean": round(sum(scores) / len(scores), 3),
        **count_photographs(bench),
        "warning": result.warning,
    }


def count_photographs(bench: Bench) -> dict[str, Any]:
    """How many photos are photographs, and that `tiny` knows none."""
    from bolid.formats.images import read_photo
    from bolid.rendered import is_photograph

    photos = sorted((bench.work / "photos").rglob("*.jpg"))
    count = 0
    for photo in photos:
        with contextlib.suppress(BolidError):  # one that cannot be read: `extract` has counted it
            count += is_photograph(read_photo(photo))
    unknown = count if bench.family.name == DEFAULT_FAMILY else 0
    note = f"family tiny knows only rendered people: {unknown} of {len(photos)} photos are photographs"
    return {"photographs": count, "note": note if unknown else ""}


def run_shard(bench: Bench) -> dict[str, Any]:
    """Feature shards -> training shards, with latents of the base's VAE."""
    import numpy as np

    from bolid.formats.shards import read_shards
    from bolid.shard import shard

    result = shard(
        bench.work / "shards", bench.work / "train", family=bench.family.name, min_photos=2, seed=bench.seed,
        device=bench.device, progress=bench.progress,
    )  # fmt: skip
    latents = [sample.tensors["latents"] for sample in read_shards(bench.work / "train")]
    if not all(np.isfinite(array).all() for array in latents):
        raise BolidError("the VAE gives latents that are not finite", "its files may be damaged: bolid models verify")
    spread = float(np.std(np.stack([array[0] for array in latents]).astype(np.float32)))
    return {
        "photos": result.samples, "people": result.persons, "latents": list(latents[0].shape),
        "spread of the latents": round(spread, 3),
    }  # fmt: skip


def run_train_vae(bench: Bench) -> dict[str, Any]:
    """One training step of a body encoder."""
    from bolid.train_vae import TrainVaeConfig, train_vae

    result = train_vae(
        bench.work / "train", bench.work / "body-encoder.safetensors", config=TrainVaeConfig(steps=1),
        device=bench.device, seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    _require_finite(result.metrics)
    return {"steps": result.steps, "people": result.people, "photos": result.views, **result.metrics}


def run_profile(bench: Bench) -> dict[str, Any]:
    """Half of the first person's photos -> a profile."""
    from bolid.profile import make_profile

    photos = bench.person[: max(1, len(bench.person) // 2)]
    result = make_profile(
        photos, bench.work / "person.safetensors", body_encoder=bench.body_encoder, family=bench.family.name,
        device=bench.device, force=True, progress=bench.progress,
    )  # fmt: skip
    trained = "the family's" if bench.family.has("body_encoder") else "of one training step: it knows no bodies"
    return {
        "photos used": result.photos, "photos given": len(photos), "face": result.has_face,
        "uncertainty": round(result.uncertainty, 3), "body encoder": trained,
    }  # fmt: skip


def run_train_adapter(bench: Bench, folder: str = "adapter", **settings: Any) -> dict[str, Any]:
    """One training step of both branches, in the least memory where the base is large."""
    from bolid.train_adapter import TrainAdapterConfig, train_adapter

    if min(bench.family.image_size) >= LARGE:
        settings |= {"kv_rank": 16, "gradient_checkpointing": True}
    config = TrainAdapterConfig(steps=1, batch_size=1, sample_every=0, **settings)
    result = train_adapter(
        bench.work / "train", bench.work / folder, config=config, body_encoder=bench.body_encoder, device=bench.device,
        seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    _require_finite({"loss": result.loss})
    return {"steps": result.steps, "loss": round(result.loss, 4), "photos": result.photos}


def _require_finite(losses: Mapping[str, float]) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise BolidError(f"{name} is {value} after one step", "a lower precision may overflow: --precision bf16")


def run_generate(bench: Bench, folder: str, *, person: bool = True, **options: Any) -> dict[str, Any]:
    """Pictures of one prompt; of the profile's person or of the plain base. Refuses those of one colour."""
    from bolid.generate import generate

    if person:
        options = {"profile": bench.work / "person.safetensors", "adapter": bench.adapter} | options
    if "steps" not in options:
        options["steps"] = min(bench.steps, bench.family.steps)
    paths = generate(
        [bench.prompt], bench.out / "pictures" / folder, n=options.pop("n", bench.pictures), family=bench.family.name,
        device=bench.device, seed=bench.seed, progress=bench.progress, **options,
    )  # fmt: skip
    bench.made += [path.relative_to(bench.out).as_posix() for path in paths]
    return {"steps": options["steps"] or "the family's", **_look_at_pictures(paths)}


def _look_at_pictures(paths: Sequence[Path]) -> dict[str, Any]:
    """Size and contrast (standard deviation of the pixels, 0..255). BolidError for a picture of one colour."""
    import numpy as np

    from bolid.formats.images import read_photo

    pictures = [read_photo(path) for path in paths]
    contrasts = [float(np.std(picture.astype(np.float32), axis=(0, 1)).mean()) for picture in pictures]
    flat = sum(int(np.ptp(picture, axis=(0, 1)).max()) == 0 for picture in pictures)
    if flat:
        raise BolidError(
            f"{flat} of {len(pictures)} pictures are of one colour",
            "a network may overflow in half precision: try generate --dtype fp32, or bf16",
        )
    height, width = pictures[0].shape[:2]
    return {"pictures": len(pictures), "size": f"{width}x{height}", "contrast": [round(c, 1) for c in contrasts]}


def run_evaluate(bench: Bench) -> dict[str, Any]:
    """The person's pictures against the photos that did not make the profile."""
    from bolid.evaluate import evaluate

    result = evaluate(
        bench.out / "pictures" / "person", bench.work / "photos" / "person-1",
        without_adapter=bench.out / "pictures" / "base", family=bench.family.name, device=bench.device,
        seed=bench.seed, progress=bench.progress,
    )  # fmt: skip
    if result is None:
        raise BolidError(
            "fieldtest runs in one process, and this is one of several", "start it without torchrun or srun"
        )
    shown = {name: metric.value for name, metric in result.metrics.items() if metric.value is not None}
    return {
        "photos": result.references,
        "metrics": {name: round(float(value), 4) for name, value in shown.items()},
        "not measured": sorted(set(result.metrics) - set(shown)),
    }


def run_inspect(bench: Bench) -> dict[str, Any]:
    """Read back everything that was written, with its checksums."""
    from bolid.inspect import inspect

    names = ("shards", "train", "body-encoder.safetensors", "person.safetensors", "adapter/body.safetensors")
    places = [bench.work / name for name in names] + sorted((bench.out / "pictures").rglob("*.png"))[:1]
    # A step that failed may leave a folder without its index; its row says so.
    there = [place for place in places if place.is_file() or (place / "index.json").is_file()]
    for place in there:
        inspect(str(place), verify=True)
    return {"files and folders": len(there)}


# ---------------------------------------------------------------------------------------------------------- the list


def _encoder_step(bench: Bench) -> list[str]:
    return [] if bench.family.has("body_encoder") else ["train-vae"]


def _adapter_steps(bench: Bench) -> list[str]:
    return ["profile"] + ([] if bench.adapter is None else ["train-adapter"])


def _lacks(part: str) -> Callable[[Bench], str]:
    def without(bench: Bench) -> str:
        return "" if bench.family.has(part) else f"the family has no {part.replace('_', ' ')}"

    return without


def _no_card(bench: Bench) -> str:
    from bolid.run import pick_device

    return "" if pick_device(bench.device).startswith("cuda") else "it spares the memory of a GPU, and none is used"


def _guided(bench: Bench) -> dict[str, Any]:
    """In all steps: of so few, the usual interval might cover none."""
    own = bench.family.has("body_encoder") and bench.family.body_encoder != MASK_ENCODER  # which passes no gradient
    body = "1@0..1" if own else "0"
    return run_generate(bench, "guided", n=1, face_guidance="1@0..1", body_guidance=body)


def _published_face(bench: Bench) -> dict[str, Any]:
    """With the family's FaceID-Portrait adapter, and no adapter that one training step has made."""
    return run_generate(bench, "published-face", n=1, adapter=None)


def _no_published_face(bench: Bench) -> str:
    if bench.family.has("face_adapter"):
        return "the family has a face adapter of its own"
    return "" if bench.family.has("face_portrait") else "bolid models pull FAMILY --only face_portrait fetches it"


def _posed(bench: Bench) -> dict[str, Any]:
    return run_generate(bench, "pose", n=1, pose_from=bench.person[0])


_PICTURE_LOSSES = {"id_weight": 0.1, "clip_weight": 0.1, "pixel_every": 1, "pixel_alpha_bar": 0.0}

STEPS = (
    Step("photos", "photos", prepare_photos),
    Step("extract", "extract: pose, face and image features", run_extract, lambda bench: ["photos"]),
    Step("shard", "shard: latents of the base's VAE", run_shard, lambda bench: ["extract"]),
    Step("train-vae", "train-vae: one step", run_train_vae, lambda bench: ["shard"]),
    Step("profile", "profile", run_profile, lambda bench: ["photos", *_encoder_step(bench)]),
    Step("train-adapter", "train-adapter: one step", run_train_adapter, lambda b: ["shard", *_encoder_step(b)]),
    Step(
        "train-adapter-pixels", "train-adapter: one step with L_id and L_CLIP",
        lambda bench: run_train_adapter(bench, "adapter-pixels", **_PICTURE_LOSSES),
        lambda bench: ["shard", *_encoder_step(bench)],
    ),
    Step("generate-base", "generate: the plain base", functools.partial(run_generate, folder="base", person=False)),
    Step("generate", "generate: the person", functools.partial(run_generate, folder="person"), _adapter_steps),
    Step(
        "generate-face", "generate with the published face adapter", _published_face,
        lambda bench: ["profile"], _no_published_face,
    ),
    Step("generate-guided", "generate with face and body guidance", _guided, _adapter_steps),
    Step(
        "generate-few", "generate in a few steps",
        functools.partial(run_generate, folder="few", n=1, few_steps=True, steps=None), _adapter_steps,
        _lacks("few_steps_lora"),
    ),
    Step("generate-pose", "generate in a photo's pose", _posed, _adapter_steps, _lacks("controlnet")),
    Step(
        "generate-offload", "generate with networks off the GPU",
        functools.partial(run_generate, folder="offload", n=1, offload=True), _adapter_steps, _no_card,
    ),
    Step("evaluate", "evaluate", run_evaluate, lambda bench: ["generate", "generate-base"]),
    Step("inspect", "inspect: read everything back", run_inspect, lambda bench: ["photos"]),
)  # fmt: skip
