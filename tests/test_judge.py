"""The judge: its looks, its network and its file, on random weights. How well it reads is in its README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bolid.body.mesh import PARAMETERS
from bolid.errors import BolidError
from bolid.formats.tensors import save_tensors
from bolid.run import run_record
from bolid.synth.people import RATIO_NAMES, sample_person
from bolid.synth.render import Renderer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiment"))
from judge import looks, network, train


@pytest.fixture(scope="module")
def renderer():
    return Renderer(sample_person(100_000), train.RENDERED)


def test_a_look_is_decided_by_person_and_number(renderer):
    first, again, other = (looks.photograph(renderer, index) for index in (0, 0, 1))
    assert first.image.shape == (256, 192, 3) and first.image.dtype == np.uint8
    assert np.array_equal(first.image, again.image) and not np.array_equal(first.image, other.image)


def test_mask_and_keypoints_fit_the_picture(renderer):
    for index in range(4):
        shown = looks.photograph(renderer, index)
        assert 0.02 < (shown.mask > 0).mean() < 0.7
        visible = shown.keypoints[shown.keypoints[:, 2] == 2]
        x, y = visible[:, 0].astype(int), visible[:, 1].astype(int)
        assert len(visible) >= 5 and (shown.mask[y, x] > 0).mean() > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_patterns_are_fractions(seed):
    at = np.random.default_rng(seed).uniform(-0.3, 1, (200, 3))
    values = looks.pattern(at, np.random.default_rng(seed))
    assert values.shape == (200,) and values.min() >= -0.01 and values.max() <= 1.01


def test_augmented_keypoints_stay_on_the_mask():
    """A disc around each keypoint moves with it."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.zeros(8, 17, 3)
    marks[:, :, :2], marks[:, :, 2] = torch.tensor([0.3, -0.2]), 2
    mask = torch.zeros(8, *train.MASK)
    row, column = (round((place + 1) / 2 * size - 0.5) for place, size in ((-0.2, train.MASK[0]), (0.3, train.MASK[1])))
    mask[:, row - 1 : row + 2, column - 1 : column + 2] = 1
    pixels = torch.zeros(8, *network.SIZE, 3, dtype=torch.uint8)
    joints = torch.zeros(8, 17, 3)
    joints[:, 5, 0] = 0.1  # the left shoulder, to the picture's right
    found = train.augmented(train.JudgeBatch(pixels, marks, joints, mask), generator)
    assert found.pictures.shape == (8, 3, *network.SIZE) and float(found.pictures.abs().max()) <= 1
    mirrored = found.marks[:, 0, 0] < 0
    assert mirrored.any() and not mirrored.all()
    for (px, py, _), shown in zip(found.marks[:, 0].tolist(), found.mask, strict=True):
        at = int((py + 1) / 2 * train.MASK[0]), int((px + 1) / 2 * train.MASK[1])
        assert shown[at] > 0.5
    # In a mirror image the right shoulder is where the left one was, on the other side.
    assert (
        torch.allclose(found.joints[mirrored][:, 6, 0], torch.tensor(-0.1)) and not found.joints[mirrored][:, 5].any()
    )
    assert torch.equal(found.joints[~mirrored], joints[~mirrored])


def test_joints_are_where_the_keypoints_are(renderer):
    """In a camera's axes, which point right and down as the picture's do."""
    shot = looks.photograph(renderer, 0)
    for axis in (0, 1):
        assert np.corrcoef(shot.joints[:, axis], shot.keypoints[:, axis])[0, 1] > 0.95
    assert np.allclose(shot.joints.mean(0), 0, atol=1e-5)


def test_the_learning_rate_can_be_prolonged_before_its_last_part():
    assert [train.learning_rate(step, 1000, 2.0) for step in (0, 99, 500, 699)] == [0.02, 2.0, 2.0, 2.0]
    assert train.learning_rate(699, 1000, 2.0) == train.learning_rate(699, 2000, 2.0)
    assert train.learning_rate(999, 1000, 2.0) == pytest.approx(2 / 300)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    torch.manual_seed(0)
    values, parameters = len(RATIO_NAMES) + len(train.MEASURES), len(PARAMETERS) - 1
    tensors = {name: value.half() for name, value in network.JudgeNetwork(values, parameters).state_dict().items()}
    tensors |= {"mean": torch.arange(train.TRUTH).float(), "std": torch.ones(train.TRUTH)}
    tensors["sd_scale"] = torch.full((values,), 2.0)
    config = {"names": [RATIO_NAMES, train.MEASURES, PARAMETERS[1:]]}
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_tensors(file, tensors, run_record(network.KIND, family=None, config=config))
    return network.Judge(file)


def test_both_sizes_are_read_alike_and_mirrored_pictures_too(judge, renderer):
    image = looks.photograph(renderer, 0).image
    half = image.reshape(128, 2, 96, 2, 3).mean((1, 3)).round().astype(np.uint8)
    both, mirrored = judge.read([image, half]), judge.read([image[:, ::-1]])
    assert both.ratios.shape == (2, 10) and both.measurements.shape == (2, 11) and both.parameters.shape == (2, 34)
    assert np.abs(both.ratios[0] - both.ratios[1]).max() < 0.05
    assert np.allclose(both.ratios[0], mirrored.ratios[0], atol=1e-4)
    assert (both.ratios_sd > 0).all() and np.array_equal(judge.predict([image]), judge.read([image]).ratios)


def test_no_pictures_give_no_readings(judge):
    assert judge.predict([]).shape == (0, 10)


def test_places_are_where_the_maps_peak():
    grid = network.positions(4, 2)
    assert grid.shape == (8, 2) and grid[0].tolist() == [-0.5, -0.75] and grid[-1].tolist() == [0.5, 0.75]


def test_the_mesh_metric_is_a_squared_distance():
    bodies = np.stack([train.body_of(seed)[1:] for seed in range(40_000, 40_060)])
    metric = train.mesh_metric(bodies, vertices=50)
    assert torch.allclose(metric, metric.T, atol=1e-6) and float(torch.linalg.eigvalsh(metric).min()) > 0
    weight = {name: float(metric[i, i]) for i, name in enumerate(PARAMETERS[1:])}
    assert weight["weight"] > weight["nose-scale-depth-incr"]  # a nose moves the mesh less


def test_a_file_that_is_no_judge_is_refused(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, run_record(network.KIND, family=None, config={}))
    with pytest.raises(BolidError, match="does not hold a judge") as error:
        network.Judge(tmp_path / "x.safetensors")
    assert "judge/train.py" in error.value.hint
