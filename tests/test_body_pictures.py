"""Files and pictures of a body: meshes, control maps, the mannequin."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from scipy.ndimage import binary_dilation, binary_erosion

from bolid.body.export import export_mesh
from bolid.body.mannequin import mannequin, tape_ring
from bolid.body.maps import MAPS, control_maps, framed
from bolid.body.measurements import MEASUREMENTS, measuring_tape
from bolid.body.mesh import body_model, volume
from bolid.body.pose_fit import fit_pose
from bolid.body.rendering import Viewpoint
from bolid.body.shape import measure_body, of_sex, population
from bolid.errors import BolidError


@pytest.fixture(scope="module")
def woman() -> np.ndarray:
    return of_sex(population().shape, "woman").mean


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_exported_meshes_load_again(tmp_path, woman, suffix):
    model = body_model()
    vertices = model.posed(woman, "standing")
    path = export_mesh(tmp_path / f"me{suffix}", vertices, model.faces)
    mesh = trimesh.load(path, force="mesh", process=False)
    up = 2 if suffix == ".ply" else 1
    assert np.ptp(np.asarray(mesh.vertices)[:, up]) == pytest.approx(np.ptp(vertices[:, 2]), abs=1e-4)
    assert len(mesh.faces) == len(model.faces)
    merged = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    assert merged.is_watertight and merged.volume == pytest.approx(volume(vertices, model.faces), rel=1e-3)
    # The person looks along +z in glTF and OBJ: the nose is in front of the ears.
    nose, ear = (model.keypoints(vertices)[i] for i in (0, 3))
    assert nose[1] < ear[1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("name", "message"), [("me", "has no suffix"), ("me.fbx", "has the suffix '.fbx'")])
def test_a_mesh_without_a_format_is_refused(tmp_path, woman, name, message):
    with pytest.raises(BolidError, match=message) as error:
        export_mesh(tmp_path / name, body_model().rest(woman[None])[0], body_model().faces)
    assert ".glb, .obj, .ply" in error.value.hint


def test_control_maps(woman):
    maps = control_maps(body_model(), woman, size=(304, 208))
    assert set(maps) == set(MAPS) and all(part.shape == (304, 208, 3) for part in maps.values())
    body = maps["silhouette"][..., 0] > 0
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    assert 0.85 < len(rows) / 304 < 0.92 or 0.85 < len(columns) / 208 < 0.92
    assert abs(rows.mean() - 152) < 6 and abs(columns.mean() - 104) < 6
    inside, outside = binary_erosion(body), ~binary_dilation(body)  # edges are smooth
    depth = maps["depth"]
    assert (depth[outside] == 0).all() and depth[inside].min() >= 60 and depth.max() >= 250
    assert (maps["normal"][~body] == (128, 128, 255)).all()
    # Normals: the body's left half on the picture (its right side) looks left, so red is low there.
    middle = columns.mean()
    left = body & (np.arange(208) < middle - 10)
    assert maps["normal"][left][:, 0].mean() < 128 < maps["normal"][body & ~left][:, 0].mean()
    # Every keypoint lies on the body.
    drawn = maps["openpose"].any(2)
    assert (body & drawn).sum() > 0.9 * drawn.sum()


def test_a_turned_body_is_narrower_in_a_pose_with_hanging_arms(woman):
    front, side = (
        control_maps(body_model(), woman, ("silhouette",), size=(304, 208), turn=turn)["silhouette"][..., 0] > 0
        for turn in (0, 90)
    )
    assert side.any(0).sum() < 0.9 * front.any(0).sum()


def test_maps_that_are_refused(woman):
    for names, size, message in ((("dept",), (304, 208), "no map 'dept'"), (MAPS, (10, 10), "--size is 10x10")):
        with pytest.raises(BolidError, match=message):
            control_maps(body_model(), woman, names, size=size)


@pytest.mark.parametrize(("pose", "turn"), [("waving", 30.0), ("squatting", 0.0), ("walking", -40.0)])
def test_a_pose_is_found_again_from_its_keypoints(woman, pose, turn):
    """In pictures of another body; to within a tenth of the stature in depth too, and less across."""
    model = body_model()
    man = of_sex(population().shape, "man").mean
    vertices = model.posed(man, pose)
    view = framed(vertices, man[0], (512, 384), turn)
    keypoints = np.concatenate([view.project(model.keypoints(vertices))[:, :2], np.ones((17, 1))], 1)
    found = model.keypoints(model.posed(woman, fit_pose(model, woman, keypoints)))
    true = model.keypoints(model.posed(woman, pose)) @ Viewpoint(turn, 1, (0, 0), (1, 1)).rotation().T
    seen = found @ Viewpoint(0, 1, (0, 0), (1, 1)).rotation().T
    off = np.abs((seen - seen.mean(0)) - (true - true.mean(0))) / woman[0]
    assert off[:, :2].mean() < 0.02 and off[:, 2].mean() < 0.1


def test_a_pose_needs_a_torso(woman):
    keypoints = np.ones((17, 3))
    keypoints[5:, 2] = 0
    with pytest.raises(BolidError, match="shows no torso"):
        fit_pose(body_model(), woman, keypoints)


@pytest.mark.slow
def test_the_mannequin_shows_three_views_and_their_lines(woman):
    values = measure_body(woman[None])[0]
    picture = mannequin(measuring_tape(), woman, values, 0.02 * values, "she")
    assert picture.shape == (1180, 2120, 3) and picture.dtype == np.uint8
    paper = (picture == picture[2, 2]).all(2)
    columns = (~paper[300:900]).any(0)
    assert columns[200:600].mean() > 0.5 and columns[1500:1900].mean() > 0.5
    red = (picture[..., 0].astype(int) - picture[..., 1] > 100).sum()
    assert red > 2000


def test_the_drawn_tape_is_as_long_as_the_girth(woman):
    body = body_model().rest(woman[None])[0]
    for name in ("waist", "upper-arm", "neck"):
        ring = tape_ring(measuring_tape(), body, name)
        length = np.linalg.norm(np.diff(ring, axis=0), axis=1).sum()
        assert length == pytest.approx(measuring_tape().girth(body, name), rel=1e-6)
    assert {row.name for row in MEASUREMENTS} >= {"waist", "upper-arm", "neck"}
