"""Published FaceID-Portrait adapters: read from their pickle, recorded, loaded, and refused with another face pack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from generate_world import FACE, World, make_pictures, make_world, read_picture, same
from typer.testing import CliRunner

from bolid.backends.diffusion import load_base, quiet_diffusers
from bolid.errors import BolidError
from bolid.formats.adapter import load_adapter, nested_state_dict
from bolid.generate import generate
from bolid.method.body_condition import initial_state
from bolid.models import pull as models
from bolid.models.convert import convert
from bolid.models.families import get_family
from bolid.models.sources import PORTRAIT_FACE_MODEL
from bolid.run import sha256_file
from bolid_cli.main import app

RUN = CliRunner().invoke
NO_FACE = "face_adapter = 'absent.safetensors'\n"  # among the family's paths


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def world(request, tmp_path_factory) -> World:
    """Profiles by buffalo_l's recogniser, and a family without a face adapter of its own."""
    root = tmp_path_factory.mktemp(request.param)
    return make_world(root, sdxl=request.param == "sdxl", inputs={"face_model": PORTRAIT_FACE_MODEL}, settings=NO_FACE)


def publish(world: World, path: Path, **more) -> Path:
    """A file as h94/IP-Adapter-FaceID has it, of random weights: two dicts of tensors, pickled by torch.save."""
    unet = load_base(get_family(world.family)).unet
    state = initial_state(unet, "face", 512, tokens=16)
    generator = torch.Generator().manual_seed(1)
    for tensors in state.values():
        for name, tensor in tensors.items():
            tensors[name] = 0.5 * torch.randn(tensor.shape, generator=generator).half()
    torch.save({**state, **more}, path)
    return path


def prediction(world: World, load) -> torch.Tensor:
    """The UNet's output for the profile's face, with the adapter as `load` puts it into the pipeline."""
    pipe = load_base(get_family(world.family))
    with quiet_diffusers():
        load(pipe)
    unet, generator = pipe.unet, torch.Generator().manual_seed(2)
    latents = torch.randn(1, unet.config.in_channels, 8, 6, generator=generator)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    added = {"image_embeds": [FACE[None, None]]}
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        added |= {"text_embeds": torch.randn(1, pooled, generator=generator), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        return unet(latents, 500, text, added_cond_kwargs=added).sample


@pytest.mark.slow
def test_stock_diffusers_predicts_the_same_from_the_published_file(world, tmp_path):
    published = publish(world, tmp_path / "ip-adapter-faceid-portrait_x.bin")
    tensors, record = load_adapter(convert(published, tmp_path / "face.safetensors", family=world.family), "face")
    assert record["inputs"]["face_model"] == PORTRAIT_FACE_MODEL and record["config"]["face_pack"] == "buffalo_l"
    settings = {"image_encoder_folder": None}
    theirs = prediction(
        world, lambda pipe: pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=published.name, **settings)
    )
    state = nested_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    ours = prediction(world, lambda pipe: pipe.load_ip_adapter(state, subfolder="", weight_name="", **settings))
    assert torch.equal(theirs, ours) and not torch.allclose(theirs, prediction_without_face(world))


def prediction_without_face(world: World) -> torch.Tensor:
    unet = load_base(get_family(world.family)).unet
    state = initial_state(unet, "face", 512, tokens=16)  # its to_v_ip are 0: no effect
    return prediction(
        world, lambda pipe: pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    )


def test_generate_uses_it_where_the_family_has_no_face_adapter(world, tmp_path, monkeypatch):
    family = get_family(world.family)
    convert(publish(world, tmp_path / "a.bin"), family.face_portrait, family=world.family)
    try:
        shown = {"adapter": None, "body_scale": 0, "steps": 2}
        with_face = make_pictures(world, tmp_path / "1", profile=world.me, **shown)
        assert not same(with_face, make_pictures(world, tmp_path / "2", profile=world.me, face_scale=0, **shown))
        record = read_picture(tmp_path / "1" / "000-a-photo-of-a-woman.png")
        assert record["inputs"]["face_adapter"] == sha256_file(family.face_portrait)
        assert "body_adapter" not in record["inputs"]
        monkeypatch.setenv("BOLID_COMMERCIAL", "1")
        assert get_family(world.family).require("face_portrait")  # a file of one's own: nobody says what it is
    finally:
        family.face_portrait.unlink()


def test_a_profile_by_another_face_pack_is_refused(world, tmp_path):
    other = make_world(tmp_path, inputs={"face_model": "e" * 64}, settings=NO_FACE)
    family = get_family(other.family)
    convert(publish(other, tmp_path / "a.bin"), family.face_portrait, family=other.family)
    with pytest.raises(BolidError, match="different face models: the adapter's is InsightFace buffalo_l") as caught:
        generate(["a"], tmp_path / "out", profile=other.me, family=other.family, device="cpu")
    assert "--only face" in caught.value.hint and not (tmp_path / "out").exists()


def test_pull_converts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "reachable", lambda url: False)
    small = make_world(tmp_path / "w")
    (tmp_path / "files").mkdir()
    publish(small, tmp_path / "files" / "ip-adapter-faceid-portrait_sdxl.bin")
    (place,) = models.pull("sdxl", only=["face_portrait"], from_dir=tmp_path / "files")
    assert load_adapter(place, "face")[1]["family"] == "sdxl"
    manifest = json.loads((get_family("sdxl").root / "models.json").read_text())["face_portrait"]
    assert set(manifest["files"]) == {"face-portrait.safetensors"} and manifest["fetched"]["file"].endswith(".bin")
    (tmp_path / "more").mkdir()
    shutil.copytree(get_family("sdxl").root, tmp_path / "copied")
    monkeypatch.setenv("BOLID_HOME", str(tmp_path / "elsewhere"))
    (again,) = models.pull("sdxl", only=["face_portrait"], from_dir=tmp_path / "copied")
    assert again.read_bytes() == place.read_bytes()
    monkeypatch.setenv("BOLID_COMMERCIAL", "1")
    with pytest.raises(BolidError, match="non-commercial research only, and --commercial is in force"):
        get_family("sdxl").require("face_portrait")
    listed = RUN(app, ["models", "list", "sdxl", "--json"])
    parts = {part["part"]: part for part in json.loads(listed.stdout)["families"][0]["parts"]}
    assert parts["face_portrait"]["optional"] and parts["face_portrait"]["state"] == "refused"


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["image_proj"].update(evil=Evil()), "is refused: it holds more than tensors"),
        (lambda s: s["ip_adapter"].update({"0.to_q_lora.down.weight": torch.ones(2, 2)}), "another kind"),
        (lambda s: s["image_proj"].pop("proj.0.weight"), "another kind"),
        (lambda s: s["ip_adapter"].pop("1.to_v_ip.weight"), "has not the layout"),
        (lambda s: s["image_proj"].update({"norm.weight": torch.ones(3)}), "has not the layout"),
        (lambda s: s.pop("ip_adapter"), "is no IP-Adapter"),
        (lambda s: s["ip_adapter"].update(note="text"), "holds more than tensors"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message, capsys):
    state = {
        "image_proj": {"proj.0.weight": torch.ones(1024, 512), "proj.0.bias": torch.ones(1024),
                       "proj.2.weight": torch.ones(32, 1024), "proj.2.bias": torch.ones(32),
                       "norm.weight": torch.ones(16), "norm.bias": torch.ones(16)},
        "ip_adapter": {f"{n}.to_{kind}_ip.weight": torch.ones(8, 16) for n in (1, 3) for kind in "kv"},
    }  # fmt: skip
    torch.save(state, tmp_path / "good.bin")
    assert convert(tmp_path / "good.bin", family="mine.toml").name == "good.safetensors"
    change(state)
    torch.save(state, tmp_path / "bad.bin")
    with pytest.raises(BolidError, match=message):
        convert(tmp_path / "bad.bin")
    assert capsys.readouterr().out == "" and not (tmp_path / "bad.safetensors").exists()


def test_damaged_files_and_the_command(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"PK nonsense")
    result = RUN(app, ["models", "convert", str(tmp_path / "a.bin")])
    assert result.exit_code == 1 and "is damaged or no torch file" in result.stderr
    result = RUN(app, ["models", "convert", str(tmp_path / "x_unnorm.bin")])
    assert result.exit_code == 1 and "not normalised" in result.stderr
    result = RUN(app, ["models", "convert", str(tmp_path / "absent.bin")])
    assert result.exit_code == 1 and "there is no" in result.stderr
