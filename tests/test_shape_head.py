"""The head that reads the body's shape off what the body encoder sees, and the file that holds it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from bolid.body.body_vector import (
    KIND,
    BodyVectors,
    ShapeReadings,
    load_body_vectors,
    load_readings,
    save_body_vectors,
)
from bolid.body.measurements import NAMES
from bolid.body.mesh import PARAMETERS, parameters_of
from bolid.body.shape import measure_body, population
from bolid.errors import BolidError
from bolid.formats.tensors import load_tensors, save_tensors
from bolid.method.body_vae import fuse
from bolid.method.shape_head import ShapeHead, loss_readings
from bolid.models.families import get_family
from bolid.person import PersonReader
from bolid.run import run_record
from bolid.synth.people import sample_person

E, R = 12, 3
S = len(PARAMETERS) + len(NAMES)


def people_seen(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(evidence [N, 4, E] of four views each, what is to be read [N, R]): the evidence is linear in it, and noisy."""
    random = torch.Generator().manual_seed(seed)
    target = torch.randn(count, R, generator=random)
    mixing = torch.randn(R, E, generator=torch.Generator().manual_seed(99))
    return (target @ mixing)[:, None] + 2 * torch.randn(count, 4, E, generator=random), target


@functools.cache
def trained() -> ShapeHead:
    torch.manual_seed(0)
    (evidence, target), head = people_seen(2000), ShapeHead(E, R, 16)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(150):
        loss, _ = loss_readings(head, evidence, torch.ones(2000, 4), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def test_a_trained_head_reads_and_knows_how_surely():
    evidence, target = people_seen(500, seed=1)
    head = trained()
    with torch.no_grad():
        mean, logvar = (part.view(500, 4, R) for part in head(evidence.flatten(0, 1)))
        off, sd = {}, {}
        for views in (1, 4):
            fused, uncertain = fuse(mean[:, :views], logvar[:, :views], torch.ones(500, views))
            off[views], sd[views] = fused - target, (uncertain / 2).exp()
    assert off[4].square().mean() < off[1].square().mean() < 1  # 1: the population's variance
    assert (sd[4] < sd[1]).all()
    assert 0.58 < (off[4].abs() < sd[4]).float().mean() < 0.76


def test_a_view_without_confidence_says_nothing():
    head, (evidence, target) = trained(), people_seen(5, seed=2)
    sure = torch.tensor([[1.0, 1, 0, 0]]).repeat(5, 1)
    other = evidence.clone()
    other[:, 2:] += 9
    assert loss_readings(head, evidence, sure, target)[0] == loss_readings(head, other, sure, target)[0]


@pytest.fixture
def saved(tmp_path):
    """A body-shape file with a head, of a body encoder "abc"."""
    rng = np.random.default_rng(0)

    def vectors(size: int) -> BodyVectors:
        weight = rng.normal(size=(size, S)).astype(np.float32).astype(float)
        record = run_record(KIND, family="tiny", config={"people": 5}, inputs={"body_encoder": "abc"})
        return BodyVectors(weight, np.zeros(size), np.eye(size), np.eye(size), np.zeros(size), np.zeros(size), record)

    head = ShapeHead.of_state({name: value.half() for name, value in trained().state_dict().items()})
    model, readings = vectors(5), ShapeReadings(head, vectors(R))
    save_body_vectors(tmp_path / "s.safetensors", model, readings)
    return tmp_path / "s.safetensors", model, readings


def test_the_file_holds_both(saved):
    file, model, readings = saved
    assert np.array_equal(load_body_vectors(file, "abc").weight, model.weight)
    again = load_readings(file, "abc")
    assert np.array_equal(again.vectors.weight, readings.vectors.weight)
    views = people_seen(1, seed=3)[0][0], torch.ones(4)
    found, expected = again.read(*views), readings.read(*views)
    assert found[0].shape == (R,) and all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(BolidError, match="for another body encoder"):
        load_readings(file, "other")
    save_body_vectors(file, model)
    assert load_readings(file, "abc") is None


def test_a_damaged_head_is_refused(saved):
    file = saved[0]
    tensors, record = load_tensors(file, KIND)
    record.pop("sha256", None)
    save_tensors(file, {name: value for name, value in tensors.items() if name != "head.mean.weight"}, record)
    with pytest.raises(BolidError, match="holds a damaged shape head"):
        load_readings(file, "abc")


@pytest.mark.slow
def test_tinys_head_reads_people_off_photos(rendered_people):
    """`profile` reads the shape by the head, nearer to the truth than the population's mean."""
    reader = PersonReader(get_family("tiny"))
    file, space = reader.family.require("body_shape"), reader.encoder.space
    readings, off = load_readings(file, space), []
    for seed in (100_000, 100_001, 100_002):
        person = reader.read(sorted((rendered_people / f"p{seed}").glob("*.jpg")))
        found, _ = reader.shapes(person)
        expected = readings.vectors.shape_of(population().shape, *readings.read(*person.views))
        assert np.array_equal(found.mean, expected.mean)
        of = sample_person(seed)
        truth = parameters_of(of.phenotypes, of.local_changes, 1.7)
        bodies = np.stack([found.mean, population().mean, truth])
        bodies[:, 0] = 1.7
        sizes = measure_body(bodies)
        off.append(np.abs(sizes[:2] - sizes[2]) / population().spread())
    read, guessed = np.mean(off, axis=(0, 2))
    assert read < 0.6 * guessed
