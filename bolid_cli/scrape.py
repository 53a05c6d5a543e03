"""``bolid scrape``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bolid.errors import BolidError
from bolid_cli._console import (
    DeviceOption,
    FamilyOption,
    ForceOption,
    JsonOption,
    QuietOption,
    choose_family,
    emit_json,
    emit_paths,
    note,
    print_table,
    progress_bar,
)
from bolid_cli._options import configurable

if TYPE_CHECKING:
    import numpy as np

    from bolid.scrape.command import ScrapeResult


_FILTERS, _RECORDS, _WEB, _DELETE = "Filters", "Records", "From the web", "Delete a person"


@configurable
def scrape(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Your own photos: a folder of <person>/*.jpg, or of one person's.", show_default=False),
    ] = None,
    urls: Annotated[
        Path | None,
        typer.Option(
            help="Or addresses: a .txt, .csv, .tsv or .parquet file of person, url and caption.", show_default=False
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="Or a gallery: theplace, or a .toml file describing one.", metavar="NAME", show_default=False
        ),
    ] = None,
    person: Annotated[
        list[str] | None, typer.Option(help="Only this person. May be repeated.", metavar="NAME", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write <person>/*.jpg to.")] = Path("photos"),
    min_size: Annotated[
        int, typer.Option(help="Pixels of the shorter side, at least.", rich_help_panel=_FILTERS)
    ] = 1000,
    min_photos: Annotated[
        int | None,
        typer.Option(
            help="Leave out people with fewer photos.  [default: 100 with --site, otherwise 1]",
            show_default=False,
            rich_help_panel=_FILTERS,
        ),
    ] = None,
    max_photos: Annotated[
        int | None, typer.Option(help="Photos of one person, at most.", show_default=False, rich_help_panel=_FILTERS)
    ] = None,
    max_people: Annotated[
        int | None, typer.Option(help="People, at most.", show_default=False, rich_help_panel=_FILTERS)
    ] = None,
    min_sharpness: Annotated[
        float,
        typer.Option(
            help="Drop blurred photos: variance of the Laplacian at 512 pixels, at least. 0 keeps all.",
            min=0,
            rich_help_panel=_FILTERS,
            hidden=True,
        ),
    ] = 20.0,
    one_person: Annotated[
        bool,
        typer.Option(
            "--one-person",
            help="Drop photos in which the family's pose model does not detect exactly one person.",
            rich_help_panel=_FILTERS,
        ),
    ] = False,
    force: ForceOption = False,
    watermark: Annotated[
        str | None,
        typer.Option(
            help="A program that is called with a photo's path. If it fails, the photo is dropped; the reason is what "
            "the program prints.",
            metavar="COMMAND",
            show_default=False,
            rich_help_panel=_FILTERS,
            hidden=True,
        ),
    ] = None,
    max_bad: Annotated[
        float,
        typer.Option(
            help="Fail when more than this fraction of the photos, and more than one, cannot be fetched or read.",
            min=0,
            max=1,
            rich_help_panel=_FILTERS,
            hidden=True,
        ),
    ] = 0.05,
    license: Annotated[
        str | None,
        typer.Option(
            help="License of the photos, for their records.  [default: the site's]",
            show_default=False,
            rich_help_panel=_RECORDS,
        ),
    ] = None,
    consent: Annotated[
        str, typer.Option(help="What the people agreed to, for the photos' records.", rich_help_panel=_RECORDS)
    ] = "unknown",
    contact: Annotated[
        str | None,
        typer.Option(
            envvar="BOLID_CONTACT",
            help="Your mail or web address, sent to every web server.",
            show_default=False,
            rich_help_panel=_WEB,
        ),
    ] = None,
    delay: Annotated[
        float,
        typer.Option(
            help="Seconds between two requests to a host, at least; more where the host is slow. 0: none.",
            max=86400,
            rich_help_panel=_WEB,
        ),
    ] = 1.0,
    connections: Annotated[
        int,
        typer.Option(
            help="Requests to one host at a time. More than 1 only on your own server.",
            max=1000,
            rich_help_panel=_WEB,
            hidden=True,
        ),
    ] = 1,
    ignore_robots: Annotated[
        bool,
        typer.Option(
            "--ignore-robots",
            help="Fetch what robots.txt forbids. Every photo's record says so.",
            rich_help_panel=_WEB,
            hidden=True,
        ),
    ] = False,
    allow_private: Annotated[
        bool,
        typer.Option(
            "--allow-private",
            help="Follow links and redirects to private networks. Addresses that you give may always be there.",
            rich_help_panel=_WEB,
            hidden=True,
        ),
    ] = False,
    forget: Annotated[
        str | None,
        typer.Option(
            help="Delete a person: photos in --out, samples in shards/ and train/, profiles here made of the photos.",
            metavar="PERSON",
            show_default=False,
            rich_help_panel=_DELETE,
        ),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --forget: more shard directories and profiles. May be repeated.",
            metavar="PATH",
            show_default=False,
            rich_help_panel=_DELETE,
        ),
    ] = None,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Collect and clean photos of people: your own, or from the web, politely.

    \b
    bolid scrape my-photos/                                             your own folder
    bolid scrape --urls list.csv --contact you@example.org              a list
    bolid scrape --site gallery.toml --contact you@example.org          a gallery
    bolid scrape --forget "Anna Ivanova"                                delete a person everywhere

    Each photo gets a .json with its origin, hash, size, license and consent. Dropped ones are listed with the reason in
    dropped.csv. After an interruption the same command goes on where it stopped, and nothing is fetched twice.
    robots.txt, noai and TDM reservations are obeyed. Photos of people are personal data:
    read docs/guides/collecting.md first.
    """
    if forget is not None:
        if folder is not None or urls is not None or site is not None:
            raise BolidError("--forget deletes; it does not collect", "give it without FOLDER, --urls and --site")
        _forget(forget, out, also or [], as_json, quiet)
        return
    if also:
        raise BolidError("--also belongs to --forget", "leave it out, or add --forget PERSON")
    chosen = choose_family(family, quiet).name if one_person else family
    if ignore_robots and folder is None:
        note("warning: robots.txt is ignored (--ignore-robots); every photo's record will say so")
    import bolid.scrape

    try:
        with progress_bar(quiet) as progress:
            result = bolid.scrape.scrape(
                folder,
                urls=urls,
                site=site,
                person=person,
                out=out,
                min_size=min_size,
                min_photos=min_photos,
                max_photos=max_photos,
                max_people=max_people,
                min_sharpness=min_sharpness,
                one_person=one_person,
                force=force,
                watermark=_checker(watermark) if watermark else None,
                license=license,
                consent=consent,
                contact=contact,
                connections=connections,
                delay=delay,
                ignore_robots=ignore_robots,
                allow_private=allow_private,
                max_bad=max_bad,
                family=chosen,
                device=device,
                progress=progress,
            )
    except bolid.scrape.TooManyFailed as error:
        _summary(error.result, quiet)
        raise
    _summary(result, quiet)
    for warning in result.warnings:
        note(f"warning: {warning}")
    if as_json:
        emit_json(result)
    else:
        emit_paths([result.out])


def _summary(result: ScrapeResult, quiet: bool) -> None:
    rows = [
        *((reason, number, "photos") for reason, number in result.dropped.items()),
        *((reason, number, "failed") for reason, number in result.failed.items()),
        *((reason, number, "people") for reason, number in result.people_dropped.items()),
    ]
    if rows:
        print_table(("dropped", "number", "of"), rows, quiet)
    note(f"kept {result.photos} photos of {result.people} people ({result.new} new)", quiet)


def _forget(person: str, out: Path, also: list[Path], as_json: bool, quiet: bool) -> None:
    import bolid.scrape.forget

    with progress_bar(quiet) as progress:
        result = bolid.scrape.forget.forget(person, out, also, progress=progress)
    samples = sum(map(len, result.samples.values()))
    note(
        f"{result.person}: deleted {len(result.photos)} files in {out}, {samples} samples in "
        f"{', '.join(result.samples) or 'no shards'}, {len(result.profiles)} profiles",
        quiet,
    )
    note("models trained on the photos and pictures made of the person are not changed: train, or delete, again", quiet)
    if as_json:
        emit_json(result)
    else:
        emit_paths(result.photos)
        emit_paths(f"{directory}/{key}" for directory, keys in result.samples.items() for key in keys)
        emit_paths(result.profiles)


def _checker(command: str) -> Callable[[np.ndarray], str]:
    """The program as a function of a picture, which returns the reason for dropping it, or ""."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BolidError(f"--watermark {command!r} is no command line: {error}", "check its quotes") from error

    def check(image: np.ndarray) -> str:
        import subprocess
        import tempfile

        from bolid.formats.images import encode_jpeg

        with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            file.write(encode_jpeg(image))
            file.flush()
            try:
                done = subprocess.run([*words, file.name], capture_output=True, text=True, timeout=600)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BolidError(f"--watermark {command!r} cannot be run: {error}", "give a program") from error
        return "" if done.returncode == 0 else done.stdout.strip().partition("\n")[0] or "found"

    check.__name__ = command
    return check
