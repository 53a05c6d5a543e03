"""`bolid models`: fetch a family's published weights, look whether they are whole, and convert them.

Every part of a family is a folder or a file below BOLID_HOME/<family>. What `pull` put there is written down in
models.json beside it: source, commit, license, and size and SHA-256 of each file. The first fetch is trusted, for no
hashes are pinned (see `Source`); from then on `verify` compares.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import os
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bolid.errors import BolidError
from bolid.models.families import DEFAULT_FAMILY, SOURCES, Family, Source, get_family
from bolid.run import Progress, atomic_path, canonical_json, disk_errors, home, sha256_file, write_atomic

MANIFEST = "models.json"
REACH_SECONDS = 1.5  # for the question whether there is a network at all
_BLOCK = 1 << 20


# ---- what there is ------------------------------------------------------------------------------------------------


def describe(family: Family, *, commercial: bool = False) -> list[dict[str, Any]]:
    """Every published part of ``family``: what, how big, license, revision, where it lies or is looked for, its state.

    state: "there", "missing", or "refused" where ``commercial`` use is asked for and its license forbids it.
    """
    written = read_manifest(family.root)
    parts = []
    for source in SOURCES.get(family.name, ()):
        entry = written.get(source.part, {})
        refused = commercial and not source.commercial
        parts.append(
            {
                "part": source.part,
                "name": source.name,
                "megabytes": source.megabytes,
                "license": source.license,
                "commercial": source.commercial,
                "source": source.repo or source.url,
                "revision": entry.get("revision", ""),
                "sha256": {name: file["sha256"] for name, file in entry.get("files", {}).items()},
                "where": getattr(family, source.part),
                "optional": source.optional,
                "state": "refused" if refused else "there" if family.has(source.part) else "missing",
                "notice": source.notice,
                "instead": source.instead if refused else "",
            }
        )
    return parts


def read_manifest(root: Path) -> dict[str, Any]:
    """What was pulled into a family's folder: part -> {source, revision, license, files: name -> {size, sha256}}."""
    path = root / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BolidError(f"{path} is damaged", "remove it: the next pull writes it anew") from error
    if not isinstance(data, dict) or not all(isinstance(entry, dict) for entry in data.values()):
        raise BolidError(f"{path} is damaged", "remove it: the next pull writes it anew")
    return data


# ---- pull ---------------------------------------------------------------------------------------------------------


def pull(
    name: str,
    *,
    only: Sequence[str] = (),
    from_dir: str | os.PathLike[str] | None = None,
    commercial: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Fetch the parts of family ``name`` that are not there yet; returns the places of all that were asked for.

    ``only``: these parts, optional ones too; by default all that are not optional. ``from_dir``: take them from a
    folder copied from another machine (a family's folder, a Hugging Face cache, or the downloaded files as they are)
    and ask no network. With ``commercial`` a part whose license forbids that use is an error, before anything is
    fetched. An interrupted download goes on where it stopped. HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are respected.
    Raises BolidError, within two seconds where there is no network.
    """
    family = get_family(name)
    sources = SOURCES.get(family.name, ())
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
                f"{source.name}: {source.license}; commercial use is asked for",
                f"{source.instead}; the other parts: bolid models pull {name} "
                + " ".join(f"--only {s.part}" for s in wanted if s.commercial),
            )
    places = []
    for number, source in enumerate(wanted):
        if progress:
            progress(number, len(wanted), source.name)
        if not family.has(source.part):
            _fetch(family, source, from_dir, progress)
        places.append(getattr(family, source.part))
    return places


def _fetch(family: Family, source: Source, from_dir: str | os.PathLike[str] | None, progress: Progress | None) -> None:
    target: Path = getattr(family, source.part)
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
        elif target.is_dir():  # an empty folder: `has` said no
            target.rmdir()
    if not ready and found.suffix == ".pt":
        convert(found, target)
    elif not ready and found.suffix == ".zip":
        _unpack(found, target)
    elif from_dir is None and not source.file:
        _link(found, target)
    else:
        _copy(found, target)
    files = {
        file.name if target.is_file() else file.relative_to(target).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in _files(target, source.files)
    }
    entry = {
        "source": source.repo or source.url,
        "revision": revision,
        "license": source.license,
        "files": files,
    }
    if not ready:
        entry["fetched"] = {"file": found.name, "sha256": sha256_file(found)}
    write_atomic(family.root / MANIFEST, canonical_json(read_manifest(family.root) | {source.part: entry}) + "\n")


def _files(place: Path, patterns: Sequence[str] = ()) -> list[Path]:
    """The files of a part; of a Hugging Face cache, which may hold more of a repository, those of ``patterns``."""
    if place.is_file():
        return [place]
    files = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = [file.relative_to(place).as_posix() for file in files]
    return [
        file
        for file, name in zip(files, names, strict=True)
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


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


def _from_hub(family: Family, source: Source, progress: Progress | None) -> tuple[Path, str]:
    """(the snapshot's folder or file in the Hugging Face cache, its commit)."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    reachable = not offline and _reachable(endpoint)
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
                    local_files_only=not reachable,
                    tqdm_class=_bar(progress, source.name),
                )  # fmt: skip
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
        if not reachable:
            raise _out_of_reach(family, source, endpoint, offline, cache)
        raise BolidError(
            f"{source.repo} has no {absent} any more", "tell the makers of bolid; until then fetch it by hand"
        )
    return found, snapshot.name


def _absent(folder: Path, source: Source) -> str:
    """The first file of a repository that must be there and is not; "" when all are."""
    if source.file:
        return "" if (folder / source.file).is_file() else source.file
    # What may be missing are the many names a tokenizer's files may have.
    needed = [name for name in source.files if "*" not in name and name not in ("vocab.json", "merges.txt")]
    needed = [name for name in needed if not name.startswith("special_tokens")]
    needed += ["*.safetensors"] if source.part == "caption" else []
    return next((name for name in needed if not any(folder.glob(name))), "")


def _out_of_reach(family: Family, source: Source, host: str, offline: bool, looked: Path) -> BolidError:
    why = "HF_HUB_OFFLINE is set" if offline else f"{urllib.parse.urlsplit(host).hostname} cannot be reached"
    return BolidError(
        f"{source.name} ({source.part}, {source.megabytes} MB) is missing and {why}: looked for "
        f"{getattr(family, source.part)} and in {looked}",
        f"on a machine with a network: bolid models pull {family.name}; copy its {family.root} here (cp -rL, "
        "it holds links), then: "
        f"bolid models pull {family.name} --from THAT_FOLDER",
    )


def _reachable(url: str) -> bool:
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


def _download(family: Family, source: Source, progress: Progress | None) -> Path:
    """A release file, kept in BOLID_HOME/downloads for the other families; goes on where it stopped."""
    name = source.url.rsplit("/", 1)[1]
    target = home() / "downloads" / name
    if target.is_file():
        return target
    if not _reachable(source.url):
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


def _in_folder(folder: Path, source: Source, place: Path) -> tuple[Path, bool]:
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
    """What the other machine wrote down about its files must be true of the copies."""
    files = read_manifest(folder).get(part, {}).get("files", {})
    for name, expected in files.items():
        file = found if found.is_file() else found / name
        _check_file(file, expected, "copy it again from the other machine")


def _check_file(file: Path, expected: dict[str, Any], hint: str) -> None:
    if not file.is_file():
        raise BolidError(f"{file} is missing", hint)
    if file.stat().st_size != expected["size"] or sha256_file(file) != expected["sha256"]:
        raise BolidError(f"{file} is not what was fetched: its size or SHA-256 differs", hint)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``target`` when it is full; a failure leaves nothing."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy(found: Path, target: Path) -> None:
    if found.is_file():
        with atomic_path(target) as temporary:
            shutil.copyfile(found, temporary)
        return
    with _new_folder(target) as temporary:
        shutil.copytree(found, temporary, dirs_exist_ok=True)  # follows the links of a Hugging Face cache


def _link(found: Path, target: Path) -> None:
    """The Hugging Face cache's own copy, where the system has links; gigabytes need not lie there twice."""
    try:
        target.symlink_to(found, target_is_directory=found.is_dir())
    except OSError:
        _copy(found, target)


def _unpack(archive: Path, target: Path) -> None:
    """The .onnx files of an InsightFace pack; some are zipped with a folder around them."""
    try:
        with zipfile.ZipFile(archive) as packed, _new_folder(target) as temporary:
            members = [m for m in packed.infolist() if m.filename.endswith(".onnx") and not m.is_dir()]
            if not members:
                raise BolidError(f"{archive} holds no .onnx files", "remove it and pull again")
            for member in members:
                # By its last name only: a name in an archive may point anywhere.
                with packed.open(member) as source, open(temporary / Path(member.filename).name, "wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK)
    except (zipfile.BadZipFile, EOFError) as error:
        raise BolidError(f"{archive} is damaged: {error}", "remove it and pull again") from error


# ---- verify and convert -------------------------------------------------------------------------------------------


def verify(name: str, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Look at every file of family ``name``; a row for each part that is there or must be: part, where, state.

    state: "as fetched" (every SHA-256 is that of the first fetch), "whole" (safetensors files end where they say, but
    nobody wrote down what was fetched), "missing".
    Raises BolidError for a damaged file: it names the file.
    """
    family = get_family(name)
    written = read_manifest(family.root)
    published = {source.part: source for source in SOURCES.get(family.name, ())}
    parts = [part for part in published if not published[part].optional or family.has(part)]
    parts += [part for part in family.missing() if part not in parts]
    parts += [part for part in ("base", "pose", "face", "image_text", "body_encoder") if part not in parts]
    again = f"remove it, then: bolid models pull {family.name}"
    rows = []
    for number, part in enumerate(parts):
        if progress:
            progress(number, len(parts), part)
        where: Path = getattr(family, part)
        state = "missing"
        if family.has(part):
            files = written.get(part, {}).get("files", {})
            for file, expected in files.items():
                _check_file(where if where.is_file() else where / file, expected, again)
            state = "as fetched" if files else "whole"
            if not files:
                _check_whole(where, again)
        rows.append({"part": part, "where": where, "state": state})
    return rows


def _check_whole(place: Path, hint: str) -> None:
    from bolid.formats.tensors import read_header

    for file in _files(place):
        try:
            if file.suffix == ".safetensors":
                read_header(file)
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.stat().st_size == 0:
                raise BolidError(f"{file} is empty")
        except BolidError as error:
            raise BolidError(error.message, hint) from error
        except ValueError as error:
            raise BolidError(f"{file} is not JSON", hint) from error


def convert(file: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """YOLO11 pose weights, ultralytics' own (.pt) or exported (.onnx) -> a folder that BoLID reads. Returns the folder.

    It holds config.json and model.safetensors, or the .onnx as it is. By default beside ``file``, under its name.
    Nothing that the file might ask to be run is run.
    Raises BolidError for another network, a damaged file, and one that holds more than such weights.
    """
    from bolid.backends.pose import read_checkpoint, write_onnx_pose_model, write_pose_model

    path = Path(file)
    out = Path(out) if out is not None else path.with_suffix("")
    if path.suffix not in (".pt", ".onnx"):
        raise BolidError(
            f"{path} is no .pt and no .onnx file",
            "only YOLO's pose weights need to be converted: yolo11n-pose.pt and the like",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BolidError(f"{out} is already there", "remove it, or name another place with --out")
    checkpoint = read_checkpoint(path) if path.suffix == ".pt" else None
    if out.is_dir():
        out.rmdir()
    with _new_folder(out) as temporary:
        if checkpoint:
            write_pose_model(temporary, *checkpoint, source=path.name, sha256=sha256_file(path))
        else:
            write_onnx_pose_model(temporary, path)
    return out
