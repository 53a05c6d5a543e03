"""``bolid generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bolid.errors import BolidError
from bolid_cli._console import (  # fmt: skip
    DeviceOption,
    FamilyOption,
    JsonOption,
    QuietOption,
    SeedOption,
    emit_json,
    emit_paths,
    progress_bar,
)


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to show. - reads prompts from standard input.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="File of prompts, one a line.")] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Show this person: a file that `bolid profile` wrote. May be repeated: each in pictures of their own.",
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Show the person in this photo; one of the whole body, upright, says most.")
    ] = None,
    new_person: Annotated[int | None, typer.Option(help="Invent a person; the same number, the same person.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of face adapter, body adapter or both. Default: the family's.")
    ] = None,
    face_scale: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE", help="How strongly the face counts. Default: the family's (1) where a face is known."
        ),
    ] = None,
    body_scale: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="How strongly the body counts: 0.7; down=0.5,mid=1,up=1 (parts of the UNet); 0.2..0.8 (from 20 % to "
            "80 % of the denoising); or both, 0.7@0.2..0.8. Default: the family's (1; in few "
            "steps it may be another) where a body is known.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="Lay a LoRA over the base. May be repeated.")
    ] = None,
    pose_from: Annotated[
        Path | None, typer.Option(metavar="PHOTO", help="Give the pictures the pose of the person in this photo.")
    ] = None,
    pose_scale: Annotated[str, typer.Option(metavar="SCALE", help="How strongly that pose counts.")] = "1.0",
    few_steps: Annotated[
        bool, typer.Option("--few-steps", help="Use the family's few-step sampler: quicker, and without guidance.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the family's.")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Guidance scale: 2.5, or 2.5@0..0.75 (in the first 75 % of the denoising). Default: the family's.",
        ),
    ] = None,
    face_guidance: Annotated[
        str,
        typer.Option(
            metavar="SCALE",
            help="Draw the picture towards the person's face while it is painted, as the face model sees it: 1, or "
            "0.5@0.3..0.7 (without a stretch, from 30 % to 90 % of the denoising). Takes about five times as long.",
        ),
    ] = "0.0",
    body_guidance: Annotated[
        str,
        typer.Option(
            metavar="SCALE",
            help="The same towards the person's body, as the body encoder sees it: 1 (from 50 % to 90 %).",
        ),
    ] = "0.0",
    negative: Annotated[str, typer.Option(help="What not to show.")] = "",
    n: Annotated[int, typer.Option("-n", help="Pictures of each prompt.")] = 1,
    best_of: Annotated[
        int, typer.Option(help="Paint so many of each picture and keep the one most like the person, by body and face.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(help="Pictures made at a time.")] = 8,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=A,B,...",
            help="Make one labelled sheet of all combinations. Axes: body-scale, face-scale, guidance, face-guidance, "
            "body-guidance, steps, seed. May be repeated.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Another base of the family's kind: a .safetensors checkpoint or a folder."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Of the pictures, like 832x1216. Default: the family's.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, or auto: fp16 on CUDA. The VAE stays in fp32.")
    ] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep networks off the accelerator while they do not compute.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the pictures. Those of other commands there are kept.")
    ] = Path("generated"),
    family: FamilyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make pictures of a person from text alone.

    Without --profile, --reference and --new-person it is nobody in particular: the plain base. The paths go to standard
    output, one a line (with --grid: the sheet's); each PNG carries the settings it was made with (bolid inspect shows
    them).
    """
    import bolid.generate

    wanted = list(prompts or [])
    if prompts_file is not None:
        try:
            wanted += bolid.generate.read_prompts(prompts_file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise BolidError(f"cannot read the prompts in {prompts_file}: {error}", "give a text file") from error
    if "-" in wanted:
        at = wanted.index("-")
        wanted[at : at + 1] = bolid.generate.read_prompts(sys.stdin.read().splitlines())
    with progress_bar(quiet) as progress:
        paths = bolid.generate.generate(
            wanted, out, profile=profile, reference=reference, new_person=new_person, adapter=adapter,
            face_scale=face_scale, body_scale=body_scale, lora=lora, pose_from=pose_from, pose_scale=pose_scale,
            few_steps=few_steps, steps=steps, guidance=guidance, face_guidance=face_guidance,
            body_guidance=body_guidance, negative=negative, n=n, best_of=best_of, batch_size=batch_size, grid=grid,
            family=family, base=base, size=size, dtype=dtype, offload=offload, device=device, seed=seed,
            progress=progress, warn=lambda warning: typer.echo(f"warning: {warning}", err=True),
        )  # fmt: skip
    pictures, sheet = (paths[:-1], paths[-1]) if grid else (paths, None)
    if as_json:
        emit_json({"pictures": pictures} | ({"sheet": sheet} if sheet else {}))
    else:
        emit_paths([sheet] if sheet else pictures)
