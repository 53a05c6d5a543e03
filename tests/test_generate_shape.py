"""Pictures that follow the 3D body of a profile: `bolid generate --body-from shape`."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from generate_world import PROMPTS, make_pictures, make_world, random_controlnet, read_picture, same
from PIL import Image

import bolid.body.maps
import bolid.views
from bolid.backends.diffusion import load_base
from bolid.body.maps import control_maps, framed
from bolid.body.mesh import body_model
from bolid.body.profiles import stored
from bolid.body.shape import of_sex, population
from bolid.errors import BolidError
from bolid.formats.profile import load_profile, save_profile
from bolid.models.families import get_family
from bolid.run import derive_seed

SIZE = (64, 48)
NAME = "000-a-photo-of-a-woman.png"


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def world(request, tmp_path_factory):
    """With a depth ControlNet as `models pull` fetches the published ones, in half precision alone, and two bodies."""
    root = tmp_path_factory.mktemp("shape")
    world = make_world(root, sdxl=request.param == "sdxl")
    with open(world.family, "a") as file:
        file.write(f"depth_controlnet = '{root / 'depth'}'\n")
    bare = load_profile(world.me)
    for sex in ("woman", "man"):
        body = stored(of_sex(population().shape, sex))
        save_profile(
            root / f"{sex}.safetensors", bare.body_mean, bare.body_logvar, None, torch.ones(1), bare.record, body
        )
    return world


def save_depth(world, network) -> None:
    network.save_pretrained(get_family(world.family).depth_controlnet, variant="fp16")


@pytest.fixture(scope="module")
def network(world):
    network = random_controlnet(load_base(get_family(world.family)).unet)
    for parameter in network.controlnet_cond_embedding.parameters():
        parameter.data *= 6  # so that small differences of maps show in pictures
    save_depth(world, network)
    return network


def body(world, sex: str = "woman"):
    return world.me.with_name(f"{sex}.safetensors")


def test_a_family_without_a_depth_controlnet(world, tmp_path):
    with pytest.raises(BolidError, match=r"has no depth ControlNet: looked for .*depth"):
        make_pictures(world, tmp_path / "0", profile=body(world), body_from="shape")
    assert not (tmp_path / "0").exists()


def test_the_depth_of_the_body_goes_through_the_controlnet(world, network, tmp_path):
    """What diffusers' own pipeline makes of the depth map that `profile export --maps depth` draws."""
    got = make_pictures(
        world, tmp_path / "a", PROMPTS[:1], profile=body(world), body_from="shape", pose="walking", guidance=1.0
    )
    record = read_picture(tmp_path / "a" / NAME)["config"]
    assert record["body_from"] == "shape" and record["pose"] == "walking" and record["scales"] == {}
    shape = load_profile(body(world)).body.shape_mean
    depth = control_maps(body_model(), shape, ("depth",), pose="walking", size=SIZE)["depth"]
    pipe = load_base(get_family(world.family), sampler=get_family(world.family).defaults)
    xl = hasattr(pipe, "text_encoder_2")
    kind = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    half = diffusers.ControlNetModel.from_pretrained(get_family(world.family).depth_controlnet, variant="fp16")
    settings = {"add_watermarker": False} if xl else {"requires_safety_checker": False}
    expected = kind(**pipe.components, controlnet=half, **settings)(
        PROMPTS[0], image=Image.fromarray(depth), height=64, width=48, num_inference_steps=2, guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(derive_seed(4, "generate", 0, 0))],
    ).images[0]  # fmt: skip
    assert np.abs(got[0].astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.slow
def test_pose_shape_and_scale_count(world, network, tmp_path):
    plain = make_pictures(world, tmp_path / "0")
    walking, standing = (
        make_pictures(world, tmp_path / pose, profile=body(world), body_from="shape", pose=pose)
        for pose in ("walking", "standing")
    )
    assert not same(walking, standing) and not same(standing, plain)
    assert same(standing, make_pictures(world, tmp_path / "1", profile=body(world), body_from="shape"))
    assert same(plain, make_pictures(world, tmp_path / "2", profile=body(world), body_from="shape", shape_scale=0))
    people = [body(world), body(world, "man")]  # each with a map of their own
    both = make_pictures(world, tmp_path / "3", PROMPTS[:1], profile=people, body_from="shape")
    assert same(both[:1], standing[:1]) and not same(both[1:], both[:1])


def test_the_body_branch_beside_it(world, network, tmp_path):
    branch = make_pictures(world, tmp_path / "0", profile=body(world))
    both = make_pictures(world, tmp_path / "1", profile=body(world), body_from="both", pose="waving")
    shape = make_pictures(world, tmp_path / "2", profile=body(world), body_from="shape", pose="waving")
    assert not same(both, branch) and not same(both, shape)
    assert read_picture(tmp_path / "1" / NAME)["config"]["scales"] == {"body": 1.0}
    assert same(branch, make_pictures(world, tmp_path / "3", profile=body(world), body_from="adapter"))
    quiet = make_pictures(world, tmp_path / "4", profile=body(world), body_from="both", pose="waving", body_scale=0)
    assert same(quiet, shape)


def test_the_pose_of_a_photo(world, network, tmp_path, monkeypatch):
    """The body gets the pose that the photo's keypoints show: here that of another body that waves."""
    model, man = body_model(), of_sex(population().shape, "man").mean
    vertices = model.posed(man, "waving")
    points = framed(vertices, man[0], (512, 384)).project(model.keypoints(vertices))[:, :2]
    found = SimpleNamespace(keypoints=np.concatenate([points, np.ones((17, 1))], 1))
    monkeypatch.setattr(bolid.views, "person_in_photo", lambda *arguments: (None, found))
    (tmp_path / "photo.png").write_bytes(b"photo")
    drawn = []

    def keep(*arguments, **options):
        drawn.append(control_maps(*arguments, **options)["depth"])
        return {"depth": drawn[-1]}

    monkeypatch.setattr(bolid.body.maps, "control_maps", keep)
    make_pictures(world, tmp_path / "0", profile=body(world), body_from="shape", pose_from=tmp_path / "photo.png")
    make_pictures(world, tmp_path / "1", profile=body(world), body_from="shape", pose="waving")
    record = read_picture(tmp_path / "0" / NAME)
    assert record["config"]["pose_from"] == "photo.png" and "pose" not in record["config"]
    fitted, named = (depth[..., 0] > 60 for depth in drawn)
    assert (fitted & named).sum() > 0.7 * (fitted | named).sum()


def test_a_3d_body_belongs_to_no_family(world, network, tmp_path):
    """One that was measured with another family, as `bolid profile --height 172` makes it with the embedded one."""
    made = load_profile(body(world))
    other, warnings = tmp_path / "other.safetensors", []
    save_profile(
        other, made.body_mean, made.body_logvar, None, torch.zeros(0), {**made.record, "family": "tiny"}, made.body
    )
    assert same(
        make_pictures(world, tmp_path / "0", profile=other, body_from="shape", warn=warnings.append),
        make_pictures(world, tmp_path / "1", profile=body(world), body_from="shape"),
    )
    assert warnings == [
        "the profile other.safetensors is of another family: of it only the 3D body is used, and no face"
    ]
    for way in (None, "both"):
        with pytest.raises(BolidError, match="was made with family 'tiny'"):
            make_pictures(world, tmp_path / "2", profile=other, body_from=way)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"body_from": "depth"}, "--body-from is 'depth'"),
        ({"body_from": "shape", "pose": "dancing"}, "--pose is 'dancing'"),
        ({"body_from": "adapter", "pose": "walking"}, "--pose is given with --body-from adapter"),
        ({"pose": "walking", "pose_from": "photo.jpg"}, "--pose is given with --pose-from"),
        ({"body_from": "shape", "body_scale": 1}, "--body-scale is given with --body-from shape"),
        ({"body_from": "shape", "shape_scale": "up=1"}, "--shape-scale is up=1"),
    ],
)
def test_settings_that_contradict_each_other(world, tmp_path, options, message):
    with pytest.raises(BolidError, match=message) as error:
        make_pictures(world, tmp_path / "0", profile=body(world), **options)
    assert error.value.hint and not (tmp_path / "0").exists()


def test_nobody_has_no_shape(world, network, tmp_path):
    with pytest.raises(BolidError, match="nobody's body is to be shown"):
        make_pictures(world, tmp_path / "0", body_from="shape")
    with pytest.raises(BolidError, match="holds no body"):
        make_pictures(world, tmp_path / "1", profile=world.me, body_from="shape")


def test_one_that_was_made_for_another_base(world, network, tmp_path):
    other = diffusers.ControlNetModel.from_config({**network.config, "cross_attention_dim": 16})
    save_depth(world, other)
    try:
        with pytest.raises(BolidError, match="was made for another base: its cross_attention_dim is 16"):
            make_pictures(world, tmp_path / "0", profile=body(world), body_from="shape")
    finally:
        save_depth(world, network)
