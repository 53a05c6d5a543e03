"""Damaged files of every kind, in thousands: none is read wrong, none is an unexpected error, none hangs.

BOLID_CAMPAIGN=20 tries twenty times as many as the part in CI.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gallery import jpeg, picture
from mutations import damage, mutated_text
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo

from bolid.backends.body import read_body_encoder
from bolid.backends.caption import caption_for
from bolid.evaluate.pictures import generated_pictures, reference_photos
from bolid.formats.adapter import load_adapter, save_adapter
from bolid.formats.checkpoint import load_checkpoint, save_checkpoint
from bolid.formats.images import decode_image, glance, own_jpeg
from bolid.formats.photos import PhotoFolder
from bolid.formats.pictures import picture_record
from bolid.formats.profile import load_profile, save_profile
from bolid.formats.shards import ShardWriter, read_shards
from bolid.formats.sites import SITES, read_site
from bolid.formats.tensors import save_tensors
from bolid.inspect import inspect
from bolid.models.checksums import read_manifest
from bolid.models.families import get_family
from bolid.run import canonical_json
from bolid.scrape import scrape
from bolid.scrape.inputs import AddressList
from bolid.train_adapter.reports import Log

TINY = get_family("tiny")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    small = picture(0, (60, 48))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo"
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = {
        "JPEG": encoded(small, "JPEG", exif=exif, icc_profile=icc, comment=b"x"),
        "progressive JPEG": encoded(small, "JPEG", progressive=True),
        "CMYK JPEG": encoded(small.convert("CMYK"), "JPEG"),
        "PNG": encoded(small.convert("RGBA"), "PNG"),
        "palette PNG": encoded(small.convert("P"), "PNG", transparency=0),
        "WebP": encoded(small, "WEBP"),
        "GIF": encoded(small, "GIF", save_all=True, append_images=[small.rotate(90)]),
        "TIFF": encoded(small, "TIFF", compression="tiff_lzw"),
        "BMP": encoded(small, "BMP"),
        "ICO": encoded(small, "ICO"),
        "PPM": encoded(small, "PPM"),
        "TGA": encoded(small, "TGA"),
        "DDS": encoded(small.convert("RGBA"), "DDS"),
        "MPO": encoded(small, "MPO", save_all=True, append_images=[small]),
    }
    if features.check("avif"):
        found["AVIF"] = encoded(small, "AVIF")
    if features.check("jpg_2000"):
        found["JPEG 2000"] = encoded(small, "JPEG2000")
    return found


PICTURES = _pictures()


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind):
    def read(data: bytes) -> None:
        image = decode_image(data)
        assert image.dtype == np.uint8 and image.ndim == 3
        decode_image(data, max_side=20)
        glance(data, 16)
        bare = own_jpeg(data, image)
        assert bare is None or np.array_equal(decode_image(bare), image), "other pixels without the metadata"

    damage(kind, PICTURES[kind], read, tries=30)


def test_records_in_pictures():
    info = PngInfo()
    info.add_text("bolid", canonical_json({"kind": "picture", "seed": 12, "config": {"prompt": "a man"}}))
    data = encoded(picture(0, (40, 40)), "PNG", pnginfo=info)
    truth = picture_record(data)

    def read(changed: bytes) -> object:
        record = picture_record(changed)
        return truth if record is None and not changed.startswith(b"\x89PNG") else record

    damage("a picture's record", data, read, tries=100, truth=truth)


def tensors_of(path: Path) -> dict[str, bytes]:
    """A small profile with everything in it."""
    rng = np.random.default_rng(0)
    face = rng.normal(size=512).astype(np.float32)
    record = {
        "kind": "profile", "version": 1, "family": "tiny", "seed": None, "packages": {},
        "config": {"name": "me"}, "inputs": {"photo_000": "ab" * 32, "body_encoder": "cd" * 32},
    }  # fmt: skip
    save_profile(path, rng.normal(size=8), rng.normal(size=8), face / np.linalg.norm(face), np.ones(2) / 2, record)
    return record


def test_tensor_files(tmp_path):
    """Profiles, encoders, adapters and checkpoints: one checksum over record and tensors."""
    path = tmp_path / "x.safetensors"
    record = tensors_of(path)

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, list | tuple) else value

    def reader(load):
        def read(data: bytes) -> object:
            path.write_bytes(data)
            return plain(load(path))

        return read

    def checkpoint(path: Path) -> object:
        weight = torch.nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.AdamW([weight])
        step = load_checkpoint(path, {**record, "kind": "adapter"}, {"weight": weight}, optimizer)
        return [step, weight.detach()]

    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", 3, {**record, "kind": "adapter"}, {"weight": weight}, optimizer)
    # As shipped it is of version 0.1, whose checksum covers the tensors alone.
    save_adapter(tmp_path / "a", *load_adapter(TINY.body_adapter, "body"))
    cases = {
        "profile": (path.read_bytes(), lambda p: list(vars(load_profile(p)).values())),
        "checkpoint": ((tmp_path / "c").read_bytes(), checkpoint),
        "body encoder": (TINY.body_encoder.read_bytes(), read_body_encoder),
        "body shape": (TINY.body_shape.read_bytes(), lambda p: inspect(p, verify=True)["record"]),
        "adapter": ((tmp_path / "a").read_bytes(), lambda p: load_adapter(p, "body")),
    }
    for name, (data, load) in cases.items():
        read = reader(load)
        truth = read(data)
        damage(name, data, read, tries=60 if len(data) < 100_000 else 4, truth=truth)


def test_records_that_somebody_wrote(tmp_path):
    """Odd values under a checksum that fits: refused, or harmless."""
    path = tmp_path / "x.safetensors"
    record = tensors_of(path)
    tensors = {"body_mean": torch.zeros(4), "body_logvar": torch.zeros(4), "view_weights": torch.ones(1)}

    def read(data: bytes) -> None:
        try:
            changed = json.loads(data)
        except ValueError:
            return
        if isinstance(changed, dict):
            try:
                save_tensors(path, tensors, changed)
            except (TypeError, ValueError, UnicodeEncodeError):  # nothing that a file can hold
                return
            inspect(path, verify=True)
            load_profile(path)

    damage("records under a checksum", json.dumps(record, indent=1).encode(), read, tries=150, text=True)


@pytest.fixture
def shards(tmp_path, make_sample, record):
    writer = ShardWriter(tmp_path / "shards", record(), 8_000)
    for number in range(3):
        writer.write(make_sample("anna", number, size=(16, 12)))
    writer.reject("anna/9.jpg", "no person found")
    writer.close()
    return writer.directory


def read_samples(directory: Path) -> list:
    inspect(directory, verify=True)
    return [(s.key, s.image, s.meta, s.caption, sorted(s.tensors)) for s in read_shards(directory)]


def test_shards(shards):
    truth = read_samples(shards)
    for file in sorted(shards.iterdir()):

        def read(data: bytes, file: Path = file) -> list:
            file.write_bytes(data)
            return read_samples(shards)

        whole = file.read_bytes()
        damage(f"shards: {file.name}", whole, read, tries=60, text=file.suffix == ".json", truth=truth)
        file.write_bytes(whole)


def test_journals(tmp_path, make_sample, record):
    """A directory that was begun: the journal of its tars, damaged; what is written then is whole."""
    begun = ShardWriter(tmp_path / "begun", record(), 3_000)
    for number in range(4):
        begun.write(make_sample("anna", number, size=(16, 12)))
    number = itertools.count()

    def read(data: bytes) -> None:
        directory = tmp_path / str(next(number))
        shutil.copytree(tmp_path / "begun", directory)
        (directory / "journal.jsonl").write_bytes(data)
        writer = ShardWriter(directory, record(), 3_000)
        for sample in (make_sample("anna", place, size=(16, 12)) for place in range(4)):
            if sample.key not in writer.done_keys:
                writer.write(sample)
        writer.close()
        inspect(directory, verify=True)
        shutil.rmtree(directory)

    damage("journal of shards", (tmp_path / "begun" / "journal.jsonl").read_bytes(), read, tries=80, text=True)


def test_descriptions_in_toml(tmp_path):
    family = b"""image_size = [64, 48]
view_size = [128, 96]
sizes = [[64, 48], [48, 64]]
needs = ["unet"]
description = "mine"
defaults = {steps = 2, guidance = "3@0..0.5", scheduler = "DDIMScheduler"}
few_steps = {steps = 4, guidance = 0.0, body_scale = 1.25}
wardrobe = [{words = ["top"], default = "a white top", unless = ["portrait"]}]
paths = {base = "base", pose = "../pose"}
"""

    def use(path: str) -> None:
        chosen = get_family(path)
        chosen.missing(), chosen.dressed("a man"), chosen.guidance, chosen.with_size(None)

    cases = {
        "site": ((SITES / "theplace.toml").read_bytes(), read_site),
        "family": (family, use),
    }
    for name, (data, load) in cases.items():
        path = tmp_path / f"{name}.toml"

        def read(data: bytes, path: Path = path, load=load) -> None:
            path.write_bytes(data)
            load(str(path))

        damage(f"{name}.toml", data, read, tries=120, text=True)


@pytest.mark.slow
def test_config_files(tmp_path):
    from typer.testing import CliRunner

    from bolid_cli.main import app

    run = CliRunner().invoke
    for command in ("train-adapter", "generate"):
        printed = run(app, [command, "--print-config"], prog_name="bolid").stdout.encode()

        def read(data: bytes, command: str = command) -> None:
            (tmp_path / "x.toml").write_bytes(data)
            result = run(app, [command, "--config", str(tmp_path / "x.toml"), "--print-config"], prog_name="bolid")
            assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output, result.output[-300:]
            assert "fault in bolid" not in result.output, result.output[-300:]

        damage(f"--config of {command}", printed, read, tries=25, text=True)


def test_what_lies_beside_pictures(tmp_path):
    """Captions, records, ground truth and tables of prompts."""
    folder = tmp_path / "p" / "anna"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(jpeg(0, size=(40, 32)))
    rows = 'file,prompt,person,seed\na.jpg,"a man, in the snow",anna,7\n'
    lines = '{"file": "a.jpg", "prompt": "a man", "person": "anna", "seed": 7}\n'
    cases = {
        "a.txt": (b"a photo of a woman, on a beach\n", lambda: caption_for(folder / "a.jpg")),
        "a.json": (
            b'{"ratios": {"legs": 0.5}, "url": "http://x/", "license": "CC0"}',
            lambda: reference_photos(folder),
        ),
        "prompts.csv": (rows.encode(), lambda: generated_pictures(folder)),
        "prompts.jsonl": (lines.encode(), lambda: generated_pictures(folder)),
    }
    for name, (data, load) in cases.items():

        def read(changed: bytes, name: str = name, load=load) -> None:
            (folder / name).write_bytes(changed)
            load()

        damage(name, data, read, tries=60, text=True)
        (folder / name).unlink()


def test_lists_of_addresses(tmp_path):
    import polars

    rows = [("Anna", f"http://example.org/{n}.jpg") for n in range(4)]
    polars.DataFrame(rows, schema=["person", "url"], orient="row").write_parquet(tmp_path / "x.parquet")
    cases = {
        "list.txt": "".join(f"{person} {url}\n" for person, url in rows).encode(),
        "list.csv": ("person,url\n" + "".join(f"{person},{url}\n" for person, url in rows)).encode(),
        "list.parquet": (tmp_path / "x.parquet").read_bytes(),
    }
    for name, data in cases.items():

        def read(changed: bytes, name: str = name) -> None:
            (tmp_path / name).write_bytes(changed)
            list(AddressList(tmp_path / name))

        damage(name, data, read, tries=60, text=not name.endswith("parquet"))


def test_photo_folders(tmp_path):
    """The database and the records of `scrape`: the folder opens, or says what to do; no photo is lost."""
    (tmp_path / "mine").mkdir()
    for number in range(3):
        (tmp_path / "mine" / f"{number}.jpg").write_bytes(jpeg(number))
    whole = scrape(tmp_path / "mine", out=tmp_path / "whole", min_size=32).out
    record = next(whole.glob("*/*.json"))
    numbers = itertools.count()
    for name in (".scrape.sqlite", str(record.relative_to(whole))):

        def read(data: bytes, name: str = name) -> None:
            out = tmp_path / str(next(numbers))
            shutil.copytree(whole, out)
            (out / name).write_bytes(data)
            if name.endswith("json"):
                (out / ".scrape.sqlite").unlink()
            try:
                with PhotoFolder(out) as photos:
                    photos.people(), photos.kept(), photos.counts(), photos.write_tables()
            finally:
                kept = len(list(out.glob("*/*.jpg")))
                shutil.rmtree(out)
            assert kept == 3, f"{3 - kept} photos are gone"

        damage(f"photo folder: {name}", (whole / name).read_bytes(), read, tries=25, text=name.endswith("json"))


def test_logs_and_manifests(tmp_path):
    log = "".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 20))

    def read_log(data: bytes) -> None:
        (tmp_path / "log.jsonl").write_bytes(data)
        Log(tmp_path, 10, tensorboard=False).close()

    def read_models(data: bytes) -> None:
        (tmp_path / "models.json").write_bytes(data)
        for entry in read_manifest(tmp_path).values():
            entry.get("files", {})

    damage("log.jsonl", log.encode(), read_log, tries=6, text=True)
    damage("models.json", (TINY.root / "models.json").read_bytes(), read_models, tries=60, text=True)


def test_what_is_tried_is_damaged():
    """The campaign itself: most of what it makes is another file."""
    data = json.dumps({"a": [1, 2, "x"], "b": True}, indent=1).encode()
    changed = {mutated_text(data, np.random.default_rng(seed)) for seed in range(100)}
    assert len(changed - {data}) > 60
