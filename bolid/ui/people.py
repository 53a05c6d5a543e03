"""The people of a work folder: a profile each, `people/NAME.safetensors`. A name is a word or two, never a path."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from bolid.body.mesh import PARAMETERS
from bolid.errors import BolidError
from bolid.formats.pictures import picture_record
from bolid.formats.profile import load_profile
from bolid.run import claim, sha256_file

SUFFIX = ".safetensors"
_NAME = re.compile(r"\w[\w .-]{0,39}")


class People:
    """Profiles in `folder`/people, and the pictures of each person in `folder`/pictures/NAME."""

    def __init__(self, folder: Path) -> None:
        self.profiles, self.pictures = folder / "people", folder / "pictures"
        self.profiles.mkdir(parents=True, exist_ok=True)
        self.pictures.mkdir(exist_ok=True)

    def names(self) -> list[str]:
        """In the order of the alphabet."""
        return sorted(
            (path.stem for path in self.profiles.glob(f"*{SUFFIX}") if _NAME.fullmatch(path.stem)), key=str.lower
        )

    def path(self, name: str) -> Path:
        """The profile of somebody who is there. Raises BolidError else."""
        path = self.profiles / f"{check_name(name)}{SUFFIX}"
        if not path.is_file():
            raise BolidError(f"there is no person {name!r}", f"the people are: {', '.join(self.names()) or 'none yet'}")
        return path

    def add(self, name: str, profile: Path) -> Path:
        """Take in a profile as NAME, or as NAME 2, NAME 3, ... where that is taken; `profile` itself may go.

        Other servers may add people to the same folder at the same time.
        """
        name = check_name(name)
        numbered = (f"{name} {number}" for number in itertools.count(2))
        places = (self.profiles / f"{one}{SUFFIX}" for one in itertools.chain([name], numbered))
        return next(place for place in places if claim(profile, place))

    def is_woman(self, name: str) -> bool:
        """What the body of a person looks like; True where nothing is known of it."""
        body = load_profile(self.path(name)).body
        return body is None or float(body.shape_mean[PARAMETERS.index("gender")]) > 0.5

    def seed_file(self, name: str) -> Path:
        """Where the seed of a synthetic person is written."""
        return self.profiles / f"{check_name(name)}.seed"

    def delete(self, name: str, copies: Path | None = None) -> int:
        """Delete a profile and the pictures made with it, and their `copies` in that folder; how many pictures."""
        path = self.path(name)
        digest = sha256_file(path)
        pictures = [picture for picture in self.pictures.rglob("*.png") if _profile_of(picture) == digest]
        gone = len(pictures)
        if copies is not None:
            pictures += [picture for picture in copies.rglob("*.png") if _profile_of(picture) == digest]
            pictures += [copy for copy in copies.rglob(f"*{SUFFIX}") if sha256_file(copy) == digest]
        for picture in (*pictures, path):
            picture.unlink(missing_ok=True)
        self.seed_file(name).unlink(missing_ok=True)
        return gone


def check_name(name: str) -> str:
    """The name without spaces around it. Raises BolidError for what is none."""
    name = name.strip() if isinstance(name, str) else ""
    if not _NAME.fullmatch(name) or ".." in name:
        raise BolidError(
            f"{name!r} is no name for a person", "use up to 40 letters, digits, spaces, dots and hyphens, like Anna"
        )
    return name


def _profile_of(picture: Path) -> str | None:
    """The sha256 of the profile that a picture was made with."""
    try:
        record = picture_record(picture.read_bytes(), str(picture))
    except (BolidError, OSError):  # damaged, or gone meanwhile
        return None
    return None if record is None else record.get("inputs", {}).get("profile")
