"""The ComfyUI nodes: what needs no ComfyUI, and, where there is one, its real code on the CPU.

COMFYUI_PATH names the folder of ComfyUI, COMFYUI_PYTHON a Python that has its requirements and ours.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generate_world import BODY, FACE, make_world, with_adapters
from PIL import Image

import bolid.comfyui
from bolid.comfyui.branches import at_positions, make_branch, project, weight_now
from bolid.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from bolid.formats.adapter import load_adapter
from bolid.scales import Scale, parse_scale

COMFYUI, PYTHON = os.environ.get("COMFYUI_PATH", ""), os.environ.get("COMFYUI_PYTHON", sys.executable)
NODES = Path(bolid.comfyui.__file__).parent
WORKFLOWS = sorted((NODES / "example_workflows").glob("*.json"))
needs_comfyui = pytest.mark.skipif(
    not COMFYUI, reason="ComfyUI is not installed: COMFYUI_PATH names its folder, COMFYUI_PYTHON its Python"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("generate"))


@pytest.mark.parametrize(("branch", "vector"), [("face", FACE), ("body", BODY)])
def test_tokens_and_keys_are_those_of_diffusers(world, branch, vector):
    unet = with_adapters(world, branch).unet
    tensors, _ = load_adapter(world.adapter / f"{branch}.safetensors", branch)
    both = torch.stack([torch.zeros_like(vector), vector])
    with torch.no_grad():
        wanted = unet.encoder_hid_proj.image_projection_layers[0](both[:, None]).flatten(1, -2)
    tokens = project({name: tensor.float() for name, tensor in tensors.items()}, both)
    assert torch.allclose(tokens, wanted, atol=1e-6)
    made = make_branch(tensors, vector, Scale())
    layers = [p for name, p in unet.attn_processors.items() if "attn2" in name]
    assert len(made.keys_values) == len(layers)
    for (key, value), layer in zip(made.keys_values, layers, strict=True):
        assert torch.allclose(key, layer.to_k_ip[0](wanted), atol=1e-5)
        assert torch.allclose(value, layer.to_v_ip[0](wanted), atol=1e-5)


def test_the_interval_counts_the_samplers_steps_as_generate_does():
    schedule = torch.tensor([14.0, 6.0, 3.0, 1.0, 0.0])  # four steps
    scale = parse_scale("0.7@0.25..0.75", "scale")

    def weights(sigmas):
        return [weight_now(scale, "up", {"sample_sigmas": schedule, "sigmas": torch.tensor([s] * 2)}) for s in sigmas]

    assert weights([14.0, 6.0, 3.0, 1.0]) == [scale.at(step, 4) for step in range(4)] == [0.0, 0.7, 0.7, 0.0]
    assert weights([10.0, 4.0, 2.0, 0.5]) == [0.0, 0.7, 0.7, 0.0]  # between two levels: a sampler of second order
    parts = parse_scale("down=0.5,up=1", "scale")
    assert [weight_now(parts, part, {}) for part in ("down", "mid", "up")] == [0.5, 0.0, 1.0]


def test_a_mask_is_spread_over_the_positions_of_every_level():
    mask = torch.zeros(1, 64, 48)
    mask[:, :, :24] = 1
    for count, width in ((8 * 6, 6), (2 * 2, 2)):
        rows = at_positions(mask, count, (8, 6)).view(-1, width)
        assert torch.equal(rows[:, : width // 2], torch.ones(len(rows), width // 2)) and rows[:, -1].max() == 0
        assert rows.mean() == 0.5 and rows.numel() == count
    assert at_positions(mask, 4 * 3, (8, 6)).view(4, 3)[0].tolist() == [1, 0.5, 0]
    assert at_positions(mask, 5 * 3, (9, 5)).shape == (1, 15, 1)  # odd sizes are rounded up


def test_every_node_is_named_and_described():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys() and len(NODE_CLASS_MAPPINGS) == 6
    for node in NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(node, node.FUNCTION)) and node.DESCRIPTION and node.CATEGORY == "BoLID"


def test_names_are_never_paths(tmp_path, monkeypatch):
    from bolid.comfyui.nodes import LoadProfile, _output
    from bolid.errors import BolidError

    (tmp_path / "input").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folders = SimpleNamespace(
        get_input_directory=lambda: str(tmp_path / "input"), get_output_directory=lambda: str(tmp_path / "output"),
        get_annotated_filepath=lambda name: str(tmp_path / "input" / name),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    with pytest.raises(BolidError, match="is not in ComfyUI's input or output folder"):
        LoadProfile().load("../secret.safetensors")
    for name in ("../me", "a/b", "", ".me", "x" * 200):
        with pytest.raises(BolidError, match="names no file"):
            _output(name)
    assert _output("me 2") == tmp_path / "output" / "bolid" / "me 2.safetensors"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflow_uses_nodes_and_outputs_that_there_are(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Bolid")]
    assert {node["type"] for node in ours} <= NODE_CLASS_MAPPINGS.keys() and len(ours) >= 3
    for node in ours:
        given = NODE_CLASS_MAPPINGS[node["type"]]
        assert tuple(output["type"] for output in node["outputs"]) == given.RETURN_TYPES


# ---- with ComfyUI -------------------------------------------------------------------------------------------------


def run(folder: Path, *more: str) -> str:
    script = Path(__file__).parent / "comfyui_world.py"
    ended = subprocess.run(
        [PYTHON, str(script), str(folder), *more], capture_output=True, text=True, timeout=1200, env=environment()
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "COMFYUI_PATH": COMFYUI, "PYTHONPATH": str(NODES.parent.parent), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """ComfyUI's base directory, with a small SD 1.5, an adapter and a profile."""
    folder = tmp_path_factory.mktemp("comfyui")
    run(folder)
    return folder


@needs_comfyui
@pytest.mark.slow
def test_the_patched_model_predicts_what_diffusers_predicts(comfy):
    found = json.loads(run(comfy, "compare").splitlines()[-1])
    effects = {name: value for name, value in found.items() if name.startswith("effect")}
    assert len(found) == 22 and min(effects.values()) > 1e-2
    assert max(value for name, value in found.items() if name not in effects) < 1e-4


@needs_comfyui
@pytest.mark.slow
def test_the_numbers_of_an_adapter_name_the_same_layers_in_comfyui(tmp_path):
    """Of full-size SD 1.5 and SDXL, by ComfyUI's own table from diffusers' names to its own."""
    found = json.loads(run(tmp_path, "orders").splitlines()[-1])
    assert [len(wanted) for wanted, _ in found.values()] == [16, 70]
    for wanted, ours in found.values():
        assert ours == wanted


class Server:
    """ComfyUI itself, with our folder linked into its custom nodes."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "custom_nodes" / "bolid").exists():
            (folder / "custom_nodes" / "bolid").symlink_to(NODES, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            PYTHON,
            str(Path(COMFYUI) / "main.py"),
            "--cpu",
            "--base-directory",
            str(folder),
            "--port",
            str(port),
        ]
        self.log = open(folder / "server.log", "w")
        self.process = subprocess.Popen(command, env=environment(), stdout=self.log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{port}"
        self._wait(lambda: self.get("/system_stats"), 400)

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def queue(self, graph: dict) -> dict:
        """The history of a graph that was run."""
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode())
        return self._wait(lambda: self.get(f"/history/{number}")[number], 800)

    def _wait(self, ask, seconds: float):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return ask()
            except (OSError, KeyError):
                time.sleep(1)
        pytest.fail(Path(self.log.name).read_text()[-3000:])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def server(comfy):
    server = Server(comfy)
    yield server
    server.close()


def picture_graph() -> dict:
    """Text and a person to a picture, by ComfyUI's own sampler."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "small.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a woman waving"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "5": {"class_type": "BolidLoadProfile", "inputs": {"profile": "me.safetensors"}},
        "6": {"class_type": "BolidApplyProfile", "inputs": {
            "model": ["1", 0], "profile": ["5", 0], "adapter": "test", "face_scale": 1.0, "body_scale": 1.0,
            "start": 0.0, "end": 1.0}},
        "7": {"class_type": "KSampler", "inputs": {
            "model": ["6", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 1,
            "steps": 2, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "person"}},
    }  # fmt: skip


@needs_comfyui
@pytest.mark.slow
def test_a_graph_with_a_person_runs(server, comfy):
    assert NODE_CLASS_MAPPINGS.keys() <= server.get("/object_info").keys()
    graph = picture_graph()
    ended = server.queue(graph)
    assert ended["status"]["status_str"] == "success", ended["status"]
    graph["7"]["inputs"]["model"] = ["1", 0]
    graph["9"]["inputs"]["filename_prefix"] = "nobody"
    assert server.queue(graph)["status"]["status_str"] == "success"
    person, nobody = (sorted((comfy / "output").glob(f"{name}_*.png")) for name in ("person", "nobody"))
    assert len(person) == len(nobody) == 2
    difference = np.asarray(Image.open(person[0])).astype(int) - np.asarray(Image.open(nobody[0]))
    assert np.abs(difference).max() > 0
    graph["6"]["inputs"]["adapter"] = "the family's own"
    graph["7"]["inputs"]["model"] = ["6", 0]
    ended = server.queue(graph)
    assert ended["status"]["status_str"] == "error" and "no adapter for me.safetensors" in json.dumps(ended)


@needs_comfyui
@pytest.mark.slow
def test_photos_to_a_profile_to_maps_and_figures(server, comfy, rendered_people):
    photos = sorted((rendered_people / "p100000").glob("*.jpg"))
    for number, photo in enumerate(photos[:3]):
        Image.open(photo).save(comfy / "input" / f"{number}.png")
    graph = {
        **{str(i): {"class_type": "LoadImage", "inputs": {"image": f"{i}.png"}} for i in range(3)},
        "3": {"class_type": "ImageBatch", "inputs": {"image1": ["0", 0], "image2": ["1", 0]}},
        "4": {"class_type": "BolidProfileFromImages", "inputs": {
            "images": ["3", 0], "name": "anna", "family": "tiny", "measurements": "height=172"}},
        "5": {"class_type": "BolidEditProfile", "inputs": {
            "profile": ["4", 0], "name": "anna-thinner", "others": "stay", "waist": -4.0, **dict.fromkeys(
                ("height", "inseam", "arm", "shoulders", "chest", "hip", "thigh", "upper-arm", "neck", "head",
                 "weight"), 0.0)}},
        "6": {"class_type": "BolidShapeMaps", "inputs": {
            "profile": ["5", 0], "pose": "standing", "width": 128, "height": 192, "turn": 0.0}},
        **{str(7 + i): {"class_type": "SaveImage", "inputs": {"images": ["6", i], "filename_prefix": name}}
           for i, name in enumerate(("depth", "normal", "openpose", "silhouette"))},
        "11": {"class_type": "BolidEvaluate", "inputs": {
            "images": ["3", 0], "references": ["2", 0], "prompt": "a full body photo", "family": "tiny"}},
    }  # fmt: skip
    ended = server.queue(graph)
    assert ended["status"]["status_str"] == "success", ended["status"]
    assert (comfy / "output" / "bolid" / "anna-thinner.safetensors").is_file()
    for name in ("depth", "normal", "openpose", "silhouette"):
        [path] = (comfy / "output").glob(f"{name}_*.png")
        assert Image.open(path).size == (128, 192) and np.asarray(Image.open(path)).std() > 5
    figures = ended["outputs"]["11"]["text"]
    assert any(line.startswith("person_found: 1.000") for line in figures)
    listed = server.get("/object_info/BolidLoadProfile")["BolidLoadProfile"]["input"]["required"]["profile"][0]
    assert "bolid/anna.safetensors [output]" in listed and "me.safetensors" in listed
