"""Pack rendered photos for a machine that can fetch none: WebP, captions and truth in one zip; and unpack them there.

    python examples/tiny_family/pack_photos.py photos/train photos.zip --megabytes 40
    python examples/tiny_family/pack_photos.py photos.zip /tmp/photos

A 256x192 photo takes 3.4 KB at quality 80. The photos are drawn at random, so all people and framings take part.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from truth import read_truth

KEPT = ("person", "width", "height", "attributes", "ratios", "keypoints", "box", "face_box", "caption")


def as_webp(path: Path, quality: int) -> bytes:
    data = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(data, "WEBP", quality=quality, method=6)
    return data.getvalue()


def pack(photos: Path, file: Path, megabytes: float, quality: int) -> None:
    """As many photos as fit, their truth (some 300 bytes each, compressed) counted in."""
    rows = read_truth(photos)
    random.Random(0).shuffle(rows)
    packed: list[dict[str, Any]] = []
    room = megabytes * 1e6
    with zipfile.ZipFile(file, "w") as archive:
        for row in rows:
            data = as_webp(row["path"], quality)
            room -= len(data) + 500
            if room < 0:
                break
            name = f"{row['person']}/{row['path'].stem}"
            archive.writestr(f"{name}.webp", data)
            packed.append({"name": name} | {key: row[key] for key in KEPT})
        archive.writestr("truth.json", json.dumps(packed), zipfile.ZIP_DEFLATED)
    print(f"{len(packed)} of {len(rows)} photos, {file.stat().st_size / 1e6:.1f} MB")


def unpack(file: Path, photos: Path) -> None:
    """A photo directory as `bolid synth` writes it."""
    with zipfile.ZipFile(file) as archive:
        rows = json.loads(archive.read("truth.json"))
        data = [archive.read(f"{row['name']}.webp") for row in rows]

    def write(row: dict[str, Any], picture: bytes) -> None:
        path = photos / f"{row['name']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(picture)).save(path, quality=95, subsampling=0)
        path.with_suffix(".txt").write_text(row["caption"] + "\n")
        path.with_suffix(".json").write_text(json.dumps(row))

    with ThreadPoolExecutor() as workers:
        list(workers.map(write, rows, data))
    print(f"{len(rows)} photos in {photos}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a photo directory, or a zip that this wrote")
    parser.add_argument("target", type=Path, help="the zip, or the directory to unpack into")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--quality", type=int, default=80)
    args = parser.parse_args()
    if args.source.is_dir():
        pack(args.source, args.target, args.megabytes, args.quality)
    else:
        unpack(args.source, args.target)


if __name__ == "__main__":
    main()
