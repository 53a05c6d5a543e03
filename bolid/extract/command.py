"""``bolid extract``: photos -> feature shards. Twin of the command of this name.

Photos go through the models in fixed batches, on one thread a process, so that the bytes written depend neither on the
number of worker processes nor on where an earlier run was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid import workers as work
from bolid.errors import BolidError
from bolid.extract.tars import NO_PICTURE, find_tars, read_members
from bolid.formats.images import (
    decode_image,
    difference_hash,
    encode_jpeg,
    hash_file,
    is_grey,
    list_photos,
    own_jpeg,
    printable,
    read_file,
    unread_files,
)
from bolid.formats.photos import read_notes
from bolid.formats.shards import DEFAULT_MAX_BYTES, INDEX, Sample, ShardWriter, sample_key
from bolid.formats.storage import alone, place
from bolid.models.families import Family, get_family
from bolid.rendered import REFUSED, REFUSED_HINT, refusal
from bolid.run import Progress, canonical_json, pick_device, run_record
from bolid.views import NOT_RECOGNISED, SEVERAL, PersonRule, View, ViewReader

if TYPE_CHECKING:
    import numpy as np

    from bolid.backends.caption import Captioner

BATCH = 8
DUPLICATE = "the same file again"
CHANGED = "the file changed during the run"
UNNAMED = "unnamed-"  # and the sample's key: the person of a photo in a tar that names none


@dataclass(frozen=True)
class Photo:
    """A photo of the list."""

    path: Path  # of the photo, or of the tar that holds it
    person: str
    source: str  # path below the photo folder, with forward slashes; of a tar its name and the member's
    sha256: str  # "" for what cannot be used
    caption: str
    fault: str = ""  # why it cannot be used, as far as the list tells
    place: tuple[int, int] | None = None  # offset and size in a tar
    origin: dict[str, str] | None = None  # of a tar: address, license and consent

    def read(self) -> bytes:
        """The photo's file."""
        if self.place is None:
            return read_file(self.path)
        with open(self.path, "rb") as tar:
            tar.seek(self.place[0])
            return tar.read(self.place[1])

    @property
    def key(self) -> str:
        """Its key in the shards: <person>/<sha256[:16]>."""
        return sample_key(self.person, self.sha256)


@dataclass(frozen=True)
class ExtractResult:
    """What was written, and what was left out."""

    out: Path
    samples: int
    persons: int
    rejected: dict[str, list[str]]  # reason -> photos
    unread: dict[str, list[str]]  # reason -> files, folders and samples that are no photos
    unused_people: list[str]  # of whom no photo could be used
    unnamed: int  # photos in tars that name no person; each counts as a person of its own
    warning: str = ""


class TooManyRejected(BolidError):
    """More photos were rejected than ``max_bad`` allows, or all. ``rejected``: reason -> photos."""

    def __init__(self, message: str, hint: str, rejected: dict[str, list[str]]) -> None:
        super().__init__(message, hint)
        self.rejected = rejected


@dataclass(frozen=True)
class Extraction:
    """The models and settings of a run; every worker process loads them for itself. ``captioner``: a model, or ""."""

    family: Family
    device: str
    person: PersonRule
    max_side: int
    captioner: str = ""
    force: bool = False
    threads: int | None = 1
    round: int = 4

    def load(self) -> work.Process:
        """Load the models, in the process that will run them."""
        reader, captioner = ViewReader(self.family, self.device, self.person), None
        if self.captioner:
            from bolid.backends.caption import Captioner

            captioner = Captioner(self.captioner, self.device)
        return lambda batch: _process(batch, reader, captioner, self)


def extract(
    photos: str | os.PathLike[str] = "photos",
    out: str | os.PathLike[str] = "shards",
    *,
    family: str | None = None,
    select_person: PersonRule = "main",
    workers: int = 1,
    max_side: int = 1536,
    max_bad: float = 0.05,
    max_bytes: int = DEFAULT_MAX_BYTES,
    caption: str = "sidecar",
    force: bool = False,
    engine: work.EngineName = "local",
    device: str = "auto",
    progress: Progress | None = None,
) -> ExtractResult | None:
    """Run the family's models on every photo and write the features to the shard directory ``out``.

    ``photos``: a folder of ``<person>/*.jpg`` (or of one person's photos), captions beside them in ``.txt`` or
    ``.caption``; or WebDataset tars of another program: a tar, a folder of them, or ``data/{00000..00012}.tar``.
    ``select_person``: "main" uses the main person of a photo, "only" rejects photos that show several.
    ``caption``: "sidecar" takes those .txt files alone, "none" no captions; "blip2" (the family's captioning model) or
    a model of transformers writes one for each photo without such a file. ``force``: read photographs with ``tiny``,
    too. ``max_side``: larger photos are reduced to this many pixels. ``max_bytes``: of one tar. ``engine``: "local",
    ``workers`` processes of this machine, or "ray", as many actors of Ray Data. Processes that torchrun or a SLURM step
    has started share the photos; the first one writes, the others return None. ``out`` may be a URL
    (``s3://bucket/shards``). Rejected photos are listed with the reason in ``out/index.json``. The same call after a
    kill goes on where it stopped.

    Raises TooManyRejected, a BolidError, when nothing could be used (``out`` is then removed), or when more than
    ``max_bad`` of the photos and more than one were rejected; ``out`` is complete even then.
    """
    if workers < 1:
        raise BolidError(f"--workers is {workers}", "give at least 1")
    from bolid.backends.caption import captioner_path

    with work.start(engine, workers) as run:
        if run is None:
            return None
        chosen = get_family(family)
        model = captioner_path(caption, chosen)
        found, unread = _listed(Path(photos), progress, sidecar=caption != "none")
        config: dict[str, Any] = {"person": select_person, "max_side": max_side, "max_bytes": max_bytes}
        if caption != "sidecar":
            config["caption"] = caption
        if force:
            config["force"] = True
        digest = hashlib.sha256(canonical_json([[p.source, p.sha256, p.caption] for p in found]).encode()).hexdigest()
        record = run_record("shards", family=chosen, config=config, inputs={"photos": digest})
        with alone(out):
            writer = ShardWriter(out, record, max_bytes)
            if not writer.complete:
                extraction = Extraction(chosen, pick_device(device), select_person, max_side, model, force)
                _run(found, writer, extraction, run, progress)
            index = writer.close()
        result = ExtractResult(
            place(out), index["samples"], index["persons"], index["rejected"], unread,
            _without_photos(found, index["rejected"]), sum(p.person.startswith(UNNAMED) for p in found),
        )  # fmt: skip
        return _judge(result, len(found), chosen, max_bad)


def _without_photos(photos: list[Photo], rejected: dict[str, list[str]]) -> list[str]:
    """The people all of whose photos were rejected."""
    sources = {source for sources in rejected.values() for source in sources}
    used = {photo.person for photo in photos if photo.source not in sources}
    return sorted({photo.person for photo in photos if photo.person} - used)


def _listed(folder: Path, progress: Progress | None, *, sidecar: bool) -> tuple[list[Photo], dict[str, list[str]]]:
    """(the photos of a folder, or else of tars; reason -> what is no photo)."""
    try:
        return _photos(folder, progress, sidecar=sidecar), unread_files(folder)
    except BolidError:
        if not (tars := find_tars(str(folder))):
            raise
    return _photos_in_tars(tars, progress, sidecar=sidecar)


def _photos_in_tars(
    tars: list[Path], progress: Progress | None, *, sidecar: bool
) -> tuple[list[Photo], dict[str, list[str]]]:
    photos: list[Photo] = []
    unread: dict[str, list[str]] = {}
    for number, tar in enumerate(tars):
        try:
            for member in read_members(tar):
                source = f"{tar.name}/{member.name}"
                if member.fault == NO_PICTURE:
                    unread.setdefault(NO_PICTURE, []).append(source)
                    continue
                person = member.person or f"{UNNAMED}{tar.stem}-{Path(member.name).name.partition('.')[0]}"
                photos.append(
                    Photo(
                        tar, person.replace("/", "_").lstrip(".") or "_", source, member.sha256,
                        member.caption if sidecar else "", member.fault, (member.offset, member.size), member.origin,
                    )
                )  # fmt: skip
        except BolidError as error:  # what came before the damage is there
            photos.append(Photo(tar, "", tar.name, "", "", error.message.replace(str(tar), "the tar")))
        if progress:
            progress(number + 1, len(tars), "reading the list of photos")
    if not any(photo.person for photo in photos):
        if photos:
            raise BolidError(f"{tars[0]}: {photos[0].fault}", "make or copy it again")
        raise BolidError(f"no photos in {tars[0]}", "a sample has a picture, and its caption and json under one name")
    return photos, unread


def _photos(folder: Path, progress: Progress | None, *, sidecar: bool = True) -> list[Photo]:
    from bolid.backends.caption import caption_for

    listed = list_photos(folder)
    photos = []
    for number, (person, path) in enumerate(listed):
        if progress:
            progress(number, len(listed), "reading the list of photos")
        source = printable(path.relative_to(folder))
        try:
            sha256, caption, fault = hash_file(path), caption_for(path) if sidecar else "", ""
        except BolidError as error:
            sha256, caption, fault = "", "", error.message
        photos.append(Photo(path, printable(person), source, sha256, caption, fault))
    return photos


def _run(
    photos: list[Photo],
    writer: ShardWriter,
    extraction: Extraction,
    run: work.Run,
    progress: Progress | None,
) -> None:
    keys: set[str] = set()
    fresh: list[Photo] = []
    for photo in photos:
        if photo.fault or photo.key in keys:
            if photo.source not in writer.done_rejects:
                writer.reject(photo.source, photo.fault or DUPLICATE)
        else:
            keys.add(photo.key)
            fresh.append(photo)
    done = writer.done_keys, writer.done_rejects
    # A batch of which a part is done is processed again as a whole: its numbers may depend on what is in it.
    batches = [fresh[start : start + BATCH] for start in range(0, len(fresh), BATCH)]
    left = [batch for batch in batches if not all(p.key in done[0] or p.source in done[1] for p in batch)]
    count = len(fresh) - sum(map(len, left))
    for batch, samples in zip(left, run(extraction, left), strict=True):
        for photo, sample in zip(batch, samples, strict=True):
            if photo.key in done[0] or photo.source in done[1]:
                continue
            if isinstance(sample, str):
                writer.reject(photo.source, sample)
            else:
                writer.write(sample)
        count += len(batch)
        if progress:
            progress(count, len(fresh), batch[-1].source)


def _process(
    batch: list[Photo], reader: ViewReader, captioner: Captioner | None, settings: Extraction
) -> list[Sample | str]:
    """For each photo of a batch a sample, or the reason why there is none."""
    results: list[Sample | str] = []
    decoded: list[tuple[int, np.ndarray]] = []
    files: dict[int, bytes] = {}
    for index, photo in enumerate(batch):
        results.append("")
        try:
            data = photo.read()
            if hashlib.sha256(data).hexdigest() != photo.sha256:
                results[index] = CHANGED
                continue
            files[index] = data
            image = decode_image(data, name="the file", max_side=settings.max_side)
            if not settings.force:
                results[index] = refusal(image, settings.family)
            if not results[index]:
                decoded.append((index, image))
        except BolidError as error:
            results[index] = error.message
    views = dict(zip([i for i, _ in decoded], reader.read([image for _, image in decoded]), strict=True))
    uncaptioned = {i: view for i, view in views.items() if isinstance(view, View) and not batch[i].caption}
    captions: dict[int, str] = {}
    if captioner is not None:
        captions = dict(zip(uncaptioned, captioner.caption([v.image for v in uncaptioned.values()]), strict=True))
    for index, view in views.items():
        photo = replace(batch[index], caption=captions.get(index, batch[index].caption))
        results[index] = view if isinstance(view, str) else _sample(photo, view, files[index])
    return results


def _sample(photo: Photo, view: View, data: bytes) -> Sample:
    """`data`: the photo's file. A JPEG whose pixels the models have seen is stored without its metadata, but not
    encoded again.
    """
    meta: dict[str, Any] = {
        "person": photo.person,
        "width": view.image.shape[1],
        "height": view.image.shape[0],
        "box": [round(float(side), 2) for side in view.box],
        "score": round(view.score, 4),
        "face_box": None if view.face_box is None else [round(float(side), 2) for side in view.face_box],
        "others": [{"box": [round(side, 2) for side in box], "score": round(score, 4)} for box, score in view.others],
        **({"grey": True} if is_grey(view.image) else {}),
        "source": photo.source,
        "sha256": photo.sha256,
        "dhash": f"{difference_hash(view.image):064x}",
        **(_origin(photo.path) if photo.origin is None else photo.origin),
    }
    return Sample(photo.key, own_jpeg(data, view.image) or encode_jpeg(view.image), meta, photo.caption, view.tensors())


def _origin(path: Path) -> dict[str, str]:
    """A photo's address, license and consent, from the .json that `bolid scrape` writes beside it."""
    return read_notes(path, ("url", "license", "consent"))


def _hint(rejected: dict[str, list[str]]) -> str:
    if SEVERAL in rejected:
        return "--select-person main takes the main person of a photo that shows several"
    return "give photos that show a person, at least from head to shoulders"


def _judge(result: ExtractResult, total: int, family: Family, max_bad: float) -> ExtractResult:
    bad = sum(map(len, result.rejected.values()))
    unknown = sum(len(result.rejected.get(reason, ())) for reason in NOT_RECOGNISED)
    warning = ""
    if family.name == "tiny" and unknown > 1 and unknown >= 0.3 * total:
        warning = (
            f"family tiny knows only rendered people and recognised none in {unknown} of {total} photos: "
            "if these are real photographs, choose another family (bolid models list)"
        )
    if refused := len(result.rejected.get(REFUSED, ())):
        warning = f"family tiny knows only rendered people, and {refused} of {total} photos are photographs: " + (
            REFUSED_HINT
        )
    if result.samples == 0:
        # Nothing worth keeping, and another family may be tried under the same name.
        (result.out / INDEX).unlink()
        with contextlib.suppress(OSError):  # something else lies in it
            result.out.rmdir()
        reasons = ", ".join(f"{reason}: {len(sources)}" for reason, sources in result.rejected.items())
        raise TooManyRejected(
            f"none of the {total} photos could be used ({reasons})",
            warning or _hint(result.rejected),
            result.rejected,
        )
    if bad > 1 and bad > max_bad * total:
        raise TooManyRejected(
            f"{bad} of {total} photos were rejected, more than --max-bad {max_bad:g} allows",
            f"{warning + '; ' if warning else ''}{result.out} is complete without them (reasons in its index.json): "
            f"use it as it is, or repeat with --max-bad {bad / total + 0.005:.2f}",
            result.rejected,
        )
    return replace(result, warning=warning)
