"""`bolid models`: what a user meets who fetches, copies, checks and converts a family's weights. Offline throughout."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from bolid.errors import BolidError
from bolid.models import families
from bolid.models import pull as models
from bolid.models.families import get_family
from bolid.models.manifest import read_manifest, verify
from bolid.models.sources import SOURCES
from bolid.run import home
from bolid_cli.main import app

run = CliRunner().invoke
ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "reachable", lambda url: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


# ---- what there is


def test_list_names_license_size_and_place_of_every_part():
    listed = json.loads(run(app, ["models", "list", "--json"]).stdout)
    parts = {f["name"]: {p["part"]: p for p in f["parts"]} for f in listed["families"]}
    assert parts["tiny"] == {}
    for name in ("sd15", "sdxl", "sdxl-lightning"):
        assert {"base", "pose", "face", "image_text"} <= set(parts[name])
        for part in parts[name].values():
            assert part["license"] and part["megabytes"] > 0 and part["source"] and part["state"] == "missing"
            assert part["where"].startswith(str(home() / name))
    assert parts["sdxl-lightning"]["unet"]["source"] == "ByteDance/SDXL-Lightning"
    assert not parts["sdxl"]["face"]["commercial"] and parts["sdxl"]["pose"]["license"] == "AGPL-3.0"
    shown = run(app, ["models", "list", "sdxl"])
    assert shown.stdout.split() == ["sdxl"]
    assert "non-commercial research only" in shown.stderr and "falls under the AGPL" in shown.stderr


def test_every_source_is_well_formed():
    for name, sources in SOURCES.items():
        family = get_family(name)
        for source in sources:
            assert bool(source.repo) != bool(source.url) and source.license and source.megabytes
            assert source.commercial or source.instead
            assert getattr(family, source.part)
            assert not source.url or source.url.startswith("https://github.com/")
        assert set(family.needs) <= {source.part for source in sources}


def test_lightning_is_not_complete_without_its_unet():
    assert "unet" in get_family("sdxl-lightning").missing() and "unet" not in get_family("sdxl").missing()


# ---- commercial use


def face_pack(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("det_10g.onnx", "w600k_r50.onnx"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_commercial_refuses_packs_for_research_and_says_what_to_use_instead(monkeypatch, tmp_path):
    family = get_family("sd15")
    face_pack(family.face)
    assert family.require("face") == family.face
    monkeypatch.setenv("BOLID_COMMERCIAL", "1")
    with pytest.raises(BolidError, match="buffalo_l in .* is for non-commercial research only") as caught:
        family.require("face")
    assert "pack of your own" in caught.value.hint and "--only face --commercial" in caught.value.hint
    own = replace(family, face=face_pack(tmp_path / "own", "det.onnx", "rec.onnx"))
    assert own.require("face") == tmp_path / "own"
    copied = replace(family, name="mine.toml", face=face_pack(tmp_path / "copied", "w600k_r50.onnx"))
    with pytest.raises(BolidError, match="non-commercial"):  # known by its file, whatever the family
        copied.require("face")
    listed = json.loads(run(app, ["models", "list", "sd15", "--json"]).stdout)
    states = {part["part"]: part["state"] for part in listed["families"][0]["parts"]}
    assert states["face"] == "refused" and states["base"] == "missing"


def test_commercial_pull_refuses_what_has_no_other_way(no_network):
    result = run(app, ["models", "pull", "sdxl", "--commercial", "--only", "face_portrait"])
    assert result.exit_code == 1 and "FaceID-Portrait for sdxl: non-commercial research only" in result.stderr
    assert "bolid train-adapter" in result.stderr and not (home() / "sdxl").exists()


def test_commercial_use_is_remembered():
    assert run(app, ["models", "use", "sdxl", "--commercial"]).exit_code == 0
    assert families.commercial_use()
    assert run(app, ["models", "use", "sdxl"]).exit_code == 0 and families.commercial_use()
    run(app, ["models", "use", "sdxl", "--no-commercial"])
    assert not families.commercial_use()


# ---- without a network


def test_without_a_network_the_error_says_what_is_missing_and_what_to_do(no_network, tmp_path):
    result = run(app, ["models", "pull", "sdxl"])
    assert result.exit_code == 1 and result.stdout == ""
    assert "SDXL 1.0 (base, 6940 MB) is missing and huggingface.co cannot be reached" in result.stderr
    assert str(home() / "sdxl" / "base") in result.stderr and str(tmp_path / "hub") in result.stderr
    assert "bolid models pull sdxl --from" in result.stderr
    with pytest.raises(BolidError, match="github.com cannot be reached: looked for .*face") as caught:
        models.pull("sdxl", only=["face"])
    assert "--from" in caught.value.hint


def test_offline_mode_is_respected(monkeypatch, no_network):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "reachable", lambda url: pytest.fail("a network was asked for"))
    with pytest.raises(BolidError, match="HF_HUB_OFFLINE is set"):
        models.pull("sd15", only=["base"])


def test_an_address_that_does_not_answer_is_given_up(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket_listening() as port:
        assert models.reachable(f"http://127.0.0.1:{port}/x")
    assert not models.reachable(f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr(models.socket, "create_connection", lambda *a: threading.Event().wait())  # hangs for ever
    monkeypatch.setattr(models, "REACH_SECONDS", 0.05)
    assert not models.reachable("https://example.org")


class socket_listening:
    def __enter__(self):
        import socket

        self.socket = socket.create_server(("127.0.0.1", 0))
        return self.socket.getsockname()[1]

    def __exit__(self, *error):
        self.socket.close()


def test_pull_of_what_is_no_published_family():
    for name, message in (("tiny", "ships with the package"), ("huge", "no model family called 'huge'")):
        with pytest.raises(BolidError, match=message):
            models.pull(name)
    with pytest.raises(BolidError, match="--only is 'bas'") as caught:
        models.pull("sdxl", only=["bas"])
    assert "base_config" in caught.value.hint
    with pytest.raises(BolidError, match="--from .*nowhere is not a folder"):
        models.pull("sdxl", from_dir="nowhere")


# ---- what a server would give


def write_hub_base(folder: Path) -> Path:
    """The files of a Stable Diffusion repository, by their published names; their content is of no matter here."""
    for source in SOURCES["sdxl"]:
        if source.part == "base":
            for name in source.files:
                name = name.replace("tokenizer*/*", "tokenizer/vocab.json").replace("text_encoder*", "text_encoder")
                path = folder / name.replace("*", "scheduler_config.json")
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".json":
                    path.write_text("{}")
                else:
                    save_file({"a": torch.ones(2)}, path)
    (folder / "README.md").write_text("not asked for")
    return folder


def hub_cache(root: Path, repo: str) -> Path:
    folder = root / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c" * 40)
    return folder / "snapshots" / ("c" * 40)


def test_what_the_hugging_face_cache_has_is_used_without_a_network(no_network, tmp_path):
    snapshot = write_hub_base(hub_cache(tmp_path / "hub", "stabilityai/stable-diffusion-xl-base-1.0"))
    assert models.pull("sdxl", only=["base"]) == [home() / "sdxl" / "base"]
    entry = read_manifest(home() / "sdxl")["base"]
    assert entry["revision"] == "c" * 40 and entry["license"] == "CreativeML OpenRAIL++-M"
    weights = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert entry["files"][weights]["sha256"] == hashlib.sha256((snapshot / weights).read_bytes()).hexdigest()
    assert "README.md" not in entry["files"]
    assert {row["part"]: row["state"] for row in verify("sdxl")}["base"] == "as fetched"
    (snapshot / weights).write_bytes((snapshot / weights).read_bytes()[:-1] + b"!")
    with pytest.raises(BolidError, match="diffusion_pytorch_model.fp16.safetensors is not what was recorded") as caught:
        verify("sdxl")
    assert "bolid models pull sdxl" in caught.value.hint


def test_an_incomplete_cache_is_as_good_as_none(no_network, tmp_path):
    snapshot = write_hub_base(hub_cache(tmp_path / "hub", "stabilityai/stable-diffusion-xl-base-1.0"))
    (snapshot / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(BolidError, match="SDXL 1.0 .* is missing"):
        models.pull("sdxl", only=["base"])
    assert not (home() / "sdxl" / "base").exists()


def test_what_may_go_wrong_on_the_way(monkeypatch, tmp_path):
    import errno

    import huggingface_hub

    monkeypatch.setattr(models, "reachable", lambda url: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for raised, message, hint in (
        (ConnectionResetError("reset by peer"), "stable-diffusion-xl-base-1.0 broke off: reset", "where it stopped"),
        (OSError(errno.ENOSPC, "No space left"), "no space left on the disk while writing", "free some space"),
    ):

        def fail(*args, raised=raised, **kwargs):
            raise raised

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(BolidError, match=message) as caught:
            models.pull("sdxl", only=["base"])
        assert hint in caught.value.hint and not (home() / "sdxl" / "base").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as huggingface_hub asks for, on files in a folder."""

    folder, commit = Path(), "d" * 40
    asked: list[str] = []

    def do_GET(self):
        Hub.asked.append(self.path)
        path = self.path.partition("?")[0]
        names = [p.relative_to(Hub.folder).as_posix() for p in sorted(Hub.folder.rglob("*")) if p.is_file()]
        if path.startswith("/api/") and "/tree/" in path:
            sizes = {name: (Hub.folder / name).stat().st_size for name in names}
            return self.answer(
                json.dumps([{"type": "file", "path": n, "size": s, "oid": "0" * 40} for n, s in sizes.items()]).encode()
            )
        if path.startswith("/api/"):
            listing = {"id": "x/y", "sha": Hub.commit, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(json.dumps(listing).encode())
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name not in names:
            return self.send_error(404)
        self.answer((Hub.folder / name).read_bytes())

    do_HEAD = do_GET

    def answer(self, data: bytes):
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", Hub.commit)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_pull_from_a_hub(tmp_path):
    """The command itself, against a server that speaks the Hub's protocol. What is there is not asked for again."""
    Hub.folder, Hub.asked = write_hub_base(tmp_path / "repo"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if k.upper() not in ("HTTP_PROXY", "HF_TOKEN")} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "bolid_cli.main", "models", "pull", "sdxl", "--only", "base"]
    asked = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr + str(Hub.asked)
        assert done.stdout.split() == [str(home() / "sdxl" / "base")]
        assert "Fetching" not in done.stderr and "%" not in done.stderr
        asked.append(len(Hub.asked))
    server.shutdown()
    server.server_close()
    assert asked[0] == asked[1] > 0
    entry = read_manifest(home() / "sdxl")["base"]
    assert entry["revision"] == Hub.commit and not any("README" in name for name in entry["files"])
    assert (home() / "sdxl" / "base").resolve().is_relative_to(tmp_path / "hf")
    assert {row["part"]: row["state"] for row in verify("sdxl")}["base"] == "as fetched"
    result = run(app, ["models", "verify", "sdxl"])
    assert result.exit_code == 1 and "family 'sdxl' lacks pose, segmentation, face, image_text" in result.stderr


class Server(http.server.BaseHTTPRequestHandler):
    data = b""
    asked: list[str | None] = []
    stop_after: int | None = None

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        Server.asked.append(self.headers["Range"])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        self.wfile.write(self.data[start : Server.stop_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def release(monkeypatch, tmp_path):
    """A server that gives a face pack, zipped with a folder around it as buffalo_l is."""
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as packed:
        packed.writestr("buffalo_l/w600k_r50.onnx", b"recogniser" * 100)
        packed.writestr("buffalo_l/../../det_10g.onnx", b"detector" * 100)
    Server.data, Server.asked, Server.stop_after = (tmp_path / "pack.zip").read_bytes(), [], None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    url = f"http://127.0.0.1:{server.server_port}/v0.7/buffalo_l.zip"
    face = next(source for source in SOURCES["sdxl"] if source.part == "face")
    for name in ("sdxl", "sdxl-lightning"):
        monkeypatch.setitem(SOURCES, name, (replace(face, url=url),))
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_goes_on_where_it_stopped_and_serves_two_families(release):
    Server.stop_after = 100
    with pytest.raises(BolidError, match="broke off") as caught:
        models.pull("sdxl")
    assert "goes on where it stopped" in caught.value.hint and not (home() / "sdxl" / "face").exists()
    Server.stop_after = None
    models.pull("sdxl")
    assert Server.asked == [None, "bytes=100-"]
    face = home() / "sdxl" / "face"
    assert {p.name for p in face.iterdir()} == {"w600k_r50.onnx", "det_10g.onnx"}  # none outside of it
    entry = read_manifest(home() / "sdxl")["face"]
    assert entry["fetched"]["sha256"] == hashlib.sha256(Server.data).hexdigest() and entry["revision"] == "v0.7"
    models.pull("sdxl")
    models.pull("sdxl-lightning")
    assert len(Server.asked) == 2


def test_a_broken_archive_leaves_nothing(release):
    Server.data = b"no archive"
    with pytest.raises(BolidError, match="buffalo_l.zip is damaged"):
        models.pull("sdxl")
    assert not (home() / "sdxl" / "face").exists()


# ---- copied from another machine


def test_a_folder_copied_from_another_machine(no_network, tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    monkeypatch.setenv("BOLID_HOME", str(there))
    write_hub_base(hub_cache(tmp_path / "hub", "stabilityai/stable-diffusion-xl-base-1.0"))
    models.pull("sdxl", only=["base"])
    monkeypatch.setenv("BOLID_HOME", str(here))
    result = run(app, ["models", "pull", "sdxl", "--only", "base", "--from", str(there / "sdxl")])
    assert result.exit_code == 0 and result.stdout.split() == [str(here / "sdxl" / "base")]
    assert not (here / "sdxl" / "base").is_symlink() and "OpenRAIL" in result.stderr
    assert {row["part"]: row["state"] for row in verify("sdxl")}["base"] == "as fetched"
    with pytest.raises(BolidError, match="buffalo_l .face. is not in .*there") as caught:
        models.pull("sdxl", only=["face"], from_dir=there / "sdxl")
    assert "--only" in caught.value.hint
    # a copy that went wrong on the way
    monkeypatch.setenv("BOLID_HOME", str(tmp_path / "third"))
    (here / "sdxl" / "base" / "vae" / "config.json").write_text("[]")
    with pytest.raises(BolidError, match="vae/config.json is not what was recorded"):
        models.pull("sdxl", only=["base"], from_dir=here / "sdxl")
    assert not (tmp_path / "third" / "sdxl" / "base").exists()


def test_the_downloaded_files_as_they_are(no_network, tmp_path):
    write_hub_base(tmp_path / "files" / "stable-diffusion-xl-base-1.0")
    save_file({"a": torch.ones(2)}, tmp_path / "files" / "sdxl_lightning_4step_unet.safetensors")
    face_pack(tmp_path / "files" / "buffalo_l", "w600k_r50.onnx", "det_10g.onnx")
    models.pull("sdxl-lightning", only=["base", "unet", "face"], from_dir=tmp_path / "files")
    family = get_family("sdxl-lightning")
    assert all(family.has(part) for part in ("base", "unet", "face")) and "unet" not in family.missing()
    assert set(read_manifest(family.root)["unet"]["files"]) == {"unet.safetensors"}
    assert {r["state"] for r in verify("sdxl-lightning") if r["part"] == "unet"} == {"as fetched"}


def test_verify_of_files_that_were_put_there_by_hand():
    family = get_family("sd15")
    write_hub_base(family.base)
    rows = {row["part"]: row["state"] for row in verify("sd15")}
    assert rows["base"] == rows["body_encoder"] == "whole" and rows["pose"] == "missing"
    weights = family.base / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(BolidError, match="vae/diffusion_pytorch_model.fp16.safetensors is damaged"):
        verify("sd15")


def test_the_embedded_weights_are_those_that_were_shipped(tmp_path):
    """One flipped bit in any file of a part, and the part is not loaded; the record fits what is shipped."""
    tiny = get_family("tiny")
    assert {row["state"] for row in verify("tiny")} == {"as shipped"}
    shutil.copytree(tiny.base, tmp_path / "base")
    (tmp_path / "models.json").write_bytes((tiny.root / "models.json").read_bytes())
    copied = replace(tiny, root=tmp_path, base=tmp_path / "base")
    assert copied.require("base") == tmp_path / "base"
    for name in ("unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
        data = bytearray((tiny.base / name).read_bytes())
        data[-100] ^= 1
        other = tmp_path / name.partition("/")[0]  # what was looked at once a process is not looked at again
        shutil.copytree(tmp_path / "base", other / "base")
        (other / "base" / name).write_bytes(data)
        (other / "models.json").write_bytes((tiny.root / "models.json").read_bytes())
        with pytest.raises(BolidError, match=f"{name} is not what was recorded: its size or SHA-256 differs") as error:
            replace(tiny, root=other, base=other / "base").require("base")
        assert "install bolid again" in error.value.hint


@pytest.mark.slow
def test_stock_diffusers_loads_the_embedded_base_as_it_stands():
    """Without a dtype, in one precision, and to the pictures that our own loading gives."""
    import diffusers
    import numpy as np

    from bolid.backends.diffusion import load_base

    stock = diffusers.StableDiffusionPipeline.from_pretrained(get_family("tiny").base)
    networks = stock.unet, stock.vae, stock.text_encoder
    assert {parameter.dtype for network in networks for parameter in network.parameters()} == {torch.float32}

    def picture(pipe):
        noise = torch.Generator().manual_seed(1)
        return pipe("a portrait of a man", num_inference_steps=2, generator=noise, output_type="np").images

    pictures = [picture(stock), picture(load_base(get_family("tiny")))]
    assert pictures[0].std() > 0.05 and np.abs(pictures[0] - pictures[1]).max() < 1e-4
