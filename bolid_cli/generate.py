"""``bolid generate``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bolid.errors import BolidError
from bolid.run import LARGEST_SEED
from bolid_cli._console import (  # fmt: skip
    DeviceOption,
    Engine,
    EngineOption,
    FamilyOption,
    ForceOption,
    JsonOption,
    QuietOption,
    WorkersOption,
    emit_json,
    note,
    progress_bar,
)
from bolid_cli._options import configurable
from bolid_cli._settings import COMMON
from bolid_cli._streams import emit


class Format(StrEnum):
    """Choices of --format."""

    png = "png"
    jpg = "jpg"
    webp = "webp"


class Precision(StrEnum):
    """Choices of --dtype."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


_PERSON, _SAMPLING, _MODELS = "How strongly the person counts", "Sampling", "Models"
_INTERVAL = "An interval counts in fractions of the denoising: 0 is pure noise, 1 the finished picture."


@configurable
def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to show. - reads prompts from standard input.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="File of prompts, one a line.", hidden=True)] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Show this person: a file that `bolid profile` wrote. May be repeated: each in pictures of their own.",
        ),
    ] = None,
    photo: Annotated[
        Path | None,
        typer.Option(metavar="PHOTO", help="Show the person in this photo. Best: the whole body, upright."),
    ] = None,
    new_person: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Invent a person; the same number, the same person.", max=LARGEST_SEED),
    ] = None,
    pose_from: Annotated[
        Path | None, typer.Option(metavar="PHOTO", help="Give the pictures the pose of the person in this photo.")
    ] = None,
    body_from: Annotated[
        str | None,
        typer.Option(
            metavar="adapter|shape|both",
            help="Take the body from the trained body branch, from the depth map of the person's 3D body (through the "
            "family's depth ControlNet), or from both. Default: adapter; with --pose both.",
            hidden=True,
        ),
    ] = None,
    pose: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Pose of the 3D body: standing, walking, waving, ... Default: standing."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Take what is not given here from this picture of generate's: prompt, person, sampling, seed. "
            "It is made again; with --seed or other options, varied.",
        ),
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What not to show.")] = "",
    n: Annotated[int, typer.Option("-n", metavar="N", help="Pictures of each prompt.")] = 1,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Of the pictures, in pixels, like 832x1216. Default: the family's."),
    ] = None,
    upscale: Annotated[
        int, typer.Option(metavar="2|4", help="Enlarge the pictures by the family's upscaler.", hidden=True)
    ] = 1,
    refine_face: Annotated[
        bool, typer.Option("--refine-face", help="Sample small faces again, larger, and blend them in.")
    ] = False,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=A,B,...",
            help="Make one labelled contact sheet of all combinations. Axes: body-scale, face-scale, guidance, "
            "face-guidance, body-guidance, steps, seed. May be repeated.",
        ),
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Of the picture files. jpg and webp are smaller and lose a little.", hidden=True)
    ] = Format.png,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the pictures. Those of other commands there are kept.")
    ] = Path("generated"),
    face_scale: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Weight of the face branch, written like --body-scale. Default: the family's (1) where a face is "
            "known.",
            rich_help_panel=_PERSON,
        ),
    ] = None,
    body_scale: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Weight of the body branch: a number (0.7); one for each part of the UNet (down=0.5,mid=1,up=1); an "
            "interval (0.2..0.8: from 20 % to 80 % of the denoising); or both (0.7@0.2..0.8). Default: the family's "
            "(1; another with --few-steps) where a body is known.",
            rich_help_panel=_PERSON,
        ),
    ] = None,
    face_guidance: Annotated[
        str,
        typer.Option(
            metavar="SCALE",
            help="Guidance by the face model: each step follows the gradient that makes the face more like the "
            f"person's. 1, or 0.5@0.3..0.7; without an interval 0.3..0.9. {_INTERVAL} Takes about five times as long.",
            rich_help_panel=_PERSON,
            hidden=True,
        ),
    ] = "0.0",
    body_guidance: Annotated[
        str,
        typer.Option(
            metavar="SCALE",
            help="The same by the body encoder, for the body; without an interval 0.5..0.9.",
            rich_help_panel=_PERSON,
            hidden=True,
        ),
    ] = "0.0",
    best_of: Annotated[
        int,
        typer.Option(
            help="Generate so many of each picture and keep the one whose body and face are most like the person's.",
            rich_help_panel=_PERSON,
            hidden=True,
        ),
    ] = 1,
    pose_scale: Annotated[
        str,
        typer.Option(metavar="SCALE", help="Weight of the pose of --pose-from.", rich_help_panel=_PERSON, hidden=True),
    ] = "1.0",
    shape_scale: Annotated[
        str,
        typer.Option(metavar="SCALE", help="Weight of the 3D body's depth.", rich_help_panel=_PERSON, hidden=True),
    ] = "1.0",
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Denoising steps. Default: the family's.", rich_help_panel=_SAMPLING),
    ] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            metavar="SCALE",
            help="Guidance scale: 2.5, or with an interval 2.5@0..0.75. Default: the family's.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    few_steps: Annotated[
        bool,
        typer.Option(
            "--few-steps",
            help="Use the family's few-step sampler: faster, and without guidance.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Pictures in a batch.", rich_help_panel=_SAMPLING, hidden=True)] = 8,
    dtype: Annotated[
        Precision,
        typer.Option(
            help="Precision of the networks; auto: fp16 on CUDA, otherwise fp32. The VAE stays in fp32.",
            rich_help_panel=_SAMPLING,
            hidden=True,
        ),
    ] = Precision.auto,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="Keep each network in main memory while it does not compute.",
            rich_help_panel=_SAMPLING,
            hidden=True,
        ),
    ] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of face adapter, body adapter or both. Default: the family's.",
            rich_help_panel=_MODELS,
            hidden=True,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Another base of the family's kind: a .safetensors checkpoint or a folder.",
            rich_help_panel=_MODELS,
            hidden=True,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="Add a LoRA to the base. May be repeated.", rich_help_panel=_MODELS),
    ] = None,
    force: ForceOption = False,
    workers: WorkersOption = 1,
    engine: EngineOption = Engine.local,
    family: FamilyOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=LARGEST_SEED,
            metavar="N",
            rich_help_panel=COMMON,
            help="Same seed, same pictures. Default: 0, or the seed of --like.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make pictures of a person from text alone.

    Without --profile, --photo and --new-person the pictures show nobody in particular: they are the plain base's.
    The paths go to standard output, one a line (with --grid: the contact sheet's). Each picture carries the settings
    that made it: bolid inspect shows them, --like uses them, and other programs read them. After an interruption the
    same command goes on where it stopped. Started by torchrun or srun, several processes share the pictures.
    """
    import bolid.generate
    from bolid.workers import this_rank

    wanted = list(prompts or [])
    if prompts_file is not None:
        try:
            wanted += bolid.generate.read_prompts(prompts_file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise BolidError(f"cannot read the prompts in {prompts_file}: {error}", "give a text file") from error
    leads = this_rank().leads  # the other ranks get their share from it
    if "-" in wanted and leads:
        at = wanted.index("-")
        wanted[at : at + 1] = bolid.generate.read_prompts(sys.stdin.read().splitlines())
    printed = not (as_json or grid)
    quiet = quiet or not leads
    with progress_bar(quiet) as progress:
        paths = bolid.generate.generate(
            wanted, out, like=like, profile=profile, photo=photo, new_person=new_person, adapter=adapter,
            face_scale=face_scale, body_scale=body_scale, lora=lora, pose_from=pose_from, pose_scale=pose_scale,
            body_from=body_from, pose=pose, shape_scale=shape_scale, few_steps=few_steps, steps=steps,
            guidance=guidance, face_guidance=face_guidance, body_guidance=body_guidance, negative=negative, n=n,
            best_of=best_of, batch_size=batch_size, grid=grid, family=family, base=base, size=size, upscale=upscale,
            refine_face=refine_face, dtype=dtype.value, offload=offload, device=device, seed=seed, force=force,
            format=format.value, workers=workers, engine=engine.value, progress=progress, models=context.obj,
            warn=lambda text: note(f"warning: {text}"), made=(lambda path: emit(str(path))) if printed else None,
        )  # fmt: skip
    if not paths:  # rank 0 reports
        return
    pictures, sheet = (paths[:-1], paths[-1]) if grid else (paths, None)
    if as_json:
        emit_json({"pictures": pictures} | ({"sheet": sheet} if sheet else {}))
    elif sheet:
        emit(str(sheet))
