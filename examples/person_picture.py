"""README's second picture: a person's photos, the mannequin that they give, and pictures of that body.

    bolid synth --person-seed 200000 --photos 8 --size 192x256 --out photos
    python examples/person_picture.py photos/p200000 --height 172 --out docs/person.png

Every part is made by the command of its caption.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from PIL import Image, ImageDraw, ImageFont

from bolid import api
from bolid.body.profiles import read_known
from bolid.profile import picture_profile

WIDTH, GAP, CAPTION = 1680, 12, 34  # pixels
MANNEQUIN = 1060  # of the width
PROMPTS = (
    "a full body photo of a woman standing, in a red short-sleeved top and blue trousers, on a beach",
    "a full body photo of a woman standing, in a white long-sleeved top and black trousers, in the snow",
)


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
    parser.add_argument("--prompt", action="append", help="once a picture; by default two full bodies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pose", help="follow the 3D body in this pose as well, like standing")
    parser.add_argument("--out", type=Path, default=Path("docs/person.png"))
    args = parser.parse_args()
    photos = sorted(args.photos.glob("*.jpg"))
    with tempfile.TemporaryDirectory() as work:
        me = api.make_profile(photos, Path(work, "me.safetensors"), known=read_known({"height": args.height}))
        mannequin = picture_profile(me.path, Path(work, "me.png"))
        body = {"body_from": "both", "pose": args.pose} if args.pose else {}
        made = list(
            api.generate(
                args.prompt or PROMPTS,
                Path(work, "pictures"),
                profile=me.path,
                seed=args.seed,
                upscale=2,
                refine_face=True,
                **body,
            )
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet(photos, mannequin, made, args.height).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
