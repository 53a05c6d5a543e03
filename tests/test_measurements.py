"""Measurements of meshes: against closed forms on primitive bodies, trimesh's sections, and Anny's own measurements."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from bolid.body.measurements import MEASUREMENTS, NAMES, edges_of, measuring_tape, section, tape
from bolid.body.mesh import A_POSE, NEUTRAL, PARAMETERS, body_model, bounds, parameters_of, poses, volume
from bolid.body.rest_mesh import WAIST_LOOP, RestMesh
from bolid.errors import BolidError
from bolid.synth.people import sample_person

UP = np.array([0.0, 0, 1])


def people(count: int, stature: float = 1.7) -> np.ndarray:
    persons = [sample_person(seed) for seed in range(20000, 20000 + count)]
    return np.stack([parameters_of(person.phenotypes, person.local_changes, stature) for person in persons])


def girth(mesh: trimesh.Trimesh, origin, normal) -> float:
    normal = np.asarray(normal, float) / np.linalg.norm(normal)
    return tape(
        section(np.asarray(mesh.vertices), edges_of(np.asarray(mesh.faces)), np.asarray(origin), normal), normal
    )


def test_girth_of_a_cylinder_upright_and_lying():
    # A polygon of n corners on a circle of radius r has the perimeter 2 n r sin(pi / n).
    polygon = 2 * 96 * 0.15 * np.sin(np.pi / 96)
    cylinder = trimesh.creation.cylinder(radius=0.15, height=1.0, sections=96)
    assert girth(cylinder, [0, 0, 0.2], UP) == pytest.approx(polygon, rel=1e-9)
    lying = cylinder.copy().apply_transform(trimesh.transformations.rotation_matrix(0.7, [1, 0, 0]))
    assert girth(lying, [0, 0, 0], lying.vertices[-1] - lying.vertices[0]) > 0
    axis = trimesh.transformations.rotation_matrix(0.7, [1, 0, 0])[:3, :3] @ UP
    assert girth(lying, [0, 0, 0], axis) == pytest.approx(polygon, rel=1e-9)


def test_girth_of_a_box_and_of_an_ellipse():
    assert girth(trimesh.creation.box([0.3, 0.2, 1.0]), [0, 0, 0.13], UP) == pytest.approx(1.0)
    a, b = 0.20, 0.12
    tube = trimesh.creation.cylinder(radius=1, height=1, sections=720).apply_scale([a, b, 1])
    ramanujan = np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b)))
    assert girth(tube, [0, 0, 0.1], UP) == pytest.approx(ramanujan, rel=1e-5)


def test_a_tape_spans_hollows():
    """Two posts side by side: the tape goes straight from one to the other."""
    left = trimesh.creation.box([0.1, 0.1, 1], transform=trimesh.transformations.translation_matrix([-0.2, 0, 0]))
    right = trimesh.creation.box([0.1, 0.1, 1], transform=trimesh.transformations.translation_matrix([0.2, 0, 0]))
    assert girth(trimesh.util.concatenate([left, right]), [0, 0, 0.1], UP) == pytest.approx(2 * 0.5 + 2 * 0.1)


def test_a_plane_beside_the_body_is_refused():
    with pytest.raises(BolidError, match="plane misses the body"):
        girth(trimesh.creation.box(), [0, 0, 3], UP)


def test_volume_of_primitives():
    box, ball = trimesh.creation.box([0.3, 0.2, 1.0]), trimesh.creation.icosphere(subdivisions=5, radius=0.5)
    assert volume(np.asarray(box.vertices), box.faces) == pytest.approx(0.06)
    assert volume(np.asarray(ball.vertices), ball.faces) == pytest.approx(np.pi / 6, rel=2e-3)


def test_girths_are_those_of_trimesh():
    """The hull of trimesh's own section, of the part of it that the girth is of."""
    model, tapes = body_model(), measuring_tape()
    for body in model.rest(people(4)):
        mesh = trimesh.Trimesh(body, model.faces, process=False)
        for name in ("chest", "waist", "hip", "thigh", "upper-arm", "neck"):
            plane = tapes.plane(body, name)
            cut = mesh.section(plane_origin=plane.origin, plane_normal=plane.normal)
            near = []
            for loop in cut.discrete:  # without the arms, the other leg, and whatever else the plane meets
                arm = model.arm[np.linalg.norm(body - loop[0], axis=1).argmin()] > 0.5
                if arm != (name == "upper-arm") or (name in ("thigh", "upper-arm") and loop[:, 0].mean() < 0):
                    continue
                if np.linalg.norm(loop.mean(0) - plane.origin) < 0.2 * np.ptp(body[:, 2]):
                    near.append(loop)
            longest = max(near, key=len)
            assert tapes.girth(body, name) == pytest.approx(tape(longest, plane.normal), rel=2e-3), name


@pytest.mark.slow
def test_the_mesh_at_rest_is_annys():
    """The whole of the parameters' ranges, extremes too; and what is fixed on the mesh."""
    import torch

    from bolid.synth.body import anny_body

    anny, ours = anny_body(), RestMesh()
    assert ours.phenotypes == anny.model.phenotype_labels and ours.changes == anny.model.local_change_labels
    rng = np.random.default_rng(0)
    phenotypes = rng.uniform(-0.2, 1.2, (12, len(ours.phenotypes)))
    phenotypes[0], phenotypes[1] = 0, 1
    changes = rng.uniform(-1, 1, (12, len(ours.changes)))
    none = torch.zeros(12, 0)
    expected = anny.model._get_phenotype_blendshape_coefficients(
        torch.tensor(phenotypes).float(), torch.tensor(changes).float(), none
    )
    found = ours.coefficients(phenotypes, changes)
    assert found == pytest.approx(expected.numpy(), abs=1e-6)
    rest = anny.model.get_rest_model(expected)
    assert ours.vertices(found) == pytest.approx(rest["rest_vertices"].numpy(), abs=2e-6)  # metres
    assert ours.bone_heads(found) == pytest.approx(rest["rest_bone_heads"].numpy(), abs=2e-6)
    model = body_model()
    assert (model.faces == anny.faces).all() and (np.array(WAIST_LOOP) == anny.waist_loop).all()
    assert (model.arm == anny.arm).all() and (model.head == anny.head).all()


def test_waist_and_volume_agree_with_anny():
    """Anny's own waist is the length of a bent line of vertices; ours is a level tape at its mean height."""
    import anny
    import torch

    from bolid.synth.body import load_anny

    own = anny.Anthropometry(load_anny())
    bodies = body_model().rest(people(30))
    measured = measuring_tape().measure(bodies)
    theirs = own.waist_circumference(torch.from_numpy(bodies)).numpy()
    ours = measured[:, NAMES.index("waist")]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.98
    assert np.abs(ours / theirs - 1).mean() < 0.04
    mass = own.mass(torch.from_numpy(bodies)).numpy()
    assert measured[:, NAMES.index("weight")] == pytest.approx(mass * 985 / 980, rel=1e-6)


def test_measurements_scale_with_stature():
    small, large = (measuring_tape().measure(body_model().rest(people(3, stature)))[:, :] for stature in (1.5, 1.8))
    assert large[:, :-1] == pytest.approx(small[:, :-1] * 1.2, rel=1e-4)
    assert large[:, -1] == pytest.approx(small[:, -1] * 1.2**3, rel=1e-4)
    assert small[:, 0] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("parameter", "grows"),
    [
        ("measure-waist-circ-incr", "waist"),
        ("measure-hips-circ-incr", "hip"),
        ("measure-shoulder-dist-incr", "shoulders"),
        ("measure-upperleg-height-incr", "inseam"),
        ("measure-lowerarm-length-incr", "arm"),
        ("head-scale-vert-incr", "head"),
        ("weight", "weight"),
    ],
)
def test_what_a_shape_change_changes(parameter, grows):
    low, high = (parameters_of(NEUTRAL, {}, 1.7) for _ in range(2))
    low[PARAMETERS.index(parameter)] -= 0.3
    high[PARAMETERS.index(parameter)] += 0.3
    less, more = measuring_tape().measure(body_model().rest(np.stack([low, high])))
    change = more / less - 1
    assert change[NAMES.index(grows)] > 0.01


def test_measurements_are_plausible_for_adults():
    measured = measuring_tape().measure(body_model().rest(people(40))) * [m.scale for m in MEASUREMENTS]
    ranges = {"inseam": (65, 95), "arm": (43, 68), "waist": (50, 140), "hip": (70, 150), "weight": (35, 140)}
    for name, (low, high) in ranges.items():
        values = measured[:, NAMES.index(name)]
        assert low < values.min() and values.max() < high, name


def test_poses_keep_the_bones():
    """A pose turns limbs and changes no bone's length."""
    model, body = body_model(), people(1)[0]
    shins = []
    for pose in (A_POSE, "standing", "walking"):
        vertices = model.posed(body, pose)
        assert vertices[:, 2].min() == pytest.approx(0, abs=1e-6)
        points = model.keypoints(vertices)
        shins.append(np.linalg.norm(points[13] - points[15]))
    assert shins == pytest.approx([shins[0]] * 3, rel=0.03)
    with pytest.raises(BolidError, match="no pose 'flying'") as error:
        model.posed(body, "flying")
    assert "standing" in error.value.hint and A_POSE in poses()


def test_adults_only():
    low, high = bounds()
    assert low[PARAMETERS.index("age")] >= 2 / 3
    assert (low < people(5)).all() and (people(5) < high).all()
