"""Write bolid/tiny/models.json: the size and SHA-256 of every file of the embedded family, by part.

BoLID compares them when it loads a part, and `bolid models verify tiny` compares all. Run it after every change of the
weights.
"""

from __future__ import annotations

from bolid.models.checksums import MANIFEST
from bolid.models.families import ALL_PARTS, get_family
from bolid.models.manifest import files_of
from bolid.run import canonical_json, sha256_file, write_atomic


def main() -> None:
    """Write the file."""
    family = get_family("tiny")
    manifest = {}
    for part in ALL_PARTS:
        place = getattr(family, part)
        if not family.has(part) or not place.is_relative_to(family.root):
            continue
        files = [file for file in files_of(place) if file.suffix != ".md"]
        manifest[part] = {
            "files": {
                file.name if place.is_file() else file.relative_to(place).as_posix(): {
                    "size": file.stat().st_size, "sha256": sha256_file(file),
                }
                for file in files
            }
        }  # fmt: skip
    write_atomic(family.root / MANIFEST, canonical_json(manifest) + "\n")


if __name__ == "__main__":
    main()
