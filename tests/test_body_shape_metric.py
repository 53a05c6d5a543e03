"""`body_shape_mm` of evaluate: the bodies that a reader sees in pictures and photos, against the person's."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bolid.body.measurements import NAMES
from bolid.body.mesh import PARAMETERS, body_model, vertex_distances
from bolid.body.profiles import body_from_measurements, stored
from bolid.body.shape import Known, draw, measure_body, population
from bolid.evaluate.body_shape import FLOOR, SHAPE, known_bodies, shape_metrics
from bolid.evaluate.pictures import Picture
from bolid.evaluate.results import PictureScores
from bolid.formats.profile import save_profile
from bolid.run import run_record
from bolid.synth.people import sample_person

P = len(PARAMETERS)


class Reader:
    """A picture says the body's parameters; several, their mean."""

    name, size, needs_features = "test", P, False

    def view(self, image, person, features):
        raise NotImplementedError

    def body(self, views):
        return views.double().numpy().mean(0)


def world(pictures: dict[str, np.ndarray], photos: dict[str, np.ndarray], truth: dict[str, np.ndarray]):
    """(scores, references, views): person -> bodies [n, P] in pictures and in photos."""
    people = [person for person, bodies in pictures.items() for _ in bodies]
    views = torch.from_numpy(np.concatenate(list(pictures.values()))).float()
    names = sorted(photos)
    references = SimpleNamespace(
        people=names,
        owner=torch.tensor([names.index(person) for person in names for _ in photos[person]]),
        views=torch.from_numpy(np.concatenate([photos[person] for person in names])).float(),
        bodies=truth,
    )
    return PictureScores("made", None, [], people, {}, {}), references, views


def test_the_distance_is_that_of_the_surfaces_and_the_floor_that_of_the_photos():
    a, b = draw(population().shape, 2, 1)
    other = b.copy()
    other[0] += 0.2  # pictures show no size
    scored, references, views = world({"a": np.stack([b, other])}, {"a": np.stack([a, a])}, {"a": a})
    metrics, sizes = shape_metrics(scored, references, views, Reader())
    true, found = (body_model().rest(body[None])[0] for body in (a, np.r_[a[0], b[1:]]))
    assert metrics[SHAPE].value == pytest.approx(1000 * vertex_distances(found, true).mean(), rel=1e-4)
    assert (
        metrics[FLOOR].value == pytest.approx(0, abs=1e-3)
        and metrics[SHAPE].n == 1
        and "2 pictures" in metrics[SHAPE].note
    )
    assert scored.per_person[SHAPE]["a"] == metrics[SHAPE].value and metrics[SHAPE].low is None
    waist = measure_body(np.stack([a, np.r_[a[0], b[1:]]]))[:, NAMES.index("waist")]
    assert sizes["waist"]["error"] == pytest.approx(100 * abs(waist[1] - waist[0]), abs=0.01)
    assert sizes["waist"]["floor"] == pytest.approx(0, abs=0.01) and "height" not in sizes


def test_as_many_pictures_as_photos_are_read():
    a, b = draw(population().shape, 2, 2)
    unseen = np.full((1, P), np.nan)
    pictures = {"a": np.concatenate([unseen, a[None], b[None]]), "b": b[None], "": b[None]}
    scored, references, views = world(pictures, {"a": a[None], "b": unseen}, {"a": a, "b": b})
    metrics, _ = shape_metrics(scored, references, views, Reader())
    assert metrics[SHAPE].n == 1 and metrics[SHAPE].value == pytest.approx(0, abs=1e-3)
    assert set(scored.per_person[SHAPE]) == {"a"}


def test_without_a_reader_or_a_known_body_there_is_no_value():
    a = draw(population().shape, 1, 3)[0]
    for truth, reader in (({"a": a}, None), ({}, Reader())):
        metrics, sizes = shape_metrics(*world({"a": a[None]}, {"a": a[None]}, truth), reader)
        assert metrics[SHAPE].value is None and metrics[FLOOR].value is None and not sizes


def test_whose_body_is_known(tmp_path):
    person = sample_person(4)
    pictures = []
    for name, phenotypes in (("true", person.phenotypes), ("other", {**person.phenotypes, "age": 0.9}), ("bare", None)):
        photo = tmp_path / name / "000.jpg"
        photo.parent.mkdir()
        if phenotypes:
            photo.with_suffix(".json").write_text(json.dumps({"seed": 4, "phenotypes": phenotypes}))
        pictures.append(Picture(str(photo), "", tmp_path, person=name))
    found = known_bodies(pictures, [], ["bare", "other", "true"])
    assert set(found) == {"true"}
    assert found["true"][PARAMETERS.index("gender")] == person.phenotypes["gender"]
    # A profile counts where somebody has measured the person.
    known = {"height": Known(1.7, 0.005), "waist": Known(0.8, 0.01)}
    shape = body_from_measurements(known)
    for name, config in (("bare", {"known": known}), ("other", {})):
        record = run_record("profile", family="tiny", config=config)
        save_profile(
            tmp_path / f"{name}.safetensors", torch.zeros(8), torch.zeros(8), None, torch.ones(1), record, stored(shape)
        )
    profiles = [tmp_path / "bare.safetensors", tmp_path / "other.safetensors"]
    found = known_bodies(pictures, profiles, ["bare", "other", "true"])
    assert set(found) == {"bare", "true"} and found["bare"] == pytest.approx(shape.mean, abs=1e-5)


@pytest.mark.slow
def test_tinys_reader_sees_pictures_as_profile_sees_photos(rendered_people):
    """By the shape head where there are three pictures or more, by the body vector else."""
    from bolid.evaluate.shape_reader import open_reader
    from bolid.formats.images import read_photo
    from bolid.models.families import get_family
    from bolid.person import PersonReader

    family = get_family("tiny")
    reader, photos = open_reader(family, "cpu"), sorted((rendered_people / "p100000").glob("*.jpg"))
    whole = PersonReader(family)
    for count in (1, len(photos)):
        person, views = whole.read(photos[:count]), []
        for photo in photos[:count]:
            image = read_photo(photo)
            views.append(reader.view(image, whole.view_reader.pose.detect([image])[0][0], None))
        expected = whole.shapes(person)[0].mean
        assert np.allclose(reader.body(torch.stack(views)), expected, atol=0.02)
