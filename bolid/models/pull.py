"""`bolid models`: fetch a family's published weights, look whether they are whole, and convert them.

Every part of a family is a folder or a file below BOLID_HOME/<family>. What `pull` put there is recorded in
models.json beside it: source, commit, license, and size and SHA-256 of each file. The first fetch is trusted, for no
hashes are pinned (see `bolid.models.sources`); from then on `verify` compares.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.models.checksums import MANIFEST, check_file, read_manifest
from bolid.models.convert import convert
from bolid.models.families import DEFAULT_FAMILY, Family, get_family, refuse_non_commercial
from bolid.models.manifest import files_of
from bolid.models.sources import SOURCES, PublishedPart, published
from bolid.run import (
    Progress,
    atomic_folder,
    atomic_path,
    canonical_json,
    disk_errors,
    home,
    sha256_file,
    write_atomic,
)

REACH_SECONDS = 1.5  # for the question whether there is a network at all
_BLOCK = 1 << 20


# ---- pull ---------------------------------------------------------------------------------------------------------


def pull(
    name: str,
    *,
    only: Sequence[str] = (),
    from_dir: str | os.PathLike[str] | None = None,
    commercial: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Fetch the parts of family ``name`` that are not there yet; returns the places of all parts that it names.

    ``only``: these parts, optional ones too; by default all that are not optional. ``from_dir``: take them from a
    folder copied from another machine (a family's folder, a Hugging Face cache, or the downloaded files as they are)
    and ask no network. With ``commercial`` other models take the place of those that are not licensed for it or come
    under the AGPL, and where there are none, an error comes before anything is fetched. An interrupted download goes
    on where it stopped. HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are respected.
    Raises BolidError, within two seconds where there is no network.
    """
    family = get_family(name)
    sources = published(family.name, commercial)
    if not sources:
        what = "ships with the package" if family.name == DEFAULT_FAMILY else "is your own"
        raise BolidError(f"family {name!r} {what}: there is nothing to pull", f"choose one of {', '.join(SOURCES)}")
    if unknown := sorted(set(only) - {source.part for source in sources}):
        raise BolidError(
            f"--only is {unknown[0]!r}, which is no published part of family {name!r}",
            "choose from " + ", ".join(source.part for source in sources),
        )
    wanted = [s for s in sources if s.part in only or (not only and not s.optional)]
    if from_dir is not None and not Path(from_dir).is_dir():
        raise BolidError(f"--from {from_dir} is not a folder", "give the folder that was copied from the other machine")
    for source in wanted:
        if commercial and not source.commercial:
            raise BolidError(
                f"{source.name}: {source.license}; --commercial is in force",
                f"{source.instead}; the other parts: bolid models pull {name} "
                + " ".join(f"--only {s.part}" for s in wanted if s.commercial),
            )
    places = []
    for number, source in enumerate(wanted):
        if progress:
            progress(number, len(wanted), source.name)
        if commercial and family.has(source.part):
            refuse_non_commercial(source.part, getattr(family, source.part), family.name)
        if not family.has(source.part):
            _fetch(family, source, from_dir, progress)
        places.append(getattr(family, source.part))
    return places


def _fetch(
    family: Family, source: PublishedPart, from_dir: str | os.PathLike[str] | None, progress: Progress | None
) -> None:
    target: Path = getattr(family, source.part)
    if source.members:
        _fetch_members(family, source, from_dir, progress)
        return
    if from_dir is not None:
        found, ready = _in_folder(Path(from_dir), source, target.relative_to(family.root))
        revision = "from " + str(Path(from_dir).resolve())
    elif source.repo:
        found, revision = _from_hub(family, source, progress)
        ready = True
    else:
        found, revision = _download(family, source, progress), source.url.rsplit("/", 2)[1]
        ready = False
    if from_dir is not None and ready:
        _compare_with_manifest(Path(from_dir), source.part, found)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():  # to a cache that has gone
            target.unlink()
        elif target.is_dir():  # an empty folder
            target.rmdir()
    if found.suffix == ".bin":
        ready = False
    if not ready and found.suffix in (".pt", ".pth", ".bin"):
        convert(found, target, family=family.name)
    elif not ready and found.suffix == ".zip":
        _unpack(found, target)
    elif from_dir is None and not source.file:
        _link(found, target)
    else:
        _copy(found, target)
    _note_files(family, source, revision, {} if ready else {"file": found.name, "sha256": sha256_file(found)})


def _fetch_members(
    family: Family, source: PublishedPart, from_dir: str | os.PathLike[str] | None, progress: Progress | None
) -> None:
    """A part of several networks, each published elsewhere: a folder with each under the name that BoLID knows."""
    target: Path = getattr(family, source.part)
    found: dict[str, tuple[Path, str]] = {}
    if from_dir is not None and (there := Path(from_dir) / target.relative_to(family.root)).is_dir():
        _compare_with_manifest(Path(from_dir), source.part, there)
    for name, member in source.members:
        if from_dir is not None:
            place = target.relative_to(family.root) / name
            found[name] = (_in_folder(Path(from_dir), member, place)[0], "from " + str(Path(from_dir).resolve()))
        elif member.repo:
            found[name] = _from_hub(family, member, progress)
        else:
            found[name] = (_download(family, member, progress), member.url.rsplit("/", 1)[1])
    with disk_errors(target), atomic_folder(target) as temporary:
        for name, (file, _) in found.items():
            if file.suffix == ".zip":
                _unpack_one(file, temporary / name)
            else:
                shutil.copyfile(next(iter(sorted(file.glob("*.onnx")))) if file.is_dir() else file, temporary / name)
    _note_files(family, source, ", ".join(revision for _, revision in found.values()), {})


def _note_files(family: Family, source: PublishedPart, revision: str, fetched: dict[str, str]) -> None:
    """Record in the manifest what lies where the part belongs; `fetched`: the file it was made from."""
    target: Path = getattr(family, source.part)
    files = {
        file.name if target.is_file() else file.relative_to(target).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in files_of(target, source.files)
    }
    entry: dict[str, Any] = {
        "source": source.place,
        "revision": revision,
        "license": source.license,
        "files": files,
    }
    if fetched:
        entry["fetched"] = fetched
    write_atomic(family.root / MANIFEST, canonical_json(read_manifest(family.root) | {source.part: entry}) + "\n")


def _bar(progress: Progress | None, name: str) -> Any:
    """What huggingface_hub takes for a bar on the terminal: it tells ``progress`` the megabytes, and shows nothing."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"file": io.StringIO(), "disable": False}))

        def display(self, *args: Any, **kwargs: Any) -> bool:
            if progress and self.unit == "B" and self.total:
                progress(int(self.n) >> 20, int(self.total) >> 20, f"{name}, MB")
            return True

    return Bar


def _from_hub(family: Family, source: PublishedPart, progress: Progress | None) -> tuple[Path, str]:
    """(the snapshot's folder or file in the Hugging Face cache, its commit)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    online = not offline and reachable(endpoint)
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    cache = Path(constants.HF_HUB_CACHE)
    patterns = [source.file] if source.file else list(source.files)
    try:
        with disk_errors(cache):
            # Downloads resume by themselves; what the cache has is not fetched again.
            snapshot = Path(
                huggingface_hub.snapshot_download(
                    source.repo,
                    allow_patterns=patterns,
                    local_files_only=not online,
                    tqdm_class=_bar(progress, source.name),
                )
            )
    except BolidError:
        raise
    except GatedRepoError as error:
        raise BolidError(
            f"{source.repo} is given only to those who accepted its terms",
            f"accept them at {endpoint}/{source.repo}, then: hf auth login, and the same command again",
        ) from error
    except HfHubHTTPError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BolidError(f"{endpoint} refused {source.repo}: {reason}", "try the same command again later") from error
    except LocalEntryNotFoundError as error:
        raise _out_of_reach(family, source, endpoint, offline, cache) from error
    except Exception as error:  # the network gone on the way: of httpx, of xet, of the system
        raise BolidError(
            f"the download of {source.repo} broke off: {error}", "the same command goes on where it stopped"
        ) from error
    found = snapshot / source.file if source.file else snapshot
    if absent := _absent(snapshot, source):
        if not online:
            raise _out_of_reach(family, source, endpoint, offline, cache)
        raise BolidError(
            f"{source.repo} has no {absent} any more", "tell the makers of bolid; until then fetch it by hand"
        )
    return found, snapshot.name


def _absent(folder: Path, source: PublishedPart) -> str:
    """The first file of a repository that must be there and is not; "" when all are."""
    if source.file:
        return "" if (folder / source.file).is_file() else source.file
    # What may be missing are the many names a tokenizer's files may have.
    needed = [name for name in source.files if "*" not in name and name not in ("vocab.json", "merges.txt")]
    needed = [name for name in needed if not name.startswith("special_tokens")]
    needed += ["*.safetensors"] if source.part == "caption" else []
    return next((name for name in needed if not any(folder.glob(name))), "")


def _out_of_reach(family: Family, source: PublishedPart, host: str, offline: bool, looked: Path) -> BolidError:
    why = "HF_HUB_OFFLINE is set" if offline else f"{urllib.parse.urlsplit(host).hostname} cannot be reached"
    return BolidError(
        f"{source.name} ({source.part}, {source.megabytes} MB) is missing and {why}: looked for "
        f"{getattr(family, source.part)} and in {looked}",
        f"on a machine with a network: bolid models pull {family.name}; copy its {family.root} here (cp -rL, "
        "it holds links), then: "
        f"bolid models pull {family.name} --from THAT_FOLDER",
    )


def reachable(url: str) -> bool:
    """Whether the host of ``url`` (or the proxy on the way) takes a connection. Asks for REACH_SECONDS at most."""
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if proxies.get(parts.scheme) and not urllib.request.proxy_bypass(parts.hostname or ""):
        proxy = proxies[parts.scheme]
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    answered: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, REACH_SECONDS):
            answered.append(True)

    # In a thread, because looking up a name cannot be given a time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_SECONDS)
    return bool(answered)


def _download(family: Family, source: PublishedPart, progress: Progress | None) -> Path:
    """A release file, kept in BOLID_HOME/downloads for the other families; goes on where it stopped."""
    name = source.url.rsplit("/", 1)[1]
    target = home() / "downloads" / name
    if target.is_file():
        return target
    if not reachable(source.url):
        raise _out_of_reach(family, source, source.url, False, target.parent)
    part = target.with_name(name + ".part")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in (1, 2):
            start = part.stat().st_size if part.is_file() else 0
            request = urllib.request.Request(source.url, headers={"Range": f"bytes={start}-"} if start else {})
            try:
                with (
                    urllib.request.urlopen(request, timeout=30) as answer,
                    open(part, "r+b" if start else "wb") as file,
                ):
                    if start and answer.status != 206:  # the server begins at the beginning
                        start = 0
                    file.seek(start)
                    total = start + int(answer.headers.get("Content-Length") or 0)
                    while block := answer.read(_BLOCK):
                        file.write(block)
                        if progress:
                            progress(file.tell() >> 20, total >> 20, f"{source.name}, MB")
                    file.truncate()
                    if total and file.tell() < total:
                        raise ConnectionError("the connection ended early")
                break
            except urllib.error.HTTPError as error:
                if error.code == 416 and attempt == 1:  # the rest of a whole file, or of another one: from the start
                    part.unlink()
                    continue
                raise BolidError(f"{source.url} answers {error.code} {error.reason}", "try again later") from error
            except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
                raise BolidError(
                    f"the download of {source.url} broke off: {error}", "the same command goes on where it stopped"
                ) from error
        os.replace(part, target)
    return target


# ---- a folder from another machine --------------------------------------------------------------------------------


def _in_folder(folder: Path, source: PublishedPart, place: Path) -> tuple[Path, bool]:
    """(where ``source`` lies in ``folder``, whether it is as the family wants it). BolidError when it is not there."""
    name = source.file or source.url.rsplit("/", 1)[-1]
    looked = [folder / place]
    if source.repo:
        for cache in (folder, folder / "hub"):
            snapshots = cache / ("models--" + source.repo.replace("/", "--")) / "snapshots"
            looked += sorted(snapshots.iterdir()) if snapshots.is_dir() else []
        looked += [folder / source.repo.split("/")[1], folder / source.repo]
    for path in looked:
        inside = path / source.file if source.file and path.is_dir() else path
        if inside.is_file() or (inside.is_dir() and any(inside.iterdir()) and not _absent(inside, source)):
            if source.url or source.file or inside.is_dir():
                return inside, True
    for path in (folder / name, folder / "downloads" / name) if name else ():
        if path.is_file():
            return path, bool(source.file)
    if source.url.endswith(".zip") and any((folder / Path(name).stem).glob("*.onnx")):
        return folder / Path(name).stem, True
    expected = [str(place), *([source.repo] if source.repo else []), *([name] if name else [])]
    raise BolidError(
        f"{source.name} ({source.part}) is not in {folder}: looked for {', '.join(expected)} there",
        "copy it there too, or leave it out by naming the others with --only",
    )


def _compare_with_manifest(folder: Path, part: str, found: Path) -> None:
    """Raises BolidError unless the copies agree with the other machine's record of its files."""
    files = read_manifest(folder).get(part, {}).get("files", {})
    for name, expected in files.items():
        file = found if found.is_file() else found / name
        check_file(file, expected, "copy it again from the other machine")


def _copy(found: Path, target: Path) -> None:
    if found.is_file():
        with atomic_path(target) as temporary:
            shutil.copyfile(found, temporary)
        return
    with atomic_folder(target) as temporary:
        shutil.copytree(found, temporary, dirs_exist_ok=True)  # follows the links of a Hugging Face cache


def _link(found: Path, target: Path) -> None:
    """The Hugging Face cache's own copy, where the system has links; gigabytes need not lie there twice."""
    try:
        target.symlink_to(found, target_is_directory=found.is_dir())
    except OSError:
        _copy(found, target)


def _unpack_one(archive: Path, target: Path) -> None:
    """The one .onnx file of MMPose's archives, wherever in it."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [m for m in packed.infolist() if m.filename.endswith(".onnx") and not m.is_dir()]
            if len(members) != 1:
                raise BolidError(f"{archive} holds {len(members)} .onnx files", "remove it and pull again")
            with packed.open(members[0]) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, _BLOCK)
    except (zipfile.BadZipFile, EOFError) as error:
        raise BolidError(f"{archive} is damaged: {error}", "remove it and pull again") from error


def _unpack(archive: Path, target: Path) -> None:
    """The .onnx files of an InsightFace pack; some are zipped with a folder around them."""
    try:
        with zipfile.ZipFile(archive) as packed, atomic_folder(target) as temporary:
            members = [m for m in packed.infolist() if m.filename.endswith(".onnx") and not m.is_dir()]
            if not members:
                raise BolidError(f"{archive} holds no .onnx files", "remove it and pull again")
            for member in members:
                # By its last name only: a name in an archive may point anywhere.
                with packed.open(member) as source, open(temporary / Path(member.filename).name, "wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK)
    except (zipfile.BadZipFile, EOFError) as error:
        raise BolidError(f"{archive} is damaged: {error}", "remove it and pull again") from error
