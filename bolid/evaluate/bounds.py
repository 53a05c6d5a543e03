"""What real photos reach in a benchmark, scored as if a method had made them.

real photos: half of each person's held-out photos against the other half; what a perfect method would reach.
strangers: the same photos as if they showed the next person, with another photo's caption for a prompt; chance.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from bolid.evaluate.pictures import Picture, PictureFolder

REAL, STRANGERS = "real photos", "strangers"


def real_and_strangers(reference: PictureFolder) -> dict[str, PictureFolder]:
    """Take every second photo (by hash) of each person with two or more out of `reference`: {REAL, STRANGERS}.

    {} where nobody has two; no STRANGERS of one person alone.
    """
    people: dict[str, list[Picture]] = {}
    for photo in sorted(reference.pictures, key=lambda photo: photo.sha256):
        people.setdefault(photo.person, []).append(photo)
    taken = {person: photos[1::2] for person, photos in sorted(people.items()) if len(photos) > 1}
    if not taken:
        return {}
    away = {photo.source for photos in taken.values() for photo in photos}
    reference.pictures = [photo for photo in reference.pictures if photo.source not in away]
    found = {REAL: _folder(reference, [photo for photos in taken.values() for photo in photos])}
    if len(taken) > 1:
        names = list(taken)
        following = dict(zip(names, names[1:] + names[:1], strict=True))
        photos = found[REAL].pictures
        others = [replace(photo, person=following[photo.person]) for photo in photos]
        captions = [photo.prompt for photo in photos]
        captions = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
        others = [replace(photo, prompt=caption) for photo, caption in zip(others, captions, strict=True)]
        found[STRANGERS] = _folder(reference, others)
    return found


def _folder(reference: PictureFolder, pictures: list[Picture]) -> PictureFolder:
    folder = copy.copy(reference)
    folder.pictures, folder.rejected = pictures, {}
    return folder
