"""README's second picture: a person's photos, the mannequin that they give, and pictures of that body.

    bolid synth --person-seed 200006 --photos 8 --size 192x256 --out photos
    python examples/person_picture.py photos/p200006 --seeds 9051615067313174657 115061513134999833

Every part is made by the command of its caption.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from PIL import Image, ImageDraw, ImageFont

from bolid import api
from bolid.body.profiles import read_known
from bolid.profile import picture_profile

WIDTH, GAP, CAPTION = 1680, 12, 34  # pixels
MANNEQUIN = 920  # of the width
STANDING = "a full body photo of a {} standing, in a red short-sleeved top and blue trousers, on a beach"
PORTRAIT = "a portrait of a {}, in a green top, in a meadow"


def row(pictures: Sequence[Image.Image], width: int) -> Image.Image:
    """Pictures side by side in one height, `width` pixels in all."""
    shapes = [picture.width / picture.height for picture in pictures]
    height = round((width - GAP * (len(pictures) - 1)) / sum(shapes))
    strip, left = Image.new("RGB", (width, height), "white"), 0
    for picture, shape in zip(pictures, shapes, strict=True):
        part = picture.convert("RGB").resize((round(height * shape), height), Image.Resampling.LANCZOS)
        strip.paste(part, (left, 0))
        left += part.width + GAP
    return strip


def sheet(photos: Sequence[Path], mannequin: Path, made: Sequence[Path], height: str) -> Image.Image:
    """The photos above; the mannequin and the generated pictures below; the commands beside each."""
    above = row([Image.open(photo) for photo in photos], WIDTH)
    body = row([Image.open(mannequin)], MANNEQUIN)
    pictures = row([Image.open(path) for path in made], WIDTH - MANNEQUIN - GAP)
    below = max(body.height, pictures.height)
    picture = Image.new("RGB", (WIDTH, above.height + below + 2 * CAPTION + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    picture.paste(above, (0, 0))
    draw.text((0, above.height + 6), f"{len(photos)} photos: bolid profile photos/ --height {height}", "black", font)
    top = above.height + CAPTION + GAP
    picture.paste(body, (0, top))
    draw.text((0, top + below + 6), "bolid profile show me.safetensors --picture me.png", "black", font)
    left = MANNEQUIN + GAP
    picture.paste(pictures, (left, top + (below - pictures.height) // 2))
    draw.text(
        (left, top + below + 6),
        'bolid generate "..." --profile me.safetensors --upscale 2 --refine-face',
        "black",
        font,
    )
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of one person's photos")
    parser.add_argument("--height", default="172", help="in cm")
    parser.add_argument("--who", default="woman", choices=("woman", "man"))
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 0), help="of the full body and the portrait")
    parser.add_argument("--out", type=Path, default=Path("docs/person.jpg"))
    args = parser.parse_args()
    photos = sorted(args.photos.glob("*.jpg"))
    with tempfile.TemporaryDirectory() as work:
        me = api.make_profile(photos, Path(work, "me.safetensors"), known=read_known({"height": args.height}))
        mannequin = picture_profile(me.path, Path(work, "me.png"))
        usual: dict[str, Any] = {"profile": me.path, "upscale": 2, "refine_face": True}
        standing, portrait = args.seeds
        made = [
            *api.generate([STANDING.format(args.who)], work, seed=standing, pose="standing", **usual),
            *api.generate([PORTRAIT.format(args.who)], work, seed=portrait, **usual),
        ]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet(photos, mannequin, made, args.height).save(args.out, quality=90)
    print(args.out)


if __name__ == "__main__":
    main()
